# mypy: no-check-untyped-defs
"""One step of diagonal state spaces, modes in the lanes, on addresses: arrays would cost more than the arithmetic."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    eight,
    even_lanes,
    floats,
    fma,
    fnma,
    load,
    load_splat,
    odd_lanes,
    store,
    sum_lanes,
    swap_pairs,
    zero,
)

R, LANES = eight, 8
SIGNS = torch.tensor([-1.0, 1.0] * 4)
TWO = np.float32(2.0)


def forward(x: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, C) and the next state."""
    (B, C), N = x.shape, a.shape[1]
    if N % 4:  # the kernel takes four modes at a time
        a, b, c, h = (F.pad(t, (0, -N % 4)) for t in (a, b, c, h))
        y, new = forward(x, a, b, c, h, skip)
        return y, new[..., :N].contiguous()
    u, a, b, c, h = x.float().contiguous(), a.contiguous(), b.contiguous(), c.contiguous(), h.contiguous()
    skip = None if skip is None else skip.float().contiguous()
    y, new = torch.empty(B, C), torch.empty(B, C, N, dtype=torch.complex64)
    _step(
        u.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(), h.data_ptr(), 0 if skip is None else skip.data_ptr(),
        SIGNS.data_ptr(), y.data_ptr(), new.data_ptr(), B, C, 2 * N,
    )  # fmt: skip
    return y.to(x.dtype), new


def backward(
    needed: set[str],
    dy: Tensor | None,
    dnext: Tensor | None,
    next: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h: Tensor,
    skip: Tensor | None,
) -> dict[str, Tensor]:
    """All gradients, by torch: a step that is trained is one of few."""
    dy = torch.zeros(x.shape) if dy is None else dy.float()
    through = 2 * dy[..., None] * c.conj_physical()
    dh = through if dnext is None else through + dnext
    dx = (dh * b.conj_physical()).sum(-1).real
    return {
        "x": dx if skip is None else dx + skip * dy,
        "a": (dh * h.conj_physical()).sum(0),
        "b": (dh * x[..., None]).sum(0),
        "c": (2 * dy[..., None] * next.conj_physical()).sum(0),
        "h": dh * a.conj_physical(),
        "skip": (dy * x).sum(0),
    }


@kernel
def _step(x, a, b, c, h, skip, signs, y, new, B, C, W):
    """W = 2 N floats a channel, real and imaginary parts in turn."""
    skipped = skip != 0
    x, a, b, c, h, skip, y, new = (
        floats(x),
        floats(a),
        floats(b),
        floats(c),
        floats(h),
        floats(skip),
        floats(y),
        floats(new),
    )
    signs = load(R, floats(signs), 0)
    for row in range(B):
        for channel in range(C):
            p, i = channel * W, (row * C + channel) * W
            drive, total = load_splat(R, x, row * C + channel), zero(R)
            for n in range(0, W, LANES):
                before, decay, out = load(R, h, i + n), load(R, a, p + n), load(R, c, p + n)
                now = fma(even_lanes(decay), before, load(R, b, p + n) * drive)
                now = fma(odd_lanes(decay) * signs, swap_pairs(before), now)
                store(new, i + n, now)
                total = fnma(now * signs, out, total)
            v = TWO * sum_lanes(total)
            if skipped:
                v += skip[channel] * x[row * C + channel]
            y[row * C + channel] = v
