"""Mega against plain sums over its parameters, in all its forms, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import drawn, error, series
from torch import Tensor

from longwave.mixers import MIXERS, state_bytes
from longwave.nn import LongConv, Truncated, longest
from longwave.nn.filters import EMAFilter
from longwave.official import SYSTEMS, from_official

D, S, E, N, L = 6, 4, 8, 3, 13

NORMS = {
    "layernorm": lambda x, w: F.layer_norm(x, x.shape[-1:], w["weight"], w["bias"]),
    "rmsnorm": lambda x, w: w["weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    "scalenorm": lambda x, w: w["scalar"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
}


def averaged(w: dict[str, Tensor], x: Tensor, truncation: int | None) -> Tensor:
    p = w["move.delta"].sigmoid()
    lags = torch.arange(len(x))
    powers = (1 - p * w["move.alpha"].sigmoid()) ** lags
    k = (p * w["move.beta"] * w["move.gamma"][..., None] * N**-0.5 * powers).sum(1)
    k = torch.where(lags < (truncation or len(x)), k, 0)
    ys = []
    for t in range(len(x)):
        y = w["move.omega"] * x[t] + sum(k[:D, t - s, None] * x[s, :, None] for s in range(t + 1))[:, 0]
        if len(k) > D:
            y = y + sum(k[D:, s - t, None] * x[s, :, None] for s in range(t, len(x)))[:, 0]
        ys.append(F.silu(y))
    return torch.stack(ys)


def distance(w: dict[str, Tensor], i: int, j: int, longest: int) -> Tensor:
    if "rel_pos_bias.rel_pos_bias" in w:
        return w["rel_pos_bias.rel_pos_bias"][longest - 1 + j - i]
    turned = []
    for name, place in (("alpha", i), ("beta", j)):
        angle = place * 10_000.0 ** (-torch.arange(S // 2, dtype=torch.float64) / (S // 2))
        a, b = w[f"rel_pos_bias.{name}"][0].chunk(2)
        turned.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]))
    return turned[0] @ turned[1]


def attended(w, q: Tensor, k: Tensor, v: Tensor, kind: str, causal: bool, chunk: int, longest: int) -> Tensor:
    ys = []
    for t in range(len(q)):
        first = t // chunk * chunk
        seen = range(first, t + 1 if causal else min(first + chunk, len(q)))
        bias = torch.stack([distance(w, t - first, s - first, longest) for s in seen])
        products = k[seen.start : seen.stop] @ q[t]
        if kind == "softmax":
            weights = (products * S**-0.5 + bias).softmax(0)
        elif kind == "laplace":
            weights = 0.5 * (1 + torch.erf((products / len(seen) + bias - 0.707107) / (0.282095 * math.sqrt(2))))
        else:
            weights = F.relu(products / len(seen) + bias) ** 2
        ys.append(weights @ v[seen.start : seen.stop])
    return torch.stack(ys)


def by_formula(config: dict, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One row x (L, D)."""
    norm = {key.removeprefix("norm.norm."): t for key, t in w.items() if key.startswith("norm.norm.")}
    normed = NORMS[config.get("norm_type", "layernorm")]
    n = normed(x, norm) if config.get("prenorm", True) else x
    u, zr, hx = F.linear(
        averaged(w, n, config.get("truncation")), w["mx_proj.weight"], w["mx_proj.bias"]
    ).split([D, S + E, D], dim=-1)  # fmt: skip
    z, r = F.silu(zr).split([S, E], dim=-1)
    q, k = z * w["gamma"][0] + w["beta"][0], z * w["gamma"][1] + w["beta"][1]
    v = F.silu(F.linear(n, w["v_proj.weight"], w["v_proj.bias"]))
    chunk = config.get("chunk_size", L)
    longest = config["chunk_size"] if "chunk_size" in config else config.get("max_positions", 1024)
    h = attended(w, q, k, v, config.get("attention_activation", "softmax"), config.get("causal", False), chunk, longest)
    h = F.silu(hx + F.linear(h * r, w["h_proj.weight"], w["h_proj.bias"]))
    y = x + u.sigmoid() * (h - x)
    return y if config.get("prenorm", True) else normed(y, norm)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "attention_activation": "laplace", "chunk_size": 4},
        {"causal": True, "attention_activation": "relu2", "rel_pos_bias": "rotary", "norm_type": "scalenorm"},
        {"causal": True, "truncation": 3, "chunk_size": 5, "rel_pos_bias": "rotary", "prenorm": False},
        {"bidirectional": True, "truncation": 4, "chunk_size": 4, "norm_type": "rmsnorm"},
        {"attention_activation": "relu2", "chunk_size": 6, "max_positions": 20, "prenorm": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_by_their_formula(options):
    config = {"embed_dim": D, "zdim": S, "hdim": E, "ndim": N, **options}
    module, state = drawn("mega_layer", config)
    x = series(L, 2, D)
    y = torch.stack([by_formula(config, state, row) for row in x.unbind(1)], dim=1)
    assert error(module(x=x), y) < 1e-12
    if options.get("causal"):
        pieces, carried = [], module.model.init_state(2)
        for piece in x.transpose(0, 1).split([3, 1, 1, 5, 3], dim=1):
            piece, carried = module.model(piece, carried)
            pieces.append(piece)
        assert error(torch.cat(pieces, dim=1), y.transpose(0, 1)) < 1e-12


@torch.no_grad()
def test_a_truncated_average_steps_truncated():
    conv = LongConv(Truncated(5, EMAFilter(5, 2), 4)).double()
    x = series(2, 11, 5)
    state, ys = conv.init_state(2), []
    for step in x.split(1, dim=1):
        y, state = conv(step, state)
        ys.append(y)
    assert error(torch.cat(ys, dim=1), conv(x)[0]) < 1e-12
    past = torch.zeros(1, 9, 5, dtype=torch.float64)
    past[:, 0] = 1
    assert conv(past)[0][:, 4:].abs().max() < 1e-12


def test_the_state_is_bounded_by_the_chunk():
    mega = MIXERS["mega"](8, d_qk=4, chunk=16)
    with torch.no_grad():
        sizes = {state_bytes(mega(torch.zeros(1, n, 8), mega.init_state(1))[1]) for n in (1, 100, 1000)}
    assert len(sizes) == 1
    assert longest(mega) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mega", {"chunk": 0}, r"mega needs chunk >= 1 steps, or None for no chunks; got 0"),
        ("mega_two_sided", {"chunk": -1}, r"mega_two_sided needs chunk >= 1"),
        ("mega", {"d_qk": 0}, r"mega needs d_qk >= 1 and expand \* d_model >= 1; got 0 and 2.0 \* 8"),
        ("mega", {"d_qk": 3}, r"a rotary bias turns pairs of features, so d_qk is even; got 3"),
        ("mega", {"attention": "softmx"}, r"no attention function is called 'softmx'.*did you mean 'softmax'"),
        ("mega", {"bias": "simple"}, r"needs the option 'max_len'"),
        ("mega", {"bias": {"kind": "simple", "max_len": 64}}, r"max_len = 64 .* 128; build it with max_len >= 128"),
        ("mega", {"filter": {"kind": "ema", "d_state": 0}}, r"a moving average needs d_state >= 1; got 0"),
        ("mega", {"filter": {"kind": "truncated", "support": 0}}, r"at least 1 tap; got support = 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](8, **options)


@torch.no_grad()
def test_a_sequence_beyond_a_table_of_distances_is_refused():
    layer = MIXERS["mega"](8, chunk=None, bias={"kind": "simple", "max_len": 16})
    assert longest(layer) == 16
    _, state = layer(torch.zeros(1, 16, 8), layer.init_state(1))
    for x, before in ((torch.zeros(1, 17, 8), None), (torch.zeros(1, 1, 8), state)):
        with pytest.raises(ValueError, match=r"a simple bias of max_len = 16 cannot serve .* 17; .* max_len >= 17"):
            layer(x, before)


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("mega_layer", {"bidirectional": True, "causal": True}, "bidirectional = True sees the future"),
        ("mega_layer", {"norm_type": "batchnorm"}, "norm_type = 'batchnorm' is not carried over"),
        ("mega_layer", {"norm_affine": False}, "norm_affine = False is not carried over"),
        ("mega_layer", {"activation": "relu"}, "activation = 'relu' is not carried over"),
        ("mega_layer", {"chunk_size": 0}, "chunk_size = 0 must be"),
        ("mega_hf", {"normalization_type": "rmsnorm"}, "normalization_type = 'rmsnorm' is not carried over"),
        ("mega_hf", {"add_cross_attention": True}, "add_cross_attention = True is not carried over"),
        ("mega_hf", {"normalize_before_mega": False}, "normalize_before_mega = False is not carried over"),
        ("mega_hf", {}, "MegaForCausalLM is carried over with is_decoder = True"),
        ("megablock", {"mode": "diag"}, "mode = 'diag' is not carried over"),
        ("mega_lucidrains", {"laplacian_attn_fn": True}, "laplacian_attn_fn = True is not carried over"),
        ("mega_lucidrains", {"cls": "MultiHeadedEMA"}, "'heads' is missing"),
    ],
)
def test_options_that_are_not_carried_over_are_named(system, options, words):
    sizes = {
        "mega_layer": {"embed_dim": D, "zdim": S, "hdim": E, "ndim": N},
        "megablock": {"d_model": D, "d_attin": S, "d_attout": E, "d_state": N},
    }
    with pytest.raises(ValueError, match=f"^{system}: .*{words}"):
        from_official(system, {**sizes.get(system, {}), **options}, {})


def test_padding_within_a_row_is_not_carried_over():
    module, _ = drawn("mega_layer", {"embed_dim": D, "zdim": S, "hdim": E, "ndim": N})
    with pytest.raises(ValueError, match="padding is carried over at the end of rows alone"):
        module(x=series(3, 1, D), padding_mask=torch.tensor([[1, 0, 0]]))


def test_chunks_use_the_beginning_of_huggingfaces_table():
    config = {"use_chunking": True, "chunk_size": 4, "max_positions": 9, "relative_positional_bias": "simple"}
    config |= {"is_decoder": True, "bidirectional": False, "hidden_size": D, "num_hidden_layers": 1}
    options = SYSTEMS["mega_hf"].read(config)
    table = "mega.layers.0.mega_layer.rel_pos_bias.rel_pos_bias"
    assert options.tensors()[table] == (17,)
    module, state = drawn("mega_hf", config)
    assert torch.equal(module.model.backbone.layers[0].mixer.rel_pos_bias.rel_pos_bias, state[table][:7])
