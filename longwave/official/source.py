"""What a source of official weights is: options as fields, a module of ours, and a table of names."""

import contextlib
import functools
import numbers
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar, Union, get_args, get_origin

import torch
from annotated_types import Ge, Gt
from pydantic import BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from longwave.errors import few, nearest, shown
from longwave.mixers import Mixer
from longwave.spec import Spec, explain

RUN = frozenset({"L", "batch", "length", "prefill"})  # how an official run was made, not what the module is

# What any config of transformers may say and no function of a causal model depends on.
HUGGING_FACE = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache",
})  # fmt: skip

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]
T = TypeVar("T")

Size = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
One = Annotated[Literal[1], BeforeValidator(lambda value: 1 if value == 1 else value)]
Flag = Annotated[bool, BeforeValidator(lambda value: bool(value) if value in (0, 1) else value)]


class Turn(NamedTuple):
    """A reversible map: official tensors to ours by differentiable functions of torch, and ours to official shapes.

    Attributes:
        ours: official tensors -> ours, one or a tuple.
        official: ours -> tensors of the official shapes, one or a tuple; it sees tensors without data.
    """

    ours: Callable[..., Any]
    official: Callable[..., Any]


def _plain(value: Any) -> Any:
    """A number of another library, such as NumPy's, as Python's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _itself(t: Tensor) -> Tensor:
    return t


AS_IT_IS = Turn(_itself, _itself)
WHOLE = Turn(lambda t: t.long(), _itself)  # whole numbers stay exact in a checkpoint of any dtype


FIRST = Turn(lambda t: t[0], lambda t: t[None])  # without an axis of 1 in front
CONSTANT = Turn(lambda t: t.detach(), _itself)  # of running statistics there is no gradient
COLUMN = Turn(lambda t: t[:, 0], lambda t: t[:, None])  # without an axis of 1 behind the first
TAP = Turn(lambda t: t.flatten(1) if t.ndim > 1 else t, lambda t: t[..., None] if t.ndim > 1 else t)  # a 1-tap map


def apart(*sizes: int) -> Turn:
    """Several maps of one input, of so many rows each, which are one of ours."""
    return Turn(lambda *ts: torch.cat(ts), lambda t: t.split(sizes))


def flat(features: int) -> Turn:
    """(K, features, ...), filter by filter, in one axis."""
    return Turn(lambda t: t.flatten(0, 1), lambda t: t.unflatten(0, (-1, features)))


class Name(NamedTuple):
    """Official tensors and those of ours that they become; of the first line that fits, if the module has them.

    Attributes:
        official, ours: a name or several. One that is empty or ends in a dot stands for all that begin with it. Ours
            without official ones stay as they were built, unless :meth:`Source.rest` gives them.
        turn: how the numbers differ.
    """

    official: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    turn: Turn = AS_IT_IS


class Alias(NamedTuple):
    """A second official name of one tensor."""

    official: str
    first: str


Names = list[Name | Alias]


def unused(official: str, *shape: int) -> Name:
    """A tensor of this shape that official states hold and that changes nothing."""
    return Name(official, (), Turn(lambda t: (), lambda: torch.empty(shape, device="meta")))


def weight_norm(official: str, ours: str, points: int = 0) -> Name:
    """A matrix kept as directions and lengths of its rows, with so many axes of 1 behind."""

    def joined(g: Tensor, v: Tensor) -> Tensor:
        return g.flatten(1) * v.flatten(1) / torch.linalg.vector_norm(v.flatten(1), dim=1, keepdim=True)

    ones = (1,) * points
    parted = Turn(joined, lambda w: (w.new_empty(len(w), 1, *ones), w.reshape(*w.shape, *ones)))
    return Name((f"{official}.weight_g", f"{official}.weight_v"), f"{ours}weight", parted)


def inside(official: str, ours: str, names: Iterable[Name | Alias]) -> Names:
    """The names of a part of a module, with what stands before them there and here."""

    def put(prefix: str, name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return prefix + name if isinstance(name, str) else tuple(prefix + one for one in name)

    return [
        Alias(official + name.official, official + name.first)
        if isinstance(name, Alias)
        else Name(put(official, name.official), put(ours, name.ours), name.turn)
        for name in names
    ]


def numbered(count: int, official: str, ours: str, names: Iterable[Name | Alias]) -> Names:
    """:func:`inside` for as many equal parts, whose numbers are where the prefixes have {}."""
    return [name for i in range(count) for name in inside(official.format(i), ours.format(i), names)]


class Layer(Protocol):
    """The options of a layer of a model: what its mixer is, and the names of the mixer's tensors."""

    def mixer(self) -> Mixer: ...
    def mixer_names(self) -> Names: ...


