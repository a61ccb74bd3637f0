"""What S4, S4D, DSS and LongConv have in common: one layer around different filters."""

from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Filter, OutputGLU, OutputLinear, init_conv_state, long_conv


class ConvLayer(Mixer):
    """y = output_linear(k * x + D x).

    Attributes:
        State: the NamedTuple of one tensor, of the mixer's own, that is the state of :func:`longwave.nn.long_conv`.

    Args:
        d_model: D.
        kernel: the filter k, of C channels, C / D of which hear each feature.
        output_linear: from width C to D, with the nonlinearity in between.
    """

    State: Any

    def __init__(self, d_model: int, kernel: Filter, output_linear: OutputLinear | OutputGLU):
        super().__init__()
        self.d_model, self.kernel, self.output_linear = d_model, kernel, output_linear
        self.around = output_linear.around
        self.D = nn.Parameter(torch.empty(kernel.channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> Any:
        return self.State(init_conv_state(self.kernel, batch))

    def mix(self, x: Tensor, state: Any, padding: Tensor | None):
        copies = self.kernel.channels // self.d_model
        u = x if copies == 1 else x.repeat(1, 1, copies)
        y, past = long_conv(u, self.kernel, None if state is None else state[0], padding, skip=self.D)
        return self.around(self.output_linear, y), None if state is None else self.State(past)
