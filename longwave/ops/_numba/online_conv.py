"""What an online convolution computes: the nearest taps for each step, and tiles of the others, a part at a time.

A tile is what the P inputs that end U steps before the next output add to U outputs: on a circle of P + U = 2M samples
the inputs meet the taps of lags U ... U + 2M - 1, and the last U samples are not spoilt. Transforms are those of
``causal_conv``; k is (T, C) here, so that taps come in as inputs do.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.causal_conv import (
    TILE,
    WIDTH,
    ascend,
    bring_in,
    descend,
    get,
    leaf_size,
    leaf_times,
    leaf_to_end,
    put,
    tables,
    unite_tile,
    write,
)
from longwave.ops._numba.jit import kernel, tell_once
from longwave.ops._numba.simd import (
    eight,
    floats,
    fma,
    lanes_of,
    load,
    load_first,
    splat,
    store,
    store_first,
    widest,
    zero,
)

float32 = np.float32
LAGS = 4  # taps a pass over the channels
GRAIN = 1 << 15  # points times channels of a part of a tile: some 0.1 ms


@kernel
def some(w, x, i, lanes):
    if lanes < lanes_of(w):
        return load_first(w, x, i, lanes)
    return load(w, x, i)


@kernel
def put_some(w, x, i, v, lanes):
    if lanes < lanes_of(w):
        store_first(x, i, v, lanes)
    else:
        store(x, i, v)


@kernel
def add_lags(w, y, o, past, p, k, q, C, count):
    """y[o : o + C] += sum_j past[p - j C : ...] k[q + j C : ...]  over ``count`` lags j."""
    full = lanes_of(w)
    for c in range(0, C, full):
        lanes = min(full, C - c)
        total = some(w, y, o + c, lanes)
        for j in range(0, count * C, C):
            total = fma(some(w, past, p + c - j, lanes), some(w, k, q + c + j, lanes), total)
        put_some(w, y, o + c, total, lanes)


@kernel
def sums(w, y, past, k, tiles, B, C, room, t, n, start):
    """y[b, i] = sum_{start <= j <= t + i} k[t + i - j] past[b, j] + what tiles add, for i < n;  k (T, C).

    ``past`` has ``room`` steps a row. A row of ``tiles`` is the address of a tile's outputs (B, groups, U, span), its
    first step, U and span.
    """
    full = lanes_of(w)
    y, past, k = floats(y), floats(past), floats(k)
    for b in range(B):
        for i in range(n):
            o, s = (b * n + i) * C, t + i
            for c in range(0, C, full):
                put_some(w, y, o + c, zero(w), min(full, C - c))
            for r in range(len(tiles)):
                block, U, span = floats(tiles[r, 0]), tiles[r, 2], tiles[r, 3]
                at = (b * (-(-C // span)) * U + s - tiles[r, 1]) * span
                for group in range(0, C, span):
                    for c in range(group, min(C, group + span), full):
                        lanes = min(full, C - c)
                        put_some(w, y, o + c, some(w, y, o + c, lanes) + load(w, block, at + c - group), lanes)
                    at += U * span
            lags = s - start + 1
            for lag in range(0, lags, LAGS):
                p, q = (b * room + s - lag) * C, lag * C
                if lag + LAGS <= lags:
                    add_lags(w, y, o, past, p, k, q, C, LAGS)
                else:
                    add_lags(w, y, o, past, p, k, q, C, lags - lag)


@kernel
def scale(w, x, start, n, factor):
    point = 2 * lanes_of(w)
    by = splat(w, factor)
    for o in range(start * point, (start + n) * point, point):
        re, im = get(w, x, o)
        put(w, x, o, re * by, im * by)


@kernel
def last_out(w, x, tile, y, span, channels, M, radix, P, tw, begin, end):
    """Samples P ... 2M - 1 of what x holds to y (U, span): imaginary parts, from a whole row of the division on."""
    full = lanes_of(w)
    line, m = WIDTH * 2 * full, M // radix
    rows = (P - M) // m
    for j in range(begin, end, WIDTH):
        width = min(WIDTH, end - j)
        for c in range(0, channels, full):
            unite_tile(w, x, c * 2 * M, m, radix, tile, width, j, tw)
            for q in range(rows, radix):
                place = c + (j + (q - rows) * m) * span
                write(w, tile, q * line + full, y, tile[:0], place, span, full, width)


@kernel
def share(part, parts, whole, unit):
    """Where the ``part``-th of so many parts of a whole ends, in whole units."""
    return min(whole, -(-whole * part // (parts * unit)) * unit)


@kernel
def work(
    w, y, past, k, spectrum, points, scratch, fresh, begin, end, parts,
    C, channels, span, P, K, M, radix, tw, starts,
):  # fmt: skip
    """Parts begin ... end - 1 of the 4 ``parts`` of a tile for ``channels``: a quarter of them brings inputs in.

    Args:
        y: address of the outputs (U, span); ``past`` of the P inputs' first channel, ``k`` of the K taps'.
        spectrum, points: addresses of channels * 2 M floats, channels rounded up to whole vectors; all parts of a tile
            are given the same. The spectrum of the taps is made where it is ``fresh``, else used.
    """
    full = lanes_of(w)
    y, past, k, spectrum, points = floats(y), floats(past), floats(k), floats(spectrum), floats(points)
    tile = scratch[-(scratch.ctypes.data // 4) % (2 * full) :][: TILE * full]
    m = M // radix
    n = leaf_size(w, m)
    for part in range(begin, end):
        if part < parts:
            first, last = share(part, parts, m, WIDTH), share(part + 1, parts, m, WIDTH)
            bring_in(w, points, tile, past, tile[:0], 0, P, C, channels, M, radix, tw, first, last)
            if fresh:
                bring_in(w, spectrum, tile, k, tile[:0], 0, K, C, channels, M, radix, tw, first, last)
        elif part < 3 * parts:
            first, last = share(part - parts, 2 * parts, M, n), share(part - parts + 1, 2 * parts, M, n)
            for c in range(0, channels, full):
                k_f, x = spectrum[c * 2 * M :], points[c * 2 * M :]
                for leaf in range(first // n, last // n):
                    if fresh:
                        descend(w, k_f, leaf, n, m, tw, starts)
                        leaf_to_end(w, k_f, leaf * n, n, tw, starts)
                        scale(w, k_f, leaf * n, n, float32(1) / float32(M))
                    descend(w, x, leaf, n, m, tw, starts)
                    leaf_times(w, x, leaf * n, n, k_f, tw, starts)
                    ascend(w, x, leaf, n, m, tw, starts)
        else:
            first, last = share(part - 3 * parts, parts, m, WIDTH), share(part - 3 * parts + 1, parts, m, WIDTH)
            last_out(w, points, tile, y, span, channels, M, radix, P, tw, first, last)


def kept(k: Tensor, U: int) -> bool:
    """Whether spectra of taps are kept for other tiles of U steps: those of the longest blocks, of most bytes, are not,
    for no sequence has more than a few such tiles."""
    return len(k) >= 64 * U


def begin(k: Tensor, block: int) -> None:
    """Make what all tiles of blocks of ``block``, 2 ``block``, ... steps look up."""
    tell_once()
    for U in (block << e for e in range((len(k) // block).bit_length())):
        tables(U, 4), tables(3 * U // 2, 3)


class Tile:
    """See :class:`longwave.ops.online_conv.Tile`, whose arguments and attributes these are."""

    def __init__(self, k: Tensor, U: int, S: int, B: int):
        self.U, self.B, self.C = U, B, k.shape[1]
        self.P = U * (1 + S % 2)
        self.first, self.at = (S - 1) * U - self.P, S * U
        self.M, self.radix = (self.P + U) // 2, 3 if S % 2 else 4
        self.w = widest if self.C > 8 else eight
        lanes = self.w.lanes
        vectors = -(-self.C // lanes)
        self.span = lanes * max(2 if lanes == 8 else 1, min(vectors, GRAIN // (self.M * lanes)))
        self.groups = -(-self.C // self.span)
        self.keep = kept(k, U)
        self.slices = max(1, 4 * round(self.M * self.span * (1 if self.keep else 2) / (4 * GRAIN)))
        self.parts = self.groups * B * self.slices
        self.y = torch.empty(B, self.groups, U, self.span)
        self.size = 2 * self.M * self.span
        self.points = self.spectrum = torch.empty(0)
        self.fresh = False

    def run(self, begin: int, end: int, past: Tensor, k: Tensor, spectra: dict) -> None:
        """Parts ``begin`` to ``end`` - 1, of ``self.parts``."""
        U, C, M = self.U, self.C, self.M
        while begin < end:
            (group, row), part = divmod(begin // self.slices, self.B), begin % self.slices
            stop = min(self.slices, part + end - begin)
            key = U, self.radix, group
            if part == 0:
                self.fresh = key not in spectra
                if not self.fresh:
                    self.spectrum = spectra[key]
                elif self.keep or not len(self.spectrum):
                    self.spectrum = torch.empty(self.size)
                self.points = self.points if len(self.points) else torch.empty(self.size)
            channel = group * self.span
            work(
                self.w,
                self.y.data_ptr() + 4 * (row * self.groups + group) * U * self.span,
                past.data_ptr() + 4 * (row * past.stride(0) + self.first * C + channel),
                k.data_ptr() + 4 * (U * C + channel),
                self.spectrum.data_ptr(),
                self.points.data_ptr(),
                pool.scratch((TILE + 2) * self.w.lanes),
                self.fresh,
                *((0, 4, 1) if self.slices == 1 else (part, stop, self.slices // 4)),
                *(C, min(self.span, C - channel), self.span, self.P, min(2 * M, len(k) - U)),
                *(M, self.radix, *tables(M, self.radix)),
            )
            if stop == self.slices and self.keep:
                spectra[key] = self.spectrum
            begin += stop - part
        if end == self.parts:
            self.points = self.spectrum = torch.empty(0)


def ready(tiles: list[Tile]) -> np.ndarray:
    """See :func:`longwave.ops.online_conv.ready`."""
    return np.array([(t.y.data_ptr(), t.at, t.U, t.span) for t in tiles], np.int64).reshape(-1, 4)


def near(past: Tensor, k: Tensor, tiles: np.ndarray, t: int, n: int, start: int) -> Tensor:
    """See :func:`longwave.ops.online_conv.near`."""
    B, _, C = past.shape
    y = torch.empty(B, n, C)
    w = widest if C > 8 else eight
    sums(w, y.data_ptr(), past.data_ptr(), k.data_ptr(), tiles, B, C, past.stride(0) // C, t, n, start)
    return y
