"""Filters: the impulse responses that a long convolution is given."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from longwave.nn.filters.base import (
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
from longwave.nn.filters.gss import GSSFilter, SharedStateSpace
from longwave.nn.filters.implicit import HyenaFilter
from longwave.nn.filters.modal import ModalFilter
from longwave.nn.filters.shift import ShiftFilter
from longwave.nn.filters.taps import FreeFilter, Smooth, SmoothFrequencies
from longwave.spec import Parts

FILTERS: Parts[Filter, FilterSpec] = Parts(
    "filter",
    FilterSpec,
    given=("channels",),
    classes={
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
    },
    of=Filter,
)
AnyFilter = Annotated[SerializeAsAny[FilterSpec], BeforeValidator(FILTERS.field)]  # an option of who takes any filter

__all__ = [
    "FILTERS",
    "AnyFilter",
    "CKConvFilter",
    "DPLRFilter",
    "DPLRStateSpace",
    "DSSFilter",
    "DSSSoftmaxFilter",
    "DenseStateSpace",
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
