"""What a mixer is: the only thing in a network that moves information along time."""

import abc
from typing import Annotated, Any, ClassVar, NoReturn

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longwave.nn.module import Hint
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

    A state is a NamedTuple of tensors, batch first, and is never modified. ``class Foo(Mixer, name="foo")`` registers;
    the contract in tests/test_mixers.py then covers every entry of ``examples``. Without a name a class is abstract:
    what a mixer and its two-sided twin have in common.

    Attributes:
        causal: whether y[:, t] depends on x[:, :t+1] alone. A mixer that is not causal has no state.
        examples: small configurations, each put through the contract.
        optim_hints: what parameters ask of the optimiser, by glob pattern.
        d_model: D.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]]
    optim_hints: ClassVar[dict[str, Hint]] = {}
    d_model: int

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        if name in MIXERS:
            raise ValueError(f"two mixers are called {name!r}: {MIXERS[name].__name__} and {cls.__name__}")
        cls.name = name
        MIXERS[name] = cls

    @abc.abstractmethod
    def init_state(self, batch: int) -> State:
        """The state before the first token of ``batch`` sequences."""

    @abc.abstractmethod
    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix along time.

        Args:
            x: (B, L, D), L >= 1.
            state: None, or what ``init_state`` or an earlier call returned.
            mask: (B, L) bool, True = real token. Padding on either side changes nothing for the real tokens; the
                output at padding is finite and means nothing.
        Returns:
            y: (B, L, D).
            state: after the last token, or None where none came in.
        Raises:
            ValueError: where a filter is not defined at the length.
        """


def state_bytes(state: Any) -> int:
    """How many bytes a state takes, by the elements that its tensors show."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, torch.Tensor))


def no_state(mixer: Mixer) -> NoReturn:
    """What a mixer that is not causal answers to ``init_state`` and to a state."""
    raise ValueError(f"{mixer.name} looks ahead, so it has no state; call it on whole sequences, without one")


def mixer(name: str, **options: Any) -> MixerSpec:
    """``mixer("s4d", d_state=16)``: it is checked where it is written, not where it is built.

    Raises:
        ValueError: for an unknown mixer or option, with the nearest one, for an option that is missing, or for a value
            of another type.
    """
    return MIXERS.make(name, **options)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, C) with zeros where mask (B, L) is False: padding is silenced after every bias, before every mixing."""
    return x if mask is None else x * mask[..., None].to(x.dtype)
