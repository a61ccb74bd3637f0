# mypy: no-check-untyped-defs
"""Linear recurrence, in chunks of time at once: the end of each from nothing, the states between them, then all steps.

Where the channels alone occupy the GPU there is one chunk, and only the last of the three passes.
"""

import functools

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import chunk_length, launch, size, tuned

TIME = size(32, 8)  # steps of a tile, which is scanned in registers
LANES = size(32, 4)  # channels of a program by which the length of chunks is reckoned


def forward(a, b, h0):
    """h (B, L, C)."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (a, b, h0)))
    a, b, h0 = _numbers(a, b, h0)
    h = torch.empty(b.shape[:3], dtype=dtype, device=b.device)
    _scan(_real(h), None, a, b, h0, None)
    return h


def backward(needed, dh, a, h, h0):
    """db is the scan reversed, with the decay of the next step; da is db conj(h) of the step before."""
    a, dh, h, h0 = _numbers(a, dh, h, h0)
    da, db = torch.empty_like(h), torch.empty_like(h)
    _scan(db, da if "a" in needed else None, a, dh, h0, h)
    da, db = (torch.view_as_complex(x) if h.ndim == 4 else x for x in (da, db))
    first, a = (torch.view_as_complex(x)[:, 0] if h.ndim == 4 else x[:, 0] for x in (_real(db), a))
    return {"a": da, "b": db, "h0": first * a.conj()}


def _real(x):
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _numbers(*tensors):
    """All of them contiguous, and pairs of real numbers where one is complex."""
    if any(x.is_complex() for x in tensors):
        tensors = [x.to(torch.complex64) for x in tensors]
    return [_real(x).contiguous() for x in tensors]


def _scan(out, da, a, b, h0, h):
    """Forward into out where h is None, else backward in time."""
    B, L, C = b.shape[:3]
    complex_, back, blocks = b.ndim == 4, h is not None, triton.cdiv(C, LANES)
    chunk = chunk_length(L, B * blocks, TIME)
    chunks = triton.cdiv(L, chunk)
    grid = lambda meta: B * chunks * triton.cdiv(C, meta["BC"])  # noqa: E731
    starts = None if back else h0
    if chunks > 1:
        starts, decays = (b.new_empty(B, chunks, *b.shape[2:], dtype=torch.float32) for _ in "sd")
        launch(_steps, grid, starts, decays, a, b, None, None, None, L, C, chunk, complex_, back, True, TIME)
        count = B * C
        launch(_join, triton.cdiv(count, 256), starts, decays, None if back else h0, count, C, chunks, complex_, 256)
    launch(_steps, grid, out, da, a, b, starts, h, h0, L, C, chunk, complex_, back, False, TIME)


@triton.jit
def _load(x, at, mask, other, complex_: tl.constexpr):
    """Real and imaginary part, or twice the number where it is real."""
    if complex_:
        return (
            tl.load(x + 2 * at, mask=mask, other=other).to(tl.float32),
            tl.load(x + 2 * at + 1, mask=mask, other=0.0).to(tl.float32),
        )
    else:
        real = tl.load(x + at, mask=mask, other=other).to(tl.float32)
        return real, real


@triton.jit
def _store(x, at, real, imaginary, mask, complex_: tl.constexpr):
    if complex_:
        tl.store(x + 2 * at, real, mask=mask)
        tl.store(x + 2 * at + 1, imaginary, mask=mask)
    else:
        tl.store(x + at, real, mask=mask)


@triton.jit
def _step(ar, ai, hr, hi, br, bi, complex_: tl.constexpr):
    """a h + b."""
    if complex_:
        return ar * hr - ai * hi + br, ar * hi + ai * hr + bi
    else:
        return ar * hr + br, br


@triton.jit
def _two(a, b, a_later, b_later):
    return a * a_later, a_later * b + b_later


@triton.jit
def _two_complex(ar, ai, br, bi, cr, ci, dr, di):
    return ar * cr - ai * ci, ar * ci + ai * cr, cr * br - ci * bi + dr, cr * bi + ci * br + di


@tuned(
    ["C", "complex_", "back", "ends"],
    {"BC": size(32, 4), "num_warps": 1},
    {"BC": 32, "num_warps": 2},
    {"BC": 64, "num_warps": 2},
    {"BC": 64, "num_warps": 4},
)
def _steps(
    out, other, a, b, starts, h, h0, L, C, chunk, complex_: tl.constexpr, back: tl.constexpr, ends: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All steps of a chunk into out, and backwards the gradient of a into ``other``; or only its end and its decay."""
    blocks, chunks = tl.cdiv(C, BC), tl.cdiv(L, chunk)
    row = tl.program_id(0).to(tl.int64)
    batch, part = row // blocks // chunks, row // blocks % chunks
    c = row % blocks * BC + tl.arange(0, BC)
    inside = c < C
    if starts is None:
        hr, hi = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    else:
        hr, hi = _load(starts, (batch * chunks + part) * C + c, inside, 0.0, complex_)
    pr, pi = tl.full((BC,), 1.0, tl.float32), tl.zeros((BC,), tl.float32)
    rows = tl.arange(0, BT)[:, None]
    stop = tl.minimum(part * chunk + chunk, L)
    for first in range(part * chunk, stop, BT):
        i = first + rows
        t = L - 1 - i if back else i
        at, mask = (batch * L + t) * C + c[None, :], (i < stop) & inside[None, :]
        if back:
            ar, ai = _load(a, at + C, mask & (t + 1 < L), 1.0, complex_)
            ai = -ai
        else:
            ar, ai = _load(a, at, mask, 1.0, complex_)
        br, bi = _load(b, at, mask, 0.0, complex_)
        if complex_:
            ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _two_complex)
        else:
            ar, br = tl.associative_scan((ar, br), 0, _two)
        yr, yi = _step(ar, ai, hr[None, :], hi[None, :], br, bi, complex_)
        last = rows == BT - 1
        hr, hi = tl.sum(tl.where(last, yr, 0.0), 0), tl.sum(tl.where(last, yi, 0.0), 0)
        if ends:
            zero = tl.zeros((BC,), tl.float32)
            ar, ai = tl.sum(tl.where(last, ar, 0.0), 0), tl.sum(tl.where(last, ai, 0.0), 0)
            pr, pi = _step(ar, ai, pr, pi, zero, zero, complex_)
        else:
            _store(out, at, yr, yi, mask, complex_)
            if other is not None:
                br, bi = _load(h, at - C, mask & (t > 0), 0.0, complex_)
                if h0 is not None:
                    cr, ci = _load(h0, batch * C + c[None, :], mask & (t == 0), 0.0, complex_)
                    br, bi = br + cr, bi + ci
                yr, yi = _step(br, -bi, yr, yi, tl.zeros_like(yr), tl.zeros_like(yr), complex_)
                _store(other, at, yr, yi, mask, complex_)
    if ends:
        at = (batch * chunks + part) * C + c
        _store(out, at, hr, hi, inside, complex_)
        _store(other, at, pr, pi, inside, complex_)


@triton.jit
def _join(ends, decays, h0, count, C, chunks, complex_: tl.constexpr, BLOCK: tl.constexpr):
    """The ends of chunks become the states before them."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    hr, hi = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if h0 is not None:
        hr, hi = _load(h0, n, inside, 0.0, complex_)
    at = n // C * chunks * C + n % C
    for _ in range(chunks):
        ar, ai = _load(decays, at, inside, 0.0, complex_)
        br, bi = _load(ends, at, inside, 0.0, complex_)
        _store(ends, at, hr, hi, inside, complex_)
        hr, hi = _step(ar, ai, hr, hi, br, bi, complex_)
        at += C
