"""Filters: the impulse responses that a long convolution is given."""

from longwave.nn.filters.base import Filter, StateSpace, StateSpaceFilter, Truncated
from longwave.nn.filters.diagonal import S4DFilter
from longwave.nn.filters.implicit import HyenaFilter
from longwave.nn.filters.shift import ShiftFilter
from longwave.nn.filters.taps import FreeFilter, Smooth, SmoothFrequencies

__all__ = [
    "Filter",
    "FreeFilter",
    "HyenaFilter",
    "S4DFilter",
    "ShiftFilter",
    "Smooth",
    "SmoothFrequencies",
    "StateSpace",
    "StateSpaceFilter",
    "Truncated",
]
