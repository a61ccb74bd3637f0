"""Liquid-S4, the S4 layer of version 3 around it, and the authors' SequenceModel, by slow and plain formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from official import convolved, error, series
from torch import Tensor, nn

from longwave.mixers import MIXERS
from longwave.mixers.liquid_s4 import BILINEAR
from longwave.nn import OutputGLU
from longwave.official import SYSTEMS, from_official
from longwave.official.blocks import BatchNorm

ACT = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "glu": F.glu, "id": lambda x: x, None: lambda x: x}
TRANSFORMED = {"exp": torch.exp, "softplus": F.softplus, "relu": lambda x: F.relu(x) + 1e-4}


def draw(system: str, config: dict, length: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module and its official state at random; ``length`` is the one that C is stored for."""
    rng, options = torch.Generator().manual_seed(1), SYSTEMS[system].read(config)
    state = {}
    for key, shape in {**SYSTEMS[system].keys(options), **SYSTEMS[system].extra(options)}.items():
        t = torch.randn(shape, generator=rng, dtype=torch.float64)
        state[key] = 0.3 * t - 1.5 if key.endswith(("inv_dt", "log_dt")) else t
        if key.endswith("running_var"):
            state[key] = t.abs() + 0.1
        if key.endswith((".L", "l_kernel")):
            state[key] = torch.tensor(length)
    return from_official(system, config, state), state


def liquid_recurrence(a: Tensor, b: Tensor, c: Tensor, u: Tensor) -> Tensor:
    """h[t] = (a + b u[t]) h[t-1] + b u[t],  y = 2 Re <c, h>, of diagonal (C, N) systems; u (B, L, C)."""
    h, ys = torch.zeros(len(u), *a.shape, dtype=a.dtype), []
    for x in u.unbind(1):
        h = (a + b * x[..., None]) * h + b * x[..., None]
        ys.append(2 * (c * h).sum(-1).real)
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize("degree", [2, 4])
@torch.no_grad()
def test_two_successive_inputs_are_the_liquid_recurrence(degree, monkeypatch):
    """Its first steps after silence have no product but of successive inputs."""
    layer = MIXERS["liquid_s4"](3, degree, "kb", {**BILINEAR, "d_state": 8, "dt_min": 0.5, "dt_max": 0.9}).double()
    layer.D = nn.Parameter(torch.zeros(3).double())
    monkeypatch.setattr(OutputGLU, "around", staticmethod(lambda linear, y: y))
    u = F.pad(series(2, 2, 3), (0, 0, 3, 0))
    y = layer(u)[0]
    expected = liquid_recurrence(*layer.kernel.realize(), u)
    assert error(y, expected) < 1e-12
    longer = series(2, 5, 3)
    assert error(layer(longer)[0], liquid_recurrence(*layer.kernel.realize(), longer)) > 1e-3


@pytest.mark.parametrize("filter", ["s4d", "s4"])
@pytest.mark.parametrize("liquid", ["pb", "kb"])
@pytest.mark.parametrize("degree", [2, 3])
@torch.no_grad()
def test_the_mixer_by_its_formula(filter, liquid, degree):
    torch.manual_seed(0)
    options = {**(BILINEAR if filter == "s4d" else {"kind": filter}), "d_state": 6, "dt_min": 0.2, "dt_max": 0.9}
    layer = MIXERS["liquid_s4"](3, degree, liquid, options).double()
    u, k = series(2, 9, 3), layer.kernel
    dt = k.log_dt.exp()[:, None, None]
    pairs = lambda z: torch.cat([z, z.conj()], dim=-1)  # noqa: E731
    A, B, C = (
        pairs(z) for z in (torch.complex(-k.log_A_real.exp(), k.A_imag), *map(torch.view_as_complex, (k.B, k.C)))
    )
    A = torch.diag_embed(A)
    if filter == "s4":
        P = pairs(torch.view_as_complex(k.P))
        A = A - torch.einsum("rcn,rcm->cnm", P, P.conj())
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    a = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    b = torch.linalg.solve(eye - dt / 2 * A, dt * B[..., None])[..., 0]
    y = layer.D * u
    for q in range(1, degree + 1):
        v = math.prod(F.pad(u, (0, 0, j, 0))[:, :9] for j in range(q))
        taps = [(C * (torch.linalg.matrix_power(a, l) @ b[..., None] ** q)[..., 0]).sum(-1).real for l in range(9)]
        if q > 1 and liquid == "pb":
            taps = taps[:1]
        y = y + convolved(v.transpose(1, 2), dict(enumerate(taps)).get).transpose(1, 2)
    assert error(layer(u)[0], OutputGLU.around(layer.output_linear, y)) < 1e-11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 1}, r"degree >= 2; got 1"),
        ({"liquid": "pbb"}, r"no liquid kernel is called 'pbb'; there are pb, kb; did you mean 'pb'"),
        ({"filter": "hyena"}, r"no state space is called 'hyena'; there are s4d, s4"),
        ({"filter": {"kind": "s4", "d_state": 5}}, r"d_state must be even, >= 2; got 5"),
    ],
)
def test_what_the_mixer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS["liquid_s4"](8, **options)


