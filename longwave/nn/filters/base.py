"""What a long convolution convolves with: the impulse response of a linear time-invariant map."""

import abc
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.nn.frozen import derived
from longwave.nn.online_conv import Taps
from longwave.nn.padding import last_steps
from longwave.ops import opaque, state_space_step, vandermonde, vandermonde_transpose
from longwave.spec import Parts, PartSpec


class Response(NamedTuple):
    """A bank of filters as it is drawn.

    Attributes:
        name: where it sits in its layer.
        channels: C.
        taps: (C, length) of a length, or ValueError where the filters are not defined at that length.
        eigenvalues: (G, N) complex, of one step of the recurrence, G dividing C, or None where there is none: channels
            g, g + G, ... share row g.
    """

    name: str
    channels: int
    taps: Callable[[int], Tensor]
    eigenvalues: Tensor | None = None


class Filter(nn.Module, abc.ABC):
    """A bank of causal filters.

    Attributes:
        channels: C, how many there are.
        support: steps after which every filter is zero, or None: a convolution needs to remember only support - 1
            past inputs.
        makes_taps: says of a module of any kind that its weights are those of a filter.
    """

    channels: int
    support: int | None = None
    makes_taps = True

    @abc.abstractmethod
    def forward(self, length: int) -> Tensor:
        """The first taps k (C, min(length, support)), real, float32 or better.

        Raises:
            ValueError: where the filter is not defined at that length.
        """

    def responses(self) -> list[Response]:
        """What is drawn of it."""
        return [Response("", self.channels, self)]

    def longest(self) -> int | None:
        """The greatest length at which the filter is defined; None where there is none, or it is not known."""
        return None

    @derived
    def oldest_first(self) -> Tensor:
        """All taps (C, support) of a filter of finite support, the present one last."""
        assert self.support is not None
        return self(self.support).flip(1)

    @derived
    def prepared(self, length: int) -> Taps:
        """The first taps, for steps that are to come."""
        return Taps(self(length))


class FilterSpec(PartSpec):
    """A filter as data."""

    def build(self, channels: int, *more: Any) -> Filter:
        """The module, freshly drawn; ``more`` is what its owner gives besides."""
        return self._built(channels, *more)


FILTERS: Parts[Filter, FilterSpec] = Parts("filter", FilterSpec, given=("channels",), of=Filter)
AnyFilter = Annotated[SerializeAsAny[FilterSpec], BeforeValidator(FILTERS.field)]  # an option of who takes any filter


def _like_power(a: Tensor, padding: Tensor | None, length: int) -> Tensor:
    return a.new_empty(a.shape if padding is None else (padding.shape[0], *a.shape))


@opaque(like=_like_power)
def power(a: Tensor, padding: Tensor | None, length: int) -> Tensor:
    """a^length of complex a, or a^(length - padding), padding (B,), with an axis B in front.

    By squaring in complex128, so that it is exact and its gradients are finite where a, or a power of it, is zero.
    """
    square, result = a.to(torch.complex128), torch.ones_like(a, dtype=torch.complex128)
    if padding is not None:
        exponent = (length - padding).view(-1, *[1] * a.ndim)
    for bit in range(length.bit_length()):
        square = square * square if bit else square
        if padding is not None:
            result = torch.where((exponent >> bit & 1).bool(), result * square, result)
        elif length >> bit & 1:
            result = result * square
    return result.to(a.dtype)


