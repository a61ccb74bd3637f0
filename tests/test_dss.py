"""DSS and GSS: filters against their sums, official options against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from official import convolved, drawn, error, series
from torch import Tensor

from longwave.mixers import MIXERS
from longwave.models.generate import generate
from longwave.nn import FILTERS, DSSFilter, DSSSoftmaxFilter, GSSFilter, nplr, set_rate
from longwave.nn.filters.dss import ClipEigenvalues, init_skew
from longwave.official import SYSTEMS, from_official

ACT = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    **dict.fromkeys((None, "id", "identity", "linear"), lambda x: x),
}


def spread(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def closed(a: Tensor, weight: Tensor, length: int) -> Tensor:
    """Re sum_n weight[n] a[n]^l, term by term."""
    return torch.stack([(weight * a**l).sum(-1).real for l in range(length)], dim=-1)


@pytest.mark.parametrize("eigenvalues", ["exp", "exp_re_im", "clip"])
@pytest.mark.parametrize("discretization", ["zoh", "none"])
@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_dss_filter_is_its_sum(eigenvalues, discretization, rate):
    torch.manual_seed(0)
    f = DSSFilter(3, 4, eigenvalues=eigenvalues, discretization=discretization, dt_max=0.5, rate=rate).double()
    f.log_dt.data += 0.2 * spread(3, 2)
    p = dict(f.Lambda.named_parameters())
    if eigenvalues == "clip":
        p["re_im"].data[1, 0] = 3.0
        Lambda = torch.complex(p["re_im"][:, 0].clamp(max=1e-4), p["re_im"][:, 1])
    else:
        im = p["log_im"].exp() if eigenvalues == "exp_re_im" else p["im"]
        Lambda = torch.complex(-p["log_neg_re"].exp(), im)
    dt = rate * f.log_dt.exp()
    step = torch.complex(dt[:, :1] * Lambda.real, dt[:, 1:] * Lambda.imag)
    b = (step.exp() - 1) / Lambda if discretization == "zoh" else 1
    assert error(f(17), closed(step.exp(), torch.view_as_complex(f.W) * b, 17)) < 1e-10


def test_a_reciprocal_stays_finite():
    f = DSSFilter(2, 1, eigenvalues="clip").double()
    f.Lambda.re_im.data.zero_()
    taps = f(5)
    taps.sum().backward()
    assert torch.isfinite(taps).all()
    assert all(torch.isfinite(p.grad).all() for p in f.parameters())


def test_eigenvalues_start_as_those_of_skew_hippo():
    N = 6
    i = torch.arange(2 * N, dtype=torch.float64)
    hippo = ((2 * i[:, None] + 1) * (2 * i + 1)).sqrt().tril(-1)
    values = torch.linalg.eigvals((hippo - hippo.T) / 2)
    expected = values[values.imag.argsort(descending=True)][:N].imag
    torch.testing.assert_close(init_skew(N).imag, expected, rtol=1e-9, atol=1e-9)
    assert (init_skew(N).real + 0.5).abs().max() < 1e-9
    for name in ("exp", "exp_re_im", "clip"):
        assert error(DSSFilter(2, N, eigenvalues=name).Lambda().imag.double(), expected) < 1e-6
    assert nplr("legs", 2 * N)[0].shape == (N,)


def softmax_formula(Lambda: Tensor, log_dt: Tensor, W: Tensor, length: int) -> Tensor:
    """W / Lambda times a softmax over time, by torch's own exponentials."""
    dt = log_dt.exp()
    step = torch.complex(dt[:, :1] * Lambda.real, dt[:, 1:] * Lambda.imag)
    powers = torch.exp(step[..., None] * torch.arange(length))
    return torch.einsum("cn,cnl->cl", W / Lambda, powers / powers.sum(-1, keepdim=True)).real


def growing(f: DSSSoftmaxFilter) -> None:
    with torch.no_grad():
        f.Lambda[::2, 0] *= -1
        f.log_dt += 0.2 * spread(*f.log_dt.shape)


