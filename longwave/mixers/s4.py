"""S4: a state space with a diagonal plus low rank matrix as a long convolution, then a gated linear unit.

Source: Gu, Goel & Re (2021) "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396, with
the output layer of github.com/state-spaces/s4.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from longwave.mixers.conv_layer import ConvLayer
from longwave.nn import DPLRFilter, OutputGLU


class S4State(NamedTuple):
    h: Tensor  # (B, D, N) real


class S4(ConvLayer, name="s4"):
    """y = GLU(W gelu(k * x + D x)).

    Args:
        d_model: D.
        d_state: N, real state size a channel, even.
        init, rank, dt_min, dt_max, systems, rate: of the filter, see :class:`longwave.nn.DPLRFilter`.
    """

    State = S4State
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
        kernel = DPLRFilter(
            d_model, d_state, init=init, rank=rank, dt_min=dt_min, dt_max=dt_max, systems=systems, rate=rate
        )
        super().__init__(d_model, kernel, OutputGLU(d_model, d_model))