class StateSpace(NamedTuple):
    """A diagonal discrete system  h[t] = a h[t-1] + b u[t],  y[t] = 2 Re <c, h[t]>;  each (C, N) complex.

    What a convolution asks of a system is its methods; another kind of system has the same.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, C, N)."""
        return self.a.detach().new_zeros(batch, *self.a.shape)

    def stepper(self) -> "StateSpace":
        """What takes single steps."""
        return self

    def step(self, x: Tensor, state: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One input x (B, C) -> what it and the state make of it, with skip (C,) times x, and the state behind it."""
        return state_space_step(x, self.a, self.b, self.c, state, skip)

    def taps(self, length: int) -> Tensor:
        """The impulse response (C, length)."""
        return vandermonde(self.a, (self.b * self.c)[None], length)[0]

    def response(self, state: Tensor, length: int) -> Tensor:
        """What the state (B, C, N) adds to the next ``length`` outputs, (B, C, length)."""
        return vandermonde(self.a, self.c * self.a * state, length)

    def advance(self, state: Tensor, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """The state after the inputs x (B, L, C), of which the last padding (B,) of each row are zeros and take no
        time."""
        newest_first = last_steps(x, padding, x.shape[1]).flip(1).transpose(1, 2)
        gathered = vandermonde_transpose(self.a, newest_first.to(self.a.real.dtype))
        return power(self.a, padding, x.shape[1]) * state + self.b * gathered


class StateSpaceFilter(Filter):
    """A filter that is also a recurrence, so it decodes in constant memory. A subclass only says what the system is."""

    @abc.abstractmethod
    def realize(self) -> Any:
        """The discrete system, a :class:`StateSpace` or what has its methods, in complex64 or better."""

    @derived
    def realized(self) -> Any:
        """What :meth:`realize` says."""
        return self.realize()

    @derived
    def stepper(self) -> Any:
        """The system in the form that takes single steps."""
        return self.realized().stepper()

    def forward(self, length: int) -> Tensor:
        return self.realized().taps(length)

    def responses(self) -> list[Response]:
        return [Response("", self.channels, self, _eigenvalues(self.realize()))]


def _eigenvalues(system: Any) -> Tensor | None:
    """Of one step of a discrete system: the diagonal, or those of its matrix."""
    a = system.matrix() if hasattr(system, "matrix") else getattr(system, "a", None)
    if a is None:
        return None
    return torch.atleast_2d(a) if a.is_complex() else torch.linalg.eigvals(a)


def slowest_modes(a: Tensor) -> Response:
    """Of a recurrence whose step sizes its input sets, the slowest mode of each channel at those of a silent input.

    Args:
        a: (C, N) what is left then of every mode after a step, in (0, 1).
    """
    slowest = a.amax(1, keepdim=True)

    def taps(length: int) -> Tensor:
        return slowest ** torch.arange(length, device=a.device)

    return Response("slowest modes at x = 0", len(a), taps, torch.complex(a, torch.zeros_like(a)))


def responses(module: nn.Module, name: str = "") -> Iterator[Response]:
    """All filters in a module, under their names, by the outermost parts that say what they stand for."""
    own: list[Response] = getattr(module, "responses", list)()
    for response in own:
        yield response._replace(name=f"{name} {response.name}".strip())
    if not own:
        for key, child in module.named_children():
            yield from responses(child, f"{name}.{key}".lstrip("."))


def longest(module: Any) -> int | None:
    """The greatest number of steps that all of a module is defined for, by the outermost parts that say so by a method
    of this name; None where there is no end."""
    if hasattr(module, "longest"):
        return module.longest()
    return min((limit for child in module.children() if (limit := longest(child)) is not None), default=None)


def require_max_len(what: str, max_len: int, length: int = 1) -> None:
    """Refuse a filter of no length, and a sequence of ``length`` steps where it is longer than the filter is defined.

    Raises:
        ValueError: for max_len < 1 or length > max_len.
    """
    if max_len < 1:
        raise ValueError(f"{what} needs max_len >= 1; got {max_len}")
    if length > max_len:
        raise ValueError(
            f"{what} of max_len = {max_len} cannot serve a sequence of {length}; build it with max_len >= {length}"
        )


def shared_systems(channels: int, d_state: int, systems: int | None) -> int:
    """How many systems of d_state / 2 conjugate pairs the channels share; None is one for every channel.

    Raises:
        ValueError: for an odd d_state, or systems that do not divide channels.
    """
    if d_state < 2 or d_state % 2:
        raise ValueError(f"a state space keeps conjugate pairs: d_state must be even, >= 2; got {d_state}")
    systems = channels if systems is None else systems
    if systems < 1 or channels % systems:
        raise ValueError(f"systems = {systems} does not divide channels = {channels}")
    return systems


class Truncated(Filter):
    """The first ``support`` taps of another filter, zero after: what a fixed kernel length does to a longer input.

    Args:
        channels: C.
        filter: whose taps, or the filter itself.
        support: how many.
    Raises:
        ValueError: for support < 1, or where the filter refuses a value.
    """

    def __init__(self, channels: int, filter: Filter | AnyFilter = "ema", support: int = 128):  # type: ignore[assignment]
        super().__init__()
        if support < 1:
            raise ValueError(f"a truncated filter keeps at least 1 tap; got support = {support}")
        self.inner = filter if isinstance(filter, Filter) else FILTERS.read(filter).build(channels)
        self.channels, self.support = channels, support

    def forward(self, length: int) -> Tensor:
        assert self.support is not None
        return self.inner(min(length, self.support))

    def longest(self) -> int | None:
        inner = self.inner.longest()
        return inner if inner is not None and self.support is not None and inner < self.support else None
