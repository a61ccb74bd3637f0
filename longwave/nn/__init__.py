"""Modules without a policy on time: filters, the long convolution that carries state, channel mixers, positions."""

from longwave.nn.block_fft import BlockFFT, MonarchFFT, block_fft, fourier_factors, monarch_fft, monarch_sizes
from longwave.nn.channel import MLP, OutputGLU, OutputLinear, SwiGLU
from longwave.nn.dense_conv import dense_conv
from longwave.nn.driven_states import C_INITS, DrivenStates
from longwave.nn.filters import (
    FILTERS,
    AnyFilter,
    CKConvFilter,
    DenseStateSpace,
    DPLRFilter,
    DPLRStateSpace,
    DSSFilter,
    DSSSoftmaxFilter,
    Filter,
    FilterSpec,
    FlexConvFilter,
    FreeFilter,
    GSSFilter,
    HyenaFilter,
    ModalFilter,
    Response,
    S4DFilter,
    ShiftFilter,
    StateSpace,
    StateSpaceFilter,
    Truncated,
    longest,
    responses,
)
from longwave.nn.frozen import derived, frozen
from longwave.nn.hippo import hippo, nplr
from longwave.nn.long_conv import LongConv, conv_with_past, init_conv_state, long_conv, online_length, two_sided_conv
from longwave.nn.module import Hint, append_time, optim_hints, positive_rate, reset, set_rate
from longwave.nn.monarch import BlockdiagLinear, ButterflyLinear, MonarchLinear
from longwave.nn.monarch_conv import monarch_conv
from longwave.nn.mu_law import mu_law_decode, mu_law_encode
from longwave.nn.norm import NORMS, AnyNorm, LayerNorm, RMSNorm
from longwave.nn.online_conv import Taps
from longwave.nn.rotary import POSITIONS, AnyPositions, Rotary
from longwave.nn.s4nd import S4ND, SeparableConv
from longwave.nn.weight_only import WeightOnlyLinear, like_output, weight_only, without_bias

__all__ = [
    "C_INITS",
    "FILTERS",
    "MLP",
    "NORMS",
    "POSITIONS",
    "S4ND",
    "AnyFilter",
    "AnyNorm",
    "AnyPositions",
    "BlockFFT",
    "BlockdiagLinear",
    "ButterflyLinear",
    "CKConvFilter",
    "DPLRFilter",
    "DPLRStateSpace",
    "DSSFilter",
    "DSSSoftmaxFilter",
    "DenseStateSpace",
    "DrivenStates",
    "Filter",
    "FilterSpec",
    "FlexConvFilter",
    "FreeFilter",
    "GSSFilter",
    "Hint",
    "HyenaFilter",
    "LayerNorm",
    "LongConv",
    "ModalFilter",
    "MonarchFFT",
    "MonarchLinear",
    "OutputGLU",
    "OutputLinear",
    "RMSNorm",
    "Response",
    "Rotary",
    "S4DFilter",
    "SeparableConv",
    "ShiftFilter",
    "StateSpace",
    "StateSpaceFilter",
    "SwiGLU",
    "Taps",
    "Truncated",
    "WeightOnlyLinear",
    "append_time",
    "block_fft",
    "conv_with_past",
    "dense_conv",
    "derived",
    "fourier_factors",
    "frozen",
    "hippo",
    "init_conv_state",
    "like_output",
    "long_conv",
    "longest",
    "monarch_conv",
    "monarch_fft",
    "monarch_sizes",
    "mu_law_decode",
    "mu_law_encode",
    "nplr",
    "online_length",
    "optim_hints",
    "positive_rate",
    "reset",
    "responses",
    "set_rate",
    "two_sided_conv",
    "weight_only",
    "without_bias",
]
