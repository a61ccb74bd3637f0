"""DSS: a state space whose complex modes all channels share, as a long convolution, then a linear map.

Source: Gupta, Gu & Berant (2022) "Diagonal State Spaces are as Effective as Structured State Spaces",
arXiv:2203.14343, sec. 3.3. Parameter names are those of github.com/ag1988/dss but for the eigenvalues.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import DSSFilter, DSSSoftmaxFilter, init_conv_state, long_conv


class DSSState(NamedTuple):
    h: Tensor  # (B, D, N) complex


class DSS(Mixer, name="dss"):
    """y = W gelu(k * x + D x), k of exponentials (DSS-EXP).

    Args:
        d_model: D.
        d_state: N, complex modes, each counted once.
        eigenvalues, discretization, dt_min, dt_max, rate: of the filter, see :class:`longwave.nn.DSSFilter`.
    """

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
        super().__init__()
        self.d_model = d_model
        self.kernel = DSSFilter(
            d_model,
            d_state,
            eigenvalues=eigenvalues,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            rate=rate,
        )
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> DSSState:
        return DSSState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: DSSState | None = None, *, mask: Tensor | None = None):
        h = None if state is None else state.h
        y, h = long_conv(zero_padding(x, mask), self.kernel, h, skip=self.D)
        return self.output_linear(F.gelu(y)), None if h is None else DSSState(h)


class DSSSoftmaxState(NamedTuple):
    past: Tensor  # (B, t, D) every input so far


class DSSSoftmax(Mixer, name="dss_softmax"):
    """y = W gelu(k * x + D x), every mode of k normalised over ``max_len`` steps (DSS-SOFTMAX).

    Args:
        d_model: D.
        max_len: longest sequence; every tap depends on it.
        d_state: N, complex modes, each counted once.
        dt_min, dt_max: of the filter, see :class:`longwave.nn.DSSSoftmaxFilter`.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_len": 32, "d_state": 6}, {"max_len": 20, "dt_max": 0.5})

    def __init__(self, d_model: int, max_len: int, d_state: int = 64, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__()
        self.d_model = d_model
        self.kernel = DSSSoftmaxFilter(d_model, max_len, d_state, dt_min=dt_min, dt_max=dt_max)
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> DSSSoftmaxState:
        return DSSSoftmaxState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: DSSSoftmaxState | None = None, *, mask: Tensor | None = None):
        past = None if state is None else state.past
        y, past = long_conv(zero_padding(x, mask), self.kernel, past, skip=self.D)
        return self.output_linear(F.gelu(y)), None if past is None else DSSSoftmaxState(past)
