"""What an official system is to the importer: options that are read, keys that are expected, a module, a rename."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers import nearest

REQUIRED = object()  # in place of a default, where the official code has none
RUN = frozenset({"L", "batch", "length", "prefill"})  # how an official run was made, not what the module is

Options = SimpleNamespace  # every official option that matters, by its official name
Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


class Choice:
    """An option of which some values are carried over; the official default is the first, where not given."""

    def __init__(self, *values: Any, default: Any = REQUIRED):
        self.values, self.default = values, values[0] if default is REQUIRED else default


def _no_aliases(options: Options) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class System:
    """How one official module becomes one of ours.

    Attributes:
        options: official options that change the function, with their official defaults.
        keys: the official keys and shapes that the options ask for.
        build: our module, freshly drawn.
        convert: official tensors to ours, by differentiable functions of torch, so that gradients of the official
            ones come out of ``functional_call(module, convert(leaves, options), inputs)``.
        ignored: official options of training, speed and initialisation: accepted whatever they say.
        aliases: of keys that name the same tensor, the second to the first.
        optional: whether checkpoints leave the second names out.
    """

    options: Mapping[str, Any]
    keys: Callable[[Options], Shapes]
    build: Callable[[Options], nn.Module]
    convert: Callable[[State, Options], State]
    ignored: frozenset[str] = frozenset()
    aliases: Callable[[Options], dict[str, str]] = field(default=_no_aliases)
    optional: bool = False

    def read(self, config: Mapping[str, Any]) -> Options:
        """The options that matter, defaults filled in.

        Raises:
            ValueError: for an option that the official code does not have, one that is missing, or a value that is
                not carried over.
        """
        for name, value in config.items():
            if name not in self.options and name not in self.ignored and name not in RUN:
                known = [*self.options, *self.ignored]
                raise ValueError(f"there is no option {name!r} (= {value!r}){nearest(name, known)}")
        values = {}
        for name, default in self.options.items():
            choice = default if isinstance(default, Choice) else None
            value = config.get(name, default if choice is None else choice.default)
            if value is REQUIRED:
                raise ValueError(f"the option {name!r} is missing")
            if choice is not None and value not in choice.values:
                carried = ", ".join(map(repr, choice.values))
                raise ValueError(f"the option {name} = {value!r} is not carried over; longwave has {carried}")
            values[name] = value
        return Options(**values)

    def check(self, state: State, options: Options) -> None:
        """Raises ValueError for a key that is missing or unexpected, a wrong shape, or aliases that differ."""
        shapes, aliases = self.keys(options), self.aliases(options)
        for key in state:
            if key not in shapes:
                raise ValueError(f"the state has an unexpected key {key!r}{nearest(key, shapes)}")
        for key, shape in shapes.items():
            if key not in state:
                if self.optional and key in aliases:
                    continue
                raise ValueError(f"the state has no key {key!r}, which the config asks for with shape {shape}")
            if tuple(state[key].shape) != shape:
                raise ValueError(f"{key!r} has shape {tuple(state[key].shape)}; the config asks for {shape}")
        for key, first in aliases.items():
            if key in state and not torch.equal(state[key], state[first]):
                raise ValueError(f"{key!r} and {first!r} name one tensor, but the state has two different ones")

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        """Our module with the official weights, in their dtype (the widest of them) and on their device."""
        options = self.read(config)
        module = self.build(options)
        self.check(state, options)
        if state:
            dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
            module.to(device=next(iter(state.values())).device, dtype=dtype)
        with torch.no_grad():
            module.load_state_dict(self.convert(state, options))
        return module