def several(x: T | tuple[T, ...]) -> tuple[T, ...]:
    """One thing, or several, as a tuple."""
    return x if isinstance(x, tuple) else (x,)


Line = tuple[tuple[str, ...], tuple[str, ...], Turn]


def layout(names: Names, ours: Mapping[str, Tensor]) -> list[Line]:
    """The lines of a table for a module that has these tensors, tensor by tensor."""
    left = dict.fromkeys(ours)
    lines: list[Line] = []
    fitting: list[tuple[tuple[str, ...], tuple[str, ...]]]
    for name in names:
        if isinstance(name, Alias):
            continue
        theirs, mine = several(name.official), several(name.ours)
        if len(mine) == 1 and (not mine[0] or mine[0].endswith(".")):
            found = [key for key in left if key.startswith(mine[0])]
            fitting = [(tuple(prefix + key.removeprefix(mine[0]) for prefix in theirs), (key,)) for key in found]
        else:
            fitting = [(theirs, mine)] if all(key in left for key in mine) else []
        for official, keys in fitting:
            lines.append((official, keys, name.turn))
            for key in keys:
                del left[key]
    assert not left, f"no official names for {list(left)}"
    return [line for line in lines if line[0]]


class Source(Spec):
    """An official module: its options by their official names, what we build of them, and the names of its tensors.

    A subclass has the options that change the function as fields, ``build`` and ``names``.

    Attributes:
        ignored: official options of training, speed and initialisation: accepted whatever they say.
        optional: whether checkpoints leave out the second names of tensors.
    """

    model_config = ConfigDict(strict=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[bool] = False

    def build(self) -> nn.Module:
        """Our module, freshly drawn."""
        raise NotImplementedError

    def names(self) -> Names:
        """The table of names; by default all are the same."""
        return [Name("", "")]

    def rename(self, state: State) -> State:
        """A checkpoint with its names as in the table, where releases have others."""
        return state

    def extra(self) -> Shapes:
        """Tensors that may be given or not: what no checkpoint holds but the official code uses, or what old ones hold
        besides. Complex ones come as such or as their real view, of which this is the shape."""
        return {}

    def rest(self, state: State) -> State:
        """Tensors of ours for which the table cannot say what they are made of."""
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any], **given: Any) -> Self:
        """The options, defaults filled in; ``given`` ones replace those of the config.

        Raises:
            ValueError: for an option that the official code does not have, one that is missing, or a value that is
                not carried over.
        """
        try:
            return cls.model_validate({str(name): value for name, value in {**mapping(config), **given}.items()})
        except ValidationError as error:
            raise ValueError(explain(error, "options")) from error

    @model_validator(mode="wrap")
    @classmethod
    def _name_faults(cls, data: Any, handler: Any) -> Any:
        fields, ignored = cls.model_fields, cls.ignored | RUN
        try:
            return handler({name: _plain(it) for name, it in data.items() if name in fields or name not in ignored})
        except ValidationError as error:
            worst = ["extra_forbidden", "missing"]

            def order(fault: Any) -> tuple[int, bool]:  # what is said comes before a default that is not carried over
                return (*worst, fault["type"]).index(fault["type"]), fault["loc"][0] not in data

            faults = sorted(error.errors(), key=order)
            said = {fault["loc"][0]: cls._sentence(fault["type"], str(fault["loc"][0]), data) for fault in faults}
            worded: Any = [
                {"type": PydanticCustomError("value_error", "{it}", {"it": it}), "loc": (name,), "input": data}
                for name, it in said.items()
            ]
            raise ValidationError.from_exception_data(error.title, worded) from None

    @classmethod
    def _sentence(cls, kind: str, name: str, config: Mapping[str, Any]) -> str:
        if kind == "extra_forbidden":
            known = [*cls.model_fields, *cls.ignored, *RUN]
            return f"there is no option {name!r} (= {shown(config[name])}){nearest(name, known)}"
        if kind == "missing":
            return f"the option {name!r} is missing"
        field = cls.model_fields[name]
        rule = field.description or allowed(field.annotation, field.metadata)
        return f"the option {name} = {shown(config.get(name, field.default))} {rule}"

    def tensors(self) -> Shapes:
        """The official names and shapes that the options ask for."""
        with torch.device("meta"):
            return self.shapes(self.build())

    def shapes(self, module: nn.Module) -> Shapes:
        """The same, of what ``build`` made."""
        ours = {key: torch.empty_like(t, device="meta") for key, t in module.state_dict().items()}
        shapes: Shapes = {}
        for theirs, mine, turn in layout(self.names(), ours):
            official = several(turn.official(*(ours[key] for key in mine)))
            shapes |= {key: tuple(t.shape) for key, t in zip(theirs, official, strict=True)}
        return shapes | {key: shapes[first] for key, first in self.aliases().items()}

    def aliases(self) -> dict[str, str]:
        """Of names of the same tensor, the second to the first."""
        return {name.official: name.first for name in self.names() if isinstance(name, Alias)}

    def convert(self, state: State) -> State:
        """Official tensors to ours; gradients flow back."""
        with torch.device("meta"):
            module = self.build()
        return dict(self.converted(self.rename(state), module))

    def converted(self, state: State, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of our module and their names, made one line of the table after another."""
        aliases, rest = self.aliases(), self.rest(state)
        lines = [
            (tuple(aliases.get(key, key) for key in theirs), mine, turn)
            for theirs, mine, turn in layout(self.names(), module.state_dict())
        ]
        uses = Counter((turn, sources) for sources, _, turn in lines)
        made: dict[Any, tuple[Tensor, ...]] = {}  # what names one tensor stays one
        for sources, mine, turn in lines:
            ours = made.get((turn, sources))
            if ours is None:
                ours = several(turn.ours(*(state[key] for key in sources)))
            if uses[turn, sources] > 1:
                made[turn, sources] = ours
            yield from zip(mine, ours, strict=True)
        yield from rest.items()

    def check(self, state: State, shapes: Shapes) -> None:
        """Raises ValueError for keys that are missing or unexpected, a wrong shape, or aliases that differ."""
        aliases, extra = self.aliases(), self.extra()
        strangers = [key for key in state if key not in shapes and key not in extra]
        if strangers:
            hint = nearest(strangers[0], shapes) if len(strangers) == 1 else ""
            raise ValueError(f"the state has an unexpected key {few(map(repr, strangers))}{hint}")
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{key!r} is no tensor but {type(tensor).__name__}")
        missing = [key for key in shapes if key not in state and not (self.optional and key in aliases)]
        if missing:
            asked = f" with shape {shapes[missing[0]]}" if len(missing) == 1 else ""
            raise ValueError(f"the state has no key {few(map(repr, missing))}, which the config asks for{asked}")
        for key, shape in shapes.items():
            if key in state and tuple(state[key].shape) != shape:
                raise ValueError(f"{key!r} has shape {tuple(state[key].shape)}; the config asks for {shape}")
        for key in extra.keys() & state.keys():
            found = (*state[key].shape, *([2] if state[key].is_complex() else []))
            if found != extra[key]:
                raise ValueError(f"{key!r} has shape {found} as a real view; the config asks for {extra[key]}")
        for key, first in aliases.items():
            if key in state and not torch.equal(state[key], state[first]):
                raise ValueError(f"{key!r} and {first!r} name one tensor, but the state has two different ones")

    def dtype(self, state: State) -> torch.dtype:
        """The widest of the weights."""
        return functools.reduce(torch.promote_types, (state[key].dtype for key in state.keys() - self.extra().keys()))

    def load(self, state: State) -> nn.Module:
        """Our module with the official weights, in their dtype (the widest of them) and on their device."""
        module, state = self.build(), self.rename(state)
        self.check(state, self.shapes(module))
        if state:
            module.to(device=next(iter(state.values())).device, dtype=self.dtype(state))
        with torch.no_grad():
            module.load_state_dict(dict(self.converted(state, module)), strict=False)
        return module


def mapping(config: Any) -> Mapping[str, Any]:
    """The config, or a ValueError where it is no mapping."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{config!r} is no mapping of options by name")
    return config


