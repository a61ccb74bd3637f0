# mypy: no-check-untyped-defs
"""One step of diagonal plus low rank state spaces, coordinates in the lanes, on addresses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import eight, floats, fma, fnma, load, load_splat, splat, store, sum_lanes, zero

R, LANES = eight, 8


def forward(x, re, im, left, right, b, c, h, skip) -> tuple[Tensor, Tensor]:
    """y (B, C) and the next state."""
    (B, C), (S, M), rank = x.shape, re.shape, left.shape[1]
    if M % LANES:  # the kernel takes as many modes at a time
        room = (0, -M % LANES)
        left, right, b, c, h = (F.pad(t.unflatten(-1, (2, M)), room).flatten(-2) for t in (left, right, b, c, h))
        y, new = forward(x, F.pad(re, room), F.pad(im, room), left, right, b, c, h, skip)
        return y, new.unflatten(-1, (2, -1))[..., :M].flatten(-2).contiguous()
    u, re, im, left, right, b, c, h = (t.float().contiguous() for t in (x, re, im, left, right, b, c, h))
    skip = None if skip is None else skip.float().contiguous()
    y, new = torch.empty(B, C), torch.empty(B, C, 2 * M)
    _step(
        u.data_ptr(), re.data_ptr(), im.data_ptr(), left.data_ptr(), right.data_ptr(), b.data_ptr(), c.data_ptr(),
        h.data_ptr(), 0 if skip is None else skip.data_ptr(), y.data_ptr(), new.data_ptr(), B, C, S, M, rank,
    )  # fmt: skip
    return y.to(x.dtype), new


def backward(needed, dy, dnext, next, x, re, im, left, right, b, c, h, skip) -> dict[str, Tensor]:
    """All gradients, by torch: a step that is trained is one of few."""
    S, dtype = len(re), next.dtype
    x, re, im, left, right, b, c, h = (t.to(dtype) for t in (x, re, im, left, right, b, c, h))
    dy = torch.zeros_like(x) if dy is None else dy.to(dtype)
    dh = dy[..., None] * c
    dh = (dh if dnext is None else dh + dnext).unflatten(1, (-1, S))  # (B, K, S, N)
    before, u = h.unflatten(1, (-1, S)), x.unflatten(1, (-1, S))
    (one, two), (d_one, d_two) = before.chunk(2, dim=3), dh.chunk(2, dim=3)
    inner, d_inner = (torch.einsum("srn,bksn->bksr", *pair) for pair in ((right, before), (left, dh)))
    turned = torch.cat([re * d_one + im * d_two, re * d_two - im * d_one], dim=3)
    dx = (dh * b).sum(3).flatten(1)
    return {
        "x": dx if skip is None else dx + skip * dy,
        "re": (d_one * one + d_two * two).sum((0, 1)),
        "im": (d_two * one - d_one * two).sum((0, 1)),
        "left": -torch.einsum("bksr,bksn->srn", inner, dh),
        "right": -torch.einsum("bksr,bksn->srn", d_inner, before),
        "b": (dh * u[..., None]).sum((0, 1)),
        "c": (dy[..., None] * next).sum(0),
        "h": (turned - torch.einsum("srn,bksr->bksn", right, d_inner)).flatten(1, 2),
        "skip": (dy * x).sum(0),
    }


@kernel
def _step(x, re, im, left, right, b, c, h, skip, y, new, B, C, S, M, rank):
    skipped, N = skip != 0, 2 * M
    x, re, im, left, right, b = floats(x), floats(re), floats(im), floats(left), floats(right), floats(b)
    c, h, skip, y, new = floats(c), floats(h), floats(skip), floats(y), floats(new)
    for row in range(B):
        for channel in range(C):
            s, i = channel % S, (row * C + channel) * N
            drive = load_splat(R, x, row * C + channel)
            for n in range(0, M, LANES):
                real, imag = load(R, re, s * M + n), load(R, im, s * M + n)
                one, two = load(R, h, i + n), load(R, h, i + M + n)
                store(new, i + n, fnma(imag, two, fma(real, one, load(R, b, s * N + n) * drive)))
                store(new, i + M + n, fma(imag, one, fma(real, two, load(R, b, s * N + M + n) * drive)))
            for r in range(rank):
                o, inner = (s * rank + r) * N, zero(R)
                for n in range(0, N, LANES):
                    inner = fma(load(R, right, o + n), load(R, h, i + n), inner)
                inner = splat(R, sum_lanes(inner))
                for n in range(0, N, LANES):
                    store(new, i + n, fnma(load(R, left, o + n), inner, load(R, new, i + n)))
            total = zero(R)
            for n in range(0, N, LANES):
                total = fma(load(R, new, i + n), load(R, c, channel * N + n), total)
            v = sum_lanes(total)
            if skipped:
                v += skip[channel] * x[row * C + channel]
            y[row * C + channel] = v
