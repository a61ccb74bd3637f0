"""The kernels of github.com/state-spaces/s4 (commit e757cef), diagonal or with a low rank, and their convolution."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import DenseStateSpace, Filter, StateSpace, StateSpaceFilter
from longwave.nn.filters.diagonal import DISCRETIZATIONS
from longwave.nn.filters.dplr import discretize, real_coordinates
from longwave.nn.module import widened
from longwave.official.dss import run_softmax_taps
from longwave.official.source import Flag, Name, Names, Positive, Size, Source, Turn
from longwave.ops import causal_conv

Transform = Literal["exp", "none", "relu", "sigmoid", "softplus"]
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "none": lambda x: x,
    "relu": lambda x: F.relu(x) + 1e-4,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


def _length(trained: Tensor) -> Tensor:
    if int(trained) < 0:
        raise ValueError(f"'l_kernel' is the length that C is for, >= 0; got {int(trained)}")
    return trained.long()


LENGTH = Turn(_length, lambda t: t)


class KernelParts(Source):
    """The options of a kernel of the repository but for those that a model gives all of its kernels."""

    ignored = frozenset(
        {"dropout", "tie_dropout", "lr", "wd", "verbose", "dt_min", "dt_max", "init", "measure", "real_random"}
        | {"real_scale", "imag_random", "imag_scale", "B_random", "B_init", "B_scale", "P_scale", "normalize", "B_clip"}
        | {"diagonalize_precision", "deterministic", "backend"}
    )
    channels: Size = 1
    n_ssm: Size | None = None
    l_max: Size | None = None
    disc: Literal["zoh", "bilinear", "dss"] = "zoh"
    is_real: Flag = False
    dt_tie: Flag = True
    dt_fast: Flag = False
    dt_transform: Transform = "exp"
    real_transform: Transform = "exp"
    imag_transform: Transform = "none"
    bandlimit: float | None = None
    mode: Any = None
    kernel: Any = None
    rank: Any = 1


class Kernel(KernelParts):
    """The options of a kernel, in a layer or alone."""

    d_model: Size
    d_state: Size = 64
    rate: Positive = 1.0

    def filter(self, rows: int) -> "OfficialFilter":
        """Of ``rows`` channels a feature."""
        systems, name = self.n_ssm or self.d_model, self.mode or self.kernel
        if (self.mode is None) == (self.kernel is None):
            raise ValueError(f"give one of mode and kernel; got mode = {self.mode!r}, kernel = {self.kernel!r}")
        if self.d_model % systems:
            raise ValueError(f"n_ssm = {systems} does not divide d_model = {self.d_model}")
        system = DiagonalSystem(self, rows, systems)
        if self.low_rank:
            if self.is_real:
                raise ValueError(f"is_real = True is not carried over for mode = {name!r}, only for 'diag'")
            return DPLRFilter(system, self.rank, self.l_max)
        return DSSFilter(system) if self.disc == "dss" else DiagonalFilter(system, self.disc)

    @property
    def low_rank(self) -> bool:
        """Whether the matrix is diagonal minus one of low rank, or else diagonal."""
        return (self.mode or self.kernel) in ("dplr", "nplr", "s4")

    @property
    def support(self) -> int | None:
        """Taps of the kernel that are used, or None for all."""
        return None if self.l_max is None else round(self.l_max / self.rate)


KERNEL: Names = [Name("l_kernel", "l_kernel", LENGTH), Name("P", "P"), Name("", "system.")]


class DiagonalSystem(nn.Module):
    """The parameters of the authors' SSMKernelDiag, kept as they are stored:  A = -f(A_real) - i g(A_imag).

    They are not turned into those of :class:`longwave.nn.S4DFilter`, which keeps logarithms: an untransformed step or
    real part may be negative, and a step may differ from mode to mode.

    Args:
        o: the options.
        channels: K, filters a feature; they share all but C.
        systems: S, how many different (A, B) there are; features h, h + S, ... share one.
    """

    def __init__(self, o: Kernel, channels: int, systems: int):
        super().__init__()
        self.real, self.fast, self.rate, self.bandlimit = o.is_real, o.dt_fast, o.rate, o.bandlimit
        names = (o.dt_transform, o.real_transform, o.imag_transform)
        self.transform_dt, self.transform_real, self.transform_imag = (TRANSFORMS[name] for name in names)
        H, P, pair = o.d_model, o.d_state if o.is_real else o.d_state // 2, () if o.is_real else (2,)
        self.inv_dt = nn.Parameter(torch.zeros(H, 1 if o.dt_tie else P))
        self.A_real = nn.Parameter(torch.zeros(systems, P))
        if not o.is_real:
            self.A_imag = nn.Parameter(torch.zeros(systems, P))
        self.B = nn.Parameter(torch.zeros(1, systems, P, *pair))
        self.C = nn.Parameter(torch.zeros(channels, H, P, *pair))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (H, 1 or P), A (H, P), B (H, P), C (K, H, P)."""
        inv_dt, A_real, B, C = widened(self.inv_dt, self.A_real, self.B, self.C)
        dt = self.transform_dt(inv_dt.sinh() if self.fast else inv_dt)
        A_real = -self.transform_real(A_real)
        if self.real:
            A_imag = torch.zeros_like(A_real)
            B, C = torch.complex(B, torch.zeros_like(B)), torch.complex(C, torch.zeros_like(C))
        else:
            A_imag = -self.transform_imag(*widened(self.A_imag))
            B, C = torch.view_as_complex(B), torch.view_as_complex(C)
        copies = len(dt) // len(A_real)
        A = torch.complex(A_real, A_imag).repeat(copies, 1)
        if self.bandlimit is not None:
            C = C * self.in_band(dt, A)
        return dt * self.rate, A, B[0].repeat(copies, 1), C

    def in_band(self, dt: Tensor, A: Tensor) -> Tensor:
        """(H, P) which modes are heard, of dt at rate 1."""
        assert self.bandlimit is not None
        return dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2


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

    def realize(self, length: int | None = None) -> StateSpace:
        """The system, whatever the length."""
        dt, A, B, C = self.system()
        a, b = self.discretize(A, dt)
        return StateSpace(a.repeat(len(C), 1), (b * B).repeat(len(C), 1), C.flatten(0, 1))


