"""A convolution whose inputs come step by step: exact, O(log^2 t) a step, and no step much dearer than another.

The plane of inputs and outputs is tiled. For blocks of U = BLOCK, 2 BLOCK, 4 BLOCK, ... steps, tile (U, S) is what
block S - 2, and block S - 3 too where S is odd, add to the outputs of block S: what is nearer than that is left to the
blocks half as long, what is farther to those twice as long, and what is nearest, a step's own block of BLOCK and the
one before, is summed directly. So every pair of an input and an output is met once. A tile is one short FFT
convolution. It can be begun when block S - 2 is complete, and its first output is wanted a whole block later: it is
computed in small parts meanwhile.

Source: Gardner (1995) "Efficient convolution without input-output delay", for the schedule; van der Hoeven (2003)
"Relaxed multiplication using the middle product", for the tiling; Oncescu et al. (2024) "Flash Inference",
arXiv:2410.12982, for models.

A state is nothing but the inputs so far. Tiles follow from it, so they are kept beside it, with the memory that
``append_time`` keeps for steps to come: who goes on from a state finds those that the steps before it have computed,
who goes on from an older one shares those that still hold, and where there are none, as behind a long chunk, they are
computed. No answer depends on it.
"""

import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from longwave.nn.dense_conv import convolve
from longwave.nn.module import append_time
from longwave.ops.online_conv import parts_for

BLOCK = 64  # even
CHUNK = 8  # chunks of at least this part of a sequence: to convolve all of it once more is cheaper than step by step


class Taps:
    """The taps of a filter as an online convolution wants them; what tiles make of them is kept here.

    Args:
        k: (C, T) taps, for at most T steps; or (E, D, T), a matrix for every lag.
        skip: (C,) weight of the present input, added to tap 0.
    """

    def __init__(self, k: Tensor, skip: Tensor | None = None):
        self.k = k.movedim(-1, 0).contiguous()  # (T, C) or (T, E, D)
        if skip is not None:
            self.k = torch.cat([self.k[:1] + skip.to(k.dtype), self.k[1:]])
        self.spectra: dict[Any, dict] = {}  # by what makes the tiles

    def first(self, length: int) -> Tensor:
        """The first taps, (C, length) or (E, D, length)."""
        return self.k[:length].movedim(0, -1)


class _Tile:
    """A tile on its way, which every state that has its inputs may bring forward and use."""

    def __init__(self, make: Any, taps: Taps, U: int, S: int, B: int):
        self.U, self.start, self.work = U, (S - 1) * U, make(taps.k, U, S, B)
        self.lock, self.done = threading.Lock(), 0
        self.wants: float = self.start
        self.ahead = (U // BLOCK * 0.618) % 1  # tiles of different lengths do not take their parts at the same steps

    def bring_forward(self, t: int, past: Tensor, taps: Taps) -> float:
        """Compute what is to be there at step t, from the inputs before it; returns the step that wants more."""
        if t < self.wants:
            return self.wants
        parts, due = self.work.parts, self.start + self.U
        target = parts if t >= due else min(parts, int(parts * (t - self.start) / self.U + self.ahead))
        with self.lock:
            if target > self.done:
                self.work.run(self.done, target, past, taps.k, taps.spectra.setdefault(type(self.work), {}))
                self.done = target
            following = self.start + math.ceil((self.done + 1 - self.ahead) * self.U / parts)
            self.wants = math.inf if self.done == parts else min(due, max(t + 1, following))
        return self.wants


class _Line:
    """The tiles beside one allocation of past inputs, for the step that comes next."""

    def __init__(self, taps: Taps, past: Tensor, before: "_Line | None"):
        self.taps = weakref.ref(taps)  # states do not keep them
        self.layout, self.wake, self.end = _layout(past), 0.0, 0
        self.make, self.table, self.near = parts_for(past, taps.k, BLOCK)
        self.tiles: dict[tuple[int, int], _Tile] = {}
        if before is not None and before.taps() is taps and before.make is self.make:
            self.tiles = before.tiles
        self.ready: Any = None

    def prepare(self, past: Tensor, t: int, taps: Taps) -> None:
        """Have all tiles as they should be at step t, from the inputs before it."""
        if t >= self.end:
            self._enter(past, t, taps)
        self.wake = min([self.end, *(tile.bring_forward(t, past, taps) for tile in self.tiles.values())])

    def _enter(self, past: Tensor, t: int, taps: Taps) -> None:
        """The tiles that add to the block of BLOCK where step t is, and those that are computed meanwhile."""
        tiles: dict[tuple[int, int], _Tile] = {}
        U, T = BLOCK, len(taps.k)
        while t >= U:
            for S in range(max(2, t // U), t // U + 2):
                if S * U < T:
                    known = self.tiles.get((U, S))
                    tiles[U, S] = known or _Tile(self.make, taps, U, S, len(past))
                    tiles[U, S].bring_forward(t, past, taps)
            U *= 2
        self.tiles, self.end = tiles, (t // BLOCK + 1) * BLOCK
        self.ready = self.table([tile.work for (U, S), tile in tiles.items() if t >= S * U])

    def outputs(self, past: Tensor, t: int, taps: Taps) -> Tensor:
        """What comes from step t on, from past (B, t + L, C): (B, L, C)."""
        ys, total = [], past.shape[1]
        while t < total:
            if t >= self.wake:
                self.prepare(past, t, taps)
            n = int(min(total, self.wake)) - t
            ys.append(self.near(past, taps.k, self.ready, t, n, max(0, (t // BLOCK - 1) * BLOCK)))
            t += n
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)


def online_conv(u: Tensor, past: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """y[t] = sum_s k[s] x[t - s], where the x before u are those of the past; no gradient is recorded.

    Args:
        u: (B, L, C) input, L >= 1, of any length.
        past: (B, t, C) the inputs before u, t + L <= T.
        taps: of the filter; the same object from step to step, or all that was computed ahead is forgotten.
    Returns:
        y: (B, L, C) in the dtype of u.
        past: (B, t + L, C).
    Cost: O(log^2 t) a step for each channel in the mean, and at any step not more than some times that; O(t log t)
        for a first step where nothing was computed ahead.
    """
    t, L, before = past.shape[1], u.shape[1], _line(past)
    past = append_time(past, u, room=len(taps.k))
    line = _line(past)
    if line is None or line.taps() is not taps:
        line = _Line(taps, past, before)
        storage: Any = past.untyped_storage()
        storage.longwave_line = line
    if L <= BLOCK or t + L >= L * CHUNK:
        return line.outputs(past, t, taps).to(u.dtype), past
    y = convolve(past, taps.first(t + L))[:, t:].to(u.dtype)
    line.prepare(past, t + L, taps)
    return y, past


def _layout(past: Tensor) -> tuple:
    return past.storage_offset(), past.stride(), len(past), past.shape[2:], past.dtype


def _line(past: Tensor) -> _Line | None:
    """The tiles beside these inputs, if there are and they are of the same rows."""
    line: _Line | None = getattr(past.untyped_storage(), "longwave_line", None)
    return line if line is not None and line.layout == _layout(past) else None
