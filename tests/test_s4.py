"""S4 and HiPPO: the authors' matrices and kernels, the dense state space, and official options by their formulas."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import GOLDEN, convolved, error, golden, load, series
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longwave.nn import DenseStateSpace, DPLRFilter, hippo, init_conv_state, long_conv, nplr, set_rate
from longwave.nn.hippo import MEASURES, low_rank
from longwave.official import SYSTEMS, from_official
from longwave.official.s4v3 import v3_to_v4
from longwave.official.source import under
from longwave.ops import cauchy

FOLDER = Path(__file__).parent / "golden"
LENGTHS = [1, 2, 3, 7, 8, 16, 17, 50, 65]


@pytest.mark.parametrize("path", sorted((FOLDER / "pieces").glob("hippo__*")), ids=lambda path: path.stem)
def test_hippo_is_the_authors(path):
    case = load(path)
    measure, N = case.config["measure"], case.config["N"]
    A, B = hippo(measure, N)
    assert error(A, case.tensors["A"]) < 1e-12
    assert error(B[:, None], case.tensors["B"]) < 1e-12
    if measure == "glagt":
        return
    tolerance = 1e-6 if "fou" in measure else 1e-12  # theirs has a float32 part
    Lambda, P, B, V = nplr(measure, N)
    theirs = {key: torch.view_as_complex(t.clone()) for key, t in case.part("nplr64_noclip.").items()}
    assert error(Lambda, theirs["Lambda"]) < tolerance
    assert error(low_rank(measure, N), case.tensors["rank_correction_P"].double()) < tolerance
    pairs = zip(Lambda, P.T, B, V.T, strict=True)
    rebuilt = sum(2 * (w * v[:, None] * v.conj()).real for w, p, b, v in pairs) - low_rank(measure, N).T @ low_rank(
        measure, N
    )
    assert error(rebuilt, A) < 1e-11
    if measure == "foud":
        return  # its pair of frequency 0 is mistaken in the official form, which does not rebuild A
    assert error(P.abs(), theirs["P"].abs()) < 10 * tolerance
    assert error(B.abs(), theirs["B"].abs()) < 10 * tolerance
    assert error(P.conj() * B, theirs["P"].conj() * theirs["B"]) < 10 * tolerance


def test_measures_without_low_rank_form_are_refused():
    assert hippo("lmu", 3)[0].shape == (3, 3)
    for measure in ("lmu", "glagt", "tlagt"):
        with pytest.raises(ValueError, match=f"low rank form is called '{measure}'; there are legs"):
            nplr(measure, 4)
    with pytest.raises(ValueError, match=r"'fourrier'.*did you mean 'fourier'"):
        hippo("fourrier", 4)
    with pytest.raises(ValueError, match="even state size; got N = 3"):
        hippo("foud", 3)


def test_lmu_is_legt_in_another_normalisation():
    A, B = hippo("legt", 6)
    theirs, b = hippo("lmu", 6)
    scale = (-1.0) ** torch.arange(6) * (2 * torch.arange(6, dtype=torch.float64) + 1).sqrt()
    assert error(2 * scale[:, None] * A / scale, theirs) < 1e-12
    assert error(2 * scale * B, b) < 1e-12


def dense(channels: int, systems: int, N: int = 6) -> DenseStateSpace:
    rng = torch.Generator().manual_seed(4)
    randn = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    return DenseStateSpace(0.4 * randn(systems, N, N), randn(systems, N), randn(channels, N))


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(("channels", "systems"), [(4, 4), (6, 2), (3, 1)])
def test_dense_state_space_step_by_step(channels, systems, L):
    system, x = dense(channels, systems), series(2, L, channels)
    a, b = (t.repeat(channels // systems, *[1] * (t.ndim - 1)) for t in system[:2])
    h = start = series(2, channels, 6)
    silent, impulse, taps, response = start, b, [], []
    for t in range(L):
        taps.append((system.c * impulse).sum(-1))
        impulse = torch.einsum("cnm,cm->cn", a, impulse)
        silent = torch.einsum("cnm,bcm->bcn", a, silent)
        response.append((system.c * silent).sum(-1))
        h = torch.einsum("cnm,bcm->bcn", a, h) + b * x[:, t, :, None]
    assert error(system.taps(L), torch.stack(taps, dim=1)) < 1e-12
    assert error(system.response(start, L), torch.stack(response, dim=2)) < 1e-12
    assert error(system.advance(start, x), h) < 1e-12
    assert not system.rest(2).any()


def test_gradients_of_a_dense_state_space():
    def run(a, b, c, state, x):
        system = DenseStateSpace(a, b, c)
        return system.taps(5), system.response(state, 5), system.advance(state, x)

    inputs = [*dense(4, 2, 2), series(2, 4, 2), series(2, 7, 4)]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


FILTERS = [
    {"d_state": 8},
    {"d_state": 6, "init": "legt", "rank": 3, "systems": 2},
    {"d_state": 8, "init": "fourier", "systems": 1, "dt_max": 0.9},
]


def dplr(options: dict) -> DPLRFilter:
    torch.manual_seed(0)
    filter = DPLRFilter(4, **options)
    for parameter in filter.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return filter.double()


def doubled(z: Tensor) -> Tensor:
    return torch.cat([z, z.conj()], dim=-1)


def bilinear(A: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """dA (H, N, N) and dB (H, N), complex, over modes and conjugates: A, B (H, N/2), P (R, H, N/2), dt (H, .)."""
    dt, P = doubled(dt.expand_as(A).to(A.dtype)), doubled(P)
    M = torch.diag_embed(doubled(A)) - torch.einsum("rhn,rhm->hnm", P, P.conj())
    one = torch.eye(M.shape[1], dtype=M.dtype)
    inverse = torch.linalg.inv(one - dt[..., None] / 2 * M)
    return inverse @ (one + dt[..., None] / 2 * M), (inverse @ (dt * doubled(B))[..., None])[..., 0]


def krylov(a: Tensor, b: Tensor, C: Tensor, length: int) -> Tensor:
    """C a^l b for l < length, (K, H, length), of C (K, H, N)."""
    taps = []
    for _ in range(length):
        taps.append((C * b).sum(-1).real)
        b = (a @ b[..., None])[..., 0]
    return torch.stack(taps, dim=-1)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@torch.no_grad()
def test_filter_is_its_formula(options):
    f = dplr(options)
    rows = [c % len(f.B) for c in range(4)]
    A = torch.complex(-f.log_A_real.exp(), f.A_imag)[rows]
    P, B, C = torch.view_as_complex(f.P)[:, rows], torch.view_as_complex(f.B)[rows], torch.view_as_complex(f.C)
    a, b = bilinear(A, P, B, f.log_dt.exp()[:, None])
    assert error(f(23), krylov(a, b, doubled(C), 23)) < 1e-12
    assert torch.linalg.eigvals(f.realize().matrix()).abs().max() < 1


@pytest.mark.parametrize("options", FILTERS, ids=str)
@torch.no_grad()
def test_one_step_is_that_of_the_dense_system(options):
    system, state, x = dplr(options).realize(), series(2, 4, options["d_state"]), series(2, 1, 4)
    for ours, theirs in [
        (system.taps(1), system.dense().taps(1)),
        (system.response(state, 1), system.dense().response(state, 1)),
        (system.advance(state, x), system.dense().advance(state, x)),
    ]:
        assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("measure", MEASURES)
@torch.no_grad()
def test_filter_starts_as_hippo(measure):
    """In the basis of the measure the discrete system is that of hippo's own matrices."""
    f = DPLRFilter(1, 4, init=measure, dt_min=0.1, dt_max=0.1).double()
    A, B = hippo(measure, 4)
    one = torch.eye(4, dtype=torch.float64)
    Lambda, _, _, V = nplr(measure, 4)
    A = A - (1e-4 + Lambda.real[0]).clamp(min=0) * one  # the logarithm of the real part needs one
    inverse = torch.linalg.inv(one - 0.05 * A)
    C = torch.view_as_complex(f.C)[0].conj()  # the filter keeps the other half of each pair
    c = 2 * (C @ V.conj().T).real
    a, b = inverse @ (one + 0.05 * A), inverse @ (0.1 * B)
    taps = torch.stack([c @ torch.linalg.matrix_power(a, l) @ b for l in range(9)])
    assert error(f(9)[0], taps) < 1e-6  # parameters were drawn in float32


