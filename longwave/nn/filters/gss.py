"""The state space inside GSS: diagonal, its step fixed, and the same modes for every channel."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import StateSpace, StateSpaceFilter, power
from longwave.nn.filters.diagonal import zoh
from longwave.nn.filters.dss import modes_from
from longwave.nn.module import Hint, positive_rate, widened
from longwave.nn.padding import last_steps
from longwave.ops import vandermonde, vandermonde_transpose


class SharedStateSpace(NamedTuple):
    """h[t] = a h[t-1] + b u[t],  y[t] = Re <c, h[t]>, the same a and b for every channel: (N,), (N,), (C, N) complex.

    One table of powers serves all channels: the channels stand where the rows of a batch would.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, C, N)."""
        return self.c.detach().new_zeros(batch, *self.c.shape)

    def stepper(self) -> StateSpace:
        """What takes single steps."""
        a, b = (t.expand_as(self.c).contiguous() for t in (self.a, self.b))
        return StateSpace(a, b, self.c / 2)

    def taps(self, length: int) -> Tensor:
        """The impulse response (C, length)."""
        return vandermonde(self.a[None], (self.b * self.c / 2)[:, None], length)[:, 0]

    def response(self, state: Tensor, length: int) -> Tensor:
        """What the state (B, C, N) adds to the next ``length`` outputs, (B, C, length)."""
        rows = (self.c * self.a * state / 2).flatten(0, 1)[:, None]
        return vandermonde(self.a[None], rows, length).unflatten(0, state.shape[:2])[:, :, 0]

    def advance(self, state: Tensor, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """The state after the inputs x (B, L, C), see :class:`StateSpace`."""
        rows = last_steps(x, padding, x.shape[1]).flip(1).transpose(1, 2).to(self.a.real.dtype)
        gathered = vandermonde_transpose(self.a[None], rows.flatten(0, 1)[:, None]).unflatten(0, rows.shape[:2])
        return power(self.a[None], padding, x.shape[1]) * state + self.b * gathered[:, :, 0]


class GSSFilter(StateSpaceFilter):
    """N complex modes with a step of 1:  k[l] = Re sum_n C[n] (exp(Lambda[n]) - 1) / Lambda[n] exp(Lambda[n])^l.

    Source: Mehta et al. (2022), arXiv:2206.13947, sec. 3.1 and fig. 2: the state space of DSS with its step fixed and
    all parameters drawn at random. C starts smaller by sqrt(N) than there, so that the output does not grow with N.

    Args:
        channels: C; they share Lambda.
        d_state: N, complex modes.
        eigenvalues: exp_re_im | exp | clip, or a module, as in :class:`DSSFilter`, drawn anew.
        rate: > 0, the step, see :func:`longwave.nn.set_rate`.
    Raises:
        ValueError: for an unknown name, d_state < 1, rate <= 0.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(("Lambda.*", "C"), Hint(max_lr=1e-3))

    def __init__(
        self, channels: int, d_state: int = 512, *, eigenvalues: str | nn.Module = "exp_re_im", rate: float = 1.0
    ):
        super().__init__()
        self.channels, self.rate = channels, positive_rate(rate)
        self.Lambda = modes_from(d_state, eigenvalues)
        self.C = nn.Parameter(torch.empty(channels, d_state, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.Lambda.parameters():
            parameter.normal_()
        self.C.normal_(std=self.C.shape[1] ** -0.5)

    def realize(self) -> SharedStateSpace:
        (C,) = widened(self.C)
        Lambda = self.Lambda()
        a, b = zoh(Lambda, torch.full_like(Lambda.real, self.rate))
        return SharedStateSpace(a, b, torch.view_as_complex(C))
