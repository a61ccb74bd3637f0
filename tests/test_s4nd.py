"""S4ND: convolutions over several axes against sums over all pairs of places, and the official module's options."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from official import error, series
from torch import Tensor

from longwave.mixers import S4NDMixer, mixer
from longwave.nn import S4ND, DPLRFilter, FreeFilter, S4DFilter, SeparableConv, Truncated, reset, set_rate
from longwave.official import SYSTEMS, from_official

ACT = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "glu": lambda x: F.glu(x, dim=1)}


def drawn_nd(config: dict) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A module and its official state at random; low rank kernels were trained at 8 steps."""
    rng = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in SYSTEMS["s4nd"].keys(SYSTEMS["s4nd"].read(config)).items():
        t = torch.randn(shape, generator=rng, dtype=torch.float64)
        state[key] = 0.3 * t - 1.5 if key.endswith("inv_dt") else t
        if key.endswith("l_kernel"):
            state[key] = torch.tensor(8)
    return from_official("s4nd", config, state), state


def by_lag(taps: Tensor, ahead: Tensor | None, length: int) -> Tensor:
    """(..., 2 length - 1): what weighs u[t - lag], lag = 1 - length ... length - 1."""
    lags = torch.zeros(*taps.shape[:-1], 2 * length - 1, dtype=taps.dtype)
    for s in range(min(taps.shape[-1], length)):
        lags[..., length - 1 + s] = taps[..., s]
    if ahead is not None:
        for s in range(min(ahead.shape[-1], length - 1)):
            lags[..., length - 2 - s] = ahead[..., s]
    return lags


def product(filters: list[Tensor]) -> Tensor:
    """(..., n0), (..., n1), ... -> (..., n0, n1, ...)."""
    whole = filters[0]
    for filter in filters[1:]:
        whole = whole[..., None] * filter.reshape(*filter.shape[:-1], *[1] * (whole.ndim - filter.ndim + 1), -1)
    return whole


def place_by_place(u: Tensor, kernel: Tensor) -> Tensor:
    """y[t] = sum_s K[t - s] u[s], u (B, C, *axes), K (C, *lags)."""
    sizes = u.shape[2:]
    y = torch.zeros_like(u)
    for t in itertools.product(*map(range, sizes)):
        window = kernel[(slice(None), *(slice(i, i + n) for i, n in zip(t, sizes)))]  # lags t - L + 1 ... t
        window = window.flip(tuple(range(1, window.ndim)))
        y[(slice(None), slice(None), *t)] = (u * window).flatten(2).sum(2)
    return y


def taps(config: dict, state: dict[str, Tensor], axis: int, length: int) -> Tensor:
    """(rows, H, length) of one axis: a diagonal kernel by its formula, others by the kernel class itself."""
    s = {key.removeprefix(f"kernel.{axis}."): t for key, t in state.items() if key.startswith(f"kernel.{axis}.")}
    if config.get("kernel", "dplr") not in ("diag", "s4d"):
        names = ("d_model", "d_state", "n_ssm", "rank", "rate")
        rest = {name: config[name] for name in names if name in config}
        l_max = config.get("l_max")
        l_max = l_max[axis] if isinstance(l_max, list) else l_max
        return from_official("s4kernel", {**rest, "channels": len(s["C"]), "l_max": l_max, "L": length}, s)()
    H = config["d_model"]
    dt = s["inv_dt"].exp()
    A = torch.complex(-s["A_real"].exp(), -s["A_imag"])
    groups = [h % len(A) for h in range(H)]
    A, B, C = A[groups], torch.view_as_complex(s["B"])[0][groups], torch.view_as_complex(s["C"])
    if config.get("bandlimit"):
        C = torch.where(dt * A.imag.abs() / (2 * math.pi) < config["bandlimit"] / 2, C, 0)
    dtA = dt * config.get("rate", 1.0) * A
    powers = torch.exp(dtA[..., None] * torch.arange(length))
    return 2 * torch.einsum("chn,hnl->chl", C * B * (dtA.exp() - 1) / A, powers).real


