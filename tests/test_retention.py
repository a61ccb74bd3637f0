"""RetNet and GLA beside the contract: their formulas, and torchscale's normaliser in chunks."""

import pytest
import torch
import torch.nn.functional as F
from official import drawn, error, golden

from longwave.mixers import GLA, RetNet
from longwave.models import load
from longwave.official import SYSTEMS
from longwave.official.importing import import_model


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads_first(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_gla_is_its_formula():
    """All pairs of steps at once: the weight of a key channel is the product of its decays between them."""
    torch.manual_seed(0)
    layer, x = GLA(24, heads=2, expand_k=0.5, gate_logit_normalizer=4.0).double(), noise(2, 70, 24)
    torch.nn.init.normal_(layer.g_norm.weight)
    down, up = layer.gk_proj
    total = heads_first(F.logsigmoid(x @ down.weight.T @ up.weight.T + up.bias) / 4, 2).cumsum(2)
    q, k, v = (heads_first(x @ proj.weight.T, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    between = total[:, :, :, None] - total[:, :, None]
    scores = torch.einsum("bhtn,bhsn,bhtsn->bhts", q * 6**-0.5, k, between.exp()).tril()
    o = (scores @ v).transpose(1, 2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.g_norm.weight
    exact = (F.silu(x @ layer.g_proj.weight.T) * o.flatten(2)) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x)[0], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["none", "score_sums"])
def test_retnet_is_its_formula(normalizer):
    torch.manual_seed(0)
    layer, x = RetNet(24, heads=3, normalizer=normalizer).double(), 30 * noise(2, 70, 24)
    t = torch.arange(70, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
    D = (gamma[:, None, None] ** (t[:, None] - t)).tril()
    turn = torch.exp(1j * t[:, None] * layer.rel_pos.angle)
    q, k = (heads_first(x @ proj.weight.T, 3) for proj in (layer.q_proj, layer.k_proj))
    q, k = (torch.complex(*z.chunk(2, dim=-1)) * turn for z in (q, k))
    scores = (q @ k.mH).real * 8**-0.5 * D
    if normalizer == "score_sums":
        scores = scores / D.sum(2, keepdim=True).sqrt()
        assert (scores.sum(3).abs() > 1).any()
        scores = scores / scores.sum(3, keepdim=True).abs().clamp(min=1)
    o = (scores @ heads_first(x @ layer.v_proj.weight.T, 3)).transpose(1, 2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = (F.silu(x @ layer.g_proj.weight.T) * o.flatten(2)) @ layer.out_proj.weight.T
    assert error(layer(x)[0], exact) < 1e-7  # decays and angles are kept in float32


@torch.no_grad()
def test_torchscale_in_any_chunks_is_its_parallel_form():
    """With padding too: the keys so far are kept, with their positions."""
    case = golden("retnet_torchscale__base")
    model, ids = case.module().model, case.inputs(torch.float64)["input_ids"]
    exact = case.part("output64.")["logits"]
    state, found = model.init_state(2), []
    for chunk in ids.split([5, 1, 18], dim=1):
        y, state = model(chunk, state)
        found.append(y)
    assert error(torch.cat(found, dim=1), exact) < 1e-12
    mask = torch.ones(2, 27, dtype=torch.bool)
    mask[0, :3] = mask[1, [4, 9, 10]] = False
    padded = torch.zeros(2, 27, dtype=torch.int64)
    padded[mask] = ids.flatten()
    state, found = model.init_state(2), []
    for chunk, part in zip(padded.split([6, 1, 20], dim=1), mask.split([6, 1, 20], dim=1)):
        y, state = model(chunk, state, mask=part)
        found.append(y)
    assert error(torch.cat(found, dim=1)[mask].view_as(exact), exact) < 1e-12


def test_torchscale_may_share_its_embedding():
    sizes = {"vocab_size": 11, "decoder_embed_dim": 8, "decoder_value_embed_dim": 8, "decoder_retention_heads": 2}
    more = {"decoder_ffn_embed_dim": 6, "decoder_layers": 1, "no_scale_embedding": False, "layernorm_embedding": True}
    module, state = drawn("retnet_torchscale", {**sizes, **more, "share_decoder_input_output_embed": True})
    words, norm = state["embed_tokens.weight"], state["layernorm_embedding.weight"]
    assert torch.equal(module.model.head.weight, words)
    embedded = F.rms_norm(words * 8**0.5, (8,), norm, 1e-6)
    torch.testing.assert_close(module.model.embedding.weight, embedded, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_torchscale_is_told_by_its_shapes(tmp_path):
    case = golden("retnet_torchscale__base")
    state, ids = case.state(torch.float64), case.inputs(torch.float64)["input_ids"]
    torch.save({"model": {f"decoder.{key}": t for key, t in state.items()}}, tmp_path / "retnet.pt")
    assert import_model(tmp_path / "retnet.pt", tmp_path / "out").format == "retnet_torchscale"
    model, _ = load(tmp_path / "out")
    assert torch.equal(model(ids)[0], case.module()(ids))
    (source,) = SYSTEMS["retnet_torchscale"].sources
    assert source.found({}, {"embed_tokens.weight": (3, 4)}) is None


def test_angles_and_decays_stay_in_float32():
    layer = RetNet(32, heads=2)
    exact = dict(layer.rel_pos.named_buffers())
    for name, kept in layer.bfloat16().rel_pos.named_buffers():
        assert kept.dtype == torch.float32
        assert torch.equal(kept, exact[name])
