# mypy: no-check-untyped-defs
"""A few rows times the transpose of a matrix whose weights are read as they are stored: float32, bfloat16 or int8.

One token costs the time in which memory gives its weights, so nothing may be slower than that. A tile of four rows of
weights and a few of activations is summed up in registers; while it is, the rows behind it are asked for: without,
rows of a few hundred bytes were read at 60 % of the speed of memory. Before, activations are written down as the tile
wants them: int8 weights meet activations rounded to 16 bits, and both are multiplied and summed in pairs as integers,
which takes half the instructions of a conversion to floats; bfloat16 is widened in place, even weights and odd ones,
so activations lie in that order.

What stands before a linear map in a model (a norm, a gate) or behind it (a sum, a gate) is done in the same calls.
Threads take slices of rows until there are none: nobody waits for a thread that does not run.
"""

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from longwave.ops._numba import pool
from longwave.ops._numba.jit import kernel, tell_once
from longwave.ops._numba.rms_norm import row_scale
from longwave.ops._numba.simd import (
    absolute,
    call,
    erf,
    filled,
    first_lanes,
    floats,
    fma,
    four_sums,
    load,
    load_first,
    maximum,
    shuffle,
    sigmoid,
    splat,
    spread,
    store,
    store_first,
    sum_lanes,
    widest,
    zero,
)
from longwave.ops._numba.swiglu import gated

BYTE, HALF, INT, LONG, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
R = widest  # lanes of a register
LANES = R.lanes
FLOATS = ir.VectorType(FLOAT, LANES)
ROWS = 4  # of a tile
BLOCK = 2 * LANES  # activations are padded with zeros to a multiple of it
AHEAD = 2 * ROWS  # rows between the one that is read and the one that is asked for
NONE, NORM, GELU, SWIGLU, ADD, GLU = range(6)  # what is done before or after

_ONE, _HALF, _LIMIT = np.float32(1), np.float32(0.5), np.float32(32767)
_TINY, _SQRT_HALF = np.float32(1e-30), np.float32(0.5**0.5)


class Form(NamedTuple):
    """How weights lie in memory, and the activations that meet them."""

    stored: Any  # LLVM's type of a weight
    size: int  # bytes of one
    step: int  # weights a vector
    x: Any  # LLVM's type of an activation
    x_size: int  # bytes of one
    cols: int  # rows of activations in a tile: as many as registers allow