def s4nd_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """x (B, H, *axes)."""
    sizes, K, R = x.shape[2:], config.get("channels", 1), config.get("trank", 1)
    l_max = config.get("l_max")
    l_max = l_max if isinstance(l_max, list) else [l_max] * len(sizes)
    filters = []
    for axis, (n, limit) in enumerate(zip(sizes, l_max)):
        length = n if limit is None else min(n, round(limit / config.get("rate", 1.0)))
        k, ahead = taps(config, state, axis, length), None
        if config.get("bidirectional", True):
            k, ahead = k.chunk(2)
        filters.append(by_lag(k, ahead, n))
    kernel = product(filters).unflatten(0, (R, K))  # (R, K, H, *lags)
    if config.get("contract_version", 0) == 0 or R == 1:
        kernel, D = kernel.mean(0), state["D"]
    else:
        kernel, D = kernel[:, 0], state["D"].expand(R, -1)
    y = torch.cat(
        [place_by_place(x, k) + d.view(-1, *[1] * len(sizes)) * x for k, d in zip(kernel, D)], dim=1
    )  # (B, (c h), *axes)
    if config.get("linear", True):
        return y
    y = ACT[config.get("activation", "gelu")](y)
    final = config.get("final_act")
    prefix = "output_linear." if final is None else "output_linear.0."
    y = torch.einsum("oi,bi...->bo...", state[prefix + "weight"], y)
    y = y + state[prefix + "bias"].view(-1, *[1] * len(sizes))
    return ACT[final](y)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((5, 4), {"kernel": "diag", "trank": 3, "channels": 2, "n_ssm": 1}),
        ((6, 1), {"kernel": "s4d", "bandlimit": 0.2, "linear": False, "final_act": "glu", "channels": 2}),
        ((5, 6), {"mode": "diag", "kernel": "s4d", "l_max": [3, 9], "rate": 2.0, "linear": False}),
        ((7, 4), {"kernel": "s4d", "l_max": 5, "trank": 2, "bidirectional": False}),
        ((9,), {"kernel": "s4d", "dim": 1, "contract_version": 1, "activation": "relu", "linear": False}),
        ((3, 4), {"kernel": "s4d", "contract_version": 1, "trank": 2}),
        ((9,), {"dim": 1, "contract_version": 1, "rank": 2, "trank": 2, "bidirectional": False, "l_max": 4}),
        ((3, 2, 4), {"kernel": "s4d", "dim": None, "l_max": [2, None, 8], "contract_version": 1, "channels": 2}),
        ((5, 4), {"n_ssm": 2, "rank": 2, "trank": 2, "linear": False, "final_act": "glu"}),
        ((6, 5), {"mode": "nplr", "l_max": [4, 8], "rate": 0.5, "bidirectional": False}),
    ],
    ids=str,
)
@torch.no_grad()
def test_official_module_by_its_formula(sizes, options):
    config = {"d_model": 4, "d_state": 6, **options}
    module, state = drawn_nd(config)
    x = series(2, 4, *sizes)
    expected = s4nd_formula(config, state, x)
    assert error(module(x=x), expected) < 1e-9
    last = from_official("s4nd", {**config, "transposed": False}, state)
    assert error(last(x=x.movedim(1, -1)), expected.movedim(1, -1)) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 3}, "contract_version = 0 is for 2 axes; 3 need contract_version = 1"),
        ({"dim": None}, "dim = None needs an l_max for each axis"),
        ({"out_channels": 2}, "out_channels = 2 is not carried over"),
        ({"weight_norm": True}, "weight_norm = True is not carried over"),
        ({"activation": "glu"}, "activation = 'glu' is not carried over"),
        ({"contract_version": 1, "trank": 2, "channels": 2}, "trank = 2 with contract_version = 1 needs channels = 1"),
        ({"kernel": "ema"}, "kernel = 'ema' is not carried over"),
        ({"n_ssm": 3}, "n_ssm = 3 does not divide d_model = 4"),
        ({"tranks": 3}, "'tranks'.*did you mean 'trank'"),
    ],
)
def test_official_options_that_are_refused(change, message):
    with pytest.raises(ValueError, match=f"s4nd: .*{message}"):
        from_official("s4nd", {"d_model": 4, "d_state": 6, "kernel": "s4d", **change}, {})


@pytest.mark.parametrize("sizes", [(7,), (4, 5), (3, 1, 4)])
@pytest.mark.parametrize(("two_sided", "ranks"), [(True, 1), (False, 2), (True, 3)])
@torch.no_grad()
def test_convolution_place_by_place(sizes, two_sided, ranks):
    rows = 3 * ranks * (2 if two_sided else 1)
    filters = [Truncated(rows, S4DFilter(rows, 4, dt_max=1.0), 3), *(S4DFilter(rows, 4, dt_max=1.0) for _ in sizes[1:])]
    conv = SeparableConv(filters, two_sided, ranks).double()
    u, skip = series(2, *sizes, 3), series(3)
    lags = []
    for filter, n in zip(filters, sizes):
        k, ahead = filter(n).chunk(2) if two_sided else (filter(n), None)
        lags.append(by_lag(k, ahead, n).unflatten(0, (ranks, 3)))
    expected = place_by_place(u.movedim(-1, 1), product(lags).mean(0)).movedim(1, -1)
    assert error(conv(u), expected) < 1e-9
    assert error(conv(u, skip), expected + skip * u) < 1e-9


@torch.no_grad()
def test_one_axis_may_be_causal():
    torch.manual_seed(0)
    layer = S4ND(4, [S4DFilter(4, 8), S4DFilter(8, 8), DPLRFilter(8, 8)], two_sided=(False, True, True)).double()
    x = series(2, 5, 4, 3, 4)
    later = x.clone()
    later[:, 3:] += 1
    change = (layer(later) - layer(x)).abs().amax(dim=(0, 2, 3, 4))
    assert (change[:3] < 1e-12).all()
    assert (change[3:] > 1e-8).all()
    elsewhere = x.clone()
    elsewhere[:, :, 2] += 1
    assert ((layer(elsewhere) - layer(x)).abs().amax(dim=(0, 1, 3, 4)) > 1e-8).all()


