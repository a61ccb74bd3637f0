"""Hyena, long convolutions, Monarch Mixer and the language models around them, where no reference file reaches.

Formulas of the official definitions, written down once more and slowly.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import convolved, drawn, error, golden, load, series
from torch import Tensor

from longwave.mixers import HyenaTwoSided, LongConvMixer
from longwave.models.generate import generate
from longwave.nn import FreeFilter, HyenaFilter
from longwave.official import SYSTEMS, from_official

LEGACY = Path(__file__).parent / "golden" / "legacy" / "h3lm__off_legacykeys_L20.safetensors"


def within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def ids_of(rows: int, length: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(5))


# Filters and operators


def filter_formula(c: dict, p: dict[str, Tensor], L: int, mlp: str = "implicit_filter", w_mod: float = 1.0) -> Tensor:
    """Taps (C, L) of the authors' HyenaFilter."""
    z, t = p["pos_emb.z"][0, :L], p["pos_emb.t"][0, :L]
    freq = w_mod * p["implicit_filter.1.freq"]
    inner = c.get("num_inner_mlps", 2)
    for i in range(inner + 1):
        z = torch.sin(freq * F.linear(z, p[f"{mlp}.{2 * i}.weight"], p[f"{mlp}.{2 * i}.bias"]))
    k = F.linear(z, p[f"{mlp}.{2 * inner + 2}.weight"])
    if c.get("modulate", True):
        k = k * (torch.exp(-t * p["modulation.deltas"][0].abs()) + c.get("shift", 0.0))
    if c.get("normalized"):
        k = k / k.abs().sum(-1, keepdim=True)
    return k.T


