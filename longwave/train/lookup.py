"""What there is to write into a recipe: mixers, filters, tasks, models, and the options of each."""

import importlib
import inspect
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic_core import PydanticUndefined

from longwave.errors import unknown
from longwave.mixers import MIXERS
from longwave.models.spec import CHANNEL_MIXERS, MODELS
from longwave.nn import FILTERS
from longwave.own import Table, table_of
from longwave.spec import Parts, PartSpec, Spec
from longwave.tasks import TASKS
from longwave.train.config import Recipe, recipe_names

TABLES: dict[str, Mapping[str, Any]] = {
    "mixers": MIXERS,
    "filters": FILTERS,
    "channel mixers": CHANNEL_MIXERS,
    "models": MODELS,
    "tasks": TASKS,
}
OWN: list[Table[Any]] = [MIXERS, FILTERS, TASKS, CHANNEL_MIXERS]  # to which classes of one's own are added
LIMITS: dict[type, tuple[str, str]] = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def overview() -> str:
    """Everything by name, with a line each."""
    lines = []
    for own in OWN:
        for name in own.points():
            own.find(name)
    for title, table in TABLES.items():
        lines += [f"{title}:", *(f"  {name:20}  {about(cls)}" for name, cls in sorted(table.items()))]
    lines += ["recipes:", *(f"  {name:20}  {line}" for name, line in recipe_names().items())]
    lines += ["presets: sizes of published models, for model.preset=NAME; longwave list presets shows them"]
    return "\n".join([*lines, "longwave list NAME shows the options of a name, longwave list recipe a recipe's fields"])


def about(cls: type) -> str:
    """The first line that tells of a class: of its docstring, or for a mixer of its file's, if that tells of it."""
    own = inspect.getdoc(cls) or ""
    if cls in MIXERS.values() and not own.startswith(f"{cls.__name__}: "):
        own = sys.modules[cls.__module__].__doc__ or own
    return own.split("\n", 1)[0]


def look_up(name: str) -> str:
    """The options of what has a name, each with its type and limits, its default and what it is.

    Raises:
        ValueError: for a name that nothing has, with the nearest.
    """
    if ":" in name:
        table_of(name, OWN)
    if name == "presets":
        return presets()
    found = [
        _page(f"{title[:-1]} {name}: {about(table[name])}", spec_of(table, name))
        for title, table in TABLES.items()
        if name in table
    ]
    if name == "recipe":
        found.append(_page("the fields of a recipe", Recipe))
    if name in recipe_names():
        found.append(f"recipe {name}: {recipe_names()[name]}\nlongwave show {name} shows all of it")
    if not found and (published := _published(name)):
        return published
    if not found:
        names = sorted({"recipe", *recipe_names(), *chain.from_iterable(TABLES.values())})
        raise ValueError(unknown("part", name, names))
    return "\n\n".join(found)


def presets() -> str:
    """The published models whose sizes are known, a line each."""
    from longwave.official.presets import PRESETS  # takes long to import

    return "\n".join(
        [f"  {name:20}{known.parameters:>16,} parameters  {known.hub}" for name, known in PRESETS.items()]
        + ["longwave train RECIPE model.preset=NAME starts from scratch at that size"]
    )


def _published(name: str) -> str | None:
    """What there is to say of a preset, or None for another name."""
    from longwave.official.presets import PRESETS

    if (known := PRESETS.get(name)) is None:
        return None
    source, told = known.official(), "published" if known.published else "by the authors' shapes"
    options = ", ".join(f"{key} = {value}" for key, value in known.options.items())
    lines = [
        f"preset {name}: {known.parameters:,} parameters, {told}",
        f"  weights    {known.hub}, on the Hugging Face Hub",
        f"  source     {type(source).__name__}({options})",
        *([f"  tokenizer  {source.tokenizer}"] if source.tokenizer else []),
        "  model:",
        *("    " + line for line in yaml.safe_dump(known.spec().model_dump(), sort_keys=False).splitlines()),
    ]
    return "\n".join(lines)


