"""DSS: a state space whose complex modes all channels share, as a long convolution, then a linear map.

Source: Gupta, Gu & Berant (2022) "Diagonal State Spaces are as Effective as Structured State Spaces",
arXiv:2203.14343. Parameter names are those of github.com/ag1988/dss but for the eigenvalues.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from longwave.mixers.conv_layer import ConvLayer
from longwave.mixers.states import Growing
from longwave.nn import DSSFilter, DSSSoftmaxFilter, OutputLinear


class DSSState(NamedTuple):
    h: Tensor  # (B, D, N) complex


class DSS(ConvLayer, name="dss"):
    """y = W gelu(k * x + D x), k of exponentials (DSS-EXP).

    Args:
        d_model: D.
        d_state: N, complex modes, each counted once.
        eigenvalues, discretization, dt_min, dt_max, rate: of the filter, see :class:`longwave.nn.DSSFilter`.
    """

    State = DSSState
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 6, "dt_max": 0.5},
        {"d_state": 4, "eigenvalues": "exp_re_im", "discretization": "none"},
        {"d_state": 5, "eigenvalues": "clip"},
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        eigenvalues: str = "exp",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        kernel = DSSFilter(
            d_model,
            d_state,
            eigenvalues=eigenvalues,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            rate=rate,
        )
        super().__init__(d_model, kernel, OutputLinear(d_model, d_model))


class DSSSoftmaxState(NamedTuple):
    past: Growing  # (B, t, D) every input so far


class DSSSoftmax(ConvLayer, name="dss_softmax"):
    """DSSSoftmax: DSS whose modes are normalised over ``max_len`` steps by a softmax, so that they may grow.

    y = W gelu(k * x + D x), k of DSS-SOFTMAX.

    Args:
        d_model: D.
        max_len: longest sequence; every tap depends on it.
        d_state: N, complex modes, each counted once.
        dt_min, dt_max: of the filter, see :class:`longwave.nn.DSSSoftmaxFilter`.
    """

    State = DSSSoftmaxState
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_len": 32, "d_state": 6}, {"max_len": 20, "dt_max": 0.5})

    def __init__(self, d_model: int, max_len: int, d_state: int = 64, dt_min: float = 1e-3, dt_max: float = 1e-1):
        kernel = DSSSoftmaxFilter(d_model, max_len, d_state, dt_min=dt_min, dt_max=dt_max)
        super().__init__(d_model, kernel, OutputLinear(d_model, d_model))
