# mypy: no-check-untyped-defs
"""One step of the gated delta rule, values in the lanes, on addresses: arrays would cost more than the arithmetic."""

import math

import numpy as np
import torch
from torch import Tensor

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    eight,
    floats,
    fma,
    fnma,
    load,
    load_first,
    load_splat,
    splat,
    store,
    store_first,
    zero,
)
from longwave.ops._torch import gated_delta_rule as chunks
from longwave.ops._torch.gated_delta_rule import backward, saved
from longwave.ops.gated_delta_rule import prepare

__all__ = ["backward", "forward", "saved"]

R, LANES = eight, 8


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One step by the kernel; more are matrix products of chunks, as on any device."""
    (B, L, G, N), (H, P) = q.shape, v.shape[2:]
    if L > 1:
        return chunks.forward(q, k, v, decay, beta, state, keep)
    state = prepare(q, v, state)
    given = [t.float().contiguous() for t in (q, k, v, decay, beta, state)]
    y, new = torch.empty(B, 1, H, P), torch.empty(B, H, N, P)
    _step(*(t.data_ptr() for t in (*given, y, new)), B * H, H // G, N, P)
    return (y.to(v.dtype), new), state[:, None].clone() if keep else state


@kernel
def _some(array, i, count):
    """array[i : i + count], count <= LANES."""
    return load(R, array, i) if count == LANES else load_first(R, array, i, count)


@kernel
def _put(array, i, x, count):
    if count == LANES:
        store(array, i, x)
    else:
        store_first(array, i, x, count)


@kernel
def _step(q, k, v, decay, beta, state, y, new, heads, share, N, P):
    """Of every head a few values after the other, which the state keeps apart; neighbours share queries and keys."""
    q, k, v, decay, beta = floats(q), floats(k), floats(v), floats(decay), floats(beta)
    state, y, new = floats(state), floats(y), floats(new)
    for head in range(heads):
        kept, rate = splat(R, np.float32(math.exp(decay[head]))), splat(R, beta[head])
        key, row = head // share * N, head * N
        for p in range(0, P, LANES):
            count, known, out = min(LANES, P - p), zero(R), zero(R)
            for n in range(N):
                known = fma(load_splat(R, k, key + n), _some(state, (row + n) * P + p, count), known)
            change = rate * fnma(kept, known, _some(v, head * P + p, count))
            for n in range(N):
                i = (row + n) * P + p
                now = fma(load_splat(R, k, key + n), change, kept * _some(state, i, count))
                _put(new, i, now, count)
                out = fma(load_splat(R, q, key + n), now, out)
            _put(y, head * P + p, out, count)