_FORMS = {
    torch.float32: Form(FLOAT, 4, LANES, FLOAT, 4, LANES // 4),
    torch.bfloat16: Form(HALF, 2, 2 * LANES, FLOAT, 4, LANES // 4),
    torch.int8: Form(BYTE, 1, 2 * LANES, HALF, 2, LANES // 8 + 2),
}


def _vector(builder, address, kind, count=None):
    """The vector at an address; of count elements, and zeros in the others."""
    place = builder.inttoptr(address, kind.as_pointer())
    if count is None:
        x = builder.load(place)
        x.align = 1
        return x
    name = {FLOAT: "f32", HALF: "i16", BYTE: "i8"}[kind.element]
    zeros = ir.Constant(kind, None)
    given = [place, INT(1), first_lanes(builder, kind.count, count), zeros]
    return call(builder, f"llvm.masked.load.v{kind.count}{name}.p0", given, kind)


def _widened(builder, form, w):
    """A vector of stored weights, as the vectors that are multiplied."""
    if form.stored is BYTE:
        return [builder.sext(w, ir.VectorType(HALF, form.step))]
    if form.stored is HALF:
        pairs = builder.bitcast(w, ir.VectorType(INT, LANES))
        even, odd = builder.shl(pairs, filled(pairs.type, 16)), builder.and_(pairs, filled(pairs.type, -(2**16)))
        return [builder.bitcast(half, FLOATS) for half in (even, odd)]
    return [w]


def _add_products(builder, total, w, x):
    """total + w x; integers in pairs, which is one instruction or two."""
    if w.type.element is FLOAT:
        return call(builder, f"llvm.fma.v{LANES}f32", [w, x, total], w.type)
    wide = ir.VectorType(INT, w.type.count)
    products = builder.mul(builder.sext(w, wide), builder.sext(x, wide))
    even, odd = (shuffle(builder, products, products, range(k, w.type.count, 2)) for k in (0, 1))
    return builder.add(total, builder.add(even, odd))


def _least(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _ask_for(builder, address):
    place = builder.inttoptr(address, BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, INT(0), INT(3), INT(1)])


def _tile(form: Form, cols: int, first: bool) -> Any:
    sums = ir.VectorType(INT, LANES) if form.stored is BYTE else FLOATS

    @intrinsic
    def tile(context, w, rows, K, x, x_stride, y, y_stride, bias, scale, groups, group, x_scale):
        """y[b, r] = x_scale[b] sum_k scale[r, k // group] w[r, k] x[b, k] + bias[r],  r < rows <= 4, b < cols.

        All arrays are addresses, and strides bytes; a bias of 0 is none. Scales are of int8 weights alone.
        """

        def emit(ctx, builder, sig, args):
            w, rows, K, x, x_stride, y, y_stride, bias, scale, groups, group, x_scale = args

            def plus(address, count, size=None):
                return builder.add(address, count if size is None else builder.mul(count, size))

            last, row = builder.sub(rows, LONG(1)), builder.mul(K, LONG(form.size))
            at = [_least(builder, last, LONG(r)) for r in range(ROWS)]  # rows that are not there are the last one
            ws, xs = [plus(w, r, row) for r in at], [plus(x, LONG(b), x_stride) for b in range(cols)]
            tiles = [(b, r) for b in range(cols) for r in range(ROWS)]
            totals = {i: cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None)) for i in tiles}

            def add_span(accumulators, start, stop):
                """What columns start .. stop add to the accumulators."""

                def add(k, count=None):
                    stored = ir.VectorType(form.stored, form.step)
                    places = [plus(p, k, LONG(form.size)) for p in ws]
                    weights = [_widened(builder, form, _vector(builder, p, stored, count)) for p in places]
                    for b in range(cols):
                        part = plus(xs[b], k, LONG(form.x_size))
                        for i in range(len(weights[0])):
                            kind = ir.VectorType(form.x, weights[0][i].type.count)
                            v = _vector(builder, builder.add(part, LONG(4 * LANES * i)), kind)
                            for r in range(ROWS):
                                a = accumulators[b, r]
                                builder.store(_add_products(builder, builder.load(a), weights[r][i], v), a)

                size = builder.sub(stop, start)
                whole = builder.sub(stop, builder.srem(size, LONG(form.step)))
                with cgutils.for_range_slice(builder, start, whole, LONG(form.step), LONG) as (k, _):
                    add(k)
                    if first:
                        for p in ws:
                            _ask_for(builder, plus(plus(p, k, LONG(form.size)), row, LONG(AHEAD)))
                with builder.if_then(builder.icmp_signed("<", whole, stop)):
                    add(whole, builder.sub(stop, whole))

            if form.stored is BYTE:
                with cgutils.for_range(builder, groups, intp=LONG) as loop:
                    accumulators = {i: cgutils.alloca_once(builder, sums) for i in tiles}
                    for a in accumulators.values():
                        builder.store(ir.Constant(sums, None), a)
                    start = builder.mul(loop.index, group)
                    add_span(accumulators, start, _least(builder, builder.add(start, group), K))
                    for r in range(ROWS):
                        place = plus(scale, plus(loop.index, at[r], groups), LONG(4))
                        factor = builder.load(builder.inttoptr(place, FLOAT.as_pointer()))
                        factor = spread(builder, factor, FLOATS)
                        for b in range(cols):
                            value = builder.sitofp(builder.load(accumulators[b, r]), FLOATS)
                            total = builder.load(totals[b, r])
                            total = call(builder, f"llvm.fma.v{LANES}f32", [value, factor, total], FLOATS)
                            builder.store(total, totals[b, r])
            else:
                add_span(totals, LONG(0), K)
            four = ir.VectorType(FLOAT, ROWS)
            given = builder.select(builder.icmp_signed("==", bias, LONG(0)), LONG(0), rows)
            shift = _vector(builder, bias, four, given)
            for b in range(cols):
                out = four_sums(builder, [builder.load(totals[b, r]) for r in range(ROWS)])
                if form.stored is BYTE:
                    factor = builder.load(builder.inttoptr(plus(x_scale, LONG(4 * b)), FLOAT.as_pointer()))
                    out = builder.fmul(out, spread(builder, factor, four))
                place = builder.inttoptr(plus(y, LONG(b), y_stride), four.as_pointer())
                given = [builder.fadd(out, shift), place, INT(4), first_lanes(builder, ROWS, rows)]
                call(builder, "llvm.masked.store.v4f32.p0", given, ir.VoidType())
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 12), emit

    return tile


