"""Positions that are added to what passes: what a token is, and where it stands, in one vector.

Sources: Vaswani et al. (2017), arXiv:1706.03762, sec. 3.5, which has sinusoids and a learned table. Padding has no
position.
"""

import abc
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn.filters.base import require_max_len
from longwave.nn.padding import is_real


class LearnedPositionsState(NamedTuple):
    length: Tensor  # (B, 1) int64: real tokens so far


class SinusoidalPositionsState(NamedTuple):
    length: Tensor  # (B, 1) int64: real tokens so far


def positions(length: int, device: torch.device, before: Tensor | None, padding: Tensor | None) -> Tensor:
    """The positions (1 or B, length) of steps behind so many real ones, before (B, 1); 0 at padding."""
    position = torch.arange(length, device=device)[None]
    if before is not None:
        position = before + position
    return position if padding is None else torch.where(is_real(length, padding), position, 0)


def rows_at(what: str, table: Tensor, position: Tensor) -> Tensor:
    """The rows (..., C) of table (max_len, C) at position (...).

    Raises:
        ValueError: for a position beyond the table, on a CPU; a GPU would have to be waited for to know.
    """
    try:
        return F.embedding(position, table)
    except IndexError:
        require_max_len(what, len(table), int(position.max()) + 1)
        raise


class AddedPositions(Mixer):
    """y = x + p, where p[t] is a vector of position t.

    Attributes:
        State: the NamedTuple of one number a row, of the mixer's own.
    """

    State: Any
    without_filter = "adds to each token a vector of its position"

    @abc.abstractmethod
    def vectors(self, position: Tensor) -> Tensor:
        """position (..., L) int64 >= 0 -> (..., L, D)."""

    def init_state(self, batch: int) -> Any:
        where = next(chain(self.parameters(), self.buffers()))
        return self.State(torch.zeros(batch, 1, dtype=torch.int64, device=where.device))

    def mix(self, x: Tensor, state: Any, padding: Tensor | None):
        L = x.shape[1]
        position = positions(L, x.device, None if state is None else state.length, padding)
        y = x + self.vectors(position).to(x.dtype)
        if state is None:
            return y, None
        return y, self.State(state.length + (L if padding is None else L - padding[:, None]))


class LearnedPositions(AddedPositions, name="learned_positions"):
    """y = x + table[position].

    Args:
        d_model: D.
        max_len: how many positions the table has, >= 1.
    Raises:
        ValueError: for max_len < 1; and for a text of more tokens, on a CPU: a GPU would have to be waited for to know.
    """

    State = LearnedPositionsState
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_len": 64},)

    def __init__(self, d_model: int, max_len: int):
        super().__init__()
        require_max_len(self.name, max_len)
        self.d_model, self.max_len = d_model, max_len
        self.weight = nn.Parameter(torch.empty(max_len, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.d_model**-0.5)

    def longest(self) -> int:
        """How many positions there are."""
        return self.max_len

    def vectors(self, position: Tensor) -> Tensor:
        return rows_at(self.name, self.weight, position)


class SinusoidalPositions(AddedPositions, name="sinusoidal_positions"):
    """y = x + p,  p[t, 2 i] = sin(t base^(-2i/D)),  p[t, 2 i + 1] = cos of the same; angles in float64.

    Args:
        d_model: D.
        base: > 0, over 2 pi the longest wave, in tokens.
        scale: what p is multiplied by.
    Raises:
        ValueError: for another base.
    """

    State = SinusoidalPositionsState
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, d_model: int, base: float = 10_000.0, scale: float = 1.0):
        super().__init__()
        if not base > 0:
            raise ValueError(f"sinusoidal_positions need base > 0; got {base}")
        self.d_model, self.base, self.scale = d_model, base, scale
        self.register_buffer("where", torch.empty(0), persistent=False)  # whose device tells that of the state

    def vectors(self, position: Tensor) -> Tensor:
        pair = torch.arange(0, self.d_model, 2, device=position.device, dtype=torch.float64)
        angle = position[..., None] * self.base ** (-pair / self.d_model)  # (..., L, D/2 rounded up)
        return self.scale * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.d_model]