class DPLRFilter(StateSpaceFilter):
    """The kernel of the authors' SSMKernelDPLR:  k[l] = 2 Re sum C a^l b  with a diagonal minus low rank, bilinear.

    Stored is not C but C~ = C (1 - a^l) with l the length that the kernel was trained at: here C is found again. As in
    the authors' code, a longer kernel first doubles l, which gradients do not see, and at another rate the length
    round(l / rate) is undone with the a of that rate.

    Source: Gu et al. (2021) "S4", arXiv:2111.00396, sec. 3.2 and app. C.3.

    Args:
        system: the parameters but P and the length.
        rank: R, columns of P.
        l_max: the first length, of a kernel that has none yet (0); None for the length asked for.
    """

    l_kernel: Tensor  # the length that C~ is for

    def __init__(self, system: DiagonalSystem, rank: int, l_max: int | None):
        super().__init__()
        self.system, self.l_max, self.channels = system, l_max, system.C.shape[0] * system.C.shape[1]
        self.P = nn.Parameter(torch.zeros(rank, *system.A_real.shape, 2))
        self.register_buffer("l_kernel", torch.zeros((), dtype=torch.int64))

    def realize(self, length: int | None = None) -> DenseStateSpace:
        """The system, with the C of a kernel of ``length`` taps (or of as many as it was trained at)."""
        dt, A, B, _ = self.system()
        P = torch.view_as_complex(*widened(self.P)).repeat(1, len(A) // self.P.shape[1], 1)
        C = torch.view_as_complex(*widened(self.system.C))  # (K, H, N/2)
        system = discretize(A, P, B, C.flatten(0, 1), dt)
        a, c = system.matrix(), system.c.unflatten(0, C.shape[:2])
        trained, rate = int(self.l_kernel), self.system.rate
        if trained == 0 and length is None:
            return DenseStateSpace(a, system.b, system.c)  # never run: C is itself
        wanted = trained if length is None else round(rate * length)
        if trained == 0 or wanted > trained:
            with torch.no_grad():
                at_rate_1 = discretize(A, P, B, C.flatten(0, 1), dt / rate).matrix()
            if trained == 0:
                trained = self.l_max or wanted
                c = c - _times(c, at_rate_1, trained)
            while wanted > trained:
                c, trained = c + _times(c, at_rate_1, trained), 2 * trained
        if self.system.bandlimit is not None:
            c = c * self.system.in_band(dt / rate, A).repeat(1, 2)
        return DenseStateSpace(a, system.b, _undo(c, a, round(trained / rate)).flatten(0, 1))

    def forward(self, length: int) -> Tensor:
        return self.realize(length).taps(length)


@torch.no_grad()
def _times(c: Tensor, a: Tensor, length: int) -> Tensor:
    """c a^length, of c (K, H, N) and a (H, N, N)."""
    return (c.to(a.dtype)[:, :, None] @ torch.linalg.matrix_power(a, length)).squeeze(2).to(c.dtype)


def _undo(c: Tensor, a: Tensor, length: int) -> Tensor:
    """C of  C~ = C (1 - a^length),  C~ (K, H, N)."""
    gone = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - torch.linalg.matrix_power(a, length)
    rows = torch.linalg.solve(gone, c.to(a.dtype).transpose(0, 1), left=False)
    return rows.transpose(0, 1).to(c.dtype)


def untruncated(log_A: Tensor, A_imag: Tensor, P: Tensor, B: Tensor, C: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """The C (H, N/2, 2) of stored  C (1 - a^length), from the parameters of :class:`longwave.nn.DPLRFilter`."""
    if length == 0:
        return C
    copies = len(C) // len(A_imag)
    log_A, A_imag, P, B, wide, log_dt = widened(log_A, A_imag, P, B, C, log_dt)
    A, P, B = torch.complex(-log_A.exp(), A_imag), torch.view_as_complex(P), torch.view_as_complex(B)
    tilde, dt = torch.view_as_complex(wide), log_dt.exp()[:, None]
    system = discretize(A.repeat(copies, 1), P.repeat(1, copies, 1), B.repeat(copies, 1), tilde, dt)
    re, im = _undo(system.c[None], system.matrix(), length)[0].chunk(2, dim=-1)
    return (torch.stack([re, -im], dim=-1) / 2).to(C.dtype)


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
        rows = len(C)
        return run_softmax_taps(A.repeat(rows, 1), (dt * A).repeat(rows, 1), (B * C).flatten(0, 1), length)


class StateSpaceConv(nn.Module):
    """The convolution of the authors' FFTConv.

    Args:
        filter: one row a channel; where bidirectional as many again, which look ahead: row j of them, tap s, weighs
            u[t + 1 + s].
        support: taps of the kernel that are used, or None for all.
        bidirectional: whether half of the rows look ahead.
    """

    def __init__(self, filter: "OfficialFilter", support: int | None, bidirectional: bool):
        super().__init__()
        self.filter, self.support, self.bidirectional = filter, support, bidirectional

    def kernel(self, length: int) -> Tensor:
        """The rows of the filter that a sequence of this length meets."""
        return self.filter(length if self.support is None else min(length, self.support))

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, H, P), complex."""
        filter = self._stateful(1)
        zeros = filter.realize().rest(batch)[:, : filter.system.C.shape[1]]
        return zeros if zeros.is_complex() else torch.complex(*zeros.chunk(2, dim=2))

    def forward(
        self, u: Tensor, skip: Tensor, state: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """u (B, L, C), state (B, H, P) complex, as its real view (B, H, P, 2), or real where the system is; padding
        (B,) as in :func:`longwave.nn.long_conv`."""
        L = u.shape[1]
        if state is None:
            k, ahead = self.kernel(L), None
            if self.bidirectional:
                k, ahead = k.chunk(2)
            return causal_conv(u, k, skip=skip, k_future=ahead), None
        filter = self._stateful(L)
        system = filter.realize(L)
        h = _for_every_channel(filter, as_complex_state(filter.system, state, len(u)))
        y = causal_conv(u, system.taps(L), skip=skip)
        y = (y + system.response(h, L).transpose(1, 2)).to(u.dtype)
        h = system.advance(h, u, padding)[:, : filter.system.C.shape[1]]  # every channel of a feature has the same
        if isinstance(filter, DPLRFilter):
            h = torch.complex(*h.detach().chunk(2, dim=2))  # the authors carry it without gradient
        if state.is_complex():
            return y, h
        return y, h.real if filter.system.real else torch.view_as_real(h)

    def _stateful(self, length: int) -> "DiagonalFilter | DPLRFilter":
        if self.bidirectional:
            raise ValueError("bidirectional = True has no state: it looks ahead")
        if not isinstance(self.filter, DiagonalFilter | DPLRFilter):
            raise ValueError("disc = 'dss' has no state: every tap of its kernel depends on the length")
        if self.filter.system.rate != 1:
            raise ValueError(f"rate = {self.filter.system.rate} has no state: the official state advances at rate 1")
        if self.support is not None and length > self.support:
            raise ValueError(f"with a state, L = {length} must not exceed l_max = {self.support}")
        return self.filter


def as_complex_state(system: DiagonalSystem, state: Tensor, batch: int | None = None) -> Tensor:
    """An official state (B, H, P), complex, its real view (B, H, P, 2), or real where the system is, as complex."""
    (state,) = widened(state)
    viewed = not state.is_complex() and not system.real
    h = torch.view_as_complex(state.contiguous()) if viewed else state
    _, features, modes = system.C.shape[:3]
    batch = len(h) if batch is None else batch
    if h.shape != (batch, features, modes):
        raise ValueError(f"the state of this batch is ({batch}, {features}, {modes}) complex; got {tuple(state.shape)}")
    return h


def _for_every_channel(filter: DiagonalFilter | DPLRFilter, h: Tensor) -> Tensor:
    """A state (B, H, P) as (B, K H, P), or for a dense system as (B, K H, N) real."""
    return (real_coordinates(h) if isinstance(filter, DPLRFilter) else h).repeat(1, len(filter.system.C), 1)


OfficialFilter = DiagonalFilter | DPLRFilter | DSSFilter


def kernel_alone(filter: Any, state: Tensor | None = None, *, length: int | None) -> Tensor | dict[str, Tensor]:
    """k (K, H, length); with a state {"k": ..., "k_state": (B, K, H, length)}, what it adds to the outputs.

    Args:
        filter: an OfficialFilter.
        length: None for that which the kernel was trained at.
    """
    if length is None:
        length = round(int(filter.l_kernel) / filter.system.rate)
    channels = len(filter.system.C)
    k = filter(length).unflatten(0, (channels, -1))
    if state is None:
        return k
    if isinstance(filter, DSSFilter):
        raise ValueError("disc = 'dss' has no state: every tap of its kernel depends on the length")
    h = _for_every_channel(filter, as_complex_state(filter.system, state))
    return {"k": k, "k_state": filter.realize(length).response(h, length).unflatten(1, (channels, -1))}
