"""S4D: a diagonal state space as a long convolution, then a gated linear unit.

Source: Gu, Goel, Gupta & Re (2022), arXiv:2206.11893, sec. 4: the layer of S4 with a diagonal kernel. Parameter names
are those of the authors' models/s4/s4d.py; B is kept as in their full block.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import OutputGLU, S4DFilter, init_conv_state, long_conv


class S4DState(NamedTuple):
    h: Tensor  # (B, D, N/2) complex


class S4D(Mixer, name="s4d"):
    """y = GLU(W gelu(k * x + D x)).

    Args:
        d_model: D.
        d_state: N, real state size a channel, even.
        init, discretization, dt_min, dt_max, systems, rate: of the filter, see :class:`longwave.nn.S4DFilter`.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"d_state": 8, "dt_max": 0.5, "init": "legs", "discretization": "bilinear", "systems": 2},
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        systems: int | None = None,
        rate: float = 1.0,
    ):
        super().__init__()
        self.d_model = d_model
        self.kernel = S4DFilter(
            d_model,
            d_state,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            systems=systems,
            rate=rate,
        )
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> S4DState:
        return S4DState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: S4DState | None = None, *, mask: Tensor | None = None):
        h = None if state is None else state.h
        y, h = long_conv(zero_padding(x, mask), self.kernel, h, skip=self.D)
        return self.output_linear(y), None if h is None else S4DState(h)