def test_gradients():
    torch.manual_seed(0)
    layer = S4ND(2, [FreeFilter(8, 4, squash=0.0), S4DFilter(8, 4)], ranks=2).double()
    x = series(1, 3, 4, 2).requires_grad_()
    names = dict(layer.named_parameters())

    def applied(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    leaves = [p.detach().clone().requires_grad_() for p in names.values()]
    assert torch.autograd.gradcheck(applied, (x, *leaves), fast_mode=True)


@torch.no_grad()
def test_the_rate_reaches_every_axis():
    layer, x = S4ND(2, [S4DFilter(4, 4), S4DFilter(4, 4)]).double(), series(1, 4, 5, 2)
    slow = S4ND(2, [S4DFilter(4, 4, rate=2.0), S4DFilter(4, 4, rate=2.0)]).double()
    slow.load_state_dict(layer.state_dict())
    assert error(set_rate(layer, 2.0)(x), slow(x)) < 1e-12


@torch.no_grad()
def test_a_band_limited_filter_is_one_without_its_fast_modes():
    torch.manual_seed(0)
    whole, limited = S4DFilter(3, 16, dt_max=1.0).double(), S4DFilter(3, 16, dt_max=1.0, bandlimit=0.2).double()
    limited.load_state_dict(whole.state_dict())
    fast = whole.log_dt.exp()[:, None] * whole.A_imag / (2 * math.pi) >= 0.1
    assert fast.any()
    assert not fast.all()
    whole.C[fast] = 0
    assert error(limited(9), whole(9)) < 1e-12
    assert error(set_rate(limited, 0.5)(9), set_rate(whole, 0.5)(9)) < 1e-12
    with pytest.raises(ValueError, match="got bandlimit = 0"):
        S4DFilter(3, bandlimit=0)


def test_compiles_and_builds_on_meta_and_in_bfloat16():
    torch.manual_seed(0)
    layer, x = S4ND(4, [S4DFilter(8, 4), S4DFilter(8, 4)]), series(2, 5, 3, 4, dtype=torch.float32)
    assert error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
    with torch.device("meta"):
        ghost = S4ND(4, [S4DFilter(8, 4), S4DFilter(8, 4)])
    torch.manual_seed(0)
    redrawn = reset(ghost.to_empty(device="cpu"))
    assert all(torch.equal(t, redrawn.state_dict()[key]) for key, t in layer.state_dict().items())
    low = S4ND(4, [S4DFilter(8, 4), S4DFilter(8, 4)]).bfloat16()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert error(y.float(), low.float()(x.bfloat16().float())) < 2e-2


def test_bad_input_is_named():
    layer = S4ND(4, [S4DFilter(8, 4), S4DFilter(8, 4)])
    with pytest.raises(ValueError, match=r"over 2 axes takes \(B, L1, L2, 4\); got \(1, 5, 4\)"):
        layer(torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match=r"over 2 axes takes \(B, L1, L2, 4\); got \(1, 5, 5, 3\)"):
        layer(torch.zeros(1, 5, 5, 3))
    with pytest.raises(ValueError, match=r"axis 1 has 4 channels, where 4 features .* two_sided = True need 8"):
        S4ND(4, [S4DFilter(8, 4), S4DFilter(4, 4)])
    with pytest.raises(ValueError, match="the filters are for d_model = 4; got d_model = 8"):
        S4ND(8, [S4DFilter(8, 4), S4DFilter(8, 4)])
    with pytest.raises(ValueError, match="give a filter an axis and two_sided for each; got 2 and 1"):
        SeparableConv([S4DFilter(8, 4), S4DFilter(8, 4)], two_sided=[True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        SeparableConv([])
    with pytest.raises(ValueError, match="at least one product; got ranks = 0"):
        SeparableConv([S4DFilter(8, 4)], ranks=0)


@pytest.mark.parametrize("shape", [[5], [3, 4]])
def test_as_a_mixer_it_reads_line_by_line(shape):
    torch.manual_seed(0)
    layer = mixer("s4nd", shape=shape, filter={"kind": "s4d", "d_state": 8}).build(4).double()
    x = series(2, 4, *shape, 4)
    assert error(layer(x.flatten(1, -2))[0], layer.inner(x).flatten(1, -2)) < 1e-12
    cut = x.flatten(1, -2)[:, :-2]  # as silence at the end of the last line
    silent = torch.cat([cut, torch.zeros(2, 2, 4, dtype=x.dtype)], dim=1).view_as(x)
    assert error(layer(cut)[0], layer.inner(silent).flatten(1, -2)[:, :-2]) < 1e-12
    with pytest.raises(ValueError, match=r"s4nd needs the steps along each axis but the first.*got \[\]"):
        S4NDMixer(4, [])
