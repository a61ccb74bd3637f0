"""What an official system is to the importer: options that are read, keys that are expected, a module, a rename."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longwave.errors import nearest

REQUIRED = object()  # in place of a default, where the official code has none
RUN = frozenset({"L", "batch", "length", "prefill"})  # how an official run was made, not what the module is

Options = SimpleNamespace  # every official option that matters, by its official name
Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")
State = dict[str, Tensor]


class Choice:
    """An option of which some values are carried over; the official default is the first, where not given."""

    def __init__(self, *values: Any, default: Any = REQUIRED):
        self.values, self.default = values, values[0] if default is REQUIRED else default

    def complaint(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value in self.values:
            return None
        return f"is not carried over; longwave has {', '.join(map(repr, self.values))}"


def _is(kind: type, value: Any) -> bool:
    """Whether it is such a number; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


class Size:
    """An option that is a whole number, or its default whatever that is.

    Args:
        default: the official one.
        least: the smallest that means something.
        none: whether None is allowed besides.
    """

    def __init__(self, default: Any = REQUIRED, least: int = 1, none: bool = False):
        self.default, self.least, self.none = default, least, none

    def complaint(self, value: Any) -> str | None:
        """See :class:`Choice`."""
        if _is(Integral, value) and value >= self.least:
            return None
        if (value == self.default and not isinstance(value, bool)) or (value is None and self.none):
            return None
        other = (
            " or None"
            if self.none
            else ""
            if self.default is REQUIRED or _is(Integral, self.default)
            else f" or {self.default!r}"
        )
        return f"must be a whole number >= {self.least}{other}"


class Sizes:
    """An option that is a list of whole numbers, or its default.

    Args:
        default: the official one.
        least: the smallest that means something.
        single: whether one number or None stands for as many as are needed.
    """

    def __init__(self, default: Any, least: int = 1, single: bool = False):
        self.default, self.least, self.single = default, least, single

    def complaint(self, value: Any) -> str | None:
        """See :class:`Choice`."""
        if value == self.default or (self.single and Size(None, self.least).complaint(value) is None):
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) >= self.single
        allowed = Size(None if self.single else REQUIRED, self.least)
        if listed and all(allowed.complaint(size) is None for size in value):
            return None
        return f"must be a list of whole numbers >= {self.least}{', or one' if self.single else ''}"


class Number:
    """An option that is any number, or None where that is its default.

    Args:
        default: the official one.
        least, above: limits, the first of which may be reached.
    """

    def __init__(self, default: Any = REQUIRED, *, least: float = -math.inf, above: float = -math.inf):
        self.default, self.least, self.above = default, least, above

    def complaint(self, value: Any) -> str | None:
        """See :class:`Choice`."""
        if value == self.default or (_is(Real, value) and value >= self.least and self.above < value < math.inf):
            return None
        limit = f" > {self.above}" if self.above > -math.inf else f" >= {self.least}" if self.least > -math.inf else ""
        return f"must be a number{limit}{' or None' if self.default is None else ''}"


class Anything:
    """An option that only the module itself can judge.

    Args:
        default: the official one.
    """

    def __init__(self, default: Any = REQUIRED):
        self.default = default

    def complaint(self, value: Any) -> str | None:
        """None."""
        return None


def _kind(option: Any) -> Choice | Size | Sizes | Number | Anything:
    """What an option may be; of a bare default the kind of number that it is."""
    if isinstance(option, Choice | Size | Sizes | Number | Anything):
        return option
    if isinstance(option, bool):
        return Choice(True, False, default=option)
    if isinstance(option, int):
        return Size(option, least=min(option, 1))
    return Number(option) if isinstance(option, float) else Anything(option)


