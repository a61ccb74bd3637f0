"""Clauses of a contract: functions that raise an AssertionError where it is broken."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

Clause = Callable[..., None]


class Contract(dict[str, Clause]):
    """Clauses by name. ``@contract.clause`` enters one; ``@contract.clause(place=PLACES)`` one for each value, by its
    name, of a keyword argument."""

    def clause(self, function: Clause | None = None, /, **values: Mapping[str, Any]) -> Any:
        """Enter a function by its name."""
        if function is None:
            return partial(self.clause, **values)
        for names in itertools.product(*values.values()):
            given = {key: table[name] for (key, table), name in zip(values.items(), names)}
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