def allowed(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What an option must be, of which kind it is."""
    if set(map(_kind, get_args(kind) if _kind(kind) is Union else [kind])) <= {bool, Literal, types.NoneType}:
        return f"is not carried over; longwave has {_words(kind, limits)}"
    return f"must be {_words(kind, limits)}"


def _kind(kind: Any) -> Any:
    """int, bool, Literal, Sequence, ... or Union, without what is annotated."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _kind(get_args(kind)[0])
    return Union if origin is types.UnionType else origin or kind


def _words(kind: Any, limits: Iterable[Any] = ()) -> str:
    args = get_args(kind)
    if get_origin(kind) is Annotated:
        return _words(args[0], args[1:])
    if _kind(kind) is Union:
        return " or ".join(_words(arg) for arg in args)
    if _kind(kind) is Literal:
        return ", ".join(map(repr, args))
    if kind is bool:
        return "True, False"
    if kind is types.NoneType:
        return "None"
    if _kind(kind) is Sequence:
        return f"a list of {_words(args[0]).removeprefix('a ').replace('number', 'numbers')}"
    limit = [f" >= {limit.ge}" if isinstance(limit, Ge) else f" > {limit.gt}" for limit in limits]
    return f"a {'whole ' if kind is int else ''}number{''.join(limit)}"


def part(what: str, source: type["AnySource"], config: Any, **given: Any) -> "AnySource":
    """The options of a part of a module: as its config says but for ``_name_``, or as the module itself gives them.

    Raises:
        ValueError: as :meth:`Source.read`; it says what part.
    """
    try:
        return source.read({name: value for name, value in mapping(config).items() if name != "_name_"}, **given)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


AnySource = TypeVar("AnySource", bound=Source)


class System:
    """An official name: a source, or several, of which config and state say which one is meant.

    Args:
        sources: where no state tells, the first that fits the config is meant.
    """

    def __init__(self, *sources: type[Source]):
        self.sources = sources

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that change the function, by their official names."""
        return self.sources[0].model_fields

    def meant(self, config: Mapping[str, Any], state: State | None = None) -> "System":
        """The source that a config asks for, alone; of several the one whose tensors are nearest to the state's.

        Raises:
            ValueError: where the config fits none of the sources, as the source with most of its options says it.
        """
        if len(self.sources) == 1:
            return self
        fitting = []
        for source in self.sources:
            with contextlib.suppress(ValueError):
                options = source.read(config)
                fitting.append((source, options, options.tensors()))
        if not fitting:
            closest = max(self.sources, key=lambda source: _in_common(source, config))
            closest.read(config).tensors()

        def strangers(options: Source, wanted: Shapes) -> int:
            found = {key: tuple(getattr(t, "shape", ())) for key, t in options.rename(state or {}).items()}
            return len(found.items() ^ wanted.items())

        return System(fitting[0][0] if state is None else min(fitting, key=lambda fit: strangers(*fit[1:]))[0])

    def read(self, config: Mapping[str, Any]) -> Source:
        """See :meth:`Source.read`, as the rest."""
        return self.meant(config).sources[0].read(config)

    def keys(self, options: Source) -> Shapes:
        return options.tensors()

    def aliases(self, options: Source) -> dict[str, str]:
        return options.aliases()

    def extra(self, options: Source) -> Shapes:
        return options.extra()

    def convert(self, state: State, options: Source) -> State:
        config = {name: getattr(options, name) for name in options.model_fields_set}
        return self.meant(config, state).read(config).convert(state)

    def load(self, config: Mapping[str, Any], state: State) -> nn.Module:
        return self.meant(config, state).read(config).load(state)


def _in_common(source: type[Source], config: Mapping[str, Any]) -> int:
    """How many of the options in a config a source has, with that value."""
    known = config.keys() & (source.model_fields.keys() | source.ignored)
    try:
        source.read(config)
    except ValueError as error:
        cause = error.__cause__
        return len(known - {e["loc"][0] for e in cause.errors()}) if isinstance(cause, ValidationError) else len(known)
    return len(known)


def under(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """What a mapping has under keys that start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def prefixed(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """A mapping with the prefix before every key."""
    return {f"{prefix}{key}": value for key, value in tensors.items()}
