"""Classes of one's own: in a file that the caller names or allows, or of a package that declares them.

No other code runs, whatever a recipe, a run or a stored model says.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from longwave.errors import nearest, shown

C = TypeVar("C")

_modules: dict[Path, ModuleType] = {}  # of the files that were allowed


def trust(file: str | Path) -> ModuleType:
    """Run a Python file, once: from now on, ``file.py:Class`` names a class in it wherever a part is named.

    Raises:
        ValueError: where there is no such file, or it fails, with the line.
    """
    path = Path(file).expanduser()
    place = path.resolve()
    if place in _modules:
        return _modules[place]
    if not path.is_file():
        raise ValueError(f"{file}: there is no such file")
    name = (
        f"longwave_own_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}_{path.stem}"  # in every process the same
    )
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file; name one that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]  # it is there by half
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        if isinstance(error, SyntaxError) and error.filename == spec.origin:
            lines.append(error.lineno)
        raise ValueError(f"{file}, line {lines[-1]}: {type(error).__name__}: {error}") from error
    _modules[place] = module
    return module


def trust_named(texts: Iterable[str]) -> None:
    """:func:`trust` every file that stands as ``file.py:Class`` in what the caller wrote."""
    for text in texts:
        for file in re.findall(r"[^\s\[\]{},'\"=:]+\.py(?=:\w)", text):
            trust(file)


def trusted() -> list[Path]:
    """The files that were run, in their order."""
    return list(_modules)


class Table(dict[str, type[C]], Generic[C]):
    """Classes by name; besides them, on demand, those that ``file.py:Class`` and ``package:name`` name.

    Args:
        what: what the classes are, in an error; with an s behind it and longwave. before it the group of entry points.
        classes: those that are known at the start.
        of: the class that all inherit.
    """

    def __init__(self, what: str, classes: Mapping[str, type[C]] | None = None, of: type | None = None):
        super().__init__(classes or {})
        self.what, self.of = what, of

    def find(self, kind: str) -> bool:
        """Whether there is a class of that name; one of a trusted file or of a package is entered when it is asked for.

        Raises:
            ValueError: where the file or the package has no such class.
        """
        if kind in self:
            return True
        file, _, name = kind.rpartition(":")
        if file.endswith(".py"):
            module = _trusted(Path(file))
            if module is not None:
                self._enter(kind, getattr(module, name, None), vars(module), name)
        elif (point := self.points().get(kind)) is not None:
            try:
                found = point.load()
            except Exception as error:
                raise ValueError(f"{self.what} {kind!r}: its package fails: {type(error).__name__}: {error}") from error
            self._enter(kind, found, {}, point.value)
        return kind in self

    def points(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages for such classes, as ``package:name``."""
        group = entry_points(group=f"longwave.{self.what.replace(' ', '_')}s")
        return {f"{point.dist.name if point.dist else ''}:{point.name}": point for point in group}

    def missing(self, kind: str) -> str | None:
        """Why a name of this form is of no class here, and what to do; None for a name of another form."""
        file, colon, name = kind.rpartition(":")
        if ".py" in kind or "/" in kind:
            whole = file.endswith(".py") and name.isidentifier()
            how = f"by longwave --trust {file if whole else 'FILE'} (in Python longwave.own.trust)"
            more = "" if whole else ", and write FILE.py:CLASS"
            return f"{shown(kind)} is a file, and a config runs no code: allow it {how}{more}"
        if colon:
            return (
                f"{shown(kind)} is a {self.what} of the package {file}, which is not installed here, or has no entry "
                f"point {name!r} for it; install it"
            )
        return None

    def _enter(self, kind: str, found: Any, beside: Mapping[str, Any], name: str) -> None:
        base: Any = self.of
        assert base is not None, f"nobody said what a {self.what} is"
        if found is None:
            classes = [key for key, value in beside.items() if inspect.isclass(value) and issubclass(value, base)]
            hint = nearest(name, classes) or (f"; there are {', '.join(classes)}" if classes else "")
            raise ValueError(f"{kind.rpartition(':')[0]} has no {name!r}{hint}")
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise OtherKind(f"{kind} is no {self.what}: such a class inherits {base.__module__}.{base.__name__}")
        own: Any = found
        if inspect.isabstract(own):
            raise ValueError(f"{kind} is not whole: it lacks {', '.join(sorted(own.__abstractmethods__))}")
        if "name" in base.__annotations__ and not vars(own).get("name"):
            own.name = name
        self[kind] = own


class OtherKind(ValueError):
    """A class that is not what a table is of."""


def table_of(kind: str, tables: Iterable[Table[Any]]) -> Table[Any]:
    """The first table that has a class of that name.

    Raises:
        ValueError: where none has.
    """
    tables = list(tables)
    for table in tables:
        with contextlib.suppress(OtherKind):
            if table.find(kind):
                return table
    raise ValueError(tables[0].missing(kind) or f"{kind} is no {' or '.join(table.what for table in tables)}")


def _trusted(file: Path) -> ModuleType | None:
    """The module of a trusted file: of this path, or the only one of this name, which may have moved since."""
    module = _modules.get(file.expanduser().resolve())
    if module is not None:
        return module
    alike = [place for place in _modules if place.name == file.name]
    if len(alike) > 1:
        raise ValueError(f"{file} is {' or '.join(map(str, alike))}: trust one of them")
    return _modules[alike[0]] if alike else None
