"""Long convolution by one half-length complex FFT a row, channels in the lanes, everything pointwise fused in.

The transform. A real sequence x of at most 2M samples is the polynomial sum_j x[j] z^j modulo z^2M + 1. That modulus is
(z^M - i)(z^M + i), and real polynomials are conjugate in the two factors, so one factor tells all: with z^M = i the
sequence is the M complex numbers x[j] + i x[j+M], and multiplying two of them multiplies the real polynomials. So a
convolution costs transforms of M >= L points where zero padding to 2L and a real FFT would be the usual way; what
leaves at 2M comes back at 0 negated, and M is chosen so that none of it comes back where it is read (`plan`).

The FFT divides moduli: z^4m - g^4 is the product of z^m - i^p g over p < 4, so a block of 4m points becomes four blocks
of m points, block p holding sum_q i^pq g^q x[j + qm]. g is constant over a block: long blocks need no table of
twiddles. After the last division the points are the values of the polynomial at the M roots, in some order which does
not matter, because the inverse undoes the same steps backwards. The first division is by 3, 4 or 5 (M = radix 2^p) and
is done while reading, its inverse while writing. Blocks are divided depth first, so that small ones stay in cache.

Memory: a point is a vector of real parts and one of imaginary parts, of eight channels or sixteen: a cache line or two.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    Width,
    eight,
    fma,
    fms,
    fnma,
    lanes_of,
    load,
    load_first,
    load_splat,
    prefetch,
    prefetch_to_write,
    splat,
    store,
    store_first,
    transpose,
    widest,
    zero,
)

LEAF = 2048  # floats of a block's real parts that is divided to the end at once: 16 kB, half of an L1 cache
WIDTH = 16  # columns that pass through the tile at a time on their way in or out
TILE = 5 * WIDTH * 2  # vectors
SHARED = 1 << 16  # up to here, in points, sixteen channels at a time share the cache lines of u

float32 = np.float32
SQRT3_4 = float32(np.sqrt(0.75))
COS1, COS2 = float32(np.cos(2 * np.pi / 5)), float32(np.cos(4 * np.pi / 5))
SIN1, SIN2 = float32(np.sin(2 * np.pi / 5)), float32(np.sin(4 * np.pi / 5))
HALF = float32(0.5)


def plan(L: int, K: int, F: int) -> tuple[int, int]:
    """The least M = radix 2^p, radix 3, 4 or 5, for L samples, K causal and F future taps; and its radix.

    Output t is spoilt by those at t + 2M and t - 2M. The outputs run from -F to L + K - 2 and those from 0 to L - 1 are
    read, so 2M >= L + K - 1 and 2M >= L + F. The gradients need the same: that of u is a convolution with K future and
    F causal taps; that of the taps is read from -F to K - 1 of the lags -(L - 1) to L - 1.
    """
    least = (L + max(K - 1, F) + 1) // 2
    return min((radix << max(0, (-(-least // radix) - 1).bit_length()), radix) for radix in (4, 3, 5))


@functools.lru_cache(maxsize=64)
def tables(M: int, radix: int) -> tuple[np.ndarray, np.ndarray]:
    """Twiddles g, g^2, ... of full block as (cos, sin) pairs, and where those of blocks of 2^e points begin, by e."""
    angle = np.full(1, np.pi / 2)  # the blocks' moduli are z^n - exp(i angle), in the order of the blocks
    parts, starts, count, n, divide = [], np.zeros(64, np.int64), 0, M, radix
    while n > 1:
        powers = angle[:, None] / divide * np.arange(1, divide)
        parts.append(np.stack([np.cos(powers), np.sin(powers)], axis=2).astype(np.float32).ravel())
        if n != M:
            starts[n.bit_length() - 1] = count
        count += parts[-1].size
        angle = ((angle[:, None] + 2 * np.pi * np.arange(divide)) / divide).ravel()
        n //= divide
        divide = min(n, 4)
    parts.append(np.zeros(8, np.float32))  # the first division reads four twiddles, whatever its radix
    return np.concatenate(parts), starts


@kernel
def turn(re, im, cos, sin):
    return fnma(im, sin, re * cos), fma(im, cos, re * sin)


@kernel
def turn_back(re, im, cos, sin):
    return fma(im, sin, re * cos), fms(im, cos, re * sin)


@kernel
def get(w, x, o):
    full = lanes_of(w)
    return load(w, x, o), load(w, x, o + full)


@kernel
def put(w, x, o, re, im):
    full = lanes_of(w)
    store(x, o, re)
    store(x, o + full, im)


@kernel
def get_turned(w, x, o, cos, sin):
    full = lanes_of(w)
    return turn(load(w, x, o), load(w, x, o + full), cos, sin)


@kernel
def put_turned_back(w, x, o, re, im, cos, sin):
    re, im = turn_back(re, im, cos, sin)
    put(w, x, o, re, im)


@kernel
def get_twiddles(w, tw, t):
    """Cosines and sines of g, g^2 and g^3."""
    return (
        load_splat(w, tw, t), load_splat(w, tw, t + 1), load_splat(w, tw, t + 2),
        load_splat(w, tw, t + 3), load_splat(w, tw, t + 4), load_splat(w, tw, t + 5),
    )  # fmt: skip


@kernel
def dft4(ar, ai, br, bi, cr, ci, dr, di):
    """a + i^p b + (-1)^p c + (-i)^p d for p = 0, 1, 2, 3."""
    er, ei, fr, fi = ar + cr, ai + ci, ar - cr, ai - ci
    gr, gi, hr, hi = br + dr, bi + di, br - dr, bi - di
    return er + gr, ei + gi, fr - hi, fi + hr, er - gr, ei - gi, fr + hi, fi - hr


@kernel
def split4(w, x, i, s, y, o, t, c1, s1, c2, s2, c3, s3):
    """One point of each quarter of a block, s apart in x, to one point of each of four blocks, t apart in y."""
    ar, ai = get(w, x, i)
    br, bi = get_turned(w, x, i + s, c1, s1)
    cr, ci = get_turned(w, x, i + 2 * s, c2, s2)
    dr, di = get_turned(w, x, i + 3 * s, c3, s3)
    ar, ai, br, bi, cr, ci, dr, di = dft4(ar, ai, br, bi, cr, ci, dr, di)
    put(w, y, o, ar, ai)
    put(w, y, o + t, br, bi)
    put(w, y, o + 2 * t, cr, ci)
    put(w, y, o + 3 * t, dr, di)


@kernel
def join4(w, x, i, s, y, o, t, c1, s1, c2, s2, c3, s3):
    """The inverse, times 4: from blocks s apart in x to quarters t apart in y."""
    ar, ai = get(w, x, i)
    br, bi = get(w, x, i + s)
    cr, ci = get(w, x, i + 2 * s)
    dr, di = get(w, x, i + 3 * s)
    ar, ai, dr, di, cr, ci, br, bi = dft4(ar, ai, br, bi, cr, ci, dr, di)
    put(w, y, o, ar, ai)
    put_turned_back(w, y, o + t, br, bi, c1, s1)
    put_turned_back(w, y, o + 2 * t, cr, ci, c2, s2)
    put_turned_back(w, y, o + 3 * t, dr, di, c3, s3)


@kernel
def divide(w, x, start, n, blocks, tw, t):
    """Blocks of n = 4m points, the first at ``start``, into four of m points each."""
    point = 2 * lanes_of(w)
    s = n // 4 * point
    for block in range(blocks):
        c1, s1, c2, s2, c3, s3 = get_twiddles(w, tw, t + 6 * block)
        first = (start + block * n) * point
        for o in range(first, first + s, point):
            split4(w, x, o, s, x, o, s, c1, s1, c2, s2, c3, s3)


@kernel
def unite(w, x, start, n, blocks, tw, t):
    """The inverse of divide, times 4."""
    point = 2 * lanes_of(w)
    s = n // 4 * point
    for block in range(blocks):
        c1, s1, c2, s2, c3, s3 = get_twiddles(w, tw, t + 6 * block)
        first = (start + block * n) * point
        for o in range(first, first + s, point):
            join4(w, x, o, s, x, o, s, c1, s1, c2, s2, c3, s3)


@kernel
def divide_pairs(w, x, start, count, tw, t):
    """Blocks of two points into single points."""
    point = 2 * lanes_of(w)
    for o in range(start * point, (start + count) * point, 2 * point):
        ar, ai = get(w, x, o)
        br, bi = get_turned(w, x, o + point, load_splat(w, tw, t), load_splat(w, tw, t + 1))
        put(w, x, o, ar + br, ai + bi)
        put(w, x, o + point, ar - br, ai - bi)
        t += 2


@kernel
def unite_pairs(w, x, start, count, tw, t):
    point = 2 * lanes_of(w)
    for o in range(start * point, (start + count) * point, 2 * point):
        ar, ai = get(w, x, o)
        br, bi = get(w, x, o + point)
        put(w, x, o, ar + br, ai + bi)
        put_turned_back(w, x, o + point, ar - br, ai - bi, load_splat(w, tw, t), load_splat(w, tw, t + 1))
        t += 2


@kernel
def times(w, re, im, k, o):
    full = lanes_of(w)
    return turn(re, im, load(w, k, o), load(w, k, o + full))


@kernel
def multiply_fours(w, x, start, count, k, tw, t):
    """Divide blocks of four points, multiply by k, unite: all in registers."""
    point = 2 * lanes_of(w)
    for o in range(start * point, (start + count) * point, 4 * point):
        c1, s1, c2, s2, c3, s3 = get_twiddles(w, tw, t)
        t += 6
        ar, ai = get(w, x, o)
        br, bi = get_turned(w, x, o + point, c1, s1)
        cr, ci = get_turned(w, x, o + 2 * point, c2, s2)
        dr, di = get_turned(w, x, o + 3 * point, c3, s3)
        ar, ai, br, bi, cr, ci, dr, di = dft4(ar, ai, br, bi, cr, ci, dr, di)
        ar, ai = times(w, ar, ai, k, o)
        br, bi = times(w, br, bi, k, o + point)
        cr, ci = times(w, cr, ci, k, o + 2 * point)
        dr, di = times(w, dr, di, k, o + 3 * point)
        ar, ai, dr, di, cr, ci, br, bi = dft4(ar, ai, br, bi, cr, ci, dr, di)
        put(w, x, o, ar, ai)
        put_turned_back(w, x, o + point, br, bi, c1, s1)
        put_turned_back(w, x, o + 2 * point, cr, ci, c2, s2)
        put_turned_back(w, x, o + 3 * point, dr, di, c3, s3)


@kernel
def multiply(w, x, start, count, k):
    point = 2 * lanes_of(w)
    for o in range(start * point, (start + count) * point, point):
        re, im = get(w, x, o)
        re, im = times(w, re, im, k, o)
        put(w, x, o, re, im)


@kernel
def exponent(n):
    e = 0
    while n > 1:
        n >>= 1
        e += 1
    return e


@kernel
def leaf_size(w, m):
    """Blocks of m points are divided by 4 until they are no larger than LEAF // lanes_of(w)."""
    while m > LEAF // lanes_of(w):
        m //= 4
    return m


