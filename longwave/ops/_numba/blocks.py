# mypy: no-check-untyped-defs
"""Small float32 matrices in scratch: rows of tensors fetched and put back, and products that stay in the cache."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from longwave.ops._numba.jit import kernel
from longwave.ops._numba.simd import (
    call,
    filled,
    load,
    load_first,
    prefetch,
    prefetch_to_write,
    spread,
    store,
    store_first,
    transpose,
    widest,
)

R = widest  # lanes of a register
LANES = R.lanes
ROWS, COLS = LANES // 2, 2  # of a tile, in numbers and in registers: 8 x 2 of the 32 of AVX-512, 4 x 2 of the 16 of AVX
WIDTH = COLS * LANES
LONG, FLOAT, VECTOR = ir.IntType(64), ir.FloatType(), R.kind.llvm


@intrinsic
def _tile(context, factor, C, c, c_row, A, a, a_row, a_col, B, b, b_row, K):
    """C[r, w] = factor C[r, w] + sum_k A[r, k] B[k, w],  r < ROWS, w < WIDTH, k < K, which is at least 1."""

    def emit(ctx, builder, sig, args):
        def first(i):
            data = ctx.make_array(sig.args[i])(ctx, builder, args[i]).data
            return builder.gep(data, [args[i + 1]])

        def vectors(row):
            return [builder.bitcast(builder.gep(row, [LONG(LANES * v)]), VECTOR.as_pointer()) for v in range(COLS)]

        def read(place):
            x = builder.load(place)
            x.align = 4
            return x

        (factor, _, _, c_row), (a_row, a_col), (b_row, K) = args[:4], args[6:8], args[10:]
        C, A, B = first(1), first(4), first(8)
        out = [p for r in range(ROWS) for p in vectors(builder.gep(C, [builder.mul(c_row, LONG(r))]))]
        fresh, times = builder.fcmp_ordered("==", factor, FLOAT(0.0)), spread(builder, factor, VECTOR)
        begun = [builder.select(fresh, filled(VECTOR, 0.0), builder.fmul(times, read(p))) for p in out]
        before, body, behind = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        k, a, b = builder.phi(LONG), builder.phi(A.type), builder.phi(B.type)
        sums, columns, more = [builder.phi(VECTOR) for _ in out], [read(p) for p in vectors(b)], []
        for r in range(ROWS):
            x = spread(builder, read(builder.gep(a, [builder.mul(a_row, LONG(r))])), VECTOR)
            for v in range(COLS):
                more.append(call(builder, f"llvm.fma.v{LANES}f32", [x, columns[v], sums[r * COLS + v]], VECTOR))
        next_k = builder.add(k, LONG(1))
        following = [next_k, builder.gep(a, [a_col]), builder.gep(b, [b_row]), *more]
        for phi, start, later in zip([k, a, b, *sums], [LONG(0), A, B, *begun], following):
            phi.add_incoming(start, before)
            phi.add_incoming(later, body)
        builder.cbranch(builder.icmp_signed("<", next_k, K), body, behind)
        builder.position_at_end(behind)
        for p, x in zip(out, more):
            builder.store(x, p).align = 4
        return ctx.get_dummy_value()

    i = types.intp
    return types.void(types.float32, C, i, i, A, i, i, i, B, i, i, i), emit


@kernel
def product(factor, C, c, c_row, A, a, a_row, a_col, B, b, b_row, rows, width, K, lower):
    """C = factor C + A B,  C (rows, width), A (rows, K), B (K, width);  where factor is 0, C is not read.

    Args:
        c, a, b: where in the flat arrays the first elements stand.
        c_row, b_row, a_row, a_col: from a row to the next, or a column: negative where one goes backwards.
        rows: whole tiles are written, so C and A have room for a multiple of ROWS, and C for one of WIDTH columns.
        lower: A is a lower triangle, the rest of which is not read but in the tiles on the diagonal, where it is zero.
    """
    for w in range(0, width, WIDTH):
        for i in range(0, rows, ROWS):
            n = min(K, i + ROWS) if lower else K
            _tile(factor, C, c + i * c_row + w, c_row, A, a + i * a_row, a_row, a_col, B, b + w, b_row, n)


@kernel
def transposed(target, target_row, source, source_row, rows, columns):
    """target (columns, rows) = the transpose of source; there is room for multiples of eight."""
    for r in range(0, rows, 8):
        for c in range(0, columns, 8):
            transpose(target, c * target_row + r, target_row, source, r * source_row + c, source_row)


def padded(width: int) -> int:
    """Of rows of pairs of registers; one more keeps powers of two apart, whose rows would meet in few cache lines."""
    return width + -width % WIDTH + LANES


@kernel
def fetch(target, width, source, place, stride, rows, count, ahead=1):
    """target[r, :width] = source[place + r * stride :][:count], then zeros; width is a multiple of LANES.

    What comes next is asked for: the rows behind, or where one goes back in time, ahead = -1, those before.
    """
    for r in range(rows):
        for c in range(0, width, LANES):
            i, j = r * width + c, place + r * stride + c
            prefetch(source, j + ahead * rows * stride)
            if c + LANES <= count:
                store(target, i, load(R, source, j))
            else:
                store(target, i, load_first(R, source, j, max(0, count - c)))


@kernel
def put(target, place, stride, source, width, rows, count, add, ahead=1):
    """The way back, or added to what is there."""
    for r in range(rows):
        for c in range(0, count, LANES):
            i, j, some = place + r * stride + c, r * width + c, min(LANES, count - c)
            prefetch_to_write(target, i + ahead * rows * stride)
            x = load(R, source, j)
            if add:
                x = x + load_first(R, target, i, some)
            if some == LANES:
                store(target, i, x)
            else:
                store_first(target, i, x, some)
