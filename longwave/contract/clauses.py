"""Clauses of a contract: functions that raise an AssertionError where it is broken."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

Clause = Callable[..., None]


class Contract(dict[str, Clause]):
    """Clauses by name. ``@contract.clause`` enters one; ``@contract.clause(place=["left", "right"])`` one for each
    value of a keyword argument, and a mapping gives the values names."""

    def clause(self, function: Clause | None = None, /, **values: Mapping[str, Any] | Sequence[Any]) -> Any:
        """Enter a function by its name."""
        if function is None:
            return partial(self.clause, **values)
        tables = [v if isinstance(v, Mapping) else {str(value): value for value in v} for v in values.values()]
        for names in itertools.product(*tables):
            given = {key: table[name] for key, table, name in zip(values, tables, names)}
            self["-".join([function.__name__, *names])] = partial(function, **given) if given else function
        return function


@contextlib.contextmanager
def refused(pattern: str) -> Iterator[None]:
    """What is done within it raises a ValueError whose message the pattern is found in."""
    said = None
    try:
        yield
    except ValueError as error:
        said = str(error)
    assert said is not None, f"nothing is refused; a ValueError like {pattern!r} was due"
    assert re.search(pattern, said), f"the message is {said!r}, and was to be like {pattern!r}"