def mapping(config: Any) -> Mapping[str, Any]:
    """The config, or a ValueError where it is no mapping."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{config!r} is no mapping of options by name")
    return config


def read_options(
    options: Mapping[str, Any], config: Mapping[str, Any], ignored: Collection[str] = frozenset()
) -> Options:
    """The options that matter, defaults filled in.

    Args:
        options: official names to a :class:`Choice`, :class:`Size`, ..., or to a default alone.
        config: what is given.
        ignored: names that are accepted whatever is given.
    Raises:
        ValueError: for an option that the official code does not have, one that is missing, or a value that is
            not carried over.
    """
    for name, value in mapping(config).items():
        if name not in options and name not in ignored:
            raise ValueError(f"there is no option {name!r} (= {value!r}){nearest(str(name), [*options, *ignored])}")
    values = {}
    for name, option in options.items():
        kind = _kind(option)
        value = values[name] = config.get(name, kind.default)
        if value is REQUIRED:
            raise ValueError(f"the option {name!r} is missing")
        if (complaint := kind.complaint(value)) is not None:
            raise ValueError(f"the option {name} = {value!r} {complaint}")
        if isinstance(kind, Choice):  # 1 is True to Python
            values[name] = kind.values[kind.values.index(value)]
    return Options(**values)


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
        options: official options that change the function, as :func:`read_options` takes them.
        keys: the official keys and shapes that the options ask for.
        build: our module, freshly drawn.
        convert: official tensors to ours, by differentiable functions of torch, so that gradients of the official
            ones come out of ``functional_call(module, convert(leaves, options), inputs)``.
        ignored: official options of training, speed and initialisation: accepted whatever they say.
        aliases: of keys that name the same tensor, the second to the first.
        optional: whether checkpoints leave the second names out.
        extra: keys and shapes of tensors that may be given or not: what no checkpoint holds but the official code uses,
            or what old checkpoints hold besides. Complex ones come as such or as their real view, of which this is the
            shape.
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

    def meant(self, config: Mapping[str, Any], state: State | None = None) -> "System":
        """The module itself, of which a :class:`Family` has several."""
        return self

    def read(self, config: Mapping[str, Any]) -> Options:
        """See :func:`read_options`."""
        return read_options(self.options, config, self.ignored | RUN)

    def check(self, state: State, options: Options) -> None:
        """Raises ValueError for a key that is missing or unexpected, a wrong shape, or aliases that differ."""
        shapes, aliases, extra = self.keys(options), self.aliases(options), self.extra(options)
        for key in state:
            if key not in shapes and key not in extra:
                raise ValueError(f"the state has an unexpected key {key!r}{nearest(key, shapes)}")
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{key!r} is no tensor but {type(tensor).__name__}")
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


def read_part(what: str, read: Callable[[Mapping[str, Any]], Options], config: Any, **given: Any) -> Options:
    """The options of a part of a module: as its config says but for ``_name_``, or as the module itself gives them.

    Raises:
        ValueError: as :func:`read_options`; it says what part.
    """
    try:
        own = {name: value for name, value in mapping(config).items() if name != "_name_"}
        return read({**own, **given})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


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
        self.meant(config)
        return Options(config=config)

    def keys(self, options: Options) -> Shapes:
        """See :class:`System`, as the other two."""
        system = self.meant(options.config)
        return system.keys(system.read(options.config))

    def convert(self, state: State, options: Options) -> State:
        system = self.meant(options.config, state)
        return system.convert(state, system.read(options.config))

    def aliases(self, options: Options) -> dict[str, str]:
        system = self.meant(options.config)
        return system.aliases(system.read(options.config))

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        """See :meth:`System.load`."""
        return self.meant(config, state).load(config, state)

    def meant(self, config: Mapping[str, Any], state: State | None = None) -> System:
        """The member that a config asks for; of several the one whose keys and shapes are nearest to the state's."""
        fitting = []
        for system in self.members.values():
            with contextlib.suppress(ValueError):
                options = system.read(config)
                fitting.append((system, options, system.keys(options)))
        if not fitting:
            closest = max(self.members.values(), key=lambda system: _in_common(system, config))
            closest.keys(closest.read(config))
        if state is None or len(fitting) == 1:
            return fitting[0][0]

        def strangers(system: System, options: Options, wanted: Shapes) -> int:
            found = {key: tuple(getattr(tensor, "shape", ())) for key, tensor in system.rename(state, options).items()}
            return len(found.items() ^ wanted.items())

        return min(fitting, key=lambda member: strangers(*member))[0]


def _in_common(system: System, config: Mapping[str, Any]) -> int:
    """How many of the options in a config a module has, with that value."""
    known = [name for name in config if name in system.options]
    fitting = sum(_kind(system.options[name]).complaint(config[name]) is None for name in known)
    return fitting + len(system.ignored & config.keys())


def under(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """What a mapping has under keys that start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def prefixed(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """A mapping with the prefix before every key."""
    return {f"{prefix}{key}": value for key, value in tensors.items()}