@intrinsic
def take(context, counter):
    """The integer at an address, which becomes one more: no two threads are given the same."""

    def emit(ctx, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], LONG.as_pointer()), LONG(1), "monotonic")

    return types.intp(types.intp), emit


@intrinsic
def put(context, address, value):
    """The integer at an address becomes value."""

    def emit(ctx, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], LONG.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp), emit


def _product(form: Form):
    one, many, first = _tile(form, 1, True), _tile(form, form.cols, False), _tile(form, form.cols, True)
    size, x_size, cols = form.size, form.x_size, form.cols

    @kernel
    def product(counter, slices, width, w, scale, bias, x, x_scale, y, B, M, K, groups, group):
        """Slices of ``width`` rows of weights, until there are none; see the tile."""
        stride = (K + BLOCK - 1) // BLOCK * BLOCK * x_size
        while True:
            s = take(counter)
            if s >= slices:
                return
            for m in range(s * width, min(M, (s + 1) * width), ROWS):
                rows, p, b = min(ROWS, M - m), w + m * K * size, 0
                shift, factor = bias + 4 * m if bias else 0, scale + 4 * m * groups
                while b < B:
                    q, f, o = x + b * stride, x_scale + 4 * b, y + 4 * (b * M + m)
                    if B - b < cols:
                        one(p, rows, K, q, stride, o, 4 * M, shift, factor, groups, group, f)
                        b += 1
                    elif b:
                        many(p, rows, K, q, stride, o, 4 * M, shift, factor, groups, group, f)
                        b += cols
                    else:
                        first(p, rows, K, q, stride, o, 4 * M, shift, factor, groups, group, f)
                        b += cols

    return product


_PRODUCTS = {dtype: _product(form) for dtype, form in _FORMS.items()}


@intrinsic
def evens(context, a, b):
    """Lanes 0, 2, 4 ... of a and then of b."""
    return a(a, b), lambda ctx, builder, sig, args: shuffle(builder, *args, range(0, 2 * a.count, 2))


@intrinsic
def odds(context, a, b):
    """Lanes 1, 3, 5 ... of a and then of b."""
    return a(a, b), lambda ctx, builder, sig, args: shuffle(builder, *args, range(1, 2 * a.count, 2))


@intrinsic
def store_rounded(context, address, i, x):
    """The int16 i, i + 1, ... behind an address = x, rounded to the nearest, halves to even."""

    def emit(ctx, builder, sig, args):
        address, i, x = args
        n = call(builder, f"llvm.nearbyint.v{LANES}f32", [x], FLOATS)
        n = call(builder, f"llvm.fptosi.sat.v{LANES}i16.v{LANES}f32", [n], ir.VectorType(HALF, LANES))
        place = builder.inttoptr(builder.add(address, builder.mul(i, LONG(2))), n.type.as_pointer())
        builder.store(n, place).align = 2
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp, x), emit


@intrinsic
def max_lanes(context, a):
    """The largest lane, a float32."""

    def emit(ctx, builder, sig, args):
        return call(builder, f"llvm.vector.reduce.fmax.v{a.count}f32", args, FLOAT)

    return types.float32(a), emit


@kernel
def part(x, o, k, K):
    """Elements k, k + 1, ... of a row of K at o, and zeros behind its end."""
    return load(R, x, o + k) if K - k >= LANES else load_first(R, x, o + k, max(0, K - k))