def v3_kernel(c: dict, state: dict[str, Tensor], H: int, L: int) -> Tensor:
    """(rows, H, L) by powers of the dense complex matrix."""
    k = {key.removeprefix("kernel.kernel."): t for key, t in state.items() if key.startswith("kernel.kernel.")}
    diag, rate = c.get("mode") == "diag", c.get("rate", 1.0)
    real = TRANSFORMED[c.get("real_type", "exp")](k["inv_A_real" if diag else "inv_w_real"])
    w = torch.complex(-real, k["A_imag" if diag else "w_imag"])
    groups = [h % len(w) for h in range(H)]
    B = torch.view_as_complex(k["B"]).flatten(0, -2)[groups]
    w, C, dt = w[groups], torch.view_as_complex(k["C"]), k["log_dt"].exp()[:, None]
    if c.get("bandlimit"):
        C = torch.where(dt * w.imag.abs() / (2 * math.pi) < c["bandlimit"] / 2, C, 0)
    dt = dt * rate
    if diag and c.get("disc") == "zoh":
        return (
            2
            * torch.stack(
                [(C * B * (torch.exp(dt * w) - 1) / w * torch.exp(dt * w * l)).sum(-1) for l in range(L)], -1
            ).real
        )
    pairs = lambda z: torch.cat([z, z.conj()], dim=-1)  # noqa: E731
    A, B, C = torch.diag_embed(pairs(w)), pairs(B), pairs(C)
    if not diag:
        P = pairs(torch.view_as_complex(k["P"]))[:, groups]
        A = A - torch.einsum("rhn,rhm->hnm", P, P.conj())
    eye, step = torch.eye(A.shape[-1], dtype=A.dtype), dt[..., None]
    a = torch.linalg.solve(eye - step / 2 * A, eye + step / 2 * A)
    b = torch.linalg.solve(eye - step / 2 * A, step * B[..., None])[..., 0]
    if not diag:
        gone = eye - torch.linalg.matrix_power(a, round(int(k["L"]) / rate))
        C = torch.linalg.solve(gone.mT, C.transpose(0, 1).mT).mT.transpose(0, 1)
    return torch.stack(
        [torch.einsum("khn,hnm,hm->kh", C, torch.linalg.matrix_power(a, l), b) for l in range(L)], -1
    ).real


def liquid_products(c: dict, u: Tensor) -> list[Tensor]:
    """Of u (B, H, L), in reversed order of time."""
    act = {None: lambda x: x, "tanh": torch.tanh, "lecun": lambda x: 1.7159 * torch.tanh(0.666 * x)}[c.get("lcontract")]
    L, v, found = u.shape[-1], u, []
    for q in range(2, c.get("liquid_degree", 2) + 1):
        if c.get("allcombs", True):
            n = min(n for n in range(2, L) if math.comb(n, q) >= L)
            steps = list(itertools.combinations(range(L - n, L), q))[-L:]
            v = torch.stack([math.prod(u[..., i] for i in chosen) for chosen in steps], dim=-1)
        else:
            v = torch.cat([0 * v[..., :1], v[..., 1:] * v[..., :-1]], dim=-1)
        found.append(act(v).flip(-1))
    return found


