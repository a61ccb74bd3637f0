"""SaShiMi: blocks at several sampling rates between learned pools, for raw waveforms; causal, and streams exactly.

Source: Goel, Gu, Donahue & Re (2022) "It's Raw! Audio Generation with State-Space Models", arXiv:2202.09729, sec. 4.2.
Lengths need not be multiples of the pools here, and a chunk may end anywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longwave.mixers import Mixer, join, select
from longwave.mixers.base import without_padding
from longwave.models.backbone import Block
from longwave.nn import like_output, longest
from longwave.nn.padding import is_real, real_first, take_steps


class PoolState(NamedTuple):
    """Together p steps, so it never grows; the shapes tell how far the window is."""

    window: Tensor  # (B, r, D), 0 <= r < p: the steps of the unfinished window
    pending: Tensor  # (B, p - r, D): what is to be added to the coming steps, oldest first


class Pool(nn.Module):
    """The way from one sampling rate to one p times lower and back, a window of p steps behind.

    Down, p steps of x become one:  z[w] = W_d [x[wp], ..., x[wp + p - 1]].  Up, one becomes p, in the next window:
    [y[wp], ..., y[wp + p - 1]] = W_u z'[w - 1], and zeros in the first. So y[t] depends on the x before t alone.

    Source: Goel et al. (2022), arXiv:2202.09729, sec. 4.2. A feature's p steps are neighbours in the weights, as in
    the authors' code.

    Args:
        d_model: D of x and y.
        d_low: width of z and z'.
        factor: p >= 1.
    Raises:
        ValueError: where factor < 1.
    """

    def __init__(self, d_model: int, d_low: int, factor: int):
        super().__init__()
        if factor < 1:
            raise ValueError(f"a pool joins factor >= 1 steps; got factor = {factor}")
        self.d_model, self.factor = d_model, factor
        self.down = nn.Linear(d_model * factor, d_low)
        self.up = nn.Linear(d_low, d_model * factor)

    def init_state(self, batch: int) -> PoolState:
        """At the start of a window, with silence to add."""
        like = like_output(self.up)
        return PoolState(like.new_zeros(batch, 0, self.d_model), like.new_zeros(batch, self.factor, self.d_model))

    def lower(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Down: x (B, L, D), L >= 0, behind a window (B, r, D) -> z (B, (r + L) // p, d_low) and the next window."""
        steps = torch.cat([window, x], dim=1)
        finished = steps.shape[1] // self.factor
        steps, window = steps.tensor_split([finished * self.factor], dim=1)
        return self.down(steps.unflatten(1, (finished, self.factor)).transpose(2, 3).flatten(2)), window.clone()

    def lift(self, z: Tensor, pending: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Up: z' (B, W, d_low) behind what is pending -> y (B, length, D) and what is pending then."""
        steps = self.up(z).unflatten(2, (self.d_model, self.factor)).transpose(2, 3).flatten(1, 2)  # (B, W p, D)
        y, pending = torch.cat([pending, steps], dim=1).tensor_split([length], dim=1)
        return y, pending.clone()


class Level(nn.Module):
    """Blocks at one sampling rate, and a skip around all of them:  y = z + blocks(z),  z = x + what comes from below.

    Args:
        blocks: at least one, all of one width.
    Raises:
        ValueError: where there is no block, or their widths differ.
    """

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        widths = {block.mixer.d_model for block in blocks}
        if len(widths) != 1:
            raise ValueError(f"a level needs blocks of one d_model; got {sorted(widths) or 'no block'}")
        self.d_model, self.blocks = widths.pop(), nn.ModuleList(blocks)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every block."""
        return [cast(Block, block).mixer for block in self.blocks]

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """One mixer state a block."""
        return tuple(mixer.init_state(batch) for mixer in self.mixers)

    def descend(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any, Any]:
        """x on the way down -> x for the pool, what :meth:`ascend` needs, and the state so far."""
        return x, x, state

    def ascend(self, below: Tensor, kept: Any, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        """What comes from below (B, L, D), on the way up -> y (B, L, D) and the state."""
        return self(below + kept, state, mask=mask)

    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """z (B, L, D), L >= 0 -> y (B, L, D) and the state, or None where none came in."""
        if x.shape[1] == 0:
            return x, state
        y, new = x, []
        for block, s in zip(self.blocks, [None] * len(self.blocks) if state is None else state, strict=True):
            y, s = block(y, s, mask=mask)
            new.append(s)
        return x + y, None if state is None else tuple(new)


class SashimiState(NamedTuple):
    levels: tuple[tuple[Any, ...], ...]  # by level, one mixer state a block
    pools: tuple[PoolState, ...]

    @property
    def layers(self) -> tuple[Any, ...]:
        """One mixer state a block, in the order of the model's ``mixers``."""
        return tuple(state for level in self.levels for state in level)

    def select(self, rows: Sequence[int] | slice) -> "SashimiState":
        """See :func:`longwave.mixers.select`."""
        return SashimiState(*(select(part, rows) for part in self))

    @staticmethod
    def join(states: "Sequence[SashimiState | SashimiRows]") -> "SashimiState | SashimiRows":
        """See :func:`longwave.mixers.join`; rows within windows at different steps are parted."""
        whole = [state for state in states if isinstance(state, SashimiState)]
        within = {tuple(pool.window.shape[1] for pool in state.pools) for state in whole}
        if len(whole) == len(states) and len(within) == 1:
            return SashimiState(*(join(parts) for parts in zip(*whole)))
        return SashimiRows(tuple(row for state in states for row in state.parted()))

    def parted(self) -> "list[SashimiState]":
        """Every row by itself."""
        batch = len(tree_leaves(self)[0])
        return [self.select([i]) for i in range(batch)]


class SashimiRows(NamedTuple):
    """The state where rows have had different numbers of real tokens, and so finish their windows at other steps."""

    rows: tuple[SashimiState, ...]  # one a row, each of a batch of 1

    @property
    def layers(self) -> tuple[Any, ...]:
        """By mixer, the states of all rows."""
        return tuple(zip(*(row.layers for row in self.rows)))

    def select(self, rows: Sequence[int] | slice) -> "SashimiState | SashimiRows":
        """See :func:`longwave.mixers.select`."""
        chosen = self.rows[rows] if isinstance(rows, slice) else [self.rows[i] for i in rows]
        return SashimiState.join(chosen)

    @staticmethod
    def join(states: "Sequence[SashimiState | SashimiRows]") -> "SashimiState | SashimiRows":
        """See :func:`longwave.mixers.join`."""
        return SashimiState.join(states)

    def parted(self) -> list[SashimiState]:
        """Every row by itself."""
        return list(self.rows)


class Sashimi(nn.Module):
    """Levels from the full sampling rate to the lowest, a pool between any two, then a norm. Obeys the mixers' rule.

    Source: Goel et al. (2022), arXiv:2202.09729, sec. 4.2, for a mixer of the caller's. Cost a step: that of every
    level over the product of the pools above it.

    Args:
        levels: at least one; see :class:`Level`.
        pool: factors between them, one fewer.
        norm: the last part, of the first level's width.
    Raises:
        ValueError: where the numbers of levels and pools do not fit, or a factor is below 1.
    """

    def __init__(self, levels: Sequence[Level], pool: Sequence[int], norm: nn.Module):
        super().__init__()
        if len(levels) != len(pool) + 1:
            raise ValueError(f"{len(pool)} pools lie between {len(pool) + 1} levels; got {len(levels)}")
        self.d_model = levels[0].d_model
        self.levels = nn.ModuleList(levels)
        self.pools = nn.ModuleList(Pool(a.d_model, b.d_model, p) for a, b, p in zip(levels, levels[1:], pool))
        self.norm = norm

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every block, from the full rate to the lowest."""
        return [mixer for level in self.levels for mixer in cast(Level, level).mixers]

    def longest(self) -> int | None:
        """See :func:`longwave.nn.longest`: a lower level makes a step of many."""
        limits, rate = [], 1
        for level, factor in zip(self.levels, [*(cast(Pool, pool).factor for pool in self.pools), 1]):
            if (limit := longest(level)) is not None:
                limits.append(limit * rate + rate - 1)
            rate *= factor
        return min(limits, default=None)

    def init_state(self, batch: int) -> SashimiState:
        """The state before the first step of ``batch`` sequences. Its size never changes, if no mixer's does."""
        levels = tuple(cast(Level, level).init_state(batch) for level in self.levels)
        return SashimiState(levels, tuple(cast(Pool, pool).init_state(batch) for pool in self.pools))

    def forward(
        self, x: Tensor, state: SashimiState | SashimiRows | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, SashimiState | SashimiRows | None]:
        """See :class:`longwave.mixers.Mixer`; L need not be a multiple of anything.

        With a mask, each row's windows are made of its real tokens. A mask together with a state parts the rows: from
        then on they run one by one.
        """
        x, mask = without_padding(x, mask)
        if isinstance(state, SashimiRows) or (state is not None and mask is not None):
            return self._row_by_row(x, state, mask)
        if mask is None:
            y, levels, pools = self._from(0, x, state, None)
            return self.norm(y), None if state is None else SashimiState(tuple(levels), tuple(pools))
        order, back, padding = real_first(mask)
        y, *_ = self._from(0, take_steps(x, order), None, is_real(x.shape[1], padding))
        return self.norm(take_steps(y, back)), None

    def _from(self, i: int, x: Tensor, state: SashimiState | None, mask: Tensor | None) -> tuple[Tensor, list, list]:
        """Level i and all below it: x (B, L, D) -> (B, L, D), and their next states. Padding is on the right."""
        level, s = cast(Level, self.levels[i]), None if state is None else state.levels[i]
        if i == len(self.pools):
            y, s = level(x, s, mask=mask)
            return y, [s], []
        x, kept, s = level.descend(x, s, mask)
        pool = cast(Pool, self.pools[i])
        window, pending = pool.init_state(len(x)) if state is None else state.pools[i]
        z, window = pool.lower(x, window)
        finished = None if mask is None else mask[:, pool.factor - 1 :: pool.factor]  # by their last steps
        z, levels, pools = self._from(i + 1, z, state, finished)
        y, pending = pool.lift(z, pending, x.shape[1])
        y, s = level.ascend(y, kept, s, mask)
        return y, [s, *levels], [PoolState(window, pending), *pools]

    def _row_by_row(
        self, x: Tensor, state: SashimiState | SashimiRows, mask: Tensor | None
    ) -> tuple[Tensor, SashimiRows]:
        if isinstance(state, SashimiState):
            state = SashimiRows(tuple(state.parted()))
        ys, rows = [], []
        for i, row in enumerate(state.rows):
            real = torch.arange(x.shape[1], device=x.device) if mask is None else mask[i].nonzero()[:, 0]
            y = torch.zeros_like(x[i])
            if len(real):
                out, row = self(x[i : i + 1, real], row)
                y = y.index_copy(0, real, out[0].to(y.dtype))
            ys.append(y)
            rows.append(row)
        return torch.stack(ys), SashimiRows(tuple(rows))