@kernel
def norm_row(x, o, weight, eps, z, to, K):
    """z = x / sqrt(mean x^2 + eps) * weight, for rows that begin at o and to."""
    scale = splat(R, row_scale(R, x, o, K, eps))
    for k in range(0, K, LANES):
        store_first(z, to + k, part(x, o, k, K) * scale * part(weight, 0, k, K), min(LANES, K - k))


@kernel
def gelu_row(x, o, z, K):
    for k in range(0, K, LANES):
        v = part(x, o, k, K)
        value = splat(R, _HALF) * v * (splat(R, _ONE) + erf(v * splat(R, _SQRT_HALF)))
        store_first(z, k, value, min(LANES, K - k))


@kernel
def swiglu_row(x, o, z, K):
    """z = a sigmoid(a) b  of a row [a | b]."""
    for k in range(0, K, LANES):
        a, b = part(x, o, k, K), part(x, o + K, k, K)
        store_first(z, k, gated(a, b), min(LANES, K - k))


@kernel
def plain_row(x, o, q, _, K):
    q = floats(q)
    for k in range(0, K, LANES):
        store(q, k, part(x, o, k, K))


@kernel
def parted_row(x, o, q, _, K):
    q = floats(q)
    for k in range(0, K, BLOCK):
        a, b = part(x, o, k, K), part(x, o, k + LANES, K)
        store(q, k, evens(a, b))
        store(q, k + LANES, odds(a, b))


@kernel
def rounded_row(x, o, q, scale, K):
    """int16 in q, their scale behind an address: NaN where anything is not finite."""
    most, wrong = zero(R), zero(R)
    for k in range(0, K, LANES):
        v = part(x, o, k, K)
        most, wrong = maximum(most, absolute(v)), fma(v, zero(R), wrong)
    largest = max(max_lanes(most), _TINY)
    floats(scale)[0] = largest / _LIMIT + sum_lanes(wrong)
    inverse = splat(R, _LIMIT / largest)
    for k in range(0, K, LANES):
        store_rounded(q, k, part(x, o, k, K) * inverse)


def _prepare(write: Any):
    @kernel
    def prepare(counter, before, x, weight, eps, z, q, scale, B, K, size):
        """The activations as the tile wants them, from what comes before; and no slice is taken."""
        put(counter, 0)
        x, weight, row = floats(x), floats(weight), floats(z)
        stride = (K + BLOCK - 1) // BLOCK * BLOCK * size
        for b in range(B):
            if before == NORM:
                norm_row(x, b * K, weight, eps, row, 0, K)
            elif before == GELU:
                gelu_row(x, b * K, row, K)
            elif before == SWIGLU:
                swiglu_row(x, b * 2 * K, row, K)
            if before == NONE:
                write(x, b * K, q + b * stride, scale + 4 * b, K)
            else:
                write(row, 0, q + b * stride, scale + 4 * b, K)

    return prepare


_ROWS = {torch.float32: plain_row, torch.bfloat16: parted_row, torch.int8: rounded_row}
_PREPARES = {dtype: _prepare(write) for dtype, write in _ROWS.items()}


@kernel
def finish(after, x, other, y, B, M):
    """y = x + other, or a sigmoid(b) of rows x = [a | b]; M is the width of y."""
    x, other, y = floats(x), floats(other), floats(y)
    for b in range(B):
        for m in range(0, M, LANES):
            count = min(LANES, M - m)
            if after == ADD:
                value = part(x, b * M, m, M) + part(other, b * M, m, M)
            else:
                value = part(x, 2 * b * M, m, M) * sigmoid(part(x, (2 * b + 1) * M, m, M))
            store_first(y, b * M + m, value, count)


@kernel
def norm_rows(x, other, weight, eps, s, y, B, D):
    """s = x + other, unless that is None, and y = its norm."""
    x, weight, s, y = floats(x), floats(weight), floats(s), floats(y)
    for o in range(0, B * D, D):
        if other:
            for k in range(0, D, LANES):
                store_first(s, o + k, part(x, o, k, D) + part(floats(other), o, k, D), min(LANES, D - k))
        norm_row(s, o, weight, eps, y, o, D)


