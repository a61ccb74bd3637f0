"""Mamba-2 against its formula step by step, and published Mamba models as ordinary ones of ours."""

import pytest
import torch
import torch.nn.functional as F
from official import GOLDEN, error, golden, load
from official import drawn as official_module

from longwave.mixers import MIXERS
from longwave.models import generate, save
from longwave.models import load as load_model
from longwave.official import SYSTEMS, from_official
from longwave.official.mamba import Mamba2 as OfficialMamba2
from longwave.official.source import under

LMS = [path for path in GOLDEN if load(path).system in ("mamba_hf", "mamba2_hf", "mamba_ssm_lm")]


def drawn(d_model, **options):
    torch.manual_seed(0)
    layer = MIXERS["mamba2"](d_model, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def step_by_step(layer, x, groups, norm, limits):
    """Of state-spaces/mamba, mamba_ssm/modules/mamba2.py, in its order of axes: states (B, H, P, N)."""
    p = dict(layer.named_parameters())
    H, E, N = len(p["A_log"]), p["out_proj.weight"].shape[1], layer.d_state
    z, u, dt = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).split([E, E + 2 * groups * N, H], dim=-1)
    K, L = p["conv1d.weight"].shape[2], x.shape[1]
    u = F.conv1d(u.mT, p["conv1d.weight"], p.get("conv1d.bias"), padding=K - 1, groups=u.shape[2])[..., :L].mT
    u, B, C = F.silu(u).split([E, groups * N, groups * N], dim=-1)
    dt = F.softplus(dt + p["dt_bias"]).clamp(*limits)
    u = u.unflatten(-1, (H, -1))
    B, C = (t.unflatten(-1, (groups, -1)).repeat_interleave(H // groups, dim=2) for t in (B, C))
    h, ys = torch.zeros(len(x), H, u.shape[3], N, dtype=x.dtype), []
    for t in range(L):
        decay = torch.exp(-dt[:, t] * p["A_log"].exp())
        h = decay[..., None, None] * h + torch.einsum("bhp,bhn,bh->bhpn", u[:, t], B[:, t], dt[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(ys, dim=1) + p["D"].view(H, -1) * u
    y = y.flatten(2)

    def normed(y):
        grouped = y.unflatten(-1, (groups, -1))
        return (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * p["norm.weight"]

    gate = F.silu(z)
    y = {"gate_norm": lambda: normed(y * gate), "norm_gate": lambda: normed(y) * gate, "gate": lambda: y * gate}[norm]()
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("norm", ["gate_norm", "norm_gate", "gate"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("limits", [(0.0, None), (0.3, 0.8)], ids=["any-step", "limits"])
def test_formula(norm, groups, limits):
    options = {"norm": norm, "skip": "channel"} if groups == 1 else {"norm": norm, "bias": True, "conv_bias": False}
    layer = drawn(6, d_state=4, expand=3, head_dim=3, groups=groups, dt_low=limits[0], dt_high=limits[1], **options)
    x = torch.randn(2, 70, 6, dtype=torch.float64)
    assert error(layer(x)[0], step_by_step(layer, x, groups, norm, limits)) < 1e-12


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"rmsnorm": False}, {"norm": {"kind": "gate"}}),
        ({"norm_before_gate": True}, {"norm": {"kind": "norm_gate", "eps": 1e-5}}),
        ({"D_has_hdim": True, "dt_limit": (0.1, float("inf"))}, {"skip": "channel", "dt_low": 0.1, "dt_high": None}),
    ],
)
def test_official_options_of_a_layer_are_ours(options, ours):
    spec = OfficialMamba2.read({"d_model": 12, "headdim": 4, **options}).mixer().model_dump()
    assert {name: spec[name] for name in ours} == ours


@pytest.mark.parametrize("path", LMS, ids=lambda path: path.stem)
def test_published_models_are_ordinary_ones(path, tmp_path):
    """What they are as data builds them, keeps them on disk, and gives the official logits."""
    case = load(path)
    model = case.module().model
    save(tmp_path, model, SYSTEMS[case.system].read(case.config).spec())
    again, _ = load_model(tmp_path)
    ids = case.part("input.")["input_ids"]
    assert error(again(ids)[0], case.part("output64.")["logits"]) < 1e-9
    assert [len(row) for row in generate(again, ids[:, :1], 2, temperature=0)] == [2] * len(ids)


def official_attention(p, x, H, J, P, turned):
    """Of mamba_ssm/modules/mha.py: positions turn what has passed the convolution."""
    L, K = x.shape[1], p["conv1d.weight"].shape[2]
    qkv = F.linear(x, p["in_proj.weight"]).mT
    qkv = F.conv1d(qkv, p["conv1d.weight"], p["conv1d.bias"], padding=K - 1, groups=qkv.shape[1])[..., :L].mT
    q, k, v = qkv.unflatten(-1, (-1, P)).transpose(1, 2).split([H, J, J], dim=1)
    angles = torch.outer(torch.arange(L, dtype=x.dtype), 10000 ** (-torch.arange(0, turned, 2, dtype=x.dtype) / turned))

    def rotated(x):
        a, b, rest = x.split([turned // 2, turned // 2, P - turned], dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos(), rest], dim=-1)

    q, k, v = rotated(q), rotated(k).repeat_interleave(H // J, dim=1), v.repeat_interleave(H // J, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(y.transpose(1, 2).flatten(2), p["out_proj.weight"], p["out_proj.bias"])


@torch.no_grad()
def test_layers_of_attention():
    """As in mamba2attn-2.7b, and grouped heads besides."""
    sizes = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "rotary_emb_dim": 4, "d_conv": 4}
    config = {
        "d_model": 8,
        "n_layer": 3,
        "vocab_size": 11,
        "attn_layer_idx": [1],
        "attn_cfg": {"causal": True, "qkv_proj_bias": False, **sizes},
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4},
    }
    module, state = official_module("mamba_ssm_lm", config)
    mixers = module.model.backbone.mixers
    assert [m.name for m in mixers] == ["mamba2", "attention", "mamba2"]
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    exact = official_attention(under("backbone.layers.1.mixer.", state), x, 4, 2, 6, 4)
    assert error(mixers[1](x)[0], exact) < 1e-12


def _transformers(name, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return config, getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("system", "name", "options"),
    [
        ("mamba_hf", "Mamba", {}),
        ("mamba2_hf", "Mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 2, "time_step_limit": (0.01, 0.05)}),
    ],
)
@torch.no_grad()
def test_padding_on_the_left_is_as_in_transformers(system, name, options):
    """And a config as transformers writes it is one of ours."""
    config, theirs = _transformers(name, **options)
    module = from_official(system, config.to_dict(), theirs.state_dict())
    ids, mask = torch.randint(0, 19, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ours, exact = (m(input_ids=ids, attention_mask=mask) for m in (module, theirs))
    assert error(ours[mask.bool()], exact.logits[mask.bool()]) < 1e-5
    assert error(ours[0, 4:], module(input_ids=ids[:1, 4:])[0]) < 1e-5


@torch.no_grad()
def test_a_token_has_the_limits_that_a_sequence_has():
    """The official cached step forgets them; see docs/mixers.md."""
    case = golden("mamba2_hf__dtlimit")
    model, ids = case.module().model, case.part("input.")["input_ids"]
    state, rows = model.init_state(len(ids)), []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        rows.append(logits)
    assert error(torch.cat(rows, dim=1), case.part("output64.")["logits"]) < 1e-9


@torch.no_grad()
def test_a_mamba_without_a_config_is_told_by_its_shapes():
    """Which those of Mamba-2 are not: what of its maps is of groups and what of states is not in them."""
    (source,) = SYSTEMS["mamba_ssm_lm"].sources
    for stem in ("mamba_ssm_lm__mamba1", "mamba_ssm_lm__mamba2_mlp"):
        case = golden(stem)
        state, ids = case.state(torch.float64), case.inputs(torch.float64)["input_ids"]
        shapes = {key: tuple(t.shape) for key, t in state.items()}
        assert source.found({"d_model": 8, "n_layer": 2}, shapes) == {"d_model": 8, "n_layer": 2}
        assert source.found({}, {"backbone.embeddings.weight": (3, 4)}) is None
        if stem.endswith("mamba1"):
            assert torch.equal(from_official("mamba_ssm_lm", source.found({}, shapes), state)(ids), case.module()(ids))
        else:
            with pytest.raises(ValueError, match=r"a Mamba-2 .* is told by its config.json: put it beside the weights"):
                source.found({}, shapes)