@kernel
def descend(w, x, leaf, n, m, tw, starts):
    """Divide the blocks that begin with this leaf, of n points, down to it; the largest have m points."""
    size = m
    while size > n:
        start = leaf * n
        if start % size == 0:
            divide(w, x, start, size, 1, tw, starts[exponent(size)] + 6 * (start // size))
        size //= 4


@kernel
def ascend(w, x, leaf, n, m, tw, starts):
    """Unite the blocks that end with this leaf."""
    size = 4 * n
    while size <= m:
        end = (leaf + 1) * n
        if end % size == 0:
            unite(w, x, end - size, size, 1, tw, starts[exponent(size)] + 6 * (end // size - 1))
        size *= 4


@kernel
def leaf_down(w, x, start, n, tw, starts):
    """Divide a leaf down to blocks of at most four points; returns their size."""
    size, e = n, exponent(n)
    while size > 4:
        divide(w, x, start, size, n // size, tw, starts[e] + 6 * (start // size))
        size //= 4
        e -= 2
    return size


@kernel
def leaf_up(w, x, start, n, size, tw, starts):
    """Unite blocks of ``size`` points up to the leaf."""
    size *= 4
    e = exponent(size)
    while size <= n:
        unite(w, x, start, size, n // size, tw, starts[e] + 6 * (start // size))
        size *= 4
        e += 2


@kernel
def leaf_to_end(w, x, start, n, tw, starts):
    """Divide a leaf into single points; returns the size of the blocks before the last division."""
    size = leaf_down(w, x, start, n, tw, starts)
    if size == 4:
        divide(w, x, start, 4, n // 4, tw, starts[2] + 6 * (start // 4))
    elif size == 2:
        divide_pairs(w, x, start, n, tw, starts[1] + start)
    return size


@kernel
def leaf_from_end(w, x, start, n, size, tw, starts):
    if size == 4:
        unite(w, x, start, 4, n // 4, tw, starts[2] + 6 * (start // 4))
    elif size == 2:
        unite_pairs(w, x, start, n, tw, starts[1] + start)
    leaf_up(w, x, start, n, size, tw, starts)


@kernel
def leaf_times(w, x, start, n, k, tw, starts):
    """Transform a leaf, multiply it by the spectrum k, transform it back."""
    size = leaf_down(w, x, start, n, tw, starts)
    if size == 4:
        multiply_fours(w, x, start, n, k, tw, starts[2] + 6 * (start // 4))
    elif size == 2:
        divide_pairs(w, x, start, n, tw, starts[1] + start)
        multiply(w, x, start, n, k)
        unite_pairs(w, x, start, n, tw, starts[1] + start)
    else:
        multiply(w, x, start, n, k)
    leaf_up(w, x, start, n, size, tw, starts)


@kernel
def dft3(w, ar, ai, br, bi, cr, ci):
    """a + w^p b + w^2p c for p = 0, 1, 2, w = exp(2 pi i / 3)."""
    half, sine = splat(w, HALF), splat(w, SQRT3_4)
    sr, si, dr, di = br + cr, bi + ci, (br - cr) * sine, (bi - ci) * sine
    er, ei = fnma(sr, half, ar), fnma(si, half, ai)
    return ar + sr, ai + si, er - di, ei + dr, er + di, ei - dr


@kernel
def dft5(w, ar, ai, br, bi, cr, ci, dr, di, er, ei):
    """a + w^p b + w^2p c + w^3p d + w^4p e for p = 0 ... 4, w = exp(2 pi i / 5)."""
    cos1, cos2, sin1, sin2 = splat(w, COS1), splat(w, COS2), splat(w, SIN1), splat(w, SIN2)
    pr, pi, qr, qi = br + er, bi + ei, br - er, bi - ei
    rr, ri, sr, si = cr + dr, ci + di, cr - dr, ci - di
    fr, fi = fma(rr, cos2, fma(pr, cos1, ar)), fma(ri, cos2, fma(pi, cos1, ai))
    gr, gi = fma(rr, cos1, fma(pr, cos2, ar)), fma(ri, cos1, fma(pi, cos2, ai))
    hr, hi = fma(sr, sin2, qr * sin1), fma(si, sin2, qi * sin1)
    kr, ki = fnma(sr, sin1, qr * sin2), fnma(si, sin1, qi * sin2)
    return ar + pr + rr, ai + pi + ri, fr - hi, fi + hr, gr - ki, gi + kr, gr + ki, gi - kr, fr + hi, fi - hr


@kernel
def divide_tile(w, x, start, m, radix, tile, width, j, tw):
    """The first division, out of the tile: its row q holds points q m + j ... of the whole, which make row p of x."""
    point = 2 * lanes_of(w)
    line = WIDTH * point
    c1, s1, c2, s2, c3, s3 = get_twiddles(w, tw, 0)
    c4, s4 = load_splat(w, tw, 6), load_splat(w, tw, 7)
    t, first = m * point, start + j * point
    if radix == 4:
        for i in range(0, width * point, point):
            split4(w, tile, i, line, x, first + i, t, c1, s1, c2, s2, c3, s3)
    elif radix == 3:
        for i in range(0, width * point, point):
            ar, ai = get(w, tile, i)
            br, bi = get_turned(w, tile, i + line, c1, s1)
            cr, ci = get_turned(w, tile, i + 2 * line, c2, s2)
            ar, ai, br, bi, cr, ci = dft3(w, ar, ai, br, bi, cr, ci)
            put(w, x, first + i, ar, ai)
            put(w, x, first + i + t, br, bi)
            put(w, x, first + i + 2 * t, cr, ci)
    else:
        for i in range(0, width * point, point):
            ar, ai = get(w, tile, i)
            br, bi = get_turned(w, tile, i + line, c1, s1)
            cr, ci = get_turned(w, tile, i + 2 * line, c2, s2)
            dr, di = get_turned(w, tile, i + 3 * line, c3, s3)
            er, ei = get_turned(w, tile, i + 4 * line, c4, s4)
            ar, ai, br, bi, cr, ci, dr, di, er, ei = dft5(w, ar, ai, br, bi, cr, ci, dr, di, er, ei)
            put(w, x, first + i, ar, ai)
            put(w, x, first + i + t, br, bi)
            put(w, x, first + i + 2 * t, cr, ci)
            put(w, x, first + i + 3 * t, dr, di)
            put(w, x, first + i + 4 * t, er, ei)


@kernel
def unite_tile(w, x, start, m, radix, tile, width, j, tw):
    """The inverse of divide_tile, times radix."""
    point = 2 * lanes_of(w)
    line = WIDTH * point
    c1, s1, c2, s2, c3, s3 = get_twiddles(w, tw, 0)
    c4, s4 = load_splat(w, tw, 6), load_splat(w, tw, 7)
    t, first = m * point, start + j * point
    if radix == 4:
        for i in range(0, width * point, point):
            join4(w, x, first + i, t, tile, i, line, c1, s1, c2, s2, c3, s3)
    elif radix == 3:
        for i in range(0, width * point, point):
            ar, ai = get(w, x, first + i)
            br, bi = get(w, x, first + i + t)
            cr, ci = get(w, x, first + i + 2 * t)
            ar, ai, cr, ci, br, bi = dft3(w, ar, ai, br, bi, cr, ci)
            put(w, tile, i, ar, ai)
            put_turned_back(w, tile, i + line, br, bi, c1, s1)
            put_turned_back(w, tile, i + 2 * line, cr, ci, c2, s2)
    else:
        for i in range(0, width * point, point):
            ar, ai = get(w, x, first + i)
            br, bi = get(w, x, first + i + t)
            cr, ci = get(w, x, first + i + 2 * t)
            dr, di = get(w, x, first + i + 3 * t)
            er, ei = get(w, x, first + i + 4 * t)
            ar, ai, er, ei, dr, di, cr, ci, br, bi = dft5(w, ar, ai, br, bi, cr, ci, dr, di, er, ei)
            put(w, tile, i, ar, ai)
            put_turned_back(w, tile, i + line, br, bi, c1, s1)
            put_turned_back(w, tile, i + 2 * line, cr, ci, c2, s2)
            put_turned_back(w, tile, i + 3 * line, dr, di, c3, s3)
            put_turned_back(w, tile, i + 4 * line, er, ei, c4, s4)


@kernel
def read(w, tile, o, u, gate, place, C, lanes, count):
    """``count`` samples of ``lanes`` channels, times the gate, to every second vector of the tile from o on.

    Those of the next tile are prefetched: their distance, C floats, is more than the hardware's prefetchers follow.
    """
    full = lanes_of(w)
    point = 2 * full
    ahead = WIDTH * C
    for at in range(place, place + count * C, C):
        prefetch(u, at + ahead)
        if lanes < full:
            v = load_first(w, u, at, lanes)
            if gate.size:
                v = v * load_first(w, gate, at, lanes)
            store(tile, o, v)
        elif gate.size:
            prefetch(gate, at + ahead)
            store(tile, o, load(w, u, at) * load(w, gate, at))
        else:
            store(tile, o, load(w, u, at))
        o += point


@kernel
def write(w, tile, o, y, gate, place, C, lanes, count):
    """The way back: y = gate times what the tile holds."""
    full = lanes_of(w)
    point = 2 * full
    ahead = WIDTH * C
    for at in range(place, place + count * C, C):
        prefetch_to_write(y, at + ahead)
        v = load(w, tile, o)
        if lanes < full:
            if gate.size:
                v = v * load_first(w, gate, at, lanes)
            store_first(y, at, v, lanes)
        elif gate.size:
            prefetch(gate, at + ahead)
            store(y, at, v * load(w, gate, at))
        else:
            store(y, at, v)
        o += point


@kernel
def clear(w, tile, o, start, stop):
    point = 2 * lanes_of(w)
    for i in range(start, stop):
        store(tile, o + i * point, zero(w))


@kernel
def bring_in(w, x, tile, u, gate, first, L, C, channels, M, radix, tw, begin, end):
    """u times gate, (L, channels) from ``first`` on, as polynomials modulo z^M - i, after the first division.

    Of the M // radix columns of the division, those from ``begin`` to ``end``. Several vectors of channels at a time,
    one array of M points after the other in x, so that of each cache line and each page of u all is used that there is.
    """
    full = lanes_of(w)
    line = WIDTH * 2 * full
    m = M // radix
    parts = 2 if L > M else 1
    for i in range(0, 5 * line, full):
        store(tile, i, zero(w))
    for j in range(begin, end, WIDTH):
        width = min(WIDTH, end - j)
        for c in range(0, channels, full):
            lanes = min(full, channels - c)
            for q in range(radix):
                for part in range(parts):
                    start = q * m + j + part * M
                    there = max(0, min(width, L - start))
                    o = q * line + part * full
                    read(w, tile, o, u, gate, first + c + start * C, C, lanes, there)
                    if there < width:
                        clear(w, tile, o, there, width)
            divide_tile(w, x, c * 2 * M, m, radix, tile, width, j, tw)


@kernel
def bring_out(w, x, tile, y, gate, y2, gate2, first, L, C, channels, M, radix, tw):
    """The inverse: y = gate times what x holds, and y2 = gate2 times it where there is a y2."""
    full = lanes_of(w)
    line = WIDTH * 2 * full
    m = M // radix
    parts = 2 if L > M else 1
    for j in range(0, m, WIDTH):
        width = min(WIDTH, m - j)
        for c in range(0, channels, full):
            lanes = min(full, channels - c)
            unite_tile(w, x, c * 2 * M, m, radix, tile, width, j, tw)
            for q in range(radix):
                for part in range(parts):
                    start = q * m + j + part * M
                    there = max(0, min(width, L - start))
                    o = q * line + part * full
                    write(w, tile, o, y, gate, first + c + start * C, C, lanes, there)
                    if y2.size:
                        write(w, tile, o, y2, gate2, first + c + start * C, C, lanes, there)


@kernel
def read_taps(w, tile, o, k, place, stride, lanes, count):
    """``count`` taps of ``lanes`` rows, ``stride`` apart, to every second vector of the tile from o on."""
    point = 2 * lanes_of(w)
    whole = count // 8 * 8 if lanes % 8 == 0 else 0
    for i in range(0, whole, 8):
        for lane in range(0, lanes, 8):
            transpose(tile, o + i * point + lane, point, k, place + lane * stride + i, stride)
    for i in range(whole, count):
        store(tile, o + i * point, zero(w))
        for lane in range(lanes):
            tile[o + i * point + lane] = k[place + lane * stride + i]


@kernel
def write_taps(w, tile, o, k, place, stride, lanes, count):
    point = 2 * lanes_of(w)
    whole = count // 8 * 8 if lanes % 8 == 0 else 0
    for i in range(0, whole, 8):
        for lane in range(0, lanes, 8):
            transpose(k, place + lane * stride + i, stride, tile, o + i * point + lane, point)
    for i in range(whole, count):
        for lane in range(lanes):
            k[place + lane * stride + i] = tile[o + i * point + lane]


@kernel
def taps_in(w, x, tile, k, k_stride, K, future, F, skip, channel, lanes, M, radix, tw):
    """All taps of ``lanes`` channels, divided by M, as a polynomial after the first division.

    The tap of lag -s is that of 2M - s negated, which is an imaginary part.
    """
    full = lanes_of(w)
    point = 2 * full
    line = WIDTH * point
    m = M // radix
    scale = float32(1) / float32(M)
    for j in range(0, m, WIDTH):
        width = min(WIDTH, m - j)
        for q in range(radix):
            t, o = q * m + j, q * line
            there = max(0, min(width, K - t))
            read_taps(w, tile, o, k, channel * k_stride + t, k_stride, lanes, there)
            if t == 0 and skip.size:
                for lane in range(lanes):
                    tile[lane] += skip[channel + lane]
            for i in range(there):
                store(tile, o + i * point, load(w, tile, o + i * point) * splat(w, scale))
            clear(w, tile, o, there, width)
            clear(w, tile, o + full, 0, width)
            for i in range(max(0, M - F - t), width):
                for lane in range(lanes):
                    tile[o + i * point + full + lane] = -scale * future[(channel + lane) * F + M - 1 - t - i]
        divide_tile(w, x, 0, m, radix, tile, width, j, tw)


@kernel
def taps_out(w, x, tile, k, k_stride, K, future, F, channel, lanes, M, radix, tw):
    full = lanes_of(w)
    point = 2 * full
    line = WIDTH * point
    m = M // radix
    for j in range(0, m, WIDTH):
        width = min(WIDTH, m - j)
        unite_tile(w, x, 0, m, radix, tile, width, j, tw)
        for q in range(radix):
            t, o = q * m + j, q * line
            there = max(0, min(width, K - t))
            write_taps(w, tile, o, k, channel * k_stride + t, k_stride, lanes, there)
            for i in range(max(0, M - F - t), width):
                for lane in range(lanes):
                    future[(channel + lane) * F + M - 1 - t - i] = -tile[o + i * point + full + lane]


@kernel
def convolve(
    start, stop, scratch, w, y, k, k_stride, K, future, F, skip, u, gate_in, gate_out,
    B, L, C, span, rows, M, radix, tw, starts,
):  # fmt: skip
    """y = gate_out (k * (gate_in u)); a task is ``rows`` rows of the batch and ``span`` channels."""
    full = lanes_of(w)
    point, tile_size = 2 * full, TILE * full
    m = M // radix
    n = leaf_size(w, m)
    scratch = scratch[-(scratch.ctypes.data // 4) % point :]  # from its first cache line on
    tile, none = scratch[:tile_size], scratch[:0]
    size = M * point
    spectra, points = (
        scratch[tile_size : tile_size + span * 2 * M],
        scratch[tile_size + span * 2 * M : tile_size + span * 4 * M],
    )
    spans = (C + span - 1) // span
    for task in range(start, stop):
        channel = task % spans * span
        channels = min(span, C - channel)
        for c in range(0, channels, full):
            k_f = spectra[c * 2 * M : c * 2 * M + size]
            lanes = min(full, channels - c)
            taps_in(w, k_f, tile, k, k_stride, K, future, F, skip, channel + c, lanes, M, radix, tw)
        begin = task // spans * rows
        for row in range(begin, min(B, begin + rows)):
            first = row * L * C + channel
            bring_in(w, points, tile, u, gate_in, first, L, C, channels, M, radix, tw, 0, m)
            for c in range(0, channels, full):
                k_f, x = spectra[c * 2 * M : c * 2 * M + size], points[c * 2 * M : c * 2 * M + size]
                for leaf in range(M // n):
                    if row == begin:
                        descend(w, k_f, leaf, n, m, tw, starts)
                        leaf_to_end(w, k_f, leaf * n, n, tw, starts)
                    descend(w, x, leaf, n, m, tw, starts)
                    leaf_times(w, x, leaf * n, n, k_f, tw, starts)
                    ascend(w, x, leaf, n, m, tw, starts)
            bring_out(w, points, tile, y, gate_out, none, none, first, L, C, channels, M, radix, tw)


@kernel
def correlate(w, g, x, k, total, start, stop, fresh, keep, scale):
    """total += g conj(x) scale, g *= conj(k), and x *= k if it is kept, for points start ... stop - 1."""
    full = lanes_of(w)
    point = 2 * full
    for o in range(start * point, stop * point, point):
        gr, gi = get(w, g, o)
        xr, xi = get(w, x, o)
        kr, ki = get(w, k, o)
        re, im = turn_back(gr, gi, xr, xi)
        re, im = re * scale, im * scale
        if not fresh:
            re, im = re + load(w, total, o), im + load(w, total, o + full)
        put(w, total, o, re, im)
        put_turned_back(w, g, o, gr, gi, kr, ki)
        if keep:
            re, im = turn(xr, xi, kr, ki)
            put(w, x, o, re, im)


@kernel
def gradients(
    start, stop, scratch, w, du, dgate_in, dgate_out, dk, dfuture,
    dy, k, k_stride, K, future, F, skip, u, gate_in, gate_out,
    B, L, C, span, M, radix, tw, starts,
):  # fmt: skip
    """All gradients; a task is ``span`` channels, whose rows are added up in order, as spectra.

    With s = k * x, x = gate_in u, y = gate_out s: of s it is g = gate_out dy, of x the correlation of g with k, of k
    that of g with x; s itself is wanted for the gradient of gate_out only.
    """
    full = lanes_of(w)
    point, tile_size = 2 * full, TILE * full
    m = M // radix
    n = leaf_size(w, m)
    scratch = scratch[-(scratch.ctypes.data // 4) % point :]
    tile, none = scratch[:tile_size], scratch[:0]
    size, all_of = M * point, span * 2 * M
    spectra, points = scratch[tile_size : tile_size + all_of], scratch[tile_size + all_of : tile_size + 2 * all_of]
    gs = scratch[tile_size + 2 * all_of : tile_size + 3 * all_of]
    keep = dgate_out.size > 0
    totals = scratch[tile_size + 3 * all_of : tile_size + 4 * all_of] if keep or B > 1 else points
    scale = splat(w, float32(1) / float32(M))
    for task in range(start, stop):
        channel = task * span
        channels = min(span, C - channel)
        for c in range(0, channels, full):
            k_f = spectra[c * 2 * M : c * 2 * M + size]
            lanes = min(full, channels - c)
            taps_in(w, k_f, tile, k, k_stride, K, future, F, skip, channel + c, lanes, M, radix, tw)
        for row in range(B):
            first = row * L * C + channel
            bring_in(w, points, tile, u, gate_in, first, L, C, channels, M, radix, tw, 0, m)
            bring_in(w, gs, tile, dy, gate_out, first, L, C, channels, M, radix, tw, 0, m)
            for c in range(0, channels, full):
                k_f, x = spectra[c * 2 * M : c * 2 * M + size], points[c * 2 * M : c * 2 * M + size]
                g, total = gs[c * 2 * M : c * 2 * M + size], totals[c * 2 * M : c * 2 * M + size]
                for leaf in range(M // n):
                    if row == 0:
                        descend(w, k_f, leaf, n, m, tw, starts)
                        leaf_to_end(w, k_f, leaf * n, n, tw, starts)
                    descend(w, x, leaf, n, m, tw, starts)
                    descend(w, g, leaf, n, m, tw, starts)
                    block = leaf_to_end(w, x, leaf * n, n, tw, starts)
                    leaf_to_end(w, g, leaf * n, n, tw, starts)
                    correlate(w, g, x, k_f, total, leaf * n, (leaf + 1) * n, row == 0, keep, scale)
                    leaf_from_end(w, g, leaf * n, n, block, tw, starts)
                    ascend(w, g, leaf, n, m, tw, starts)
                    if keep:
                        leaf_from_end(w, x, leaf * n, n, block, tw, starts)
                        ascend(w, x, leaf, n, m, tw, starts)
                    if row == B - 1:
                        leaf_from_end(w, total, leaf * n, n, block, tw, starts)
                        ascend(w, total, leaf, n, m, tw, starts)
            bring_out(w, gs, tile, du, gate_in, dgate_in, u, first, L, C, channels, M, radix, tw)
            if keep:
                bring_out(w, points, tile, dgate_out, dy, none, none, first, L, C, channels, M, radix, tw)
        for c in range(0, channels, full):
            total = totals[c * 2 * M : c * 2 * M + size]
            lanes = min(full, channels - c)
            taps_out(w, total, tile, dk, k_stride, K, dfuture, F, channel + c, lanes, M, radix, tw)


def _plan(u: Tensor, k: Tensor, k_future: Tensor | None) -> tuple[int, int, int, int]:
    """(causal taps that matter, future taps that matter, M, its radix)."""
    L = u.shape[1]
    K, F = min(k.shape[1], L), 0 if k_future is None else min(k_future.shape[1], L - 1)
    return K, F, *plan(L, K, F)


def _span(C: int, M: int, rows: int) -> tuple[Width, int]:
    """The lanes, and channels a task: sixteen share the cache lines of u, eight take half the memory of long rows."""
    threads = torch.get_num_threads()
    span = 16 if M <= SHARED and (threads == 1 or -(-C // 16) * rows >= 2 * threads) else 8
    return widest if widest.lanes == span and C > 8 else eight, span


def forward(
    u: Tensor, k: Tensor, skip: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, k_future: Tensor | None
) -> Tensor:
    """y (B, L, C)."""
    B, L, C = u.shape
    K, F, M, radix = _plan(u, k, k_future)
    y = pool.empty(B, L, C)
    w, span = _span(C, M, B)
    spans = -(-C // span)
    tasks = 1 if torch.get_num_threads() == 1 else -(-4 * torch.get_num_threads() // spans)  # of the same channels
    rows = max(1, B // tasks)
    taps = pool.flat(k), k.shape[1], K, pool.flat(None if k_future is None else k_future[:, :F]), F, pool.flat(skip)
    inputs = (pool.flat(t) for t in (u, gate_in, gate_out))
    pool.run(
        convolve,
        spans * -(-B // rows),
        *(w, pool.flat(y), *taps, *inputs, B, L, C, span, rows, M, radix, *tables(M, radix)),
        scratch_size=(TILE + 2) * w.lanes + 2 * span * 2 * M,
    )
    return y.to(u.dtype)


def backward(
    needed: set[str], dy: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, gate_in: Tensor | None,
    gate_out: Tensor | None, k_future: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Float32 gradients; those of the gates only where they are needed."""
    B, L, C = u.shape
    K, F, M, radix = _plan(u, k, k_future)
    grads = {name: pool.empty(B, L, C) for name in needed & {"gate_in", "gate_out"} | {"u"}}
    dk = torch.zeros(C, k.shape[1]) if k.shape[1] > K else pool.empty(C, K)
    dfuture = torch.zeros(C, F)
    w, span = _span(C, M, 1)
    outputs = (pool.flat(t) for t in (grads["u"], grads.get("gate_in"), grads.get("gate_out"), dk, dfuture))
    taps = pool.flat(k), k.shape[1], K, pool.flat(None if k_future is None else k_future[:, :F]), F, pool.flat(skip)
    inputs = (pool.flat(t) for t in (u, gate_in, gate_out))
    arrays = 4 if B > 1 or "gate_out" in needed else 3
    pool.run(
        gradients,
        -(-C // span),
        *(w, *outputs, pool.flat(dy), *taps, *inputs, B, L, C, span, M, radix, *tables(M, radix)),
        scratch_size=(TILE + 2) * w.lanes + arrays * span * 2 * M,
    )
    if k_future is not None:
        grads["k_future"] = torch.nn.functional.pad(dfuture, (0, k_future.shape[1] - F))
    return {**grads, "k": dk, "skip": dk[:, 0].clone()}