@pytest.mark.parametrize(
    "options",
    [
        {"normalized": True, "shift": 0.05, "bias": False},
        {"modulate": False, "num_inner_mlps": 0, "emb_dim": 7},
        {"normalized": True, "modulate": False, "num_inner_mlps": 3, "w": 14, "target": 0.1, "linear_mixer": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_hyena_filter_by_its_formula(options):
    config = {"d_model": 3, "order": 6, "seq_len": 14, **options}
    module, state = drawn("hyenafilter", config)
    x = series(2, 3, 11)
    out, k = module(x=x), filter_formula(config, state, 11)
    bias = state["bias"] if config.get("bias", True) else 0 * state["bias"]
    y = convolved(x, lambda lag: k[:, lag] if lag >= 0 else None) + bias[:, None] * x
    assert error(out["k"][0].T, k) < 1e-9
    assert error(out["y"], y) < 1e-9


@pytest.mark.parametrize(
    "options", [{"num_blocks": 3}, {"num_blocks": 2, "order": 3, "outer_mixing": True}, {"num_blocks": 6}], ids=str
)
@torch.no_grad()
def test_hyena_in_blocks_by_its_formula(options):
    config = {"d_model": 3, "l_max": 24, "filter_order": 4, **options}
    module, state = drawn("hyena", config)
    x, order, blocks = series(2, 12, 3), config.get("order", 2), config["num_blocks"]
    u = F.linear(x, state["in_proj.weight"], state["in_proj.bias"]).transpose(1, 2)
    taps = state["short_filter.weight"][:, 0]
    u = convolved(u, lambda lag: taps[:, 2 - lag] if 0 <= lag < 3 else None) + state["short_filter.bias"][:, None]
    first, *gates, v = u.split(3, dim=1)
    k = filter_formula({}, within(state, "filter_fn."), 12).unflatten(0, (3, -1))
    bias = state["filter_fn.bias"].unflatten(0, (3, -1))
    for i, gate in enumerate(reversed(gates)):
        v = v * (gate.sum(1, keepdim=True) if "outer_mixing" in options else gate)
        pieces = [circular(piece, k[:, i], 24 // blocks) for piece in v.chunk(blocks, dim=2)]
        v = torch.cat(pieces, dim=2) + bias[:, i, None] * v
    assert len(gates) == order - 1
    y = F.linear((v * first).transpose(1, 2), state["out_proj.weight"], state["out_proj.bias"])
    assert error(module(x=x), y) < 1e-9
    with pytest.raises(ValueError, match="does not divide the length 11"):
        module(x=x[:, 1:])


@torch.no_grad()
def test_a_hyena_dna_operator_is_the_standalone_one_with_a_floor_under_its_window():
    config = {"d_model": 3, "l_max": 12, "order": 3, "filter_order": 4, "num_inner_mlps": 1}
    module, state = drawn("hyenadna", {**config, "normalized": True, "short_filter_order": 5, "local_order": 3})
    other = from_official("hyenastandalone", {**config, "shift": 0.05}, state)
    x = series(2, 10, 3)
    assert torch.equal(module(x=x), other(x=x))
    assert error(from_official("hyenadna", {**config, "shift": 0.0}, state)(x=x), module(x=x)) > 1e-3


@pytest.mark.parametrize("order", [2, 3])
@torch.no_grad()
def test_two_sided_hyena_by_its_formula(order):
    torch.manual_seed(0)
    layer = HyenaTwoSided(4, 16, order=order, width=6, emb_dim=5, shift=0.02).double()
    x = series(2, 9, 4)
    conv = layer.short_filter
    u = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).transpose(1, 2)
    u = convolved(u, lambda lag: conv.weight[:, 0, 2 - lag] if 0 <= lag < 3 else None) + conv.bias[:, None]
    first, *gates, v = u.split(4, dim=1)
    behind, ahead = layer.filter_fn(9).unflatten(0, (4, -1)), layer.filter_ahead(9).unflatten(0, (4, -1))
    bias = layer.filter_fn.bias.unflatten(0, (4, -1))
    for i, gate in enumerate(reversed(gates)):
        v = v * gate
        both = convolved(v, lambda lag, i=i: behind[:, i, lag] if lag >= 0 else ahead[:, i, -lag - 1])
        v = both + bias[:, i, None] * v
    y = F.linear((v * first).transpose(1, 2), layer.out_proj.weight, layer.out_proj.bias)
    assert error(layer(x)[0], y) < 1e-9


def test_two_sided_hyena_refuses_more_than_max_len():
    with pytest.raises(ValueError, match=r"max_len = 8.*17.*max_len >= 17"):
        HyenaTwoSided(4, 8)(torch.zeros(1, 17, 4))


def test_a_filter_owns_the_weight_of_the_present_only_where_asked():
    options = {"width": 4, "emb_dim": 3}
    assert HyenaFilter(3, 8, **options).bias is None
    assert HyenaFilter(3, 8, **options, skip=True).bias.shape == (3,)
    assert "filter_ahead.bias" not in HyenaTwoSided(4, 8, **options).state_dict()


# Monarch Mixer


def m2_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    c = {"hyena_w_mod": 1, **config}
    L = x.shape[1]

    def long(u: Tensor, name: str) -> Tensor:
        p = within(state, f"{name}.")
        k = filter_formula({}, p, L, w_mod=c["hyena_w_mod"])
        ahead = None
        if c.get("bidirectional"):
            ahead = filter_formula({}, p, L, "implicit_filter_rev", c["hyena_w_mod"])

        def weight(lag):
            if lag >= 0:
                return k[:, lag]
            return None if ahead is None else ahead[:, -lag - 1]

        return convolved(u, weight) + p["bias"][:, None] * u

    if c.get("hyena_training_additions"):
        x = F.layer_norm(x, x.shape[-1:], state["layernorm.weight"], state["layernorm.bias"])
    u = F.linear(x, state["in_linear.weight"], state["in_linear.bias"]).transpose(1, 2)
    taps, bias = state["short_filter.weight"][:, 0], state["short_filter.bias"]
    u = convolved(u, lambda lag: taps[:, 2 - lag] if 0 <= lag < 3 else None) + bias[:, None]
    x1, x2, v = u.chunk(3, dim=1)
    y = long(v * x1, "filter_fn") * x2
    if c.get("residual_long_conv"):
        y = y + long(x.transpose(1, 2), "filter_fn2")
    return F.linear(y.transpose(1, 2), state["out_linear.weight"], state["out_linear.bias"])


@pytest.mark.parametrize(
    "options",
    [
        {"residual_long_conv": True},
        {"residual_long_conv": True, "bidirectional": True, "hyena_emb_dim": 5, "hyena_filter_order": 7},
        {"hyena_training_additions": True, "hyena_w_mod": 3, "bidirectional": True},
        {"hyena_training_additions": True, "residual_long_conv": True, "hyena_w_mod": 0.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_monarch_mixer_by_its_formula(options):
    config = {"d_model": 3, "l_max": 12, **options}
    module, state = drawn("m2", config)
    x = series(2, 9, 3)
    assert error(module(x=x), m2_formula(config, state, x)) < 1e-9


# Long convolutions


def squashed(k: Tensor, lam: float) -> Tensor:
    return torch.sign(k) * (k.abs() - lam).clamp(min=0)


def circular(x: Tensor, k: Tensor, n: int) -> Tensor:
    """x (B, H, L) with taps k (..., H, T) on a circle of n steps, the first L of them."""
    L = x.shape[-1]
    k = F.pad(k, (0, n))[..., :n]
    x = F.pad(x, (0, n - L))
    return sum(k[..., p, None] * x.roll(p, -1) for p in range(n))[..., :L]


@pytest.mark.parametrize(
    "options",
    [
        {"l_max": 16},
        {"l_max": 12, "causal": False, "lam": 0.05},
        {"l_max": 7, "use_ma_smoothing": True, "ma_window_len": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_h3_conv_by_its_formula(options):
    config = {"d_model": 3, **options}
    module, state = drawn("h3conv", config)
    x = series(2, 10, 3)
    q, k, v = (F.linear(x, state[f"{name}_proj.weight"], state[f"{name}_proj.bias"]).transpose(1, 2) for name in "qkv")

    def taps(key):
        k = state[key][0]
        if config.get("use_ma_smoothing"):
            padded = F.pad(k, (1, 1))
            k = sum(padded[:, j : j + k.shape[1]] for j in range(3)) / 3
        return squashed(k, config.get("lam", 0.1))

    k = circular(k, taps("k_kernel.kernel"), 20) + state["k_D"][:, None] * k
    y = circular(k * v, taps("kernel.kernel"), 20) + state["D"][:, None] * k * v
    y = F.linear((q * y).transpose(1, 2), state["output_linear.weight"], state["output_linear.bias"])
    assert error(module(x=x), y) < 1e-9


@torch.no_grad()
def test_long_conv_kernel_options():
    config = {"H": 3, "L": 9, "channels": 2, "causal": False, "lam": 0.3}
    module, state = drawn("longconvkernel", config)
    assert torch.equal(module(), squashed(state["kernel"], 0.3))
    assert module().shape == (2, 3, 18)
    module, state = drawn("longconvkernel", {"H": 3, "L": 9, "use_ma_smoothing": True, "smooth_freq": True})
    assert module().shape == (1, 3, 8)  # the authors' transform back loses the last of an odd number


def standalone_formula(c: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    y = circular(x[:, None], squashed(state["kernel"], c.get("kernel_lam", 0.1)), 2 * x.shape[-1])
    y = F.gelu((y + state["D"][..., None] * x[:, None]).flatten(1, 2)).transpose(1, 2)
    return F.glu(F.linear(y, state["output_linear.0.weight"], state["output_linear.0.bias"])).transpose(1, 2)


@pytest.mark.parametrize("length", [5, 8, 13])
@torch.no_grad()
def test_standalone_long_conv_at_other_lengths(length):
    config = {"H": 3, "L": 8}
    module, state = drawn("longconvstandalone", config)
    x = series(2, 3, length)
    assert error(module(x=x), standalone_formula(config, state, x)) < 1e-9


@pytest.mark.parametrize("prenorm", [False, True])
@torch.no_grad()
def test_standalone_long_conv_model(prenorm):
    config = {"d_input": 2, "d_output": 3, "d_model": 4, "n_layers": 2, "prenorm": prenorm, "kernel_lam": 0.5}
    module, state = drawn("longconvstandalone", config)
    x = series(2, 7, 2)
    y = F.linear(x, state["encoder.weight"], state["encoder.bias"])
    for i in range(2):
        norm = [state[f"norms.{i}.weight"], state[f"norms.{i}.bias"]]
        z = F.layer_norm(y, (4,), *norm) if prenorm else y
        y = y + standalone_formula(config, within(state, f"conv_layers.{i}."), z.transpose(1, 2)).transpose(1, 2)
        y = y if prenorm else F.layer_norm(y, (4,), *norm)
    assert error(module(x=x), F.linear(y.mean(1), state["decoder.weight"], state["decoder.bias"])) < 1e-9


@torch.no_grad()
def test_long_conv_with_several_filters_a_feature():
    torch.manual_seed(0)
    layer = LongConvMixer(4, 16, channels=3, squash=0.0).double()
    x = series(2, 9, 4).transpose(1, 2)
    k, D = layer.kernel(9).unflatten(0, (3, 4)), layer.D.unflatten(0, (3, 4))
    y = torch.cat([convolved(x, lambda lag, c=c: k[c, :, lag] if lag >= 0 else None) for c in range(3)], dim=1)
    y = F.gelu(y + torch.cat([D[c, :, None] * x for c in range(3)], dim=1)).transpose(1, 2)
    y = F.glu(F.linear(y, layer.output_linear.weight, layer.output_linear.bias))
    assert error(layer(x.transpose(1, 2))[0], y) < 1e-9


def test_free_taps_start_under_a_decay():
    k = FreeFilter(8, 4096, squash=0.0, decay=True).kernel
    t = torch.arange(4096) / 4096
    for c in range(8):
        expected = 0.02 * torch.exp(-t * 4 ** (c / 8))
        assert 0.9 < (k[c] / expected).std() < 1.1


# Language models


def mha_formula(c: dict, p: dict[str, Tensor], x: Tensor) -> Tensor:
    H, R = c["num_heads"], c.get("rotary_emb_dim", 0)
    qkv = F.linear(x, p["Wqkv.weight"], p.get("Wqkv.bias"))
    if c.get("dwconv"):
        taps = p["dwconv_qkv.weight"][:, 0]
        qkv = convolved(qkv.transpose(1, 2), lambda lag: taps[:, 2 - lag] if 0 <= lag < 3 else None).transpose(1, 2)
        qkv = qkv + p["dwconv_qkv.bias"]
    q, k, v = (t.unflatten(2, (H, -1)) for t in qkv.chunk(3, dim=2))
    y = torch.zeros_like(v)
    scale = c.get("softmax_scale") or q.shape[3] ** -0.5

    def turned(x, t):
        x = x.clone()
        for i in range(R // 2):
            angle = t * c.get("rotary_emb_base", 10_000.0) ** (-2 * i / R)
            a, b = x[..., i].clone(), x[..., i + R // 2].clone()
            x[..., i] = a * math.cos(angle) - b * math.sin(angle)
            x[..., i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
        return x

    for t in range(x.shape[1]):
        logits = [scale * (turned(q[:, t], t) * turned(k[:, s], s)).sum(-1) for s in range(t + 1)]
        weights = torch.stack(logits, dim=-1).softmax(-1)  # (B, H, t + 1)
        y[:, t] = torch.einsum("bhs,bshp->bhp", weights, v[:, : t + 1])
    return F.linear(y.flatten(2), p["out_proj.weight"], p["out_proj.bias"])


def backbone_formula(config: dict, state: dict[str, Tensor], ids: Tensor, mixers) -> Tensor:
    """flash_attn's prenorm blocks; mixers[i]: (tensors of the layer, x) -> y."""
    eps = config.get("layer_norm_epsilon", 1e-5)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    hidden, residual = state["backbone.embeddings.word_embeddings.weight"][ids], 0
    if config.get("max_position_embeddings"):
        hidden = hidden + state["backbone.embeddings.position_embeddings.weight"][: ids.shape[1]]
    for i, mixer in enumerate(mixers):
        block = f"backbone.layers.{i}"
        residual = hidden + residual
        hidden = mixer(within(state, f"{block}.mixer."), norm(residual, f"{block}.norm1"))
        residual = hidden + residual
        p = within(state, f"{block}.mlp.")
        hidden = F.linear(norm(residual, f"{block}.norm2"), p["fc1.weight"], p["fc1.bias"])
        hidden = F.linear(F.gelu(hidden, approximate="tanh"), p["fc2.weight"], p["fc2.bias"])
    return norm(hidden + residual, "backbone.ln_f")


@pytest.mark.parametrize(
    "options",
    [
        {"attn_cfg": {"num_heads": 2, "rotary_emb_dim": 2}},
        {"attn_cfg": {"num_heads": 1, "rotary_emb_dim": 8, "rotary_emb_base": 100.0, "bias": False}},
        {"attn_cfg": {"num_heads": 2, "dwconv": True, "dropout": 0.1}, "max_position_embeddings": 12},
        {"attn_cfg": {"num_heads": 4, "softmax_scale": 0.3}, "d_inner": 5, "layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
@torch.no_grad()
def test_attention_in_language_models_by_its_formula(options):
    config = {"d_model": 8, "n_layer": 2, "vocab_size": 11, "pad_vocab_size_multiple": 8, "attn_layer_idx": [0, 1]}
    config |= options
    module, state = drawn("h3lm", config)
    ids = ids_of(2, 9, 11)
    mixers = [lambda p, x: mha_formula(config["attn_cfg"], p, x)] * 2
    expected = backbone_formula(config, state, ids, mixers) @ state["lm_head.weight"].T
    logits = module(input_ids=ids)
    assert logits.shape == (2, 9, 16)
    assert error(logits, expected) < 1e-9
    for sizes in ([1] * 9, [4, 5]):
        carried, pieces = module.model.init_state(2), []
        for piece in ids.split(sizes, dim=1):
            piece, carried = module.model(piece, carried)
            pieces.append(piece)
        assert error(torch.cat(pieces, dim=1), logits) < 1e-9


@pytest.mark.parametrize(
    "layer",
    [
        {"_name_": "hyena", "l_max": 16, "order": 3, "filter_order": 4, "modulate": False, "local_order": 3},
        {"_name_": "hyena", "l_max": 16, "filter_order": 4, "outer_mixing": True},
        {"_name_": "hyena", "l_max": 18, "filter_order": 4, "num_blocks": 3},
        {"_name_": "h3-conv", "l_max": 16, "lam": 0.003, "kernel_dropout": 0.2},
        {"_name_": "h3", "d_state": 6, "head_dim": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_in_language_models(layer):
    config = {"d_model": 4, "n_layer": 2, "d_inner": 6, "vocab_size": 7, "layer": layer}
    module, state = drawn("hyenalm", {**config, "residual_in_fp32": True, "fused_mlp": True})
    ids = ids_of(2, 9, 7)
    name, options = layer["_name_"].replace("-", ""), {key: v for key, v in layer.items() if key != "_name_"}
    mixers = [lambda p, x: from_official(name, {**options, "d_model": 4}, p)(x=x)] * 2
    expected = backbone_formula(config, state, ids, mixers) @ state["lm_head.weight"].T
    assert error(module(input_ids=ids), expected) < 1e-9
    if name == "h3conv" or {"outer_mixing", "num_blocks"} & set(layer):
        with pytest.raises(ValueError, match="has no state here"):
            module.model.init_state(2)
    else:
        last, _ = module.model(ids, module.model.init_state(2))
        assert error(last, expected) < 1e-9


@torch.no_grad()
def test_positions_do_not_count_padding():
    config = {"d_model": 8, "n_layer": 2, "d_inner": 8, "vocab_size": 11, "max_position_embeddings": 12}
    module, _ = drawn("hyenalm", {**config, "attn_layer_idx": [0, 1], "attn_cfg": {"num_heads": 2}})
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    together = generate(module.model, rows, 4)
    assert together == [generate(module.model, [row], 4)[0] for row in rows]
    for row, new in zip(rows, together):
        for token in new:
            assert module(input_ids=torch.tensor([row]))[0, -1].argmax() == token
            row.append(token)
    assert torch.equal(
        module(input_ids=torch.tensor([[1, 2]]), position_ids=torch.tensor([[0, 1]])),
        module(input_ids=torch.tensor([[1, 2]])),
    )
    with pytest.raises(ValueError, match="learned_positions of max_len = 12 cannot serve a sequence of 13"):
        module(input_ids=torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("stem", ["h3lm__off_attn1_L32", "hyenalm__conv_o2_attn_L25", "hyenadna__lm_hidden_L64"])
@torch.no_grad()
def test_the_imported_language_model_generates(stem):
    case = golden(stem)
    module = case.module()
    row = case.inputs(torch.float64)["input_ids"][0, :9].tolist()
    for token in generate(module.model, [row], 3)[0]:
        assert module.model(torch.tensor([row]))[0][0, -1].argmax() == token
        row.append(token)


@torch.no_grad()
def test_checkpoints_of_older_names():
    case = load(LEGACY)
    ids, logits, old = case.tensors["input.input_ids"], case.tensors["output.logits"], case.part("legacy_state.")
    trained = {f"model.{key}": t for key, t in old.items()} | {"step": torch.ones(1)}
    separate = {key: t for key, t in old.items() if "Wqkv" not in key and ".1.mixer.out_proj" not in key}
    for kind in ("weight", "bias"):
        mixer = "s4seq.encoder.layers.1.mixer"
        parts = old[f"{mixer}.Wqkv.{kind}"].chunk(3)
        separate |= {f"{mixer}.{name}_proj.{kind}": t for name, t in zip("qkv", parts)}
        separate[f"{mixer}.output_linear.{kind}"] = old[f"{mixer}.out_proj.{kind}"]
    rotary = {"s4seq.encoder.layers.1.mixer.rotary_emb.inv_freq": torch.ones(2)}
    untied = {key: t for key, t in old.items() if key != "lm_head.weight"}
    for state in (case.part("state."), old, trained, separate, {**old, **rotary}, untied):
        assert error(from_official("h3lm", case.config, state)(input_ids=ids), logits) < 1e-5


@torch.no_grad()
def test_released_hyena_dna_checkpoints():
    case = golden("hyenadna__lm_hidden_L64")
    state, inputs = case.state(torch.float64), case.inputs(torch.float64)
    out = case.module()(**inputs)
    released = {f"model.{key}": t for key, t in state.items()}
    released |= {"model.lm_head.weight": state["backbone.embeddings.word_embeddings.weight"], "step": torch.ones(1)}
    nested = {key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): t for key, t in released.items()}
    config = {**case.config, "checkpoint_mixer": True, "checkpoint_mlp": True, "fused_mlp": False}
    for renamed in (released, nested):
        assert torch.equal(from_official("hyenadna", config, renamed)(**inputs), out)
    head = {"head.output_transform.weight": series(3, 16), "head.output_transform.bias": series(3)}
    labels = from_official("hyenadna", {**config, "use_head": True, "n_classes": 3}, {**state, **head})(**inputs)
    weight, bias = head.values()
    assert error(labels, F.linear(out.mean(1), weight, bias)) < 1e-12
    logits, _ = case.module().model(inputs["input_ids"])
    assert error(logits, out @ state["backbone.embeddings.word_embeddings.weight"].T) < 1e-12


@pytest.mark.parametrize(
    ("stem", "change", "word"),
    [
        ("h3lm__simple_attn1_L32", {"layer": {"_name_": "hyenna", "l_max": 8}}, "'hyenna' .*did you mean 'hyena'"),
        ("h3lm__simple_attn1_L32", {"layer": {"_name_": "long-conv"}}, "_name_ = 'long-conv'"),
        ("h3lm__simple_attn1_L32", {"layer": {"_name_": "h3", "d_stat": 8}}, "layer: .*did you mean 'd_state'"),
        ("h3lm__simple_attn1_L32", {"layer": "h3"}, "_name_ = None"),
        ("h3lm__off_attn1_L32", {"ssm_cfg": {"mode": "nplr"}}, "ssm_cfg: .*mode = 'nplr'"),
        ("h3lm__off_attn1_L32", {"attn_cfg": None}, "attn_cfg: None is no mapping"),
        ("h3lm__off_attn1_L32", {"attn_cfg": {}}, "attn_cfg: .*'num_heads' is missing"),
        ("h3lm__off_attn1_L32", {"attn_cfg": {"num_heads": 3}}, "num_heads = 3 does not divide d_model = 16"),
        ("h3lm__off_attn1_L32", {"attn_cfg": {"num_heads": 4, "rotary_emb_dim": 6}}, "rotary_emb_dim = 6 .*<= 4"),
        ("h3lm__off_attn1_L32", {"attn_cfg": {"num_heads": 4, "causal": False}}, "attn_cfg: .*causal = False"),
        ("h3lm__off_attn1_L32", {"attn_cfg": {"num_heads": 4, "rotary_emb_scale_base": 512}}, "scale_base = 512"),
        ("hyenadna__lm_hidden_L64", {"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\]"),
        ("hyenadna__lm_hidden_L64", {"use_head": True}, "no key 'head.output_transform.weight'"),
        ("h3conv__H8_L24", {"head_dim": 2}, "head_dim = 2"),
        ("h3conv__H8_L24", {"channels": 2}, "channels = 2"),
        ("longconvkernel__freq_L40_w5", {"smooth_freq": False, "ma_window_len": 4}, "odd width >= 1; got 4"),
        ("longconvstandalone__H6_L24", {"postact": "glu"}, "no option 'postact'"),
        ("m2__causal_H8_L32", {"bidirectional": True}, "no key 'filter_fn.implicit_filter_rev"),
        ("m2__causal_H8_L32", {"hyena_emb_dim": 4}, "must be odd, >= 3; got 4"),
        ("hyenafilter__D8_L40", {"seq_length": 40}, "did you mean 'seq_len'"),
    ],
)
def test_options_that_are_not_carried_over_are_named(stem, change, word):
    case = golden(stem)
    with pytest.raises(ValueError, match=f"^{case.system}: .*{word}"):
        from_official(case.system, {**case.config, **change}, case.state(torch.float32))


@pytest.mark.parametrize(
    "stem",
    ["m2__bidir_H6_L33", "hyena__o2_H8_L32", "hyenafilter__D8_L40", "hyenadna__op_o2_H8_L40", "hyenalm__simple_o2_L32"],
)
@torch.no_grad()
def test_shared_tensors_may_be_left_out(stem):
    case = golden(stem)
    aliases = SYSTEMS[case.system].aliases(SYSTEMS[case.system].read(case.config))
    assert aliases
    state = {key: t for key, t in case.state(torch.float64).items() if key not in aliases}
    ours, inputs = from_official(case.system, case.config, state), case.inputs(torch.float64)
    for key, theirs in case.part("output64.").items():
        out = ours(**inputs)
        assert error(out[key] if isinstance(out, dict) else out, theirs) < 1e-9


def test_shared_tensors_that_differ_are_named():
    case = golden("m2__bidir_H6_L33")
    state = case.state(torch.float32)
    key = "filter_fn.implicit_filter_rev.1.freq"
    with pytest.raises(ValueError, match=f"'{key}' and 'filter_fn.implicit_filter.1.freq' name one tensor"):
        from_official("m2", case.config, {**state, key: state[key] + 1})
    assert set(SYSTEMS) >= {"hyenafilter", "hyenadna", "hyenalm", "h3lm", "h3conv", "longconvkernel", "m2"}