@pytest.mark.parametrize("options", FILTERS, ids=str)
@torch.no_grad()
def test_chunks_are_the_whole(options):
    f, u = dplr(options), series(2, 40, 4)
    whole, _ = long_conv(u, f)
    state, ys = init_conv_state(f, 2), []
    for piece in u.split([1, 5, 16, 1, 17], dim=1):
        y, state = long_conv(piece, f, state)
        ys.append(y)
    assert error(torch.cat(ys, dim=1), whole) < 1e-12


@pytest.mark.parametrize("options", FILTERS, ids=str)
@torch.no_grad()
def test_taps_do_not_depend_on_the_length(options):
    f = dplr(options)
    longest = f(300)
    for length in (1, 2, 63, 64, 65, 299):
        assert error(f(length), longest[:, :length]) < 1e-12


@torch.no_grad()
def test_rate_doubles_the_step():
    f, twice = dplr({"d_state": 8}), dplr({"d_state": 8})
    twice.log_dt += math.log(2)
    assert error(set_rate(f, 2)(30), twice(30)) < 1e-12
    slow = dplr({"d_state": 8, "dt_max": 0.002})
    fine = slow(400).unflatten(1, (200, 2)).sum(2)
    assert error(set_rate(slow, 2)(200), fine) < 0.01  # half as many samples, each worth two


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_long_kernels_take_little_memory():
    C, N, L = 16, 64, 65536
    f, saved = DPLRFilter(C, N), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        k = f(L)
        k.square().mean().backward()
    assert largest.elements <= 2 * C * L
    assert sum(saved.values()) < 16 * C * L * 4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in f.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "legss"}, r"'legss'; there are legs, .*did you mean 'legs'"),
        ({"init": "glagt"}, "low rank form is called 'glagt'"),
        ({"init": "legt", "rank": 1}, "init = 'legt' needs rank >= 2; got rank = 1"),
        ({"rank": 0}, "needs rank >= 1; got rank = 0"),
        ({"d_state": 7}, "d_state must be even, >= 2; got 7"),
        ({"dt_min": 0.2}, "got dt_min = 0.2, dt_max = 0.1"),
        ({"systems": 3}, "systems = 3 does not divide channels = 4"),
        ({"rate": 0.0}, "rate = 0.0"),
    ],
)
def test_bad_filter_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DPLRFilter(4, **options)