def v3_formula(c: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """x (B, H, L) or, not transposed, (B, L, H), as the official code computes."""
    u = x if c.get("transposed", True) else x.transpose(1, 2)
    linear = lambda name, x: F.linear(  # noqa: E731
        x.transpose(1, 2), *(state[name + part] for part in (".weight", ".bias"))
    ).transpose(1, 2)
    act, post = ACT[c.get("activation", "gelu")], c.get("postact", "glu")
    if c.get("gate"):
        gate = act(linear("input_gate.0", u))
    if c.get("bottleneck"):
        u = act(linear("input_linear.0", u))
    H, L = u.shape[1:]
    Lk = min(L, round(c["l_max"] / c.get("rate", 1.0))) if c.get("l_max") else L
    k = v3_kernel(c, state, H, Lk)
    if c.get("bidirectional"):
        k0, k1 = k.chunk(2)
        k = F.pad(k0, (0, L)) + F.pad(k1.flip(-1), (L, 0))
    n = Lk + L
    if c.get("shift"):
        f = torch.fft.rfft(F.pad(k.flip(-1), (L, 0)), n=2 * L)
        g = torch.fft.rfft(F.pad(u.flip(-1), (L, 0)), n=2 * L)
        y = torch.fft.irfft(g[:, None] * f, n=2 * L)[..., L:].flip(-1)
    else:
        spectrum = torch.fft.rfft(u, n=n)[:, None] * torch.fft.rfft(k, n=n)
        if c.get("liquid_kernel") == "kb":
            kb = k
            for v in liquid_products(c, u):
                kb = kb * stashed(state)[0].sum(-1).real[:, None]
                spectrum = spectrum + torch.fft.rfft(v, n=n)[:, None] * torch.fft.fft(kb, n=n // 2 + 1)
        y = torch.fft.irfft(spectrum, n=n)[..., :L]
    y = y + state["D"][..., None] * u[:, None]
    if c.get("liquid_kernel") == "polyb":
        b, C = stashed(state)
        for v in liquid_products(c, u):
            b = (b[:, :, None] * b[:, None]).sum(2)
            weight = (C * b).sum(-1).real[..., None]
            y = y + (v * weight[0])[:, None]
            if c.get("bidirectional"):
                y = y + (v.flip(2) * weight[1])[:, None]
    if c.get("hyper_act"):
        y, yh = y.chunk(2, dim=1)
        y = ACT[c["hyper_act"]](yh) * y
    y = y.flatten(1, 2)
    if not c.get("linear"):
        y = act(y).transpose(1, 2)
        name = "output_linear" if post is None else "output_linear.0"
        y = ACT[post](F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])).transpose(1, 2)
    if c.get("gate"):
        y = linear("output_gate", y * gate)
    return y if c.get("transposed", True) else y.transpose(1, 2)


