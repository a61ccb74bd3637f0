"""Parts as data: what a recipe writes down and a checkpoint stores, and in one line what is wrong with it."""

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic._internal._model_construction import ModelMetaclass
from pydantic_core import PydanticCustomError
from torch import nn

from longwave.errors import nearest, shown, unknown
from longwave.own import Table

MOST = {"d_state": 65536}  # of options that would else take all memory before anything could say so

T = TypeVar("T", bound="Spec")
P = TypeVar("P", bound="PartSpec")
C = TypeVar("C")


class _Worded(ModelMetaclass):  # an __init__ of its own would be called for parts of a whole too
    def __call__(cls: Any, *args: Any, **fields: Any) -> Any:
        try:
            return ModelMetaclass.__call__(cls, *args, **fields)
        except ValidationError as error:
            raise ValueError(explain(error, cls.title())) from None


class Spec(BaseModel, metaclass=_Worded):
    """Fields that are checked: immutable, strict about their names, and without infinite numbers.

    Raises:
        ValueError: for fields that cannot be, in a line or two that name them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_faults(cls, data: Any, handler: Any) -> Any:
        """Words what is wrong with a field's name here, where the known ones are at hand, and bounds whole numbers."""
        try:
            spec = handler(data)
            for name, value in spec:
                if isinstance(value, int) and abs(value) >= 2**63:
                    wrong = _fault("too_large", f"no size reaches 2^63; got {shown(value)}")
                    fault: Any = {"type": wrong, "loc": (name,), "input": value}
                    raise ValidationError.from_exception_data(cls.__name__, [fault])
            return spec
        except ValidationError as error:
            faults = [cls._named(fault) for fault in error.errors()]
            raise ValidationError.from_exception_data(error.title, faults) from None

    @classmethod
    def _named(cls, fault: Any) -> Any:
        kind, context, own = fault["type"], fault.get("ctx", {}), len(fault["loc"]) == 1
        if own and kind == "extra_forbidden":
            known, name = [name for name in cls.model_fields if name != "kind"], fault["loc"][0]
            hint = nearest(name, known) or f"; it has {', '.join(known) or 'none'}"
            fault["type"] = _fault(kind, f"{cls.title()} has no {cls.noun()} {shown(name)}{hint}")
        elif own and kind == "missing":
            fault["type"] = _fault(kind, f"{cls.title()} needs the {cls.noun()} {fault['loc'][0]!r}")
        elif "sentence" in context:
            fault["type"] = _fault(kind, context["sentence"])
        return fault

    @classmethod
    def title(cls) -> str:
        """What it is called in an error."""
        kind = cls.model_fields.get("kind")
        return f"a {cls.__name__.lower()}" if kind is None else repr(kind.default)

    @classmethod
    def noun(cls) -> str:
        """What its fields are called in an error."""
        return "field"


class PartSpec(Spec):
    """A part as data: ``kind`` is its name, and the other fields are the options of its class."""

    kind: str
    what: ClassVar[str]
    source: ClassVar[type]

    def _built(self, *given: Any) -> Any:
        """The part, freshly drawn, from its options and what its owner knows: a width, say."""
        return type(self).source(*given, **{name: value for name, value in self if name != "kind"})

    @classmethod
    def title(cls) -> str:
        """What it is called in an error."""
        return f"{cls.what} {cls.model_fields['kind'].default!r}"

    @classmethod
    def noun(cls) -> str:
        """What its fields are called in an error."""
        return "option"


