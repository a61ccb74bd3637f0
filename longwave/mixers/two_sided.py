"""TwoSided: a convolution that looks back with one filter and ahead with another, then a gated linear unit.

Source: the ``bidirectional`` layers of S4, S4D, DSS (github.com/state-spaces/s4, github.com/ag1988/dss) and LongConv
(github.com/HazyResearch/safari): one convolution with two filters before one nonlinearity.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longwave.mixers.base import WholeMixer
from longwave.nn import FILTERS, AnyFilter, OutputGLU, two_sided_conv


class TwoSided(WholeMixer, name="two_sided"):
    """y = GLU(W gelu(sum_s k[s] x[t-s] + sum_s f[s] x[t+1+s] + D x[t])).

    Args:
        d_model: D.
        filter: of both directions: a name in :data:`longwave.nn.FILTERS`, or ``{"kind": name, ...}`` with its options.
    Raises:
        ValueError: for an unknown filter or option, or where the filter refuses a value.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"filter": {"kind": "s4d", "d_state": 8}},
        {"filter": {"kind": "free", "max_len": 32, "squash": 0.001}},
    )

    def __init__(self, d_model: int, filter: AnyFilter = FILTERS.make("s4d")):  # noqa: B008
        super().__init__()
        self.d_model = d_model
        spec = FILTERS.read(filter)
        self.kernel, self.kernel_ahead = spec.build(d_model), spec.build(d_model)
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        y = two_sided_conv(x, self.kernel, self.kernel_ahead, skip=self.D)
        return OutputGLU.around(self.output_linear, y)
