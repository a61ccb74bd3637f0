"""What an official system is to the importer: options that are read, keys that are expected, a module, a rename."""

import contextlib
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


def _no_shapes(options: Options) -> Shapes:
    return {}


def _as_it_is(state: State, options: Options) -> State:
    return state


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
        extra: keys and shapes of tensors that no checkpoint holds but the official code uses. They may be given too,
            complex ones as such or as their real view, of which this is the shape.
        rename: a checkpoint's keys, where releases name them otherwise, to those of ``keys``.
    """

    options: Mapping[str, Any]
    keys: Callable[[Options], Shapes]
    build: Callable[[Options], nn.Module]
    convert: Callable[[State, Options], State]
    ignored: frozenset[str] = frozenset()
    aliases: Callable[[Options], dict[str, str]] = field(default=_no_aliases)
    optional: bool = False
    extra: Callable[[Options], Shapes] = field(default=_no_shapes)
    rename: Callable[[State, Options], State] = field(default=_as_it_is)

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
        shapes, aliases, extra = self.keys(options), self.aliases(options), self.extra(options)
        for key in state:
            if key not in shapes and key not in extra:
                raise ValueError(f"the state has an unexpected key {key!r}{nearest(key, shapes)}")
        for key, shape in shapes.items():
            if key not in state:
                if self.optional and key in aliases:
                    continue
                raise ValueError(f"the state has no key {key!r}, which the config asks for with shape {shape}")
            if tuple(state[key].shape) != shape:
                raise ValueError(f"{key!r} has shape {tuple(state[key].shape)}; the config asks for {shape}")
        for key, shape in extra.items():
            found = shape if key not in state else (*state[key].shape, *([2] if state[key].is_complex() else []))
            if found != shape:
                raise ValueError(f"{key!r} has shape {found} as a real view; the config asks for {shape}")
        for key, first in aliases.items():
            if key in state and not torch.equal(state[key], state[first]):
                raise ValueError(f"{key!r} and {first!r} name one tensor, but the state has two different ones")

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        """Our module with the official weights, in their dtype (the widest of them) and on their device."""
        options = self.read(config)
        module = self.build(options)
        state = self.rename(state, options)
        self.check(state, options)
        if state:
            extra = self.extra(options)
            dtype = functools.reduce(torch.promote_types, (state[key].dtype for key in state if key not in extra))
            module.to(device=next(iter(state.values())).device, dtype=dtype)
        with torch.no_grad():
            module.load_state_dict(self.convert(state, options))
        return module


@dataclass(frozen=True)
class Either:
    """Two official modules under one name, told apart by an option that the first needs and the second lacks.

    Attributes:
        option: its name.
        first, second: the modules.
    """

    option: str
    first: System
    second: System

    def read(self, config: Mapping[str, Any]) -> Options:
        """See :meth:`System.read`; ``system`` among the options is the module that was meant."""
        system = self._meant(config)
        return Options(**vars(system.read(config)), system=system)

    def keys(self, options: Options) -> Shapes:
        """See :class:`System`, as the other two."""
        return options.system.keys(options)

    def convert(self, state: State, options: Options) -> State:
        return options.system.convert(state, options)

    def aliases(self, options: Options) -> dict[str, str]:
        return options.system.aliases(options)

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        """See :meth:`System.load`."""
        return self._meant(config).load(config, state)

    def _meant(self, config: Mapping[str, Any]) -> System:
        return self.first if self.option in config else self.second


def _in_common(system: System, config: Mapping[str, Any]) -> int:
    """How many of the options in a config a module has, with that value."""
    known = {name: system.options[name] for name in config if name in system.options}
    return sum(not isinstance(option, Choice) or config[name] in option.values for name, option in known.items())


@dataclass(frozen=True)
class Family:
    """Several official modules under one name: the one whose options a config has and whose tensors a state has.

    Attributes:
        members: the modules by their official names; the first that fits the config is meant where no state tells.
    """

    members: Mapping[str, System]

    def read(self, config: Mapping[str, Any]) -> Options:
        """The config itself, checked; which module is meant is seen when there is a state.

        Raises:
            ValueError: where the config fits none of the modules, as the module with most of its options says it.
        """
        self._meant(config)
        return Options(config=config)

    def keys(self, options: Options) -> Shapes:
        """See :class:`System`, as the other two."""
        system = self._meant(options.config)
        return system.keys(system.read(options.config))

    def convert(self, state: State, options: Options) -> State:
        system = self._meant(options.config, state)
        return system.convert(state, system.read(options.config))

    def aliases(self, options: Options) -> dict[str, str]:
        system = self._meant(options.config)
        return system.aliases(system.read(options.config))

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        """See :meth:`System.load`."""
        return self._meant(config, state).load(config, state)

    def _meant(self, config: Mapping[str, Any], state: State | None = None) -> System:
        fitting = []
        for system in self.members.values():
            with contextlib.suppress(ValueError):
                fitting.append((system, system.keys(system.read(config))))
        if not fitting:
            closest = max(self.members.values(), key=lambda system: _in_common(system, config))
            closest.keys(closest.read(config))
        shapes = None if state is None else {key: tuple(tensor.shape) for key, tensor in state.items()}
        for system, wanted in fitting:
            if wanted == shapes:
                return system
        return fitting[0][0]