class Parts(Table[C], Generic[C, P]):
    """Classes by name, each with a spec whose fields are the arguments of its ``__init__``.

    A class that is entered later exists from then on for whatever reads specs by this table.

    Args:
        what: what the classes are, in an error.
        base: of their specs.
        given: the first arguments, which the owner of a part gives and which are no options.
        classes, of: see :class:`longwave.own.Table`.
    """

    def __init__(
        self,
        what: str,
        base: type[P],
        given: tuple[str, ...],
        classes: Mapping[str, type[C]] | None = None,
        of: type | None = None,
    ):
        super().__init__(what, classes, of)
        self.base, self.given = base, given
        self._specs: dict[str, type[P]] = {}

    def spec(self, name: str) -> type[P]:
        """The spec of a class."""
        known = self._specs.get(name)
        if known is None or known.source is not self[name]:
            known = self._specs[name] = self._made(name, self[name])
        return known

    def _made(self, name: str, source: type[C]) -> type[P]:
        fields: dict[str, Any] = {"kind": (typing.Literal[name], name)}
        for key, parameter in inspect.signature(source, eval_str=True).parameters.items():
            if key in self.given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue  # the latter are those of a module without an __init__ of its own
            if (annotation := _as_data(parameter.annotation)) is not None:
                if key in MOST:
                    annotation = typing.Annotated[annotation, Field(le=MOST[key])]
                fields[key] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
        made = typing.cast(Any, create_model)(source.__name__, __base__=self.base, __module__=__name__, **fields)
        made.what, made.source, made.__doc__ = self.what, source, source.__doc__
        return made

    def field(self, value: Any) -> P:
        """A spec, from itself, from a name, which takes the defaults, or from fields and their ``kind``.

        Raises:
            ValidationError, PydanticCustomError: for pydantic, whose validator this is, see :func:`read_kind`.
        """
        return read_kind(self.what, self, self.spec, value)

    def read(self, value: Any) -> P:
        """As :meth:`field`.

        Raises:
            ValueError: for an unknown name or option, with the nearest, or a value that cannot be, in one line.
        """
        try:
            return self.field(value)
        except PydanticCustomError as error:
            raise ValueError(error.message()) from None
        except ValidationError as error:
            raise ValueError(explain(error, self.what)) from None

    def make(self, name: str, /, **options: Any) -> P:
        """The spec of a name with some options. Raises: see :meth:`read`."""
        return self.read({**options, "kind": name})


def read_kind(what: str, known: Mapping[str, Any], spec: typing.Callable[[str], type[T]], value: Any) -> T:
    """What one field holds of several: a spec told by its ``kind``, or by its name alone.

    Args:
        what: what the kinds are, in an error.
        known: has their names.
        spec: the class of a name.
        value: itself, a name, or fields and ``kind``.
    Raises:
        ValidationError, PydanticCustomError: where it is none.
    """
    if isinstance(value, Spec):
        value = dict(value)
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict) or "kind" not in value:
        raise _fault("no_kind", f"say which {what} it is, by its name or as {{kind: ...}}; got {shown(value)}")
    kind = value["kind"]
    if isinstance(kind, str) and isinstance(known, Table):
        try:
            found = known.find(kind)
        except ValueError as error:
            raise _fault("own", str(error)) from error
        if not found and (why := known.missing(kind)) is not None:
            raise _fault("own", why)
    if isinstance(kind, str) and kind in known:
        return spec(kind).model_validate(value)
    raise _fault("unknown_kind", unknown(what, kind, known))


def _fault(kind: str, sentence: str) -> PydanticCustomError:
    """One of our own, that says all: the value is not told again."""
    return PydanticCustomError(kind, "{sentence}", {"sentence": sentence})


def _as_data(annotation: Any) -> Any:
    """An annotation without modules, which only Python can pass; None where nothing else is left."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [kind for member in typing.get_args(annotation) if (kind := _as_data(member)) is not None]
        return None if set(members) == {types.NoneType} else typing.Union[tuple(members)]  # noqa: UP007
    if annotation is inspect.Parameter.empty:
        return Any
    return None if isinstance(annotation, type) and issubclass(annotation, nn.Module) else annotation


def explain(error: ValidationError, root: str) -> str:
    """What is wrong, in a line or two: the path, the value, and what would be right.

    Args:
        root: the name of the whole, where the path is empty.
    """
    lines = [_line(fault, root) for fault in error.errors()]
    return "\n".join(lines[:2]) + (f" (and {len(lines) - 2} more)" if len(lines) > 2 else "")


def _line(fault: Any, root: str) -> str:
    where = ".".join(part if len(part) <= 80 else f"{part[:40]}..." for part in map(str, fault["loc"])) or root
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")
    got = "" if "sentence" in fault.get("ctx", {}) else f"; got {shown(fault.get('input'))}"
    return f"{where}: {fault['msg']}{got}"
