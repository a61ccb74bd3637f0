"""Filters: the impulse responses that a long convolution is given."""

from longwave.nn.filters.base import (
    FILTERS,
    AnyFilter,
    Filter,
    FilterSpec,
    Response,
    StateSpace,
    StateSpaceFilter,
    Truncated,
    longest,
    responses,
    slowest_modes,
)
from longwave.nn.filters.ckconv import CKConvFilter, FlexConvFilter
from longwave.nn.filters.diagonal import S4DFilter
from longwave.nn.filters.dplr import DenseStateSpace, DPLRFilter, DPLRStateSpace
from longwave.nn.filters.dss import DSSFilter, DSSSoftmaxFilter
from longwave.nn.filters.ema import EMAFilter
from longwave.nn.filters.gss import GSSFilter, SharedStateSpace
from longwave.nn.filters.implicit import HyenaFilter
from longwave.nn.filters.modal import ModalFilter
from longwave.nn.filters.shift import ShiftFilter
from longwave.nn.filters.taps import FreeFilter, Smooth, SmoothFrequencies

FILTERS.update(
    {
        "s4d": S4DFilter,
        "dss": DSSFilter,
        "dss_softmax": DSSSoftmaxFilter,
        "gss": GSSFilter,
        "s4": DPLRFilter,
        "ckconv": CKConvFilter,
        "flexconv": FlexConvFilter,
        "free": FreeFilter,
        "hyena": HyenaFilter,
        "modal": ModalFilter,
        "shift": ShiftFilter,
        "ema": EMAFilter,
        "truncated": Truncated,
    }
)

__all__ = [
    "FILTERS",
    "AnyFilter",
    "CKConvFilter",
    "DPLRFilter",
    "DPLRStateSpace",
    "DSSFilter",
    "DSSSoftmaxFilter",
    "DenseStateSpace",
    "EMAFilter",
    "Filter",
    "FilterSpec",
    "FlexConvFilter",
    "FreeFilter",
    "GSSFilter",
    "HyenaFilter",
    "ModalFilter",
    "Response",
    "S4DFilter",
    "SharedStateSpace",
    "ShiftFilter",
    "Smooth",
    "SmoothFrequencies",
    "StateSpace",
    "StateSpaceFilter",
    "Truncated",
    "longest",
    "responses",
    "slowest_modes",
]
