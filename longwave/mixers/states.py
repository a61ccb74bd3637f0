"""States as values: their rows chosen and joined.

A state is a tree of NamedTuples whose leaves are tensors, batch first. Tensors that grow with time do so on axis 1, and
zeros before the first step mean that there was none; a NamedTuple of which that is not true has ``select`` and ``join``
of its own.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.errors import shown


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
    return _map(lambda parts: parts[0].select(rows), lambda tensors: tensors[0][rows], state)


def join(states: Sequence[Any]) -> Any:
    """The states of several batches of one model as that of one batch, row behind row.

    Caches of unequal length are aligned at their ends, with padding before the shorter ones.

    Raises:
        ValueError: where there is no state, or they are of different mixers.
    """
    if not states:
        raise ValueError("there is no state to join: give at least one")
    return _map(lambda parts: type(parts[0]).join(parts), _end_to_end, *states)


def _map(own: Callable[[tuple], Any], leaf: Callable[[tuple[Tensor, ...]], Any], *states: Any) -> Any:
    """Apply ``leaf`` to the tensors that stand in one place of all states, and ``own`` to what looks after itself."""
    first = states[0]
    if isinstance(first, Tensor):
        return leaf(states)
    if hasattr(first, "join"):
        return own(states)
    if len(kinds := {type(state).__name__ for state in states}) > 1:
        raise ValueError(f"states of one model are joined; got {' and '.join(sorted(kinds))}")
    if first is None:
        return None
    parts = [_map(own, leaf, *each) for each in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def _end_to_end(tensors: tuple[Tensor, ...]) -> Tensor:
    if tensors[0].ndim < 2 or all(a.shape[1:] == b.shape[1:] for a, b in pairwise(tensors)):
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    front = [(0, 0) * (t.ndim - 2) + (longest - t.shape[1], 0) for t in tensors]
    return torch.cat([F.pad(t, pad) for t, pad in zip(tensors, front)])
