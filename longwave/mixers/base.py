"""What a mixer is: the only thing in a network that moves information along time."""

import abc
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longwave.nn.module import Hint, choose, nearest

State = tuple[Any, ...]  # in each mixer a NamedTuple of tensors, batch first
MIXERS: dict[str, type["Mixer"]] = {}


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


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a mixer: the arguments of its ``__init__`` but d_model."""
    parameters = dict(inspect.signature(choose("mixer", name, MIXERS).__init__).parameters)
    return {key: value for key, value in parameters.items() if key not in ("self", "d_model")}


@dataclass(frozen=True)
class MixerSpec:
    """A mixer as data: what a recipe writes down and a checkpoint stores."""

    name: str
    options: dict[str, Any]

    def build(self, d_model: int) -> Mixer:
        """The module, freshly drawn."""
        return MIXERS[self.name](d_model, **self.options)


def mixer(name: str, **options: Any) -> MixerSpec:
    """``mixer("s4d", d_state=16)``: its names are checked where it is written, not where it is built.

    Raises:
        ValueError: for an unknown mixer or option, with the nearest one, or for an option that is missing.
    """
    known = options_of(name)
    for key in options:
        if key not in known:
            raise ValueError(f"mixer {name!r} has no option {key!r}; it has {', '.join(known)}{nearest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"mixer {name!r} needs the option {key!r}")
    return MixerSpec(name, options)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, C) with zeros where mask (B, L) is False: padding is silenced after every bias, before every mixing."""
    return x if mask is None else x * mask[..., None].to(x.dtype)