SMALL = 2**17  # bytes of weights, a row of activations, that one thread reads sooner than it calls another


class Weights(NamedTuple):
    """A linear map: weight (M, K) float32, bfloat16 or int8, bias (M,) or None, scale (M, G) of int8 or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


_local = threading.local()


def _scratch(size: int) -> int:
    """The address of so many bytes, this thread's own."""
    held = getattr(_local, "scratch", None)
    if held is None or held.numel() < size:
        held = _local.scratch = torch.empty(size, dtype=torch.uint8)
    return held.data_ptr()


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def linear(
    x: Tensor,
    weights: Weights,
    *,
    before: int = NONE,
    norm: Tensor | None = None,
    eps: float = 0.0,
    after: int = NONE,
    other: Tensor | None = None,
) -> Tensor:
    """after(W before(x) + bias).

    Args:
        x: (..., K), or (..., 2 K) before SWIGLU.
        weights: W and bias.
        before: NONE, NORM (x / sqrt(mean x^2 + eps) norm), GELU, or SWIGLU (a sigmoid(a) b of x = [a | b]).
        norm, eps: of NORM, norm (K,).
        after: NONE, ADD (of ``other``, shaped as the result), or GLU (a sigmoid(b) of [a | b]).
    Returns:
        y: (..., M), or (..., M / 2) after GLU. Like every tensor here, contiguous, float32 and on the CPU.
    """
    weight, bias, scale = weights
    form, (M, K) = _FORMS[weight.dtype], weight.shape
    width, groups = M // 2 if after == GLU else M, 1 if scale is None else scale.shape[1]
    B = x.numel() // (2 * K if before == SWIGLU else K)
    y = torch.empty((*x.shape[:-1], width))
    tell_once()
    row = -(-K // BLOCK) * BLOCK
    # In the scratch: the counter, a row, scales, activations, and what is not yet the result.
    counter = _scratch(64 + 4 * row + 4 * B + 4 * B * row + (4 * B * M if after else 0))
    z, x_scale = counter + 64, counter + 64 + 4 * row
    q = x_scale + 4 * B
    out = q + 4 * B * row if after else y.data_ptr()
    prepare, product = _PREPARES[weight.dtype], _PRODUCTS[weight.dtype]
    prepare(counter, before, x.data_ptr(), _place(norm), eps, z, q, x_scale, B, K, form.x_size)
    threads = torch.get_num_threads() if M * K * form.size * B > SMALL else 1
    slice = -(-M // (ROWS * pool.SLICES_A_THREAD * threads)) * ROWS
    places = weight.data_ptr(), _place(scale), _place(bias), q, x_scale, out
    pool.share(product, threads, counter, -(-M // slice), slice, *places, B, M, K, groups, -(-K // groups))
    if after:
        finish(after, out, _place(other), y.data_ptr(), B, width)
    return y


def swiglu(x: Tensor, norm: Tensor, eps: float, up: Weights, down: Weights) -> Tensor:
    """x + down(silu(a) b),  [a | b] = up(rms_norm(x)): all of a channel mixer of x (..., D)."""
    return linear(linear(x, up, before=NORM, norm=norm, eps=eps), down, before=SWIGLU, after=ADD, other=x)


def gelu_glu(x: Tensor, weights: Weights) -> Tensor:
    """a sigmoid(b),  [a | b] = W gelu(x) + bias, of x (..., K)."""
    return linear(x, weights, before=GELU, after=GLU)


def rms_norm(x: Tensor, weight: Tensor, eps: float, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = x + other, and s / sqrt(mean s^2 + eps) weight, of x (..., D)."""
    tell_once()
    s, y = x if other is None else torch.empty_like(x), torch.empty_like(x)
    D = x.shape[-1]
    norm_rows(x.data_ptr(), _place(other), weight.data_ptr(), eps, s.data_ptr(), y.data_ptr(), x.numel() // D, D)
    return s, y
