"""S4: a state space with a diagonal plus low rank matrix as a long convolution, then a gated linear unit.

Source: Gu, Goel & Re (2021) "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396, with
the output layer of github.com/state-spaces/s4.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import DPLRFilter, OutputGLU, init_conv_state, long_conv


class S4State(NamedTuple):
    h: Tensor  # (B, D, N)


class S4(Mixer, name="s4"):
    """y = GLU(W gelu(k * x + D x)).

    Args:
        d_model: D.
        d_state: N, real state size a channel, even.
        init, rank, dt_min, dt_max, systems, rate: of the filter, see :class:`longwave.nn.DPLRFilter`.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 16},
        {"d_state": 8, "init": "legt", "dt_max": 0.5, "systems": 2},
        {"d_state": 8, "init": "fourier", "systems": 1, "rate": 0.5},
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "legs",
        rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        systems: int | None = None,
        rate: float = 1.0,
    ):
        super().__init__()
        self.d_model = d_model
        self.kernel = DPLRFilter(
            d_model, d_state, init=init, rank=rank, dt_min=dt_min, dt_max=dt_max, systems=systems, rate=rate
        )
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> S4State:
        return S4State(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: S4State | None = None, *, mask: Tensor | None = None):
        h = None if state is None else state.h
        y, h = long_conv(zero_padding(x, mask), self.kernel, h, skip=self.D)
        return self.output_linear(y), None if h is None else S4State(h)