def test_softmax_filter_is_normalised_over_max_len():
    torch.manual_seed(0)
    f = DSSSoftmaxFilter(3, 20, 4, dt_min=0.3, dt_max=0.5).double()
    growing(f)
    Lambda, W = torch.view_as_complex(f.Lambda), torch.view_as_complex(f.W)
    expected = softmax_formula(Lambda, f.log_dt, W, 20)
    assert error(f(20), expected) < 1e-6  # the reciprocal's epsilon
    assert error(f(7), f(20)[:, :7]) < 1e-12
    weight = spread(3, 20, seed=3)
    ours = torch.autograd.grad((f(20) * weight).sum(), list(f.parameters()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(f.parameters()))
    for a, b in zip(ours, theirs):
        assert error(a, b) < 1e-5
    f.Lambda.data[0, 0] = 1e4  # would overflow, were its powers not taken backwards
    assert torch.isfinite(f(20)).all()


def test_a_softmax_filter_has_one_length():
    with pytest.raises(ValueError, match=r"max_len = 20 .*sequence of 21; build it with max_len >= 21"):
        DSSSoftmaxFilter(2, 20, 4)(21)
    layer = MIXERS["dss_softmax"](8, max_len=16, d_state=4)
    _, state = layer(torch.zeros(1, 16, 8), layer.init_state(1))
    with pytest.raises(ValueError, match=r"max_len = 16"):
        layer(torch.zeros(1, 1, 8), state)


def test_gss_filter_is_its_sum():
    torch.manual_seed(0)
    f = set_rate(GSSFilter(3, 4).double(), 2.0)
    Lambda = torch.complex(-f.Lambda.log_neg_re.exp(), f.Lambda.log_im.exp())
    a = (2.0 * Lambda).exp()
    expected = closed(a, torch.view_as_complex(f.C) * (a - 1) / Lambda, 17)
    assert error(f(17), expected) < 1e-10
    system = f.realize()
    x = spread(2, 9, 3)
    h = torch.zeros(2, 3, 4, dtype=torch.complex128)
    for t in range(9):
        h = system.a * h + system.b * x[:, t, :, None]
    assert error(torch.view_as_real(system.advance(system.rest(2), x)), torch.view_as_real(h)) < 1e-10
    after = torch.stack([(system.c * system.a ** (l + 1) * h).sum(-1).real for l in range(6)], dim=-1)
    assert error(system.response(h, 6), after) < 1e-10


@pytest.mark.parametrize("name", ["dss", "gss"])
def test_states_do_not_grow(name):
    layer = MIXERS[name](8, d_state=4)
    shapes = [layer(torch.zeros(1, L, 8), layer.init_state(1))[1][0].shape for L in (10, 100)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dss", {"eigenvalues": "expp"}, r"'expp'; there are exp, exp_re_im, clip; did you mean 'exp'"),
        ("dss", {"discretization": "zho"}, r"no discretization of DSS is called 'zho'.*did you mean 'zoh'"),
        ("dss", {"d_state": 0}, r"d_state >= 1; got 0"),
        ("dss", {"dt_min": 1.0}, r"0 < dt_min <= dt_max; got dt_min = 1.0"),
        ("dss", {"rate": -1.0}, r"> 0; got rate = -1.0"),
        ("dss_softmax", {"max_len": 0}, r"max_len >= 1; got 0"),
        ("gss", {"channels": 0}, r"channels >= 1; got .* and 0"),
        ("gss", {"expand": 0.1}, r"expand \* d_model >= 1 .*got 0.1 \* 8"),
        ("gss", {"d_state": 0}, r"d_state >= 1; got 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](8, **options)


def test_filters_by_name():
    for name in ("dss", "dss_softmax", "gss"):
        options = {"d_state": 4, **({"max_len": 32} if name == "dss_softmax" else {})}
        layer = MIXERS["two_sided"](8, filter={"kind": name, **options})
        assert isinstance(layer.kernel, FILTERS[name])
        assert layer(torch.zeros(1, 5, 8))[0].shape == (1, 5, 8)
    assert DSSFilter(2, 3, eigenvalues=ClipEigenvalues(3, -0.1))(4).shape == (2, 4)


def dss_kernel(c: dict, s: dict[str, Tensor], length: int) -> Tensor:
    """(K, H, length), as the official code has it: shifts and clamps included."""
    version = c.get("version", "softmax")
    if "exp" in version:
        im = s["Lambda_log_im"].exp() if "im" in version else s["Lambda_im"]
        Lambda = torch.complex(-s["Lambda_log_neg_re"].exp(), im)
    else:
        re = s["Lambda"][:, 0]
        re = re.clip(max=c.get("max_real_Lambda", 1e-4)) if "clip" in version else re
        Lambda = torch.complex(re, s["Lambda"][:, 1])
    dt = s["log_dt"].exp()
    if c.get("sep_dt_re_im", True):
        dtL = torch.complex(dt[:, :1] * Lambda.real, dt[:, 1:] * Lambda.imag)
    else:
        dtL = dt[:, None] * Lambda
    W, P = torch.view_as_complex(s["W"]), dtL[..., None] * torch.arange(length)
    if version == "softmax":
        grows = Lambda.real > 0
        P = P - (dtL * grows * (length - 1)).detach()[..., None]
        neg = torch.where(grows, -dtL, dtL)
        x = ((neg * length).exp() - 1) * Lambda
        W = W * (neg.exp() - 1) * x.conj() / (x * x.conj() + c.get("epsilon", 1e-7))
    elif "no-scale" not in version:
        W = W * (dtL.exp() - 1) * Lambda.conj() / (Lambda * Lambda.conj()).real.clamp(1e-7)
    return torch.einsum("chn,hnl->chl", W, P.exp()).real


def dss_formula(c: dict, s: dict[str, Tensor], u: Tensor) -> Tensor:
    """u (B, H, L), with the convolution on the official circle."""
    L = u.shape[-1]
    K = min(c.get("max_kernel_length") or L, L)
    k = dss_kernel(c, {key.removeprefix("kernel."): t for key, t in s.items()}, K)
    if c.get("bidirectional"):
        behind, ahead = k.chunk(2)
        k = F.pad(behind, (0, K)) + F.pad(ahead.flip(-1), (K, 0))
    n = L + K
    circle, wrapped = F.pad(k, (0, n - k.shape[-1])), F.pad(u, (0, K))[:, None]
    y = sum(circle[..., p : p + 1] * wrapped.roll(p, -1) for p in range(n))[..., :L]
    y = (y + s["D"][..., None] * u[:, None]).flatten(1, 2).transpose(1, 2)
    if c.get("hyper_act") is not None:
        y, gate = y.chunk(2, dim=-1)
        y = ACT[c["hyper_act"]](gate) * y
    y = ACT[c.get("activation", "gelu")](y)
    name = "output_linear" if c.get("postact") is None else "output_linear.0"
    y = F.linear(y, s[f"{name}.weight"], s[f"{name}.bias"].flatten())
    return (F.glu(y) if c.get("postact") == "glu" else ACT[c.get("postact")](y)).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": "softmax", "channels": 2, "bidirectional": True, "epsilon": 1e-3},
        {"version": "softmax", "max_kernel_length": 4, "sep_dt_re_im": False, "postact": "relu"},
        {"version": "exp-no-scale", "activation": "tanh", "postact": "id"},
        {"version": "exp-no-scale", "bidirectional": True, "max_kernel_length": 5, "channels": 3, "hyper_act": "gelu"},
        {"version": "exp-re-im", "bidirectional": True, "max_kernel_length": 7, "channels": 2, "postact": "glu"},
        {"version": "clip", "max_real_Lambda": -0.3, "activation": None, "sep_dt_re_im": False},
        {"version": "clip-no-scale", "bidirectional": True, "max_kernel_length": 3, "activation": "silu"},
        {"version": "exp", "hyper_act": "tanh", "channels": 2, "bidirectional": True},
        {"version": "exp", "max_kernel_length": 30, "postact": "sigmoid", "l_max": 5, "lr": {"W": 0.1}},
    ],
    ids=str,
)
def test_dss_by_its_formula(options, length):
    config = {"d_model": 3, "d_state": 4, **options}
    module, state = drawn("dss", config)
    u = series(2, 3, length)
    leaves = {key: t.clone().requires_grad_() for key, t in state.items()}
    expected = dss_formula(config, leaves, u)
    weights = SYSTEMS["dss"].convert(leaves, SYSTEMS["dss"].read(config))
    y = torch.func.functional_call(module, weights, (u,))
    assert error(y, expected) < 1e-9
    cotangent = spread(*y.shape, seed=5)
    ours = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
    for key, a, b in zip(leaves, ours, torch.autograd.grad((expected * cotangent).sum(), list(leaves.values()))):
        assert error(a, b) < 1e-9, key
    linear = "output_linear.0.bias" if options.get("postact") else "output_linear.bias"
    untransposed = from_official("dss", {**config, "transposed": False}, {**state, linear: state[linear].flatten()})
    assert error(untransposed(x=u.transpose(1, 2)).transpose(1, 2), expected) < 1e-9


@torch.no_grad()
def test_an_imported_dss_resumes():
    module, _ = drawn("dss", {"d_model": 3, "d_state": 4, "version": "exp", "channels": 2, "hyper_act": "id"})
    u = series(2, 3, 11)
    state, ys = module.model.conv.init_state(2), []
    for piece in u.split([1, 6, 1, 3], dim=2):
        y, state = module(piece, state=state).values()
        ys.append(y)
    assert error(torch.cat(ys, dim=2), module(u)) < 1e-9
    for options in ({"version": "softmax"}, {"version": "exp", "max_kernel_length": 3}):
        with pytest.raises(ValueError, match="neither is a recurrence"):
            drawn("dss", {"d_model": 3, "d_state": 4, **options})[0].model.conv.init_state(2)
    with pytest.raises(ValueError, match="looks ahead"):
        drawn("dss", {"d_model": 3, "version": "exp", "bidirectional": True})[0].model.conv.init_state(2)


@pytest.mark.parametrize("version", ["softmax", "exp", "exp-re-im", "exp-no-scale", "clip", "clip-no-scale"])
@torch.no_grad()
def test_dss_kernel_by_its_formula(version):
    config = {"H": 3, "N": 4, "channels": 2, "version": version, "kernel_only": True, "L": 9}
    module, state = drawn("dss", config)
    assert error(module(), dss_kernel(config, state, 9)) < 1e-9


def gss_formula(c: dict, s: dict[str, Tensor], x: Tensor) -> Tensor:
    def dss(s: dict[str, Tensor], x: Tensor) -> Tensor:
        v = F.layer_norm(x, x.shape[-1:], s["norm.weight"], s["norm.bias"])
        im = s["Lambda_imag"].exp() if c.get("dss_kernel_lambda_imag_exp", True) else s["Lambda_imag"]
        Lambda = torch.complex(-s["Lambda_real"].exp(), im)
        weight = torch.complex(s["C_real"], s["C_imag"]) * (Lambda.exp() - 1) / Lambda
        k = closed(Lambda.exp(), weight, x.shape[1])
        y = convolved(v.transpose(1, 2), lambda lag: k[:, lag] if lag >= 0 else None).transpose(1, 2)
        return y + s["param_D"] * v

    def inside(s: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in s.items() if key.startswith(prefix)}

    def gss(s: dict[str, Tensor], x: Tensor) -> Tensor:
        z = x.flip(1) if c.get("reverse_seq") else x
        n = F.layer_norm(z, z.shape[-1:], s["norm.weight"], s["norm.bias"])
        gate = dss(inside(s, "dss."), F.gelu(n @ s["to_v.0.weight"].T)) @ s["to_gate.weight"].T
        out = F.linear(gate * F.gelu(n @ s["to_u.0.weight"].T), s["to_out.weight"], s["to_out.bias"]) + z
        return out.flip(1) if c.get("reverse_seq") else out

    if c["cls"] == "DSS":
        return dss(s, x)
    if c["cls"] == "GSS":
        return gss(s, x)
    y = s["token_emb.weight"][x]
    for i in range(c["depth"]):
        y = gss(inside(s, f"layers.{i}."), y)
    return y @ s["to_logits.weight"].T


@pytest.mark.parametrize(
    "config",
    [
        {"cls": "DSS", "dim": 5, "kernel_N": 3, "dss_kernel_lambda_imag_exp": False},
        {"cls": "GSS", "dim": 4, "dss_kernel_N": 3, "dss_kernel_H": 5, "reverse_seq": True},
        {"cls": "GSS", "dim": 5, "dss_kernel_N": 3, "dss_kernel_H": 2, "dim_expansion_factor": 1.5},
        {
            "cls": "GatedStateSpacesLM",
            "num_tokens": 11,
            "dim": 4,
            "depth": 2,
            "dss_kernel_N": 3,
            "dss_kernel_H": 5,
            "dim_expansion_factor": 2,
            "dss_kernel_lambda_imag_exp": False,
        },
    ],
    ids=str,
)
@torch.no_grad()
def test_gss_by_its_formula(config):
    module, state = drawn("gss_lucidrains", config)
    if config["cls"] != "GatedStateSpacesLM":
        x = series(2, 9, config["dim"])
        assert error(module(x=x), gss_formula(config, state, x)) < 1e-9
        return
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = gss_formula(config, state, ids)
    assert error(module(input_ids=ids), expected) < 1e-9
    carried, parts = module.model.init_state(2), []
    for piece in ids.split([4, 1, 1, 3], dim=1):
        y, carried = module.model(piece, carried)
        parts.append(y)
    assert error(torch.cat(parts, dim=1), expected) < 1e-9
    tokens = generate(module.model, ids, 1, temperature=0)
    assert [row[0] for row in tokens] == expected[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("system", "config", "word"),
    [
        ("dss", {"d_model": 3, "version": "expp"}, "version = 'expp'"),
        ("dss", {"d_state": 3}, "'d_model' is missing"),
        ("dss", {"kernel_only": True, "L": 3}, "'H' is missing"),
        ("dss", {"kernel_only": True, "H": 3}, "'L', its length"),
        ("dss", {"d_model": 3, "hyper_act": "glu"}, "hyper_act = 'glu'"),
        ("dss", {"d_model": 3, "weight_norm": True}, "weight_norm = True"),
        ("dss", {"d_model": 3, "activation": "glu"}, "activation = 'glu'"),
        ("dss", {"d_model": 3, "sep_dt": True}, "'sep_dt' .*did you mean 'sep_dt_re_im'"),
        ("gss_lucidrains", {"cls": "MHESA", "dim": 3}, "cls = 'MHESA'"),
        ("gss_lucidrains", {"cls": "GatedStateSpacesLM", "dim": 3, "depth": 1}, "'num_tokens' is missing"),
    ],
)
def test_what_is_not_carried_over_is_named(system, config, word):
    with pytest.raises(ValueError, match=f"^{system}: .*{word}"):
        from_official(system, config, {})


def test_an_official_dss_takes_its_input_once():
    module, _ = drawn("dss", {"d_model": 3, "d_state": 2})
    x = series(1, 3, 4)
    assert torch.equal(module(x), module(x=x))
    for given in ({}, {"u": x, "x": x}):
        with pytest.raises(ValueError, match="as u or as x"):
            module(**given)
