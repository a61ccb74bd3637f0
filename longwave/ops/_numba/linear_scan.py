# mypy: no-check-untyped-defs
"""The linear recurrence along time and its gradient, in one pass over memory each.

A row of time is W floats: W = C, or 2 C of complex numbers as (real, imaginary) pairs, of which a vector holds four. A
task is a strip of neighbouring vectors in one sequence; their states stay in the L1 cache. W is at least LANES, and the
last vector of a row begins at W - LANES: where it overlaps its neighbour, both write the same numbers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.pool import empty, flat, run
from longwave.ops._numba.simd import eight, even_lanes, fma, load, odd_lanes, store, swap_pairs, zero

R = eight  # lanes of a vector
LANES = R.lanes


STRIP = 16  # vectors in a strip, or more where a row has more than STRIPS of them
STRIPS = 16
ONE = np.float32(1.0)


@kernel
def _times_plus(a, x, c, pairs, signs):
    """a x + c of eight real numbers, or of four complex ones: signs -1 1 -1 1 ..., or 1 -1 ... for conj(a) x + c."""
    if pairs:
        return fma(even_lanes(a), x, fma(odd_lanes(a) * signs, swap_pairs(x), c))
    return fma(a, x, c)


@kernel
def _signs(scratch, odd):
    """odd in the odd lanes, -odd in the even ones."""
    for lane in range(LANES):
        scratch[lane] = odd if lane % 2 else -odd
    return load(R, scratch, 0)


@kernel
def _vectors(strip, strips, W):
    """The first vector of a strip, and how many it has."""
    count = (W + LANES - 1) // LANES
    first = count * strip // strips
    return first, count * (strip + 1) // strips - first


@kernel
def _forward(start, stop, states, a, b, h0, h, L, W, strips, pairs):
    signs = _signs(states, ONE)
    for task in range(start, stop):
        batch = task // strips
        first, count = _vectors(task % strips, strips, W)
        for k in range(count):
            store(states, k * LANES, load(R, h0, batch * W + min((first + k) * LANES, W - LANES)))
        for step in range(L):
            row = (batch * L + step) * W
            for k in range(count):
                i = row + min((first + k) * LANES, W - LANES)
                x = _times_plus(load(R, a, i), load(R, states, k * LANES), load(R, b, i), pairs, signs)
                store(states, k * LANES, x)
                store(h, i, x)


@kernel
def _backward(start, stop, carries, a, h0, h, dh, da, db, dh0, L, W, strips, pairs):
    """db[t] = dh[t] + conj(a[t+1]) db[t+1],  da[t] = conj(h[t-1]) db[t],  dh0 = conj(a[0]) db[0]."""
    conjugate = _signs(carries, -ONE)
    for task in range(start, stop):
        batch = task // strips
        first, count = _vectors(task % strips, strips, W)
        for k in range(count):
            store(carries, k * LANES, zero(R))
        for t in range(L - 1, -1, -1):
            row = (batch * L + t) * W
            for k in range(count):
                place = min((first + k) * LANES, W - LANES)
                grad = load(R, dh, row + place) + load(R, carries, k * LANES)
                past = load(R, h, row - W + place) if t > 0 else load(R, h0, batch * W + place)
                store(db, row + place, grad)
                store(da, row + place, _times_plus(past, grad, zero(R), pairs, conjugate))
                store(
                    carries,
                    k * LANES,
                    _times_plus(load(R, a, row + place), grad, zero(R), pairs, conjugate),
                )
        for k in range(count):
            store(dh0, batch * W + min((first + k) * LANES, W - LANES), load(R, carries, k * LANES))


def _floats(x: Tensor) -> Tensor:
    """(..., C) as (..., W): complex numbers as pairs, at least LANES of them."""
    x = torch.view_as_real(x.to(torch.complex64)).flatten(-2) if x.is_complex() else x
    return F.pad(x, (0, LANES - x.shape[-1])) if x.shape[-1] < LANES else x


def _numbers(x: Tensor, C: int, pairs: bool) -> Tensor:
    """The way back, to (..., C)."""
    return torch.view_as_complex(x[..., : 2 * C].unflatten(-1, (C, 2))) if pairs else x[..., :C]


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """L, W, strips in a row, and floats of state in a strip, for x (B, L, W)."""
    _, L, W = x.shape
    vectors = -(-W // LANES)
    strips = min(STRIPS, -(-vectors // STRIP))
    return L, W, strips, -(-vectors // strips) * LANES


def why_not(a: Tensor, b: Tensor, h0: Tensor) -> str | None:
    """One kernel does not mix real and complex numbers."""
    if len({x.is_complex() for x in (a, b, h0)}) == 2:
        return "some tensors are real and some complex; the kernel takes one kind"
    return None


def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h (B, L, C)."""
    if b.shape[1] == 1 and {a.dtype, b.dtype, h0.dtype} in ({torch.float32}, {torch.complex64}):
        return torch.addcmul(b, a, h0[:, None])
    inputs = [_floats(x) for x in (a, b, h0)]
    h = empty(*inputs[1].shape)
    L, W, strips, states = _sizes(h)
    arrays = map(flat, (*inputs, h))
    run(_forward, len(b) * strips, *arrays, L, W, strips, b.is_complex(), scratch_size=states)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), h0.dtype)
    return _numbers(h, b.shape[2], b.is_complex()).to(dtype).contiguous()


def backward(needed: set[str], dh: Tensor, a: Tensor, h0: Tensor, h: Tensor) -> dict[str, Tensor]:
    """All gradients in one pass."""
    inputs = [_floats(x) for x in (a, h0, h, dh)]
    da, db = (empty(*inputs[0].shape) for _ in "ab")
    dh0 = empty(*inputs[1].shape)
    L, W, strips, states = _sizes(da)
    arrays = map(flat, (*inputs, da, db, dh0))
    run(_backward, len(a) * strips, *arrays, L, W, strips, a.is_complex(), scratch_size=states)
    return {name: _numbers(x, a.shape[2], a.is_complex()) for name, x in (("a", da), ("b", db), ("h0", dh0))}