def stashed(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """b and C with their conjugates."""
    B, C, w = (torch.view_as_complex(state[f"kernel.{key}"]) for key in "BCw")
    dt = state["kernel.log_dt"].exp()[:, None]
    b = dt * B / (1 - dt / 2 * w)
    return torch.cat([b, b.conj()], dim=-1), torch.cat([C, C.conj()], dim=-1)


V3_OPTIONS = [
    {"n_ssm": 2, "channels": 2, "bidirectional": True, "rank": 2},
    {"l_max": 6, "postact": None, "activation": "relu", "hyper_act": "tanh"},
    {"l_max": 16, "rate": 0.5, "postact": "id", "real_type": "softplus"},
    {"linear": True, "channels": 2, "transposed": False},
    {"shift": True, "channels": 2, "n_ssm": 1},
    {"mode": "diag", "shift": True, "l_max": 20, "transposed": False},
    {"mode": "diag", "bidirectional": True, "l_max": 7, "hyper_act": "relu", "channels": 2},
    {"mode": "diag", "disc": "zoh", "rate": 2.0, "bandlimit": 0.1, "real_type": "relu", "linear": True},
    {"gate": 3, "bottleneck": 2, "postact": "tanh", "channels": 2},
    {"mode": "diag", "gate": 2, "bidirectional": True},
    {"bottleneck": 4, "activation": "id", "n_ssm": 1},
    {"liquid_kernel": "polyb", "liquid_degree": 4, "allcombs": False},
    {"liquid_kernel": "polyb", "bidirectional": True, "liquid_degree": 3, "lcontract": "tanh", "n_ssm": 1},
    {"liquid_kernel": "polyb", "mode": "diag", "disc": "zoh", "l_max": 6, "transposed": False, "bottleneck": None},
    {"liquid_kernel": "kb", "liquid_degree": 3, "l_max": 6, "channels": 2, "lcontract": "lecun"},
    {"liquid_kernel": "kb", "bidirectional": True, "allcombs": False, "l_max": 7, "hyper_act": "tanh"},
    {"liquid_kernel": "kb", "mode": "diag", "gate": 1, "bottleneck": 2, "linear": False},
]


@pytest.mark.parametrize("options", V3_OPTIONS, ids=str)
@torch.no_grad()
def test_v3_layer_by_its_formula(options):
    config = {"d_model": 4, "d_state": 6, **options}
    module, state = draw("s4v3", config, length=16)
    x = series(2, 4, 13) if config.get("transposed", True) else series(2, 13, 4)
    expected = v3_formula(config, state, x)
    assert error(module(x=x), expected) < 1e-9
    assert error(from_official("liquid_s4", config, state)(u=x), expected) < 1e-9


@pytest.mark.parametrize("mode", ["nplr", "diag"])
@torch.no_grad()
def test_without_its_stash_a_liquid_layer_takes_what_it_would_have_started_from(mode):
    config = {"d_model": 4, "d_state": 6, "liquid_kernel": "polyb", "mode": mode}
    _, state = draw("liquids4", config, length=16)
    saved = {key: t for key, t in state.items() if key.startswith("kernel.kernel.") or not key.startswith("kernel.")}
    k, x = {key.removeprefix("kernel.kernel."): t for key, t in saved.items()}, series(2, 4, 13)
    w = torch.view_as_complex(k["A"]) if mode == "diag" else torch.complex(-k["inv_w_real"].exp(), k["w_imag"])
    kept = {"B": torch.view_as_complex(k["B"].reshape(4, 3, 2)), "C": torch.view_as_complex(k["C"]).conj(), "w": w}
    stash = {f"kernel.{key}": t.resolve_conj() for key, t in kept.items()} | {"kernel.log_dt": k["log_dt"]}
    module = from_official("liquids4", config, saved)
    assert torch.equal(module(x=x), from_official("liquids4", config, {**saved, **stash})(x=x))  # complex as it is
    assert all(t.dtype == torch.float64 for t in module.state_dict().values() if t.is_floating_point())
    assert not any("stash" in name for name, _ in module.named_parameters())


@torch.no_grad()
def test_states_of_the_v3_layer():
    config = {"d_model": 4, "d_state": 6, "hyper_act": "tanh", "n_ssm": 2, "gate": 1}
    module, state = draw("s4v3", config, length=16)
    x, carried, pieces = series(2, 4, 13), module.block.conv.init_state(2), []
    for piece in x.split([1, 5, 7], dim=2):
        y, carried = module(piece, carried).values()
        pieces.append(y)
    assert error(torch.cat(pieces, dim=2), module(x=x)) < 1e-11
    late = from_official("s4v3", {**config, "shift": True}, state)
    with pytest.raises(ValueError, match="shift = True has no state"):
        late(x, carried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": 1, "transposed": False}, r"gate and bottleneck need transposed = True"),
        ({"shift": True, "bidirectional": True}, r"shift = True with bidirectional = True is not carried over"),
        ({"real_type": "relu"}, r"real_type = 'relu' is not carried over in mode = 'nplr'"),
        ({"mode": "slow"}, r"the option mode = 'slow' is not carried over; longwave has 'nplr', 'diag'"),
        ({"weight_norm": True}, r"the option weight_norm = True is not carried over"),
        ({"liquid_degree": 1}, r"liquid_degree = 1 must be a whole number >= 2"),
        ({"liquid_kernel": "kb", "shift": True}, r"shift = True is not carried over with liquid_kernel = 'kb'"),
        ({"liquid_kernel": "polyb", "channels": 2}, r"'polyb' takes channels = 1 and no hyper_act"),
        ({"liquid_kernel": "kb", "n_ssm": 2}, r"n_ssm = 2 with liquid_kernel must be 1 or 4"),
        ({"liquid_kernel": "pb"}, r"the option liquid_kernel = 'pb' is not carried over"),
    ],
)
def test_what_the_v3_layer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        from_official("s4v3", {"d_model": 4, **options}, {})


