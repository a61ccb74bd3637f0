"""Modules without a policy on time: filters, the long convolution that carries state, channel mixers, positions."""

from longwave.nn.channel import MLP, OutputGLU, SwiGLU
from longwave.nn.filters import (
    FILTERS,
    Filter,
    FreeFilter,
    HyenaFilter,
    S4DFilter,
    ShiftFilter,
    StateSpace,
    StateSpaceFilter,
    Truncated,
)
from longwave.nn.hippo import hippo, nplr
from longwave.nn.long_conv import LongConv, conv_with_past, init_conv_state, long_conv, two_sided_conv
from longwave.nn.module import Hint, append_time, optim_hints, positive_rate, reset, set_rate
from longwave.nn.rotary import rotate

__all__ = [
    "FILTERS",
    "MLP",
    "Filter",
    "FreeFilter",
    "Hint",
    "HyenaFilter",
    "LongConv",
    "OutputGLU",
    "S4DFilter",
    "ShiftFilter",
    "StateSpace",
    "StateSpaceFilter",
    "SwiGLU",
    "Truncated",
    "append_time",
    "conv_with_past",
    "hippo",
    "init_conv_state",
    "long_conv",
    "nplr",
    "optim_hints",
    "positive_rate",
    "reset",
    "rotate",
    "set_rate",
    "two_sided_conv",
]
