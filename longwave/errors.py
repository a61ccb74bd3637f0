"""What error messages have in common: the nearest name, and values that are shown in part where they are long."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def shown(value: Any, most: int = 80) -> str:
    """repr(value), or its two ends where it has more than ``most`` characters."""
    return clipped(repr(value), most)


def clipped(text: str, most: int = 200) -> str:
    """A text, or its two ends where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[-most // 4 :]} ({len(text):,} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) <= 80 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def few(names: Iterable[Any], most: int = 10) -> str:
    """Names with commas, and of more than ``most`` how many are left."""
    every = list(map(str, names))
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def unknown(what: str, name: Any, known: Collection[str]) -> str:
    """The sentence that no ``what`` has this name, with those that there are and the nearest."""
    return f"no {what} is called {shown(name)}; there are {few(known, 60)}{nearest(str(name), known)}"


def choose(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name], or a ValueError that lists the table and the nearest name."""
    if name not in table:
        raise ValueError(unknown(what, name, table))
    return table[name]
