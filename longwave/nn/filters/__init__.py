"""Filters: the impulse responses that a long convolution is given."""

from longwave.nn.filters.base import Filter, StateSpace, StateSpaceFilter, Truncated
from longwave.nn.filters.diagonal import S4DFilter
from longwave.nn.filters.implicit import HyenaFilter
from longwave.nn.filters.shift import ShiftFilter
from longwave.nn.filters.taps import FreeFilter, Smooth, SmoothFrequencies

# Filters by name, each built as FILTERS[name](channels, **options): what a mixer that takes any filter is given.
FILTERS: dict[str, type[Filter]] = {"s4d": S4DFilter, "free": FreeFilter, "hyena": HyenaFilter, "shift": ShiftFilter}

__all__ = [
    "FILTERS",
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
