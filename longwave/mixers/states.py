"""States as values: their rows chosen and joined.

A state is a tree of NamedTuples whose leaves are tensors, batch first. Fields of tensors that grow with time are
``Growing``: they do so on axis 1, and zeros before the first step mean that there was none. A NamedTuple of which that
is not true has ``select`` and ``join`` of its own.
"""

import functools
import typing
from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.errors import shown

TIME = "axis 1 is time"
Growing = Annotated[Tensor, TIME]


def select(state: Any, rows: Sequence[int] | slice) -> Any:
    """The state of some rows of a batch, in the order given; a row may be taken more than once.

    Raises:
        IndexError: for a row that the state does not have.
        ValueError: for what is no row number.
    """
    if not isinstance(rows, slice):
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not all(isinstance(row, Integral) and not isinstance(row, bool) for row in rows):
            raise ValueError(f"rows are their numbers, such as [0, 2]; got {shown(rows)}")
    return _selected(state, rows)


def join(states: Sequence[Any]) -> Any:
    """The states of several batches of one model as that of one batch, row behind row.

    Caches of unequal length are aligned at their ends, with padding before the shorter ones.

    Raises:
        ValueError: where there is no state, or they are of different mixers, or of one with other sizes.
    """
    if not states:
        raise ValueError("there is no state to join: give at least one")
    return _joined(states, False)


@functools.cache
def grows(state: type) -> dict[str, bool]:
    """Of every field of a NamedTuple, whether its tensors grow with time."""
    return {name: _is_growing(hint) for name, hint in typing.get_type_hints(state, include_extras=True).items()}


def _is_growing(hint: Any) -> bool:
    return TIME in getattr(hint, "__metadata__", ()) or any(map(_is_growing, typing.get_args(hint)))


def _selected(state: Any, rows: Any) -> Any:
    if isinstance(state, Tensor):
        return state[rows]
    if hasattr(state, "select"):
        return state.select(rows)
    return None if state is None else _like(state, [_selected(part, rows) for part in state])


def _joined(states: Sequence[Any], grow: bool) -> Any:
    """States, or what stands in one place of all of them, and whether its tensors grow."""
    first = states[0]
    if isinstance(first, Tensor):
        return _end_to_end(states, grow)
    if hasattr(first, "join"):
        return type(first).join(states)
    if len(kinds := {type(state).__name__ for state in states}) > 1:
        raise ValueError(f"states of one model are joined; got {' and '.join(sorted(kinds))}")
    if first is None:
        return None
    kind: Any = type(first)
    growing = grows(kind).values() if hasattr(first, "_fields") else [grow] * len(first)
    return _like(first, [_joined(parts, g) for parts, g in zip(zip(*states, strict=True), growing, strict=True)])


def _like(state: Any, parts: list[Any]) -> Any:
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _end_to_end(tensors: Sequence[Tensor], grow: bool) -> Tensor:
    sizes = sorted({tuple(t.shape[2 if grow else 1 :]) for t in tensors})
    if len(sizes) > 1:
        raise ValueError(f"states of one model are joined; got some of sizes {' and '.join(map(str, sizes))} a row")
    if not grow:
        return torch.cat(list(tensors))
    longest = max(t.shape[1] for t in tensors)
    front = [(0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0) for t in tensors]
    return torch.cat([F.pad(t, pad) if any(pad) else t for t, pad in zip(tensors, front)])
