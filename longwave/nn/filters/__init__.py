"""Filters: the impulse responses that a long convolution is given."""

from longwave.nn.filters.base import Filter, StateSpace, StateSpaceFilter, Truncated
from longwave.nn.filters.ckconv import CKConvFilter, FlexConvFilter
from longwave.nn.filters.diagonal import S4DFilter
from longwave.nn.filters.dplr import DenseStateSpace, DPLRFilter, DPLRStateSpace
from longwave.nn.filters.dss import DSSFilter, DSSSoftmaxFilter
from longwave.nn.filters.gss import GSSFilter, SharedStateSpace
from longwave.nn.filters.implicit import HyenaFilter
from longwave.nn.filters.shift import ShiftFilter
from longwave.nn.filters.taps import FreeFilter, Smooth, SmoothFrequencies

# Filters by name, each built as FILTERS[name](channels, **options): what a mixer that takes any filter is given.
FILTERS: dict[str, type[Filter]] = {
    "s4d": S4DFilter,
    "dss": DSSFilter,
    "dss_softmax": DSSSoftmaxFilter,
    "gss": GSSFilter,
    "s4": DPLRFilter,
    "ckconv": CKConvFilter,
    "flexconv": FlexConvFilter,
    "free": FreeFilter,
    "hyena": HyenaFilter,
    "shift": ShiftFilter,
}

__all__ = [
    "FILTERS",
    "CKConvFilter",
    "DPLRFilter",
    "DPLRStateSpace",
    "DSSFilter",
    "DSSSoftmaxFilter",
    "DenseStateSpace",
    "Filter",
    "FlexConvFilter",
    "FreeFilter",
    "GSSFilter",
    "HyenaFilter",
    "S4DFilter",
    "SharedStateSpace",
    "ShiftFilter",
    "Smooth",
    "SmoothFrequencies",
    "StateSpace",
    "StateSpaceFilter",
    "Truncated",
]
