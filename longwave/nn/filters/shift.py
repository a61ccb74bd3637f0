"""The shift state space of H3: a learned look back over the last few tokens."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import Filter
from longwave.nn.module import Hint, widened


class ShiftFilter(Filter):
    """k[l] = sum_i B[i] C[i + l]  for l < N, zero after: a state that shifts by one a step and is read out by C.

    Source: Fu et al. (2023) "Hungry Hungry Hippos", arXiv:2212.14052, sec. 3.1. B starts as the first
    unit vector, so the taps are C.

    Args:
        channels: C.
        d_state: N, the number of taps.
    """

    optim_hints: ClassVar[dict[str, Hint]] = {"B": Hint(max_lr=1e-3)}

    def __init__(self, channels: int, d_state: int = 64):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"a shift filter needs d_state >= 1; got {d_state}")
        self.channels, self.support = channels, d_state
        self.B = nn.Parameter(torch.empty(channels, d_state))
        self.C = nn.Parameter(torch.empty(channels, d_state))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.B.zero_()
        self.B[:, 0] = 1.0
        self.C.normal_()

    def forward(self, length: int) -> Tensor:
        B, C = widened(self.B, self.C)
        N = B.shape[1]
        correlation = torch.fft.irfft(torch.fft.rfft(B, 2 * N).conj() * torch.fft.rfft(C, 2 * N), 2 * N)
        return correlation[:, : min(length, N)]
