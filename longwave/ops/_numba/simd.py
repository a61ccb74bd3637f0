"""Eight float32 lanes as one value in Numba code: ``x = load(a, i); store(b, i, x * x + splat(one))``.

The type is LLVM's <8 x float>, which LLVM turns into one AVX register, two of SSE or NEON, or half of AVX-512: so the
same code runs on any CPU, and no compiler is needed. ``+ - * /`` work on it; the rest are the functions below. Indices
count float32 elements of flat arrays; nothing is checked.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_REASSOCIATE = ("fast",)  # on single operations: for whole functions it would fold the rounding trick of exp away


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x8")


float32x8 = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any):
        super().__init__(manager, numba_type, _FLOATS)


def _arithmetic(symbol: Callable, instruction: str) -> None:
    @infer_global(symbol)
    class Template(ConcreteTemplate):
        key = symbol
        cases = [signature(float32x8, float32x8, float32x8)]  # noqa: RUF012

    def lower(context: Any, builder: Any, sig: Any, args: Sequence) -> Any:
        return getattr(builder, instruction)(*args)

    lower_builtin(symbol, float32x8, float32x8)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


def _constant(x: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, float(x))] * LANES)


def _integers(x: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_INT, int(x))] * LANES)


def _call(builder: Any, name: str, args: Sequence, result: Any = _FLOATS, **keywords: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(args), **keywords)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v8f32", [a, b, c])


def _polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's rule, highest power first."""
    p = _constant(coefficients[0])
    for c in coefficients[1:]:
        p = _fma(builder, p, x, _constant(c))
    return p


def _at_least(builder: Any, x: Any, bound: float) -> Any:
    """max(x, bound) that lets NaN through: one instruction on x86."""
    c = _constant(bound)
    return builder.select(builder.fcmp_ordered("<", x, c), c, x)


def _at_most(builder: Any, x: Any, bound: float) -> Any:
    c = _constant(bound)
    return builder.select(builder.fcmp_ordered(">", x, c), c, x)


def _spread(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, _INT(0)), undefined, _integers(0))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _unaligned(instruction: Any) -> Any:
    instruction.align = 4
    return instruction


def _unary(emit: Callable, doc: str) -> Any:
    """An intrinsic of one vector, from what it emits."""

    def typer(context: Any, a: Any) -> Any:
        return float32x8(float32x8), lambda ctx, builder, sig, args: emit(builder, args[0])

    typer.__doc__ = doc
    return intrinsic(typer)


@intrinsic
def zero(context):
    """Eight zeros."""
    return float32x8(), lambda ctx, builder, sig, args: _constant(0.0)


@intrinsic
def splat(context, x):
    """Eight times the scalar x (float32)."""
    return float32x8(types.float32), lambda ctx, builder, sig, args: _spread(builder, args[0])


@intrinsic
def load(context, array, i):
    """array[i : i + 8]."""

    def emit(ctx, builder, sig, args):
        return _unaligned(builder.load(_pointer(ctx, builder, sig.args[0], args[0], args[1], _FLOATS)))

    return float32x8(array, types.intp), emit


@intrinsic
def load_splat(context, array, i):
    """Eight times array[i]."""

    def emit(ctx, builder, sig, args):
        return _spread(builder, _unaligned(builder.load(_pointer(ctx, builder, sig.args[0], args[0], args[1], _FLOAT))))

    return float32x8(array, types.intp), emit


@intrinsic
def store(context, array, i, x):
    """array[i : i + 8] = x."""

    def emit(ctx, builder, sig, args):
        _unaligned(builder.store(args[2], _pointer(ctx, builder, sig.args[0], args[0], args[1], _FLOATS)))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, float32x8), emit


@intrinsic
def fma(context, a, b, c):
    """a b + c, rounded once."""
    return float32x8(float32x8, float32x8, float32x8), lambda ctx, builder, sig, args: _fma(builder, *args)


@intrinsic
def fnma(context, a, b, c):
    """c - a b, rounded once."""

    def emit(ctx, builder, sig, args):
        return _fma(builder, builder.fneg(args[0]), args[1], args[2])

    return float32x8(float32x8, float32x8, float32x8), emit


@intrinsic
def fms(context, a, b, c):
    """a b - c, rounded once."""

    def emit(ctx, builder, sig, args):
        return _fma(builder, args[0], args[1], builder.fneg(args[2]))

    return float32x8(float32x8, float32x8, float32x8), emit


