"""Diagonal state spaces: S4D, and the second SSM of H3."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from longwave.errors import choose
from longwave.nn.filters.base import StateSpace, StateSpaceFilter, shared_systems
from longwave.nn.hippo import nplr
from longwave.nn.module import Hint, positive_rate, step_range, widened


def zoh(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold:  a = exp(dt A),  b = (exp(dt A) - 1) / A  (dt where A = 0)."""
    a = torch.exp(dt * A)
    at_zero = A == 0
    return a, torch.where(at_zero, dt.to(a.dtype), torch.expm1(dt * A) / torch.where(at_zero, torch.ones_like(A), A))


def bilinear(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Tustin's rule:  a = (1 + dt A / 2) / (1 - dt A / 2),  b = dt / (1 - dt A / 2)."""
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half)


DISCRETIZATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"zoh": zoh, "bilinear": bilinear}


def init_lin(N: int) -> tuple[Tensor, Tensor]:
    """S4D-Lin:  A = -1/2 + i pi n.  Source: arXiv:2206.11893, sec. 4; as all inits: A (N/2,), B (N/2,), complex128."""
    n = torch.arange(N // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n), torch.ones(N // 2, dtype=torch.complex128)


def init_inv(N: int) -> tuple[Tensor, Tensor]:
    """S4D-Inv:  A = -1/2 + i (N/pi) (N/(2n+1) - 1)."""
    A, B = init_lin(N)
    n = torch.arange(N // 2, dtype=torch.float64)
    return torch.complex(A.real, N / math.pi * (N / (2 * n + 1) - 1)), B


def init_quad(N: int) -> tuple[Tensor, Tensor]:
    """Frequencies that grow quadratically:  A = -1/2 + i (1 + 2n)^2 / pi."""
    A, B = init_lin(N)
    n = torch.arange(N // 2, dtype=torch.float64)
    return torch.complex(A.real, (1 + 2 * n) ** 2 / math.pi), B


def init_real(N: int) -> tuple[Tensor, Tensor]:
    """S4D-Real:  A = -(n+1), the eigenvalues of HiPPO-LegS itself."""
    n = torch.arange(N // 2, dtype=torch.float64)
    return torch.complex(-(n + 1), torch.zeros_like(n)), torch.ones(N // 2, dtype=torch.complex128)


def init_legs(N: int) -> tuple[Tensor, Tensor]:
    """S4D-LegS: the diagonal part of HiPPO-LegS in its NPLR form, with its B."""
    Lambda, _, B, _ = nplr("legs", N)
    B = torch.complex(B.real, B.imag.clamp(-2, 2))  # as the authors do for stability; their 1/2 on B is dropped too
    return torch.complex(torch.full_like(Lambda.real, -0.5), -Lambda.imag), B.conj().resolve_conj()


INITS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "lin": init_lin,
    "inv": init_inv,
    "quad": init_quad,
    "legs": init_legs,
    "real": init_real,
}


class S4DFilter(StateSpaceFilter):
    """A diagonal state space with a learned step size:  k[l] = 2 Re sum_n C[n] b[n] a[n]^l,  (a, b) from (A, B, dt).

    Source: Gu et al. (2022) "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv:2206.11893, sec. 3 and 4; A = -exp(log_A_real) + i A_imag, dt = exp(log_dt).

    Args:
        channels: C.
        d_state: N, real state size, even; N/2 conjugate pairs are kept.
        init: lin | inv | quad | legs | real, of A and B.
        discretization: zoh | bilinear.
        dt_min, dt_max: step sizes are drawn log-uniformly between them; 1 / dt is the memory in steps.
        systems: S, how many different (A, B) there are; channels c, c + S, ... share one. Default C.
        rate: > 0, factor on every step size: 2 reads a signal sampled half as often, see
            :func:`longwave.nn.set_rate`.
        bandlimit: > 0, modes that turn faster than bandlimit / 2 of a circle a step, at rate 1, are silent: 1 is the
            Nyquist frequency, and below it a filter can be read at other resolutions (S4ND, arXiv:2210.06583). None
            keeps all.
    Raises:
        ValueError: for an unknown init or discretization, an odd d_state, 0 < dt_min <= dt_max violated, S not
            dividing C, bandlimit <= 0.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(("log_dt", "log_A_real", "A_imag", "B"), Hint(max_lr=1e-3))

    def __init__(
        self,
        channels: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        systems: int | None = None,
        rate: float = 1.0,
        bandlimit: float | None = None,
    ):
        super().__init__()
        systems = shared_systems(channels, d_state, systems)
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"a bandlimit is > 0, in units of the Nyquist frequency; got bandlimit = {bandlimit}")
        self.init = choose("S4D init", init, INITS)
        self.discretize = choose("discretization", discretization, DISCRETIZATIONS)
        self.channels, self.log_dt_range, self.rate = channels, step_range(dt_min, dt_max), positive_rate(rate)
        self.bandlimit = bandlimit
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(systems, pairs))
        self.A_imag = nn.Parameter(torch.empty(systems, pairs))
        self.B = nn.Parameter(torch.empty(systems, pairs, 2))
        self.C = nn.Parameter(torch.empty(channels, pairs, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
            A, B = self.init(2 * self.A_imag.shape[1])
        self.log_dt.uniform_(*self.log_dt_range)
        self.log_A_real.copy_((-A.real).log().expand_as(self.log_A_real))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        self.C.normal_(std=0.5**0.5)

    def realize(self) -> StateSpace:
        log_dt, log_A_real, A_imag, B, C = widened(self.log_dt, self.log_A_real, self.A_imag, self.B, self.C)
        copies = self.channels // len(A_imag)
        A = torch.complex(-log_A_real.exp(), A_imag).repeat(copies, 1)  # (C, N/2)
        dt, C = log_dt.exp()[:, None], torch.view_as_complex(C)
        if self.bandlimit is not None:
            C = C * (dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        a, b = self.discretize(A, self.rate * dt)
        return StateSpace(a, b * torch.view_as_complex(B).repeat(copies, 1), C)