@torch.no_grad()
def test_bad_lengths_and_stashes_are_named():
    config = {"d_model": 4, "d_state": 6, "mode": "diag"}
    module, state = draw("liquids4", {**config, "liquid_kernel": "polyb"})
    with pytest.raises(ValueError, match=r"liquid_degree = 2 with allcombs = True needs a longer input than L = 4"):
        module(x=torch.zeros(1, 4, 4).double())
    with pytest.raises(
        ValueError, match=r"'kernel.w' has shape \(4, 2\) as a real view; the config asks for \(4, 3, 2\)"
    ):
        from_official("liquids4", {**config, "liquid_kernel": "polyb"}, {**state, "kernel.w": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match=r"unexpected key 'kernel.B'"):
        from_official("liquids4", config, state)
    shifted, _ = draw("s4v3", {**config, "shift": True, "l_max": 5})
    with pytest.raises(ValueError, match=r"with shift = True, L = 6 must not exceed l_max = 5"):
        shifted(x=torch.zeros(1, 4, 6).double())


S4_LAYER = {"_name_": "s4", "d_state": 6, "mode": "diag", "lr": {"dt": 0.001}, "dropout": 0.1}
MODEL_OPTIONS = [
    {"layer": {"_name_": "ffn", "activation": "glu", "expand": 1.5}, "norm": "layer", "residual": "A", "n_repeat": 2},
    {"layer": [S4_LAYER, {"_name_": "ffn", "activation": None}], "norm": "layer", "transposed": True, "residual": "R"},
    {"layer": S4_LAYER, "norm": "batch", "residual": {"_name_": "decay", "power": 1.0}, "n_layers": 3},
    {"layer": S4_LAYER, "norm": {"_name_": "batch"}, "prenorm": False, "residual": {"_name_": "D", "l2": False}},
    {"layer": S4_LAYER, "norm": "group", "prenorm": False, "residual": {"_name_": "A", "scalar": False, "alpha": 0.5}},
    {"layer": S4_LAYER, "norm": "instance", "transposed": True, "residual": {"_name_": "R", "beta": 0.3}},
    {
        "layer": {**S4_LAYER, "bidirectional": True},
        "norm": "none",
        "residual": "F",
        "pool": {"_name_": "sample", "pool": 1},
    },
    {"layer": S4_LAYER, "bidirectional": True, "norm": "layer", "n_layers": 2, "rate": 0.5},
    {"layer": S4_LAYER, "norm": {"_name_": "layer", "scalar": False}, "transposed": True, "residual": "residual"},
]


def model_formula(c: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    def norm(prefix, x):
        p = {
            key.removeprefix(prefix + "norm.norm."): t
            for key, t in state.items()
            if key.startswith(prefix + "norm.norm.")
        }
        kind, arguments = (c["norm"], {}) if isinstance(c.get("norm"), str | None) else (c["norm"]["_name_"], c["norm"])
        if kind == "layer" and c.get("transposed") and arguments.get("scalar", True):
            return p["s"] / x.std(-1, correction=0, keepdim=True) * (x - x.mean(-1, keepdim=True) + p["m"])
        if kind == "layer":
            scale, shift = (p.get(f"ln.{name}", p.get(name)) for name in ("weight", "bias"))
            return F.layer_norm(x, x.shape[-1:], scale, shift)
        if kind == "batch":
            return (x - p["running_mean"]) / (p["running_var"] + 1e-5).sqrt() * p["weight"] + p["bias"]
        if kind in ("group", "instance"):
            dims = (1, 2) if kind == "group" else (1,)
            x = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
            return x * p["weight"] + p["bias"] if kind == "group" else x
        return x

    def layer(prefix, config, x):
        p = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        if config["_name_"] == "s4":  # tested by itself
            options = {k: v for k, v in config.items() if k != "_name_"}
            return from_official("s4", {**options, "d_model": 4, "rate": c.get("rate", 1.0), "transposed": False}, p)(
                x=x
            )
        first = "ff.0" if config["activation"] is None else "ff.0.0"
        x = ACT[config["activation"]](F.linear(x, p[f"{first}.weight"], p[f"{first}.bias"]))
        return F.linear(x, p["ff.2.weight"], p["ff.2.bias"])

    layers = c["layer"] if isinstance(c["layer"], list) else [c["layer"]]
    residual = c.get("residual")
    kind, arguments = (residual, {}) if isinstance(residual, str | None) else (residual["_name_"], residual)
    for i, config in enumerate(layers * c.get("n_layers", 1) * c.get("n_repeat", 1)):
        prefix = f"layers.{i}."
        heard = norm(prefix, x) if c.get("prenorm", True) else x
        y = layer(prefix + "layer.", config, heard)
        if c.get("bidirectional"):
            y = torch.cat([y, layer(prefix + "reverse_layer.", config, heard)], dim=-1)
            y = F.linear(y, *(state[f"{prefix}bidirectional_linear.{name}"] for name in ("weight", "bias")))
        beta = (i + 1) ** -arguments.get("power", 0.5)
        if kind in ("R", "residual"):
            y = x + arguments.get("beta", 1.0) * y
        elif kind == "A":
            y = arguments.get("alpha", 1.0) * x + state[f"{prefix}residual.affine"] * y
        elif kind in ("D", "decay"):
            y = (math.sqrt(1 - beta**2) if arguments.get("l2", True) else 1 - beta) * x + beta * y
        x = y if c.get("prenorm", True) else norm(prefix, y)
    return norm("", x) if c.get("prenorm", True) else x


@pytest.mark.parametrize("options", MODEL_OPTIONS, ids=str)
@torch.no_grad()
def test_sequence_model_by_its_formula(options):
    config = {"d_model": 4, "dropout": 0.2, **options}
    module, state = draw("s4model", config)
    assert not module.training
    x = series(2, 7, 4)
    assert error(module(x=x), model_formula(config, state, x)) < 1e-11


@torch.no_grad()
def test_states_of_the_sequence_model():
    config = {"d_model": 4, "layer": [S4_LAYER, {"_name_": "ffn"}], "n_layers": 2, "norm": "batch", "prenorm": False}
    module, _ = draw("s4model", config)
    x, state, pieces = series(2, 7, 4), module.model.init_state(2), []
    for piece in x.split([1, 4, 2], dim=1):
        y, state = module.model(piece, state)
        pieces.append(y)
    assert error(torch.cat(pieces, dim=1), module(x=x)) < 1e-12
    for ahead in ({"norm": "group"}, {"bidirectional": True}, {"layer": {**S4_LAYER, "bidirectional": True}}):
        with pytest.raises(ValueError, match="looks ahead here, so it has no state"):
            draw("s4model", {**config, **ahead})[0].model.init_state(2)


def test_batch_norm_trains_as_that_of_torch():
    ours, theirs, x = BatchNorm(4).double(), nn.BatchNorm1d(4).double(), series(3, 5, 4)
    for shift in (0, 2):
        assert error(ours(x + shift), theirs((x + shift).transpose(1, 2)).transpose(1, 2)) < 1e-12
    assert error(ours.running_mean, theirs.running_mean) < 1e-12
    assert error(ours.running_var, theirs.running_var) < 1e-12
    assert error(ours.eval()(x), theirs.eval()(x.transpose(1, 2)).transpose(1, 2)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "H"}, r"residual = 'H' is not carried over; longwave has R, A, D, F, N"),
        ({"norm": "layr"}, r"no norm is called 'layr'; there are .*did you mean 'layer'"),
        ({"norm": {"_name_": "layer", "eps": 1e-3}}, r"norm = 'layer' with 'eps' is not carried over"),
        ({"pool": "avg"}, r"pool = 'avg' is not carried over"),
        ({"pool": {"_name_": "sample", "stride": 2}}, r"pool = .* is not carried over: longwave has none"),
        ({"layer": {"_name_": "s4d"}}, r"no layer is called 's4d'; there are s4, ffn"),
        ({"layer": {"_name_": "ffn", "d_output": 8}}, r"the option d_output = 8 is not carried over"),
        ({"layer": {"_name_": "s4", "activation": "glu"}}, r"the option activation = 'glu' is not carried over"),
        ({"bidirectional": True, "transposed": True}, r"bidirectional = True needs transposed = False"),
    ],
)
def test_what_the_sequence_model_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        from_official("s4model", {"d_model": 4, "layer": S4_LAYER, **options}, {})