@intrinsic
def maximum(context, a, b):
    """The larger in each lane; b where a is NaN, and NaN where b is."""

    def emit(ctx, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return float32x8(float32x8, float32x8), emit


@intrinsic
def sum_lanes(context, a):
    """The sum of the eight lanes, a float32."""

    def emit(ctx, builder, sig, args):
        return _call(builder, "llvm.vector.reduce.fadd.v8f32", [_FLOAT(0.0), args[0]], _FLOAT, fastmath=_REASSOCIATE)

    return types.float32(float32x8), emit


_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the low bits


def _scaled(builder: Any, p: Any, rounded: Any) -> Any:
    """p 2^n, where n stands in the low bits of ``rounded``: added to the exponent."""
    exponent = builder.shl(builder.bitcast(rounded, _INTS), _integers(23))
    return builder.bitcast(builder.add(builder.bitcast(p, _INTS), exponent), _FLOATS)


def _exp(builder: Any, x: Any) -> Any:
    """Cephes' expf: 1 ulp, 0 below -87.3, inf above 88.4, NaN for NaN."""
    clamped = _at_most(builder, _at_least(builder, x, -87.33), 88.37)
    t = _fma(builder, clamped, _constant(1.4426950408889634), _constant(_ROUND))
    n = builder.fsub(t, _constant(_ROUND))
    r = _fma(builder, n, _constant(-0.693359375), clamped)
    r = _fma(builder, n, _constant(2.12194440e-4), r)
    taylor = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    p = _polynomial(builder, r, taylor)
    p = _fma(builder, p, builder.fmul(r, r), builder.fadd(r, _constant(1.0)))
    y = _scaled(builder, p, t)
    y = builder.select(builder.fcmp_ordered("<", x, _constant(-87.33)), _constant(0.0), y)
    return builder.select(builder.fcmp_ordered(">", x, _constant(88.37)), _constant(float("inf")), y)


def _exp2(builder: Any, x: Any) -> Any:
    """2^x within 2e-7 for -126 <= x <= 126, clamped outside, NaN for NaN: the fast one, for decays."""
    x = _at_most(builder, _at_least(builder, x, -126.0), 126.0)
    t = builder.fadd(x, _constant(_ROUND))
    r = builder.fsub(x, builder.fsub(t, _constant(_ROUND)))
    minimax = (1.535336188e-4, 1.339887440e-3, 9.618437357e-3, 5.550332548e-2, 2.402264791e-1, 6.931472028e-1, 1.0)
    return _scaled(builder, _polynomial(builder, r, minimax), t)


def _sigmoid(builder: Any, x: Any) -> Any:
    one = _constant(1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, builder.fneg(x))))


def _softplus(builder: Any, x: Any) -> Any:
    """max(x, 0) + log(1 + y),  y = exp(-|x|);  log(1 + y) = 2 artanh(u),  u = y / (2 + y) <= 1/3."""
    y = _exp(builder, builder.fneg(_call(builder, "llvm.fabs.v8f32", [x])))
    u = builder.fdiv(y, builder.fadd(y, _constant(2.0)))
    series = (2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
    log = builder.fmul(_polynomial(builder, builder.fmul(u, u), series), u)
    return builder.fadd(_at_least(builder, x, 0.0), log)


exp = _unary(_exp, "exp(x), 1 ulp.")
exp2 = _unary(_exp2, "2^x within 2e-7, clamped to 2^-126 .. 2^126.")
sigmoid = _unary(_sigmoid, "1 / (1 + exp(-x)).")
softplus = _unary(_softplus, "log(1 + exp(x)); 0 for -inf.")
negate = _unary(lambda builder, x: builder.fneg(x), "-x.")


def _shuffle(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_INTS, [_INT(k) for k in order]))


def _transposed(builder: Any, rows: Sequence) -> list:
    """The columns of eight rows: interleave singles, then pairs, then quarters."""
    singles = []
    for i in range(0, LANES, 2):
        singles.append(_shuffle(builder, rows[i], rows[i + 1], [0, 8, 1, 9, 4, 12, 5, 13]))
        singles.append(_shuffle(builder, rows[i], rows[i + 1], [2, 10, 3, 11, 6, 14, 7, 15]))
    pairs = []
    for i in (0, 4):
        a, b, c, d = singles[i : i + 4]
        for left, right in ((a, c), (b, d)):
            pairs.append(_shuffle(builder, left, right, [0, 1, 8, 9, 4, 5, 12, 13]))
            pairs.append(_shuffle(builder, left, right, [2, 3, 10, 11, 6, 7, 14, 15]))
    low = [_shuffle(builder, pairs[i], pairs[i + 4], [0, 1, 2, 3, 8, 9, 10, 11]) for i in range(4)]
    high = [_shuffle(builder, pairs[i], pairs[i + 4], [4, 5, 6, 7, 12, 13, 14, 15]) for i in range(4)]
    return low + high


