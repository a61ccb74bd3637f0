"""What a mixer is: the only thing in a network that moves information along time."""

import abc
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from longwave.nn import Response, longest
from longwave.nn.module import Hint
from longwave.nn.padding import real_first, take_steps
from longwave.spec import Parts, PartSpec

State = tuple[Any, ...]  # in each mixer a NamedTuple of tensors, batch first


class MixerSpec(PartSpec):
    """A mixer as data."""

    def build(self, d_model: int) -> "Mixer":
        """The module, freshly drawn."""
        return self._built(d_model)


MIXERS: Parts["Mixer", MixerSpec] = Parts("mixer", MixerSpec, given=("d_model",))
AnyMixer = Annotated[SerializeAsAny[MixerSpec], BeforeValidator(MIXERS.field)]  # an option of who takes any mixer


class Mixer(nn.Module, abc.ABC):
    """A map (B, L, D) -> (B, L, D) along time that can stop at any token and go on.

    One ``forward`` is training, prefill, chunked prefill and decoding:

        y, _ = mixer(x)                                # no state in, no state out
        y, s = mixer(x[:, :n], mixer.init_state(B))    # any n >= 1
        y, s = mixer(x[:, n:], s)                      # goes on exactly

    A state is a NamedTuple of tensors, batch first, and is never modified. ``forward`` is the same for all mixers: it
    checks what it is given and brings the real tokens of every row to the front; what a mixer says is :meth:`mix`.
    ``class Foo(Mixer, name="foo")`` registers; the contract in longwave/contract then covers every entry of
    ``examples``. Without a name a class is abstract: what a mixer and its two-sided twin have in common.

    Attributes:
        causal: whether y[:, t] depends on x[:, :t+1] alone. A mixer that is not causal is a :class:`WholeMixer`.
        examples: small configurations, each put through the contract.
        optim_hints: what parameters ask of the optimiser, by glob pattern.
        without_filter: how it looks back, of one that has no filters.
        window: of how many last steps it sees no more, its own included, where what it keeps grows; None is all.
        d_model: D.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]]
    optim_hints: ClassVar[dict[str, Hint]] = {}
    without_filter: str = "there is nothing to draw"
    window: int | None = None
    d_model: int
    _layout: tuple[type, list[torch.Size]] | None = None

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            raise TypeError(f"{cls.__name__} defines forward, which is final: define mix(x, state, padding)")
        if name is None:
            return
        if name in MIXERS:
            raise ValueError(f"two mixers are called {name!r}: {MIXERS[name].__name__} and {cls.__name__}")
        cls.name = name
        MIXERS[name] = cls

    @abc.abstractmethod
    def init_state(self, batch: int) -> State:
        """The state before the first token of ``batch`` sequences: of its own NamedTuple type, and of the sizes that it
        keeps; an axis of size 0 is time, which grows."""

    @abc.abstractmethod
    def mix(self, x: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, Any]:
        """Mix along time; what ``forward`` calls.

        Args:
            x: (B, L, D), B and L >= 1, zero at padding.
            state: None, or one that fits.
            padding: (B,) how many steps at the end of each row are padding, or None. They take no time: they change
                neither y at real tokens nor the state. See longwave/nn/padding.py; silence what has had a bias.
        Returns:
            y: (B, L, D), finite and of no meaning at padding.
            state: after the last real token, or None where none came in.
        """

    def responses(self) -> list[Response]:
        """The filters that it stands for as a whole; where there are none, those of its parts are asked for."""
        return []

    @final  # type: ignore[misc]  # to mypy a module's forward is an attribute
    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix along time.

        Args:
            x: (B, L, D), B and L >= 1.
            state: None, or what ``init_state`` or an earlier call returned.
            mask: (B, L) bool, or integers 0 and 1: True = real token. Padding takes no time: wherever it stands, the
                output at real tokens and the state are as if it were not there, whatever it holds, NaN included; the
                output at padding is finite and means nothing.
        Returns:
            y: (B, L, D).
            state: after the last real token, or None where none came in.
        Raises:
            ValueError: where x, the state or the mask does not fit, or a filter is not defined at the length.
        """
        check_steps(self.name, x, self.d_model)
        if state is not None:
            state = self._checked(state, x)
        if mask is None:
            return self.mix(x, state, None)
        mask = as_mask(mask, x)
        order, back, padding = real_first(mask)
        if not torch.compiler.is_compiling() and self._ends_within(x, state):
            idle = min(int(padding.min()), x.shape[1] - 1)  # at the end of all rows, which so are as long as they need
            order, back, padding = order[:, : x.shape[1] - idle], back.clamp(max=x.shape[1] - idle - 1), padding - idle
        y, state = self.mix(take_steps(zero_padding(x, mask), order), state, padding)
        return take_steps(y, back), state

    def _ends_within(self, x: Tensor, state: Any) -> bool:
        """Whether a filter ends before x does, with the steps before x that a state has."""
        if (limit := longest(self)) is None:
            return False
        behind: list[int] = []
        if state is not None:
            _, sizes = self._layout or self._lay_out()
            behind = [t.shape[1] for t, size in zip(_tensors(state), sizes) if len(size) > 1 and size[1] == 0]
        return x.shape[1] + max(behind, default=0) > limit

    def _checked(self, state: Any, x: Tensor) -> Any:
        """The state, where it is of this layer and of the rows of x; one of inference mode as autograd needs it."""
        kind, sizes = self._layout or self._lay_out()
        if type(state) is not kind:
            raise ValueError(
                f"{self.name} goes on from a {kind.__name__}, of its init_state or an earlier call; "
                f"got a {type(state).__name__}"
            )
        tensors = list(_tensors(state))
        if len(tensors) != len(sizes) or not all(map(_fits, tensors, sizes)):
            raise ValueError(
                f"{self.name} of d_model = {self.d_model} has a state of {_described(self.init_state(1))} a sequence; "
                f"got one of {_described(state)}, from a layer of other sizes"
            )
        if any(t.shape[0] != x.shape[0] for t in tensors):
            raise ValueError(f"{self.name}: the state is of {tensors[0].shape[0]} sequences, x of {x.shape[0]}")
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(t.is_inference() for t in tensors):
            return tree_map(torch.clone, state)  # autograd cannot save what inference mode has made
        return state

    def _lay_out(self) -> tuple[type, list[torch.Size]]:
        with torch.no_grad():
            state = self.init_state(1)
        layout = type(state), [t.shape for t in _tensors(state)]
        if not torch.compiler.is_compiling():
            self._layout = layout
        return layout