def parameters(case) -> tuple[Tensor, ...]:
    """dt, A, P, B, C~ and the length of an official kernel, transforms being the default ones."""
    s = case.state(torch.float64)
    rate = case.config.get("rate", 1.0)
    dt, A = rate * s["inv_dt"].exp(), torch.complex(-s["A_real"].exp(), -s["A_imag"])
    P, B, C = (torch.view_as_complex(s[name]) for name in ("P", "B", "C"))
    return dt, A, P, B, C, int(s["l_kernel"])


@pytest.mark.parametrize(
    "name", ["legs_N16_L64", "fout_N16_L50", "dtuntied_N8_L33", "rate0p5_N16_L64", "rate2_L33", "state_L32"]
)
@torch.no_grad()
def test_cauchy_makes_the_official_kernels(name):
    """The generating function at the roots of unity, by Woodbury's identity for rank 1."""
    case = golden(f"s4kernel__{name}")
    dt, A, P, B, C, l_kernel = parameters(case)
    L = round(l_kernel / case.config["rate"])
    omega = torch.exp(-2j * math.pi * torch.arange((L + 1) // 2, dtype=torch.float64) / L)  # -1 is a limit
    v = torch.cat([B, P])[:, None] * torch.cat([C, P.conj()])[None] * dt
    r = cauchy(v.flatten(0, 1), 2 * (1 - omega) / (1 + omega), dt * A).unflatten(0, (2, 2))
    k = 2 / (1 + omega) * (r[0, 0] - r[0, 1] * r[1, 0] / (1 + r[1, 1]))
    if L % 2 == 0:
        k = torch.cat([k, v[0, 0].real.sum(-1, keepdim=True) + 0j], dim=1)
    k = torch.fft.irfft(k, n=L)[:, : case.config["L"]]
    assert error(k[None], case.tensors["output64.k"]) < 1e-9


def drawn(config: dict, l_kernel: int) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in SYSTEMS["s4"].keys(SYSTEMS["s4"].read(config)).items():
        t = 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
        state[key] = t - 1.5 if key.endswith("inv_dt") else torch.tensor(l_kernel) if key.endswith("l_kernel") else t
    return from_official("s4", config, state), state


TRANSFORMED = {"exp": torch.exp, "softplus": F.softplus, "none": lambda p: p, "relu": lambda p: F.relu(p) + 1e-4}
ACT = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, None: lambda y: y, "id": lambda y: y}
ACT["glu"] = lambda y: F.glu(y, dim=-1)


def official_kernel(c: dict, p: dict[str, Tensor], length: int) -> Tensor:
    """(K, H, length) of SSMKernelDPLR, its length found, doubled and undone with matrices."""
    rate = c.get("rate", 1.0)
    dt = TRANSFORMED[c.get("dt_transform", "exp")](p["inv_dt"].sinh() if c.get("dt_fast") else p["inv_dt"])
    A = torch.complex(
        -TRANSFORMED[c.get("real_transform", "exp")](p["A_real"]),
        -TRANSFORMED[c.get("imag_transform", "none")](p["A_imag"]),
    )
    rows = [h % len(A) for h in range(len(dt))]
    A, P, B = A[rows], torch.view_as_complex(p["P"])[:, rows], torch.view_as_complex(p["B"])[0, rows]
    C, l = doubled(torch.view_as_complex(p["C"])), int(p["l_kernel"])
    slow, _ = bilinear(A, P, B, dt)
    if l == 0:
        l = c.get("l_max") or round(rate * length)
        C = C - torch.einsum("chn,hnm->chm", C, torch.linalg.matrix_power(slow, l))
    while round(rate * length) > l:
        C = C + torch.einsum("chn,hnm->chm", C, torch.linalg.matrix_power(slow, l))
        l = 2 * l
    if c.get("bandlimit"):
        C = C * doubled(dt * A.imag.abs() / (2 * math.pi) < c["bandlimit"] / 2)
    a, b = bilinear(A, P, B, dt * rate)
    left = torch.eye(a.shape[1]) - torch.linalg.matrix_power(a, round(l / rate))
    return krylov(a, b, torch.einsum("chn,hnm->chm", C, torch.linalg.inv(left)), length)


def official_block(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """S4Block with a diagonal plus low rank kernel, x (B, H, L)."""
    c = {"activation": "gelu", "mult_act": None, "final_act": "glu", "rate": 1.0, **config}
    L = x.shape[2]
    K = L if c.get("l_max") is None else min(L, round(c["l_max"] / c["rate"]))
    k = official_kernel(c, under("layer.kernel.", state), K)
    k, ahead = k.chunk(2) if c.get("bidirectional") else (k, None)

    def weight(lag):
        if lag >= 0:
            return k[:, :, lag] if lag < K else None
        return ahead[:, :, -lag - 1] if ahead is not None and -lag - 1 < K else None

    y = convolved(x[:, None], weight) + state["layer.D"][:, :, None] * x[:, None]  # (B, C, H, L)
    y = y.transpose(1, 2) if c.get("swap_channels") else y
    y = ACT[c["mult_act"]](ACT[c["activation"]](y.flatten(1, 2).transpose(1, 2)))
    if c["final_act"] is not None:
        y = ACT[c["final_act"]](F.linear(y, state["output_linear.0.weight"], state["output_linear.0.bias"]))
    return y.transpose(1, 2)


@pytest.mark.parametrize("l_kernel", [11, 3, 40, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "channels": 2},
        {"n_ssm": 2, "rank": 2, "channels": 2, "swap_channels": True, "mode": "dplr"},
        {"rank": 3, "n_ssm": 1, "dt_tie": False},
        {"n_ssm": 2, "rank": 2, "dt_tie": False, "rate": 2.0, "bidirectional": True, "l_max": 9},
        {"n_ssm": 1, "dt_transform": "softplus", "real_transform": "relu", "imag_transform": "exp", "dt_fast": True},
        {"rate": 2.0, "l_max": 8, "rank": 2},
        {"rate": 0.5, "l_max": 8, "bidirectional": True},
        {"rate": 0.5, "dt_tie": False},
        {"l_max": 5, "activation": "tanh", "mult_act": "relu", "final_act": None, "mode": "s4"},
        {"activation": "glu", "final_act": "id", "mode": None, "kernel": "nplr"},
        {"bandlimit": 0.02, "rate": 2.0, "n_ssm": 2},
        {"dt_transform": "softplus", "dt_fast": True, "real_transform": "relu", "imag_transform": "softplus"},
    ],
    ids=str,
)
@torch.no_grad()
def test_block_by_its_formula(options, l_kernel):
    config = {"d_model": 4, "d_state": 6, **options}
    module, state = drawn(config, l_kernel)
    x = series(2, 4, 11)
    expected = official_block(config, state, x)
    assert error(module(x=x), expected) < 1e-9
    upright = from_official("s4", {**config, "transposed": False}, state)
    assert error(upright(x=x.transpose(1, 2)), expected.transpose(1, 2)) < 1e-9


def test_the_length_survives_any_dtype():
    config = {"d_model": 2, "d_state": 4}
    module, state = drawn(config, 1023)
    assert module.bfloat16().conv.filter.l_kernel == 1023  # which bfloat16 itself does not have
    rounded = {key: t.bfloat16() if t.is_floating_point() else t for key, t in state.items()}
    assert from_official("s4", config, rounded)(x=series(1, 2, 9).bfloat16()).isfinite().all()


def test_a_kernel_without_a_length_takes_its_trained_one():
    case = golden("s4kernel__rate2_L33")
    k = from_official("s4kernel", {**case.config, "L": None}, case.state(torch.float64))()
    assert error(k, case.tensors["output64.k"]) < 1e-9


@pytest.mark.parametrize(("channels", "l_kernel"), [(1, 4), (2, 4), (1, 40), (2, 0)])
@torch.no_grad()
def test_block_state_goes_on(channels, l_kernel):
    module, _ = drawn({"d_model": 3, "d_state": 6, "channels": channels, "rank": 2, "n_ssm": 1}, l_kernel)
    x, state = series(2, 3, 11), torch.view_as_real(module.conv.init_state(2))
    ys = []
    for piece in x.split([4, 1, 6], dim=2):
        y, state = module(x=piece, state=state).values()
        assert state.shape == (2, 3, 3, 2)
        ys.append(y)
    assert error(torch.cat(ys, dim=2), module(x=x)) < 1e-9


@pytest.mark.parametrize(
    "path", [p for p in GOLDEN if p.stem.startswith("s4__") and load(p).part("step.")], ids=lambda path: path.stem
)
@torch.no_grad()
def test_steps_are_the_official_convolution(path):
    case = load(path)
    module, x = case.module(), case.inputs(torch.float64)["x"]
    state, ys = module.conv.init_state(len(x)), []
    for piece in x.split(1, dim=2):
        y, state = module(x=piece, state=state).values()
        ys.append(y)
    assert error(torch.cat(ys, dim=2), case.tensors["output64.y"]) < 1e-9


def test_version_3_of_the_layer_becomes_version_4():
    case = load(FOLDER / "legacy" / "s4__v3tov4_nt_legs_H6_L40.safetensors")
    ours = v3_to_v4(case.part("state_v3.layer."))
    theirs = case.part("state_v4.layer.")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    module = from_official("s4", case.config, {key: t.double() for key, t in ours.items()})
    assert error(module(x=case.inputs(torch.float64)["x"]).float(), case.tensors["output.v4"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "shift"}, "mode = 'shift'"),
        ({"kernel": "nplr"}, "give one of mode and kernel"),
        ({"is_real": True}, "is_real = True is not carried over for mode = 'nplr'"),
        ({"rank": 2}, r"'layer.kernel.P' has shape \(1, 8, 8, 2\); the config asks for \(2, 8, 8, 2\)"),
        ({"n_ssm": 3}, "n_ssm = 3 does not divide d_model = 8"),
        ({"gate": 2}, "gate = 2"),
        ({"ranks": 1}, "did you mean 'rank'"),
    ],
)
def test_official_options_that_are_not_carried_over(change, words):
    case = golden("s4__legs_H8_L64")
    with pytest.raises(ValueError, match=f"^s4: .*{words}"):
        from_official("s4", {**case.config, **change}, case.state(torch.float32))


def test_impossible_states_are_refused():
    x, h = torch.zeros(1, 2, 5).double(), torch.zeros(1, 2, 2, dtype=torch.complex128)
    for options, words in [
        ({"bidirectional": True}, "bidirectional"),
        ({"rate": 2.0}, "rate"),
        ({"l_max": 3}, "l_max"),
    ]:
        module, _ = drawn({"d_model": 2, "d_state": 4, **options}, 4)
        with pytest.raises(ValueError, match=words):
            module(x=x, state=h)
    module, state = drawn({"d_model": 2, "d_state": 4}, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        module(x=x, state=h[:, :1])
    with pytest.raises(ValueError, match=r"'l_kernel' .* got -1"):
        from_official("s4", {"d_model": 2, "d_state": 4}, {**state, "layer.kernel.l_kernel": torch.tensor(-1)})
    case = golden("s4dkernel__lin_dss_L45")
    with pytest.raises(ValueError, match="'dss' has no state"):
        case.module()(state=torch.zeros(1, 4, 8, 2).double())
    with pytest.raises(ValueError, match="'L' is missing"):
        from_official("s4dkernel", {"d_model": 4}, case.state(torch.float32))