@intrinsic
def transpose(context, target, i, target_stride, source, j, source_stride):
    """target[i + r * target_stride + c] = source[j + c * source_stride + r]  for r, c < 8: an 8 x 8 transpose."""

    def emit(ctx, builder, sig, args):
        to, i, to_stride, source, j, stride = args
        rows = []
        for k in range(LANES):
            place = builder.add(j, builder.mul(stride, stride.type(k)))
            rows.append(_unaligned(builder.load(_pointer(ctx, builder, sig.args[3], source, place, _FLOATS))))
        for k, column in enumerate(_transposed(builder, rows)):
            place = builder.add(i, builder.mul(to_stride, to_stride.type(k)))
            _unaligned(builder.store(column, _pointer(ctx, builder, sig.args[0], to, place, _FLOATS)))
        return ctx.get_dummy_value()

    return types.void(target, types.intp, types.intp, source, types.intp, types.intp), emit


even_lanes = _unary(lambda builder, x: _shuffle(builder, x, x, [0, 0, 2, 2, 4, 4, 6, 6]), "Lanes 0 0 2 2 4 4 6 6.")
odd_lanes = _unary(lambda builder, x: _shuffle(builder, x, x, [1, 1, 3, 3, 5, 5, 7, 7]), "Lanes 1 1 3 3 5 5 7 7.")
swap_pairs = _unary(lambda builder, x: _shuffle(builder, x, x, [1, 0, 3, 2, 5, 4, 7, 6]), "Lanes 1 0 3 2 5 4 7 6.")

absolute = _unary(lambda builder, x: _call(builder, "llvm.fabs.v8f32", [x]), "|x|.")


@intrinsic
def where_less(context, a, b, x, y):
    """x in the lanes where a < b, else y."""

    def emit(ctx, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return float32x8(float32x8, float32x8, float32x8, float32x8), emit


def _prefetch(write: int, doc: str) -> Any:
    def typer(context: Any, array: Any, i: Any) -> Any:
        def emit(ctx: Any, builder: Any, sig: Any, args: Sequence) -> Any:
            place = _pointer(ctx, builder, sig.args[0], args[0], args[1], ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [place, _INT(write), _INT(2), _INT(1)])
            return ctx.get_dummy_value()

        return types.void(array, types.intp), emit

    typer.__doc__ = doc
    return intrinsic(typer)


prefetch = _prefetch(0, "Ask for the cache line of array[i], to be read soon; any i is harmless.")
prefetch_to_write = _prefetch(1, "Ask for the cache line of array[i], to be written soon; any i is harmless.")


def _first(builder: Any, count: Any) -> Any:
    """True in the first ``count`` lanes."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    counts = builder.insert_element(undefined, builder.trunc(count, _INT), _INT(0))
    counts = builder.shuffle_vector(counts, undefined, _integers(0))
    return builder.icmp_signed("<", ir.Constant(_INTS, [_INT(k) for k in range(LANES)]), counts)


@intrinsic
def load_first(context, array, i, count):
    """array[i : i + count] in the first lanes, count <= 8, and zeros in the others; no more than that is read."""

    def emit(ctx, builder, sig, args):
        place = _pointer(ctx, builder, sig.args[0], args[0], args[1], _FLOATS)
        given = [place, _INT(4), _first(builder, args[2]), _constant(0.0)]
        return _call(builder, "llvm.masked.load.v8f32.p0", given)

    return float32x8(array, types.intp, types.intp), emit


@intrinsic
def store_first(context, array, i, x, count):
    """array[i : i + count] = the first lanes of x; no more than that is written."""

    def emit(ctx, builder, sig, args):
        place = _pointer(ctx, builder, sig.args[0], args[0], args[1], _FLOATS)
        given = [args[2], place, _INT(4), _first(builder, args[3])]
        _call(builder, "llvm.masked.store.v8f32.p0", given, ir.VoidType())
        return ctx.get_dummy_value()

    return types.void(array, types.intp, float32x8, types.intp), emit
