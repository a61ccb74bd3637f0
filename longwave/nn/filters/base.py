"""What a long convolution convolves with: the impulse response of a linear time-invariant map."""

import abc
from typing import NamedTuple

from torch import Tensor, nn

from longwave.ops import vandermonde


class Filter(nn.Module, abc.ABC):
    """A bank of causal filters.

    Attributes:
        channels: C, how many there are.
        support: steps after which every filter is zero, or None: a convolution needs to remember only support - 1
            past inputs.
    """

    channels: int
    support: int | None = None

    @abc.abstractmethod
    def forward(self, length: int) -> Tensor:
        """The first taps k (C, min(length, support)), real, float32 or better.

        Raises:
            ValueError: where the filter is not defined at that length.
        """


class StateSpace(NamedTuple):
    """A diagonal discrete system  h[t] = a h[t-1] + b u[t],  y[t] = 2 Re <c, h[t]>;  each (C, N) complex."""

    a: Tensor
    b: Tensor
    c: Tensor


class StateSpaceFilter(Filter):
    """A filter that is also a recurrence, so it decodes in constant memory. A subclass only says what the system is."""

    @abc.abstractmethod
    def realize(self) -> StateSpace:
        """The discrete system, complex64 or better."""

    def forward(self, length: int) -> Tensor:
        a, b, c = self.realize()
        return vandermonde(a, (b * c)[None], length)[0]


class Truncated(Filter):
    """The first ``support`` taps of another filter, zero after: what a fixed kernel length does to a longer input."""

    def __init__(self, inner: Filter, support: int):
        super().__init__()
        if support < 1:
            raise ValueError(f"a truncated filter keeps at least 1 tap; got support = {support}")
        self.inner, self.channels, self.support = inner, inner.channels, support

    def forward(self, length: int) -> Tensor:
        assert self.support is not None
        return self.inner(min(length, self.support))
