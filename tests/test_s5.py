"""S5: the official layers by their formulas, how the state space is drawn, and what is refused."""

import math

import pytest
import torch
from official import error, series
from torch import Tensor

from longwave.mixers import MIXERS, S5, S5TwoSided
from longwave.nn import C_INITS, hippo, set_rate
from longwave.nn.hippo import normal_hippo
from longwave.official import SYSTEMS, from_official


def drawn_s5(config: dict) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A module and its official state at random: eigenvalues on both sides of 0, positive variances."""
    rng = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in SYSTEMS["s5"].keys(SYSTEMS["s5"].read(config)).items():
        t = torch.randn(shape, generator=rng, dtype=torch.float64)
        state[key] = t.abs() + 0.5 if key == "norm/var" else t
    return from_official("s5", config, state), state


def ssm_formula(config: dict, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """One step after the other, forwards and backwards, with dense matrices."""
    Lambda = torch.complex(s["Lambda_re"], s["Lambda_im"])
    if config.get("clip_eigs"):
        Lambda = torch.complex(s["Lambda_re"].minimum(torch.tensor(-1e-4).double()), s["Lambda_im"])
    step = config.get("step_rescale", 1.0) * torch.exp(s["log_step"][:, 0])
    if config.get("discretization", "zoh") == "zoh":
        a, b = torch.exp(Lambda * step), (torch.exp(Lambda * step) - 1) / Lambda
    else:
        a, b = (1 + step / 2 * Lambda) / (1 - step / 2 * Lambda), step / (1 - step / 2 * Lambda)
    B = torch.diag(b) @ torch.view_as_complex(s["B"])
    C = [torch.view_as_complex(s[key]) for key in ("C", "C1", "C2") if key in s]
    if config.get("bidirectional"):
        C = list(C[0].chunk(2, dim=1)) if len(C) == 1 else C

    def states(x):
        h, hs = torch.zeros(len(x), len(a), dtype=a.dtype), []
        for t in range(x.shape[1]):
            h = a * h + x[:, t].to(a.dtype) @ B.T
            hs.append(h)
        return torch.stack(hs, dim=1)

    y = states(x) @ C[0].T
    if config.get("bidirectional"):
        y = y + states(x.flip(1)).flip(1) @ C[1].T
    return (2 if config.get("conj_sym", True) else 1) * y.real + s["D"] * x


def layer_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    layer = {"activation": "gelu", "prenorm": False, "batchnorm": False, **config["layer"]}

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def dense(name, x):
        return x @ state[f"{name}/kernel"] + state[f"{name}/bias"]

    def norm(x):
        if layer["batchnorm"]:
            x = (x - state["norm/mean"]) / torch.sqrt(state["norm/var"] + 1e-5)
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x * state["norm/scale"] + state["norm/bias"]

    s = {key.removeprefix("seq/"): t for key, t in state.items() if key.startswith("seq/")}
    y = ssm_formula(config, s, norm(x) if layer["prenorm"] else x)
    if layer["activation"] == "full_glu":
        y = dense("out1", gelu(y)) * torch.sigmoid(dense("out2", gelu(y)))
    elif layer["activation"] == "half_glu1":
        y = gelu(y) * torch.sigmoid(dense("out2", gelu(y)))
    elif layer["activation"] == "half_glu2":
        y = y * torch.sigmoid(dense("out2", gelu(y)))
    else:
        y = gelu(y)
    return x + y if layer["prenorm"] else norm(x + y)


@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"step_rescale": 0.5},
        {"conj_sym": False, "discretization": "bilinear", "P_given": None, "P_local": 3},
        {"clip_eigs": True, "bidirectional": True},
        {"C_init": "complex_normal", "bidirectional": True, "conj_sym": False},
        {"layer": {}},
        {"layer": {"activation": "full_glu", "batchnorm": True}, "clip_eigs": True},
        {"layer": {"activation": "half_glu1", "prenorm": True, "batchnorm": True}, "bidirectional": True},
        {"layer": {"activation": "half_glu2", "prenorm": True}, "C_init": "complex_normal", "bidirectional": True},
        {"layer": {"activation": "half_glu1"}, "conj_sym": False},
        {"conj_sym": False, "discretization": "bilinear", "bidirectional": True, "P_given": None, "P_local": 3},
        {"discretization": "bilinear", "bidirectional": True, "clip_eigs": True, "step_rescale": 2.0},
    ],
    ids=str,
)
@torch.no_grad()
def test_official_layers_by_their_formulas(options, length):
    config = {"H": 3, "P_given": 8, **options}
    module, state = drawn_s5(config)
    x = series(2, length, 3)
    expected = (layer_formula if "layer" in options else ssm_formula)(config, state, x)
    assert error(module(x=x), expected) < 1e-9
    if options.get("bidirectional"):
        return
    pieces, carried = [], module.model.init_state(2)
    for piece in x.split([1] * length, dim=1):
        piece, carried = module.model(piece, carried)
        pieces.append(piece)
    assert error(torch.cat(pieces, dim=1), expected) < 1e-9


def test_batch_statistics_move_in_training_only():
    module, _ = drawn_s5({"H": 3, "P_given": 4, "layer": {"batchnorm": True, "bn_momentum": 0.75}})
    x, norm = series(2, 5, 3), module.model.norm
    before = norm.running_mean.clone()
    module(x=x)
    assert torch.equal(norm.running_mean, before)
    module.train()
    seen = (x + module.model.mixer(x)[0]).mean((0, 1))
    module(x=x)
    assert error(norm.running_mean, 0.75 * before + 0.25 * seen) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": {"activaton": "gelu"}}, "layer: there is no option 'activaton'.*did you mean 'activation'"),
        (
            {"layer": {"activation": "relu"}},
            "layer: the option activation = 'relu' is not carried over; longwave has 'full_glu'",
        ),
        ({"P_given": None}, "the option 'P' is missing"),
        ({"P": 3}, "P = 3, P_local = None and P_given = 8 do not agree"),
        ({"C_init": "normal"}, "C_init = 'normal' is not carried over"),
        ({"discretization": "dirac"}, "discretization = 'dirac' is not carried over"),
        ({"step_rescale": 0}, "step_rescale = 0 must be a number > 0"),
        ({"bidirectionl": True}, "'bidirectionl'.*did you mean 'bidirectional'"),
    ],
)
def test_official_options_that_are_refused(change, message):
    _, state = drawn_s5({"H": 3, "P_given": 8})
    with pytest.raises(ValueError, match=f"s5: .*{message}"):
        from_official("s5", {"H": 3, "P_given": 8, **change}, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 6, "blocks": 2}, "blocks = 2 does not divide d_state = 6 into even parts"),
        ({"d_state": 5, "conj_sym": False, "blocks": 2}, "blocks = 2 does not divide d_state = 5 into equal parts"),
        ({"blocks": 0}, "blocks = 0"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max; got dt_min = 0.0"),
        ({"discretization": "zho"}, "no discretization is called 'zho'.*did you mean 'zoh'"),
        ({"C_init": "lecun"}, "no S5 init of C is called 'lecun'; there are lecun_normal"),
        ({"activation": "full_gl"}, "no S5 activation is called 'full_gl'.*did you mean 'full_glu'"),
        ({"rate": -1.0}, "> 0; got rate = -1.0"),
    ],
)
@pytest.mark.parametrize("name", ["s5", "s5_two_sided"])
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](4, **options)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_normal_hippo_is_legs_plus_its_low_rank_part(size):
    Lambda, V = normal_hippo(size)
    P = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    normal = hippo("legs", size)[0] + P[:, None] * P
    assert error(V @ torch.diag(Lambda) @ V.conj().T, normal.to(V.dtype)) < 1e-12
    assert error(V.conj().T @ V, torch.eye(size, dtype=V.dtype)) < 1e-12


def transfer(layer: S5, s: complex) -> Tensor:
    """C (s - Lambda)^-1 B over all modes and their conjugates, (D, D)."""
    Lambda = torch.complex(layer.seq.Lambda_re, layer.seq.Lambda_im).to(torch.complex128)
    B, C = (torch.view_as_complex(t.detach()).to(torch.complex128) for t in (layer.seq.B, layer.C))
    if layer.seq.conj_sym:
        Lambda, B, C = torch.cat([Lambda, Lambda.conj()]), torch.cat([B, B.conj()]), torch.cat([C, C.conj()], dim=1)
    return C @ torch.diag(1 / (s - Lambda)) @ B


@pytest.mark.parametrize("C_init", C_INITS)
@torch.no_grad()
def test_draws_have_the_authors_variance(C_init):
    D, N = 64, 64
    torch.manual_seed(0)
    layer = S5(D, N, blocks=4, conj_sym=False, C_init=C_init)
    assert layer.seq.B.square().sum(-1).mean() == pytest.approx(1 / N, rel=0.05)  # V is unitary
    variance = {"lecun_normal": 2 / (D * N), "trunc_standard_normal": 2 / N, "complex_normal": 1.0}[C_init]
    assert layer.C.square().sum(-1).mean() == pytest.approx(variance, rel=0.05)
    dense = normal_hippo(N // 4)[1] @ torch.view_as_complex(layer.seq.B[: N // 4]).to(torch.complex128)
    assert dense.imag.abs().max() < 1e-6  # B was real before it was put into the basis
    assert dense.real.abs().max() <= 2 / (0.8796 * N**0.5)
    steps = layer.seq.log_step.exp().log10()
    assert -3 <= steps.min() < -2.5
    assert -1.5 < steps.max() <= -1


@torch.no_grad()
def test_pairs_are_half_of_all_modes():
    """A real system written out with both modes of each pair computes the same."""
    pairs = S5(3, 8, blocks=2, activation="none").double()
    full = S5(3, 8, blocks=2, conj_sym=False, activation="none").double()
    conjugate = torch.tensor([1.0, -1.0], dtype=torch.float64)
    full.load_state_dict(
        {
            "seq.Lambda_re": pairs.seq.Lambda_re.repeat(2),
            "seq.Lambda_im": torch.cat([pairs.seq.Lambda_im, -pairs.seq.Lambda_im]),
            "seq.B": torch.cat([pairs.seq.B, pairs.seq.B * conjugate]),
            "seq.log_step": pairs.seq.log_step.repeat(2),
            "C": torch.cat([pairs.C, pairs.C * conjugate], dim=1),
            "D": pairs.D,
        }
    )
    x = series(2, 9, 3)
    assert error(full(x)[0], pairs(x)[0]) < 1e-12
    assert error(transfer(full, 1j + 0.5), transfer(pairs, 1j + 0.5)) < 1e-12


@pytest.mark.parametrize("kind", [S5, S5TwoSided])
@torch.no_grad()
def test_the_rate_multiplies_the_steps(kind):
    layer, x = kind(4, 8).double(), series(2, 9, 4)
    slow = set_rate(kind(4, 8).double(), 2.0)
    slow.load_state_dict(layer.state_dict())
    layer.seq.log_step += math.log(2)
    assert error(slow(x)[0], layer(x)[0]) < 1e-12
    assert kind(4, 8, rate=2.0).seq.rate == slow.seq.rate == 2.0


@torch.no_grad()
def test_clipped_eigenvalues_cannot_explode():
    layer = S5(4, 8, clip_eigs=True)
    layer.seq.Lambda_re.fill_(1.0)
    assert layer(torch.ones(1, 20000, 4))[0].isfinite().all()
    layer.seq.clip_eigs = False
    assert not layer(torch.ones(1, 20000, 4))[0].isfinite().all()


@torch.no_grad()
def test_float32_stays_exact_over_long_sequences():
    layer, x = S5(4, 32), series(1, 20000, 4, dtype=torch.float32)
    y = layer(x)[0]
    assert error(y.double(), layer.double()(x.double())[0]) < 1e-4
