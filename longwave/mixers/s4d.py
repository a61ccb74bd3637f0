"""S4D: a diagonal state space as a long convolution, then a gated linear unit.

Source: Gu, Goel, Gupta & Re (2022), arXiv:2206.11893, sec. 4: the layer of S4 with a diagonal kernel. Parameter names
are those of the authors' models/s4/s4d.py; B is kept as in their full block.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from longwave.mixers.conv_layer import ConvLayer
from longwave.nn import OutputGLU, S4DFilter


class S4DState(NamedTuple):
    h: Tensor  # (B, D, N/2) complex


class S4D(ConvLayer, name="s4d"):
    """y = GLU(W gelu(k * x + D x)).

    Args:
        d_model: D.
        d_state: N, real state size a channel, even.
        init, discretization, dt_min, dt_max, systems, rate: of the filter, see :class:`longwave.nn.S4DFilter`.
    """

    State = S4DState
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
        kernel = S4DFilter(
            d_model,
            d_state,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            systems=systems,
            rate=rate,
        )
        super().__init__(d_model, kernel, OutputGLU(d_model, d_model))