MIXERS.of = Mixer


class WholeMixer(Mixer):
    """A mixer that looks ahead: it mixes whole sequences, so it has no state."""

    causal = False

    @abc.abstractmethod
    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x (B, L, D) -> y (B, L, D); see :meth:`Mixer.mix`."""

    @final
    def init_state(self, batch: int) -> State:
        """Raises ValueError."""
        raise ValueError(f"{self.name} looks ahead, so it has no state; call it on whole sequences, without one")

    @final
    def mix(self, x: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, None]:
        """See :class:`Mixer`."""
        return self.mix_whole(x, padding), None


def check_steps(what: str, x: Tensor, d_model: int) -> None:
    """Refuse what is not (B, L, d_model), floating, with B and L >= 1.

    Raises:
        ValueError: saying what ``what`` takes and what it got.
    """
    if x.ndim != 3 or x.shape[2] != d_model or x.shape[0] < 1 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"{what} takes x (B, L, {d_model}), floating, B >= 1 and L >= 1; got {tuple(x.shape)} {x.dtype}"
        )


def as_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of the steps of x (B, L, ...) as bool.

    Raises:
        ValueError: unless it is (B, L), bool or integers 0 and 1, and on the device of x.
    """
    whole = mask.dtype is torch.bool or not (mask.is_floating_point() or mask.is_complex())
    if mask.shape != x.shape[:2] or not whole or mask.device != x.device:
        raise ValueError(
            f"a mask is (B, L) = {tuple(x.shape[:2])} on {x.device}, bool or integers 0 and 1, True = real token; "
            f"got {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )
    if mask.dtype is torch.bool:
        return mask
    if not torch.compiler.is_compiling() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"a mask is 0 at padding and 1 at real tokens; got values {mask.min()}..{mask.max()}")
    return mask != 0


def without_padding(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (B, L, C) with zeros at padding, and the mask as bool: what a model does first, since its norms and maps would
    make gradients of NaN of what they are not asked about."""
    if mask is None:
        return x, None
    mask = as_mask(mask, x)
    return zero_padding(x, mask), mask


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, C) with zeros where mask (B, L) is False, by selection: NaN at padding goes nowhere."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def _tensors(state: Any) -> Iterator[Tensor]:
    for part in state:
        if isinstance(part, torch.Tensor):
            yield part
        else:
            yield from _tensors(part)


def _fits(tensor: Tensor, sizes: torch.Size) -> bool:
    if tensor.shape[1:] == sizes[1:]:
        return True
    return tensor.ndim == len(sizes) and all(n in (size, 0) for n, size in zip(sizes[1:], tensor.shape[1:]))


def _described(state: Any) -> str:
    leaves = tree_flatten_with_path(state)[0]
    return ", ".join(f"{keystr(path)[1:]} {tuple(t.shape[1:])}" for path, t in leaves)


def state_bytes(state: Any) -> int:
    """How many bytes a state takes, by the elements that its tensors show."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, torch.Tensor))


def mixer(name: str, **options: Any) -> MixerSpec:
    """``mixer("s4d", d_state=16)``: it is checked where it is written, not where it is built.

    Raises:
        ValueError: for an unknown mixer or option, with the nearest one, for an option that is missing, or for a value
            of another type.
    """
    return MIXERS.make(name, **options)
