"""A state space that all features drive and read together: the linear part of S5, and how it is drawn."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.nn.filters.diagonal import DISCRETIZATIONS
from longwave.nn.frozen import derived
from longwave.nn.hippo import normal_hippo
from longwave.nn.module import Hint, positive_rate, step_range, widened
from longwave.ops import linear_scan, without_autocast


def lecun(*shape: int, fan_in: int) -> Tensor:
    """Normal numbers of variance 1 / fan_in, cut at two standard deviations of the uncut, in float64."""
    cut = 0.87962566103423978  # standard deviation of a standard normal cut at 2
    return nn.init.trunc_normal_(torch.empty(shape, dtype=torch.float64), a=-2, b=2) / (cut * fan_in**0.5)


def lecun_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """C (D, P, 2) of a dense one (D, N) of variance 1 / (D N), in the basis V (R, p) of each block, N = R blocks."""
    N = blocks * len(V)
    return _in_basis(lecun(D, N, 2, fan_in=D * N), V)


def trunc_standard_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """As :func:`lecun_normal`, but each row has its own fan: variance 1 / N. The name is the authors'."""
    N = blocks * len(V)
    return _in_basis(lecun(D, N, 2, fan_in=N), V)


def complex_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """C (D, P, 2) drawn in the basis itself, with variance 1."""
    return torch.randn(D, blocks * V.shape[1], 2, dtype=torch.float64) * 0.5**0.5


def _in_basis(C: Tensor, V: Tensor) -> Tensor:
    blocks = torch.view_as_complex(C).unflatten(1, (-1, len(V)))
    return torch.view_as_real((blocks @ V).flatten(1))


C_INITS: dict[str, Callable[[int, int, Tensor], Tensor]] = {
    "lecun_normal": lecun_normal,
    "trunc_standard_normal": trunc_standard_normal,
    "complex_normal": complex_normal,
}


class DrivenStates(nn.Module):
    """h[t] = a h[t-1] + b x[t],  (a, b) from (Lambda, B, step): P modes that all features drive.

    Source: Smith et al. (2022) "S5", arXiv:2208.04933, sec. 3. Lambda = Lambda_re + i Lambda_im, and step =
    rate exp(log_step).

    Args:
        d_model: D.
        d_state: N, real state size; P = N / 2 conjugate pairs are kept, or all P = N.
        blocks: Lambda starts as so many equal HiPPO-N, each of size N / blocks.
        conj_sym: modes come in conjugate pairs, of which one is kept and both count.
        discretization: zoh | bilinear.
        clip_eigs: Re Lambda is kept <= -1e-4, so that no state grows.
        dt_min, dt_max: step sizes are drawn log-uniformly between them.
        rate: > 0, factor on every step size.
    Raises:
        ValueError: for an unknown discretization, blocks that do not divide d_state into even parts (any parts
            without conj_sym), 0 < dt_min <= dt_max violated, or rate <= 0.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(
        ("Lambda_re", "Lambda_im", "B", "log_step"), Hint(max_lr=1e-3)
    )

    def __init__(
        self,
        d_model: int,
        d_state: int,
        blocks: int,
        *,
        conj_sym: bool,
        discretization: str,
        clip_eigs: bool,
        dt_min: float,
        dt_max: float,
        rate: float,
    ):
        super().__init__()
        if d_state < 1 or blocks < 1 or d_state % (blocks * (2 if conj_sym else 1)):
            parts = "even parts, of conjugate pairs" if conj_sym else "equal parts"
            raise ValueError(f"blocks = {blocks} does not divide d_state = {d_state} into {parts}")
        self.discretize = choose("discretization", discretization, DISCRETIZATIONS)
        self.d_state, self.blocks, self.conj_sym, self.clip_eigs = d_state, blocks, conj_sym, clip_eigs
        self.log_dt_range, self.rate = step_range(dt_min, dt_max), positive_rate(rate)
        modes = d_state // 2 if conj_sym else d_state
        self.Lambda_re = nn.Parameter(torch.empty(modes))
        self.Lambda_im = nn.Parameter(torch.empty(modes))
        self.B = nn.Parameter(torch.empty(modes, d_model, 2))
        self.log_step = nn.Parameter(torch.empty(modes))
        self.reset_parameters()

    def _basis(self) -> tuple[Tensor, Tensor]:
        """Lambda (P / blocks,) and its eigenvectors (N / blocks, P / blocks) of one block."""
        size = self.d_state // self.blocks
        Lambda, V = normal_hippo(size)
        kept = size // 2 if self.conj_sym else size
        return Lambda[:kept], V[:, :kept]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        D = self.B.shape[1]
        with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
            Lambda, V = self._basis()
            B = lecun(self.blocks, len(V), D, fan_in=self.d_state).to(V.dtype)
            B = torch.view_as_real(V.conj().T @ B)
        self.Lambda_re.copy_(Lambda.real.repeat(self.blocks))
        self.Lambda_im.copy_(Lambda.imag.repeat(self.blocks))
        self.B.copy_(B.flatten(0, 1))
        self.log_step.uniform_(*self.log_dt_range)

    @torch.no_grad()
    def draw_C(self, C: Tensor, init: Callable[[int, int, Tensor], Tensor]) -> None:
        """Fill C (D, P, 2) with a fresh draw."""
        with torch.device("cpu"):
            C.copy_(init(len(C), self.blocks, self._basis()[1]))

    @derived
    def system(self) -> tuple[Tensor, Tensor]:
        """The decays a (P,), and what inputs are mapped by, (2 P, D), real and imaginary parts in turn."""
        Lambda_re, Lambda_im, B, log_step = widened(self.Lambda_re, self.Lambda_im, self.B, self.log_step)
        Lambda = torch.complex(Lambda_re.clamp(max=-1e-4) if self.clip_eigs else Lambda_re, Lambda_im)
        a, b = self.discretize(Lambda, self.rate * log_step.exp())
        b = torch.view_as_real(b[:, None] * torch.view_as_complex(B))  # (P, D, 2)
        return a, b.transpose(1, 2).flatten(0, 1)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decays a (P,) and what drives the modes, b x (B, L, P), of x (B, L, D)."""
        a, b = self.system()
        with without_autocast(x.device):
            driven = F.linear(x.to(b.dtype), b)
        return a, torch.view_as_complex(driven.unflatten(2, (-1, 2)))

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, P)."""
        (like,) = widened(self.Lambda_re.detach())
        zeros = like.new_zeros(batch, len(like))
        return torch.complex(zeros, zeros)

    def scan(self, a: Tensor, driven: Tensor, h0: Tensor | None = None) -> Tensor:
        """The states h (B, L, P) behind h0 (B, P), or behind rest, of what :meth:`inputs` returns."""
        h0 = self.rest(driven.shape[0]) if h0 is None else h0.to(driven.dtype)
        return linear_scan(a.expand_as(driven), driven, h0)

    def read(self, h: Tensor, C: Tensor) -> Tensor:
        """2 Re C h, or Re C h where no mode stands for two: h (B, L, P), C (D, P, 2) -> (B, L, D)."""
        (C,) = widened(C)
        C = torch.stack([C[..., 0], -C[..., 1]], dim=-1)
        with without_autocast(h.device):
            return F.linear(torch.view_as_real(h).flatten(2), (2 * C if self.conj_sym else C).flatten(1))
