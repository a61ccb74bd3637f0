"""What S4, S4D, DSS and LongConv have in common: one layer around different filters."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import Filter, init_conv_state, long_conv


class ConvState(NamedTuple):
    past: Tensor  # (B, C, N) what a state space knows of the past; (B, t, C) every input so far where there is none


class ConvLayer(Mixer):
    """y = output_linear(k * x + D x).

    Args:
        d_model: D.
        kernel: the filter k, of C channels, C / D of which hear each feature.
        output_linear: from width C to D, with the nonlinearity in between.
    """

    def __init__(self, d_model: int, kernel: Filter, output_linear: nn.Module):
        super().__init__()
        self.d_model, self.kernel, self.output_linear = d_model, kernel, output_linear
        self.D = nn.Parameter(torch.empty(kernel.channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> ConvState:
        return ConvState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: ConvState | None = None, *, mask: Tensor | None = None):
        u, copies = zero_padding(x, mask), self.kernel.channels // self.d_model
        u = u if copies == 1 else u.repeat(1, 1, copies)
        y, past = long_conv(u, self.kernel, None if state is None else state.past, skip=self.D)
        return self.output_linear(y), None if state is None else ConvState(past)
