"""Diagonal state spaces whose modes all channels share: DSS.

All N modes are kept as they are, none stands for a conjugate pair: a kernel is the real part of a sum, not twice that.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from longwave.errors import choose
from longwave.nn.filters.base import Filter, StateSpace, StateSpaceFilter, require_max_len
from longwave.nn.hippo import nplr
from longwave.nn.module import Hint, positive_rate, step_range, widened
from longwave.ops import vandermonde

EPSILON = 1e-7  # keeps reciprocals finite


def init_skew(N: int) -> Tensor:
    """The N eigenvalues with Im > 0 of the normal part of HiPPO-LegS of size 2 N, fastest first, (N,) complex128.

    Source: Gupta et al. (2022), arXiv:2203.14343 ("skew-Hippo init").
    """
    with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
        return nplr("legs", 2 * N)[0].conj().resolve_conj()


class ExpEigenvalues(nn.Module):
    """Lambda = -exp(log_neg_re) + i im: modes that decay.  Source: arXiv:2203.14343, sec. 3.1, DSS-EXP."""

    def __init__(self, d_state: int):
        super().__init__()
        self.log_neg_re = nn.Parameter(torch.empty(d_state))
        self.im = nn.Parameter(torch.empty(d_state))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        Lambda = init_skew(len(self.im))
        self.log_neg_re.copy_((-Lambda.real).log())
        self.im.copy_(Lambda.imag)

    def forward(self) -> Tensor:
        """(N,) complex."""
        log_neg_re, im = widened(self.log_neg_re, self.im)
        return torch.complex(-log_neg_re.exp(), im)


class ExpReImEigenvalues(nn.Module):
    """Lambda = -exp(log_neg_re) + i exp(log_im): modes that decay and turn one way.

    Source: Mehta et al. (2022) "Long Range Language Modeling via Gated State Spaces", arXiv:2206.13947, sec. 3.1.
    """

    def __init__(self, d_state: int):
        super().__init__()
        self.log_neg_re = nn.Parameter(torch.empty(d_state))
        self.log_im = nn.Parameter(torch.empty(d_state))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        Lambda = init_skew(len(self.log_im))
        self.log_neg_re.copy_((-Lambda.real).log())
        self.log_im.copy_(Lambda.imag.log())

    def forward(self) -> Tensor:
        """(N,) complex."""
        log_neg_re, log_im = widened(self.log_neg_re, self.log_im)
        return torch.complex(-log_neg_re.exp(), log_im.exp())


class ClipEigenvalues(nn.Module):
    """Lambda itself, with its real part kept below a limit.  Source: DSS-CLIP of github.com/ag1988/dss.

    Args:
        d_state: N.
        max_real: the limit. A positive one lets modes grow, by at most exp(dt max_real) a step.
    """

    def __init__(self, d_state: int, max_real: float = 1e-4):
        super().__init__()
        self.max_real = max_real
        self.re_im = nn.Parameter(torch.empty(d_state, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.re_im.copy_(torch.view_as_real(init_skew(len(self.re_im))))

    def forward(self) -> Tensor:
        """(N,) complex."""
        (re_im,) = widened(self.re_im)
        return torch.complex(re_im[:, 0].clamp(max=self.max_real), re_im[:, 1])


EIGENVALUES: dict[str, Callable[[int], nn.Module]] = {
    "exp": ExpEigenvalues,
    "exp_re_im": ExpReImEigenvalues,
    "clip": ClipEigenvalues,
}


def held(Lambda: Tensor, step: Tensor) -> Tensor:
    """Zero-order hold:  b = (exp(step) - 1) / Lambda, with |1 / Lambda| <= 1 / sqrt(EPSILON)."""
    return (step.exp() - 1) * Lambda.conj() / (Lambda * Lambda.conj()).real.clamp(min=EPSILON)


def unscaled(Lambda: Tensor, step: Tensor) -> Tensor:
    """b = 1: what W has to say is said by W."""
    return torch.ones_like(step)


DSS_DISCRETIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"zoh": held, "none": unscaled}


def modes_from(d_state: int, eigenvalues: str | nn.Module) -> nn.Module:
    """The eigenvalues of a name in EIGENVALUES, or the part as it is.

    Raises:
        ValueError: for an unknown name or d_state < 1.
    """
    if d_state < 1:
        raise ValueError(f"a diagonal state space needs d_state >= 1; got {d_state}")
    if isinstance(eigenvalues, nn.Module):
        return eigenvalues
    return choose("parametrisation of eigenvalues", eigenvalues, EIGENVALUES)(d_state)


def steps(Lambda: Tensor, log_dt: Tensor, rate: float = 1.0) -> Tensor:
    """dt_re Re Lambda + i dt_im Im Lambda, from Lambda (N,) and log_dt (C, 2), as (C, N) complex128: the fastest modes
    turn many times a step."""
    dt, Lambda = rate * log_dt.double().exp(), Lambda.to(torch.complex128)
    return torch.complex(dt[:, :1] * Lambda.real, dt[:, 1:] * Lambda.imag)


@torch.no_grad()
def _draw(log_dt: Tensor, W: Tensor, log_dt_range: tuple[float, float]) -> None:
    log_dt.copy_(torch.empty_like(log_dt[:, :1]).uniform_(*log_dt_range).expand_as(log_dt))
    W.normal_()


class DSSFilter(StateSpaceFilter):
    """N complex modes with learned steps:  k[l] = Re sum_n W[n] b[n] exp(dt Lambda[n])^l.

    Source: Gupta et al. (2022) "Diagonal State Spaces are as Effective as Structured State Spaces", arXiv:2203.14343,
    prop. 1(a) and sec. 3.1 (DSS-EXP), with the other versions of github.com/ag1988/dss. As there, dt is a pair: one
    step for the real part of Lambda, one for the imaginary part, which start equal.

    Args:
        channels: C; they share Lambda, and have each their dt and W.
        d_state: N, complex modes.
        eigenvalues: exp | exp_re_im | clip, how Lambda is kept from growing, or a module that returns it, (N,) complex.
        discretization: zoh for b = (exp(dt Lambda) - 1) / Lambda, none for b = 1.
        dt_min, dt_max: step sizes are drawn log-uniformly between them.
        rate: > 0, factor on every step size, see :func:`longwave.nn.set_rate`.
    Raises:
        ValueError: for an unknown name, d_state < 1, 0 < dt_min <= dt_max violated, rate <= 0.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(("log_dt", "Lambda.*", "W"), Hint(max_lr=1e-3))

    def __init__(
        self,
        channels: int,
        d_state: int = 64,
        *,
        eigenvalues: str | nn.Module = "exp",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        super().__init__()
        self.channels, self.log_dt_range, self.rate = channels, step_range(dt_min, dt_max), positive_rate(rate)
        self.discretize = choose("discretization of DSS", discretization, DSS_DISCRETIZATIONS)
        self.Lambda = modes_from(d_state, eigenvalues)
        self.log_dt = nn.Parameter(torch.empty(channels, 2))
        self.W = nn.Parameter(torch.empty(channels, d_state, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _draw(self.log_dt, self.W, self.log_dt_range)

    def realize(self) -> StateSpace:
        log_dt, W = widened(self.log_dt, self.W)
        Lambda, c = self.Lambda(), torch.view_as_complex(W) / 2
        step = steps(Lambda, log_dt, self.rate)
        return StateSpace(step.exp().to(c.dtype), self.discretize(Lambda, step).to(c.dtype), c)


def softmax_taps(Lambda: Tensor, step: Tensor, W: Tensor, length: int, epsilon: float = EPSILON) -> Tensor:
    """k[l] = Re sum_n W[n] / Lambda[n] softmax_l(step[n] l), the softmax over l = 0 .. length - 1.

    A mode with Re Lambda > 0 is summed from its last tap backwards, so that no power grows.

    Source: Gupta et al. (2022), arXiv:2203.14343, prop. 1(b).

    Args:
        Lambda: (N,) or (C, N) complex.
        step: (C, N) complex128, dt Lambda.
        W: (C, N) complex, whose dtype is that of the result.
        length: L >= 1, of which every tap depends.
        epsilon: reciprocals are conj(x) / (|x|^2 + epsilon).
    Returns:
        k: (C, L) real.
    """
    grows = Lambda.real > 0
    decay = torch.where(grows, -step, step)
    total = ((decay * length).exp() - 1) * Lambda
    weight = (W / 2 * (decay.exp() - 1) * total.conj() / ((total * total.conj()).real + epsilon)).to(W.dtype)
    forwards = vandermonde(decay.exp().to(W.dtype), torch.stack([weight * ~grows, weight * grows]), length)
    return forwards[0] + forwards[1].flip(1)


class DSSSoftmaxFilter(Filter):
    """N complex modes, each normalised over ``max_len`` steps by a softmax:  k = Re sum_n W[n] / Lambda[n] softmax.

    Every tap depends on ``max_len``. It is one filter for all sequences up to that length, shorter ones and chunks
    included, and none for longer ones. The authors' code takes each sequence's own length instead, so it has another
    filter for every length.

    Source: Gupta et al. (2022), arXiv:2203.14343, prop. 1(b) and sec. 3.1, DSS-SOFTMAX; dt as in :class:`DSSFilter`.

    Args:
        channels: C; they share Lambda, and have each their dt and W.
        max_len: longest sequence.
        d_state: N, complex modes.
        dt_min, dt_max: step sizes are drawn log-uniformly between them.
    Raises:
        ValueError: for max_len < 1, d_state < 1, 0 < dt_min <= dt_max violated, or on a length above max_len.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(("log_dt", "Lambda", "W"), Hint(max_lr=1e-3))

    def __init__(self, channels: int, max_len: int, d_state: int = 64, *, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__()
        require_max_len("a softmax filter", max_len)
        if d_state < 1:
            raise ValueError(f"a softmax filter needs d_state >= 1; got {d_state}")
        self.channels, self.max_len, self.log_dt_range = channels, max_len, step_range(dt_min, dt_max)
        self.log_dt = nn.Parameter(torch.empty(channels, 2))
        self.Lambda = nn.Parameter(torch.empty(d_state, 2))
        self.W = nn.Parameter(torch.empty(channels, d_state, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.Lambda.copy_(torch.view_as_real(init_skew(len(self.Lambda))))
        _draw(self.log_dt, self.W, self.log_dt_range)

    def longest(self) -> int:
        return self.max_len

    def forward(self, length: int) -> Tensor:
        require_max_len("a softmax filter", self.max_len, length)
        log_dt, Lambda, W = widened(self.log_dt, self.Lambda, self.W)
        modes = torch.view_as_complex(Lambda)
        return softmax_taps(modes, steps(modes, log_dt), torch.view_as_complex(W), self.max_len)[:, :length]
