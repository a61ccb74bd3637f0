"""What every task and every mixer keeps, as functions that anyone can run on a class of one's own: `longwave check`."""

from collections.abc import Iterator
from typing import Any

from longwave.contract import mixers, tasks
from longwave.mixers import MIXERS
from longwave.nn import FILTERS
from longwave.own import table_of
from longwave.tasks import TASKS


def checks(kind: str, options: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """Of every clause of the contract of a task, a mixer or a filter: the options, its name, and the fault or None.

    Args:
        kind: its name, or ``file.py:Class`` of a trusted file.
        options: of it; default every entry of its ``examples``, or those it has by default.
    Raises:
        ValueError: where there is none of that name, or it does not take the options.
    """
    table = table_of(kind, (MIXERS, TASKS, FILTERS))
    source: Any = table[kind]
    every: Any = [options] if options is not None else getattr(source, "examples", [{}])
    for given in every:
        if table is TASKS:
            task = source(**given)
            task.prepare()
            for name, clause in tasks.CONTRACT.items():
                yield given, name, _fault(clause, task)
        else:
            mixer = (kind, given) if table is MIXERS else ("conv", {"filter": {"kind": kind, **given}})
            MIXERS.make(mixer[0], **mixer[1])
            for name, clause in mixers.contract_of(mixer[0]).items():
                yield given, name, _fault(clause, *mixer)


def _fault(clause: Any, *arguments: Any) -> str | None:
    try:
        clause(*arguments)
    except Exception as error:  # whatever the class does wrong
        said = " ".join(str(error).split())
        if not isinstance(error, AssertionError):
            return f"{type(error).__name__}: {said}"
        return said or f"not so: {getattr(clause, 'func', clause).__doc__}"
    return None
