"""Modules of github.com/state-spaces/s4 (commit e757cef): S4Block with a diagonal kernel, and the minimal S4D."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import S4D
from longwave.models.pretrained.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    ConvBlock,
    MixerFace,
    output_linear,
    output_shapes,
)
from longwave.models.pretrained.system import REQUIRED, Choice, Options, Shapes, State, System
from longwave.nn import Filter, StateSpace, StateSpaceFilter, long_conv
from longwave.nn.filters.diagonal import DISCRETIZATIONS
from longwave.nn.module import at_least_float32
from longwave.ops import causal_conv


def _none(x: Tensor) -> Tensor:
    return x


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) + 1e-4


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "none": _none,
    "relu": _relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


class DiagonalSystem(nn.Module):
    """The parameters of the authors' SSMKernelDiag, kept as they are stored:  A = -f(A_real) - i g(A_imag).

    They are not turned into those of :class:`longwave.nn.S4DFilter`, which keeps logarithms: an untransformed step or
    real part may be negative, and a step may differ from mode to mode.

    Args:
        features: H.
        modes: P, of the state.
        channels: K, filters a feature; they share all but C.
        systems: S, how many different (A, B) there are; features h, h + S, ... share one.
        tied: one step size a feature, else one a mode.
        real: A, B and C have no imaginary part.
        dt, real_part, imag_part: transforms of the parameters.
        fast: the step size is transformed after a sinh.
        rate: factor on all steps.
        bandlimit: in half sampling rates; modes that oscillate faster are silent.
    """

    def __init__(
        self,
        features: int,
        modes: int,
        channels: int,
        systems: int,
        *,
        tied: bool,
        real: bool,
        dt: str,
        real_part: str,
        imag_part: str,
        fast: bool,
        rate: float,
        bandlimit: float | None,
    ):
        super().__init__()
        self.real, self.fast, self.rate, self.bandlimit = real, fast, rate, bandlimit
        self.transform_dt, self.transform_real, self.transform_imag = (
            TRANSFORMS[name] for name in (dt, real_part, imag_part)
        )
        pair = () if real else (2,)
        self.inv_dt = nn.Parameter(torch.zeros(features, 1 if tied else modes))
        self.A_real = nn.Parameter(torch.zeros(systems, modes))
        if not real:
            self.A_imag = nn.Parameter(torch.zeros(systems, modes))
        self.B = nn.Parameter(torch.zeros(1, systems, modes, *pair))
        self.C = nn.Parameter(torch.zeros(channels, features, modes, *pair))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (H, 1 or P), A (H, P), B (H, P), C (K, H, P)."""
        inv_dt, A_real, B, C = at_least_float32(self.inv_dt, self.A_real, self.B, self.C)
        dt = self.transform_dt(inv_dt.sinh() if self.fast else inv_dt)
        A_real = -self.transform_real(A_real)
        if self.real:
            A_imag = torch.zeros_like(A_real)
            B, C = torch.complex(B, torch.zeros_like(B)), torch.complex(C, torch.zeros_like(C))
        else:
            A_imag = -self.transform_imag(*at_least_float32(self.A_imag))
            B, C = torch.view_as_complex(B), torch.view_as_complex(C)
        copies = len(dt) // len(A_real)
        A = torch.complex(A_real, A_imag).repeat(copies, 1)
        if self.bandlimit is not None:
            C = C * (dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        return dt * self.rate, A, B[0].repeat(copies, 1), C


class DiagonalFilter(StateSpaceFilter):
    """k[l] = 2 Re sum_n C[n] b[n] a[n]^l, row c H + h for channel c of feature h.

    Args:
        system: the parameters.
        discretization: zoh | bilinear.
    """

    def __init__(self, system: DiagonalSystem, discretization: str):
        super().__init__()
        self.system, self.discretize = system, DISCRETIZATIONS[discretization]
        self.channels = system.C.shape[0] * system.C.shape[1]

    def realize(self) -> StateSpace:
        dt, A, B, C = self.system()
        a, b = self.discretize(A, dt)
        return StateSpace(a.repeat(len(C), 1), (b * B).repeat(len(C), 1), C.flatten(0, 1))


class DSSFilter(Filter):
    """The softmax kernel of DSS as S4D has it: every mode is normalised over the length, so every tap depends on it.

    Source: Gupta et al. (2022) "Diagonal State Spaces", arXiv:2203.14343, prop. 1(b) and sec. 3.1; real part, no
    factor 2 for conjugates. A mode with Re A > 0 is taken from its last tap backwards.

    Args:
        system: the parameters.
    """

    def __init__(self, system: DiagonalSystem):
        super().__init__()
        self.system, self.channels = system, system.C.shape[0] * system.C.shape[1]

    def forward(self, length: int) -> Tensor:
        dt, A, B, C = self.system()
        dtA = dt * A
        grows = A.real > 0
        exponent = dtA[..., None] * torch.arange(length, device=A.device)  # (H, P, length)
        exponent = exponent - (dtA * (grows * (length - 1))).detach()[..., None]
        decaying = dtA * torch.where(grows, -1.0, 1.0)
        x = ((decaying * length).exp() - 1) * A
        weight = B * C * (decaying.exp() - 1) * x.conj() / (x * x.conj() + 1e-7)  # 1 / x, safe at 0
        return torch.einsum("chn,hnl->chl", weight, exponent.exp()).real.flatten(0, 1)


class StateSpaceConv(nn.Module):
    """The convolution of the authors' FFTConv.

    Args:
        filter: one row a channel; where bidirectional as many again, which look ahead: row j of them, tap s, weighs
            u[t + 1 + s].
        support: taps of the kernel that are used, or None for all.
        bidirectional: whether half of the rows look ahead.
    """

    def __init__(self, filter: Filter, support: int | None, bidirectional: bool):
        super().__init__()
        self.filter, self.support, self.bidirectional = filter, support, bidirectional

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, H, P), complex."""
        filter = self._stateful(1)
        return filter.realize().rest(batch)[:, : filter.system.C.shape[1]]

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """u (B, L, C), state (B, H, P) complex, as its real view (B, H, P, 2), or real where the system is."""
        L = u.shape[1]
        if state is None:
            k = self.filter(L if self.support is None else min(L, self.support))
            future = None
            if self.bidirectional:
                k, future = k.chunk(2)
            return causal_conv(u, k, skip=skip, k_future=future), None
        filter = self._stateful(L)
        channels, features, modes = filter.system.C.shape[:3]
        viewed = not state.is_complex() and not filter.system.real
        h = torch.view_as_complex(state.contiguous()) if viewed else state
        if h.shape != (len(u), features, modes):
            raise ValueError(
                f"the state of this batch is ({len(u)}, {features}, {modes}) complex; got {tuple(state.shape)}"
            )
        y, h = long_conv(u, filter, h.repeat(1, channels, 1), skip=skip)
        h = h[:, :features]  # one system a feature: every channel has the same state
        if state.is_complex():
            return y, h
        return y, torch.view_as_real(h) if viewed else h.real

    def _stateful(self, length: int) -> DiagonalFilter:
        if self.bidirectional:
            raise ValueError("bidirectional = True has no state: it looks ahead")
        if not isinstance(self.filter, DiagonalFilter):
            raise ValueError("disc = 'dss' has no state: every tap of its kernel depends on the length")
        if self.filter.system.rate != 1:
            raise ValueError(f"rate = {self.filter.system.rate} has no state: the official state advances at rate 1")
        if self.support is not None and length > self.support:
            raise ValueError(f"with a state, L = {length} must not exceed l_max = {self.support}")
        return self.filter


def _modes(o: Options) -> int:
    return o.d_state if o.is_real else o.d_state // 2


def _channels(o: Options) -> int:
    return o.channels * (2 if o.activation == "glu" else 1)


def _systems(o: Options) -> int:
    return o.d_model if o.n_ssm is None else o.n_ssm


def _final_act(o: Options) -> str | None:
    if o.postact is not None and o.final_act is not None:
        raise ValueError(f"final_act = {o.final_act!r} must be None where postact = {o.postact!r} is given")
    return o.final_act if o.postact is None else o.postact


def _block_keys(o: Options) -> Shapes:
    H, P, S, K = o.d_model, _modes(o), _systems(o), _channels(o)
    pair = () if o.is_real else (2,)
    kernel: Shapes = {
        "inv_dt": (H, 1 if o.dt_tie else P),
        "C": (K * (2 if o.bidirectional else 1), H, P, *pair),
        "B": (1, S, P, *pair),
        "A_real": (S, P),
        "A_imag": (S, P),
    }
    if o.is_real:
        del kernel["A_imag"]
    return {
        "layer.D": (K, H),
        **{f"layer.kernel.{key}": shape for key, shape in kernel.items()},
        **output_shapes(o.channels * H, H, _final_act(o)),
    }


def _build_block(o: Options) -> ConvBlock:
    if (o.mode is None) == (o.kernel is None):
        raise ValueError(f"give one of mode and kernel; got mode = {o.mode!r}, kernel = {o.kernel!r}")
    H, K, S = o.d_model, _channels(o), _systems(o)
    if S < 1 or H % S:
        raise ValueError(f"n_ssm = {S} does not divide d_model = {H}")
    system = DiagonalSystem(
        H,
        _modes(o),
        K * (2 if o.bidirectional else 1),
        S,
        tied=o.dt_tie,
        real=o.is_real,
        dt=o.dt_transform,
        real_part=o.real_transform,
        imag_part=o.imag_transform,
        fast=o.dt_fast,
        rate=o.rate,
        bandlimit=o.bandlimit,
    )
    filter = DSSFilter(system) if o.disc == "dss" else DiagonalFilter(system, o.disc)
    conv = StateSpaceConv(filter, None if o.l_max is None else round(o.l_max / o.rate), o.bidirectional)
    out = nn.Sequential(
        ACTIVATIONS[o.activation](), ELEMENTWISE[o.mult_act](), output_linear(o.channels * H, H, _final_act(o))
    )
    return ConvBlock(conv, H, K, out, transposed=o.transposed, swapped=o.swap_channels)


def _convert_block(state: State, o: Options) -> State:
    renames = {"layer.kernel.": "conv.filter.system.", "layer.D": "D", "output_linear.": "out.2."}
    return {_renamed(key, renames): tensor for key, tensor in state.items()}


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    old = next(old for old in prefixes if key.startswith(old))
    return prefixes[old] + key.removeprefix(old)


_TRAINING = {"dropout", "tie_dropout", "lr", "wd", "verbose", "dt_min", "dt_max"}

S4D_BLOCK = System(
    options={
        "d_model": REQUIRED,
        "d_state": 64,
        "channels": 1,
        "n_ssm": None,
        "l_max": None,
        "rate": 1.0,
        "mode": Choice("diag", "s4d", None, default="dplr"),
        "kernel": Choice(None, "diag", "s4d"),
        "disc": Choice("zoh", "bilinear", "dss"),
        "is_real": False,
        "dt_tie": True,
        "dt_fast": False,
        "dt_transform": Choice(*TRANSFORMS),
        "real_transform": Choice(*TRANSFORMS),
        "imag_transform": Choice(*TRANSFORMS, default="none"),
        "bandlimit": None,
        "bidirectional": False,
        "swap_channels": False,
        "transposed": True,
        "activation": Choice(*ACTIVATIONS, default="gelu"),
        "mult_act": Choice(*ELEMENTWISE, default=None),
        "final_act": Choice(*ACTIVATIONS),
        "postact": Choice(*ACTIVATIONS, default=None),
        "gate": Choice(None),
        "bottleneck": Choice(None),
    },
    ignored=frozenset(
        _TRAINING
        | {"drop_kernel", "gate_act", "initializer", "weight_norm", "deterministic", "backend"}
        | {"init", "measure", "rank", "real_random", "real_scale", "imag_random", "imag_scale", "B_random", "B_init"}
        | {"B_scale", "P_scale", "normalize", "B_clip", "diagonalize_precision"}
    ),
    keys=_block_keys,
    build=_build_block,
    convert=_convert_block,
)


def _minimal_keys(o: Options) -> Shapes:
    H, P = o.d_model, o.d_state // 2
    return {
        "D": (H,),
        "kernel.C": (H, P, 2),
        "kernel.log_dt": (H,),
        "kernel.log_A_real": (H, P),
        "kernel.A_imag": (H, P),
        "output_linear.0.weight": (2 * H, H, 1),
        "output_linear.0.bias": (2 * H,),
    }


def _convert_minimal(state: State, o: Options) -> State:
    A = state["kernel.A_imag"]
    ours = {key: state[key] for key in ("D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")}
    ours["kernel.B"] = torch.stack([torch.ones_like(A), torch.zeros_like(A)], dim=-1)
    ours["output_linear.weight"] = state["output_linear.0.weight"][..., 0]
    ours["output_linear.bias"] = state["output_linear.0.bias"]
    return {f"model.{key}": tensor for key, tensor in ours.items()}


S4D_MINIMAL = System(
    options={"d_model": REQUIRED, "d_state": 64, "transposed": True, "rate": Choice(1.0)},
    ignored=frozenset(_TRAINING),
    keys=_minimal_keys,
    build=lambda o: MixerFace(S4D(o.d_model, o.d_state // 2 * 2), o.transposed),
    convert=_convert_minimal,
)

SYSTEMS = {"s4d": S4D_BLOCK, "s4dmin": S4D_MINIMAL}