def spec_of(table: Mapping[str, Any], name: str) -> type[Spec]:
    """What has the options of a name as its fields."""
    return table.spec(name) if isinstance(table, Parts) else table[name]


def _page(title: str, spec: type[Spec]) -> str:
    rows = [
        (name, _kind(field.annotation) + _limits(field.metadata), _default(field.default))
        for name, field in spec.model_fields.items()
        if name != "kind"
    ]
    if not rows:
        return f"{title}\n  it has no options"
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    margin, width = sum(widths) + 8, max(100, shutil.get_terminal_size().columns)
    lines = [title]
    for row in rows:
        cells = "".join(f"  {cell:{w}}" for cell, w in zip(row, widths))
        text = textwrap.wrap(describe(spec, row[0]), width - margin if margin < width - 40 else width - 8)
        if margin < width - 40:
            first, *more = text or [""]
            lines += [f"{cells}  {first}", *(" " * margin + line for line in more)]
        else:
            lines += [cells, *("        " + line for line in text)]
    return "\n".join(line.rstrip() for line in lines)


def describe(spec: type[Spec], name: str) -> str:
    """What the documentation says of a field: beside it, or in the docstring of its class, or of the class it names."""
    for cls in spec.__mro__:
        field = getattr(cls, "model_fields", {}).get(name)
        if field is not None and field.description is not None:
            return field.description
    text = _entry(spec.source if issubclass(spec, PartSpec) else spec, name)
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``([^`]*)``", lambda m: m[1] or m[2], text)


def _entry(source: type, name: str) -> str:
    for cls in source.__mro__:
        entries = dict(_entries(cls.__doc__ or ""))
        text = entries.get(name, entries.get("..."))
        if text is None:
            continue
        for other in re.findall(r":class:`([\w.]+)`", text):
            module, _, short = other.rpartition(".")
            there = getattr(importlib.import_module(module) if module else sys.modules[cls.__module__], short, None)
            if there is not None and there is not cls and (more := _entry(there, name)):
                return more
        return text
    return ""


def _entries(doc: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the section Args or Fields of a docstring."""
    section = re.search(r"^( *)(?:Args|Fields)\b.*:\n((?:\1 +.*\n|\n)*)", doc.rstrip() + "\n", re.M)
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section[2]).strip()) if section else []:
        names, _, text = " ".join(entry.split()).partition(": ")
        for name in names.split(", "):
            yield name, text


def _kind(annotation: Any) -> str:
    """A type in a recipe's words."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(members[0]) + _limits(members[1:])
    if origin is typing.Literal:
        return " | ".join(map(str, members))
    if origin in (typing.Union, types.UnionType):
        kinds = list(map(_kind, members))
        return " | ".join(kinds if len(kinds) < 5 else [*kinds[:3], "..."])
    if origin is list:
        return f"list of {_kind(members[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_kind, members))}]"
    if annotation is types.NoneType:
        return "null"
    kind = getattr(annotation, "model_fields", {}).get("kind")
    own = "" if kind is None or kind.is_required() else kind.default
    return own or annotation.__name__.removesuffix("Spec").lower()


def _limits(metadata: Any) -> str:
    found = []
    for limit in metadata:
        if type(limit) in LIMITS:
            sign, key = LIMITS[type(limit)]
            bound = getattr(limit, key)
            found.append(f"{sign} {'2^63' if bound == 2**63 else bound}")
        elif isinstance(limit, MinLen):
            found.append("not empty")
    return f" ({', '.join(found)})" if found else ""


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, PartSpec):
        own = [(key, option) for key, option in value if option != type(value).model_fields[key].default]
        options = "".join(f", {key}: {_default(option)}" for key, option in own)
        return f"{{kind: {value.kind}{options}}}" if own else value.kind
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default, value))}]"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
