"""Eight or sixteen float32 lanes as one value in Numba code: ``x = load(w, a, i); store(b, i, x * x + splat(w, one))``.

The types are LLVM's <8 x float> and <16 x float>, which LLVM turns into registers of AVX or AVX-512, or into two and
more of SSE or NEON: so the same code runs on any CPU, and no compiler is needed. A kernel is written once for both:
what makes a vector of something else is told the width w, ``eight`` or ``sixteen``. ``+ - * /`` work on vectors; the
rest are the functions below. Indices count float32 elements of flat arrays; nothing is checked.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import NativeValue, intrinsic, lower_builtin, models, register_model, typeof_impl, unbox
from numba.np.arrayobj import make_array, populate_array

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_REASSOCIATE = ("fast",)  # on single operations: for whole functions it would fold the rounding trick of exp away


class Lanes(types.Type):
    """Numba's type of a vector of ``count`` float32."""

    def __init__(self, count: int) -> None:
        super().__init__(name=f"float32x{count}")
        self.count = count
        self.llvm = ir.VectorType(_FLOAT, count)


_WIDTHS = tuple(Lanes(count) for count in (8, 16))


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any):
        super().__init__(manager, numba_type, numba_type.llvm)


def _arithmetic(symbol: Callable, instruction: str) -> None:
    @infer_global(symbol)
    class Template(ConcreteTemplate):
        key = symbol
        cases = [signature(kind, kind, kind) for kind in _WIDTHS]  # noqa: RUF012

    def lower(context: Any, builder: Any, sig: Any, args: Sequence) -> Any:
        return getattr(builder, instruction)(*args)

    for kind in _WIDTHS:
        lower_builtin(symbol, kind, kind)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


def filled(kind: Any, x: float) -> ir.Constant:
    """x in every lane of a vector type."""
    return ir.Constant(kind, [ir.Constant(kind.element, x)] * kind.count)


def _constant(like: Any, x: float) -> ir.Constant:
    """x in every lane of a vector as wide as ``like``."""
    return filled(like.type, x)


def _integers(like: Any, x: int) -> ir.Constant:
    return filled(ir.VectorType(_INT, like.type.count), x)


def call(builder: Any, name: str, args: Sequence, result: Any, **keywords: Any) -> Any:
    """An LLVM function of that name, called: what it gives, of type ``result``."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(args), **keywords)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fma.v{a.type.count}f32", [a, b, c], a.type)


def _absolute(builder: Any, x: Any) -> Any:
    return call(builder, f"llvm.fabs.v{x.type.count}f32", [x], x.type)


def _polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's rule, highest power first."""
    p = _constant(x, coefficients[0])
    for c in coefficients[1:]:
        p = _fma(builder, p, x, _constant(x, c))
    return p


def _at_least(builder: Any, x: Any, bound: float) -> Any:
    """max(x, bound) that lets NaN through: one instruction on x86."""
    c = _constant(x, bound)
    return builder.select(builder.fcmp_ordered("<", x, c), c, x)


def _at_most(builder: Any, x: Any, bound: float) -> Any:
    c = _constant(x, bound)
    return builder.select(builder.fcmp_ordered(">", x, c), c, x)


def spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """A scalar in every lane of a vector type."""
    undefined = ir.Constant(kind, ir.Undefined)
    vector = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(vector, undefined, _integers(vector, 0))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _unaligned(instruction: Any) -> Any:
    instruction.align = 4
    return instruction


def _unary(emit: Callable, doc: str) -> Any:
    """An intrinsic of one vector, from what it emits."""

    def typer(context: Any, a: Any) -> Any:
        return a(a), lambda ctx, builder, sig, args: emit(builder, args[0])

    typer.__doc__ = doc
    return intrinsic(typer)


def first_lanes(builder: Any, lanes: int, count: Any) -> Any:
    """True in the first ``count`` of the lanes."""
    ints = ir.VectorType(_INT, lanes)
    undefined = ir.Constant(ints, ir.Undefined)
    counts = builder.insert_element(undefined, builder.trunc(count, _INT), _INT(0))
    counts = builder.shuffle_vector(counts, undefined, filled(ints, 0))
    return builder.icmp_signed("<", ir.Constant(ints, [_INT(k) for k in range(lanes)]), counts)


class Width:
    """How many lanes: a value that kernels pass on, so that they exist once a width: ``load(eight, a, i)``."""

    def __init__(self, kind: Lanes):
        self.kind, self.lanes = kind, kind.count


class _WidthType(types.Type):
    def __init__(self, kind: Lanes):
        super().__init__(name=f"width of {kind.count}")
        self.kind = kind


register_model(_WidthType)(models.OpaqueModel)


@typeof_impl.register(Width)
def _(value: Width, context: Any) -> _WidthType:
    return _WidthType(value.kind)


@unbox(_WidthType)
def _(kind: _WidthType, value: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


@lower_constant(_WidthType)
def _(context: Any, builder: Any, kind: _WidthType, value: Any) -> Any:
    return context.get_dummy_value()


eight, sixteen = map(Width, _WIDTHS)
_features = cpu_target.target_context.codegen().magic_tuple()[2]  # those that numba compiles for
widest = sixteen if "+avx512f" in _features.split(",") else eight


def _memory(kind: Any, element: Any, doc: str) -> Any:
    """An intrinsic: the memory at an address as a flat array; who passes the address keeps its owner alive."""
    array, width = types.Array(kind, 1, "C"), kind.bitwidth // 8

    def typer(context: Any, address: Any) -> Any:
        def emit(ctx: Any, builder: Any, sig: Any, args: Sequence) -> Any:
            made = make_array(array)(ctx, builder)
            size, step = ctx.get_constant(types.intp, 2**60), ctx.get_constant(types.intp, width)
            pointer = builder.inttoptr(args[0], element.as_pointer())
            populate_array(made, data=pointer, shape=[size], strides=[step], itemsize=step, meminfo=None)
            return made._getvalue()

        return array(types.intp), emit

    typer.__doc__ = doc
    return intrinsic(typer)


floats = _memory(types.float32, _FLOAT, "The float32 at an address as a flat array.")
doubles = _memory(types.float64, ir.DoubleType(), "The float64 at an address as a flat array.")
integers = _memory(types.int64, ir.IntType(64), "The int64 at an address as a flat array.")


@intrinsic
def lanes_of(context, w):
    """How many lanes a width has, a constant."""
    return types.intp(w), lambda ctx, builder, sig, args: ir.Constant(ir.IntType(64), w.kind.count)


@intrinsic
def zero(context, w):
    """Zeros."""
    return w.kind(w), lambda ctx, builder, sig, args: filled(w.kind.llvm, 0.0)


@intrinsic
def splat(context, w, x):
    """The scalar x (float32) in every lane."""
    return w.kind(w, types.float32), lambda ctx, builder, sig, args: spread(builder, args[1], w.kind.llvm)


@intrinsic
def load(context, w, array, i):
    """array[i : i + lanes]."""

    def emit(ctx, builder, sig, args):
        return _unaligned(builder.load(_pointer(ctx, builder, sig.args[1], args[1], args[2], w.kind.llvm)))

    return w.kind(w, array, types.intp), emit


@intrinsic
def load_splat(context, w, array, i):
    """array[i] in every lane."""

    def emit(ctx, builder, sig, args):
        scalar = _unaligned(builder.load(_pointer(ctx, builder, sig.args[1], args[1], args[2], _FLOAT)))
        return spread(builder, scalar, w.kind.llvm)

    return w.kind(w, array, types.intp), emit


@intrinsic
def load_first(context, w, array, i, count):
    """array[i : i + count] in the first lanes, count <= lanes, zeros in the others; no more than that is read."""

    def emit(ctx, builder, sig, args):
        place = _pointer(ctx, builder, sig.args[1], args[1], args[2], w.kind.llvm)
        given = [place, _INT(4), first_lanes(builder, w.kind.count, args[3]), filled(w.kind.llvm, 0.0)]
        return call(builder, f"llvm.masked.load.v{w.kind.count}f32.p0", given, w.kind.llvm)

    return w.kind(w, array, types.intp, types.intp), emit


@intrinsic
def store(context, array, i, x):
    """array[i : i + lanes] = x."""

    def emit(ctx, builder, sig, args):
        _unaligned(builder.store(args[2], _pointer(ctx, builder, sig.args[0], args[0], args[1], args[2].type)))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, x), emit


@intrinsic
def fma(context, a, b, c):
    """a b + c, rounded once."""
    return a(a, a, a), lambda ctx, builder, sig, args: _fma(builder, *args)


@intrinsic
def fnma(context, a, b, c):
    """c - a b, rounded once."""

    def emit(ctx, builder, sig, args):
        return _fma(builder, builder.fneg(args[0]), args[1], args[2])

    return a(a, a, a), emit


@intrinsic
def fms(context, a, b, c):
    """a b - c, rounded once."""

    def emit(ctx, builder, sig, args):
        return _fma(builder, args[0], args[1], builder.fneg(args[2]))

    return a(a, a, a), emit


@intrinsic
def maximum(context, a, b):
    """The larger in each lane; b where a is NaN, and NaN where b is."""

    def emit(ctx, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return a(a, a), emit


@intrinsic
def sum_lanes(context, a):
    """The sum of the lanes, a float32."""

    def emit(ctx, builder, sig, args):
        name = f"llvm.vector.reduce.fadd.v{a.count}f32"
        return call(builder, name, [_FLOAT(0.0), args[0]], _FLOAT, fastmath=_REASSOCIATE)

    return types.float32(a), emit


_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the low bits


def _scaled(builder: Any, p: Any, rounded: Any) -> Any:
    """p 2^n, where n stands in the low bits of ``rounded``: added to the exponent."""
    shift = _integers(p, 23)
    exponent = builder.shl(builder.bitcast(rounded, shift.type), shift)
    return builder.bitcast(builder.add(builder.bitcast(p, shift.type), exponent), p.type)


def _exp(builder: Any, x: Any) -> Any:
    """Cephes' expf: 1 ulp, 0 below -87.3, inf above 88.4, NaN for NaN."""
    clamped = _at_most(builder, _at_least(builder, x, -87.33), 88.37)
    t = _fma(builder, clamped, _constant(x, 1.4426950408889634), _constant(x, _ROUND))
    n = builder.fsub(t, _constant(x, _ROUND))
    r = _fma(builder, n, _constant(x, -0.693359375), clamped)
    r = _fma(builder, n, _constant(x, 2.12194440e-4), r)
    taylor = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    p = _polynomial(builder, r, taylor)
    p = _fma(builder, p, builder.fmul(r, r), builder.fadd(r, _constant(x, 1.0)))
    y = _scaled(builder, p, t)
    y = builder.select(builder.fcmp_ordered("<", x, _constant(x, -87.33)), _constant(x, 0.0), y)
    return builder.select(builder.fcmp_ordered(">", x, _constant(x, 88.37)), _constant(x, float("inf")), y)


def _exp2(builder: Any, x: Any) -> Any:
    """2^x within 2e-7 for -126 <= x <= 126, clamped outside, NaN for NaN: the fast one, for decays."""
    x = _at_most(builder, _at_least(builder, x, -126.0), 126.0)
    t = builder.fadd(x, _constant(x, _ROUND))
    r = builder.fsub(x, builder.fsub(t, _constant(x, _ROUND)))
    minimax = (1.326472725e-3, 9.671512688e-3, 5.550733744e-2, 2.402224208e-1, 6.931469776e-1, 1.0)
    return _scaled(builder, _polynomial(builder, r, minimax), t)


def _sigmoid(builder: Any, x: Any) -> Any:
    one = _constant(x, 1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, builder.fneg(x))))


def _softplus(builder: Any, x: Any) -> Any:
    """max(x, 0) + log(1 + y),  y = exp(-|x|);  log(1 + y) = 2 artanh(u),  u = y / (2 + y) <= 1/3."""
    y = _exp(builder, builder.fneg(_absolute(builder, x)))
    u = builder.fdiv(y, builder.fadd(y, _constant(x, 2.0)))
    series = (2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
    log = builder.fmul(_polynomial(builder, builder.fmul(u, u), series), u)
    return builder.fadd(_at_least(builder, x, 0.0), log)


exp = _unary(_exp, "exp(x), 1 ulp.")
exp2 = _unary(_exp2, "2^x within 2e-7, clamped to 2^-126 .. 2^126.")
sigmoid = _unary(_sigmoid, "1 / (1 + exp(-x)).")
softplus = _unary(_softplus, "log(1 + exp(x)); 0 for -inf.")
negate = _unary(lambda builder, x: builder.fneg(x), "-x.")


def shuffle(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    """The lanes of a and, behind them, b in an order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), [_INT(k) for k in order]))


def _within(place: Callable[[int], int], doc: str) -> Any:
    """An intrinsic whose lane k is the argument's lane place(k)."""
    return _unary(lambda builder, x: shuffle(builder, x, x, [place(k) for k in range(x.type.count)]), doc)


even_lanes = _within(lambda k: k - k % 2, "Lanes 0 0 2 2 4 4 ...")
odd_lanes = _within(lambda k: k - k % 2 + 1, "Lanes 1 1 3 3 5 5 ...")
swap_pairs = _within(lambda k: k ^ 1, "Lanes 1 0 3 2 5 4 ...")


def four_sums(builder: Any, vectors: Sequence) -> Any:
    """The sums of the lanes of four vectors, as a vector of four: a third of the work of four sums one by one."""
    count = vectors[0].type.count

    def folded(x: Any, y: Any, width: int) -> Any:
        """Lanes of x and y in turn, ``width`` at a time, in each four the first half plus the second."""
        low = [k - k % 4 + k % 4 // (2 * width) * width + k % width + count * (k // width % 2) for k in lanes]
        return builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, [k + 2 for k in low]))

    lanes, (a, b, c, d) = range(count), vectors
    total = folded(folded(a, b, 1), folded(c, d, 1), 2)
    while count > 4:
        count //= 2
        total = builder.fadd(*(shuffle(builder, total, total, range(k, k + count)) for k in (0, count)))
    return total


@intrinsic
def store_sums(context, array, i, a, b, c, d):
    """array[i : i + 4] = the sums of the lanes of a, b, c and d."""

    def emit(ctx, builder, sig, args):
        total = four_sums(builder, args[2:])
        _unaligned(builder.store(total, _pointer(ctx, builder, sig.args[0], args[0], args[1], total.type)))
        return ctx.get_dummy_value()

    return types.void(array, types.intp, a, b, c, d), emit


def _transposed(builder: Any, rows: Sequence) -> list:
    """The columns of eight rows: interleave singles, then pairs, then quarters."""
    singles = []
    for i in range(0, 8, 2):
        singles.append(shuffle(builder, rows[i], rows[i + 1], [0, 8, 1, 9, 4, 12, 5, 13]))
        singles.append(shuffle(builder, rows[i], rows[i + 1], [2, 10, 3, 11, 6, 14, 7, 15]))
    pairs = []
    for i in (0, 4):
        a, b, c, d = singles[i : i + 4]
        for left, right in ((a, c), (b, d)):
            pairs.append(shuffle(builder, left, right, [0, 1, 8, 9, 4, 5, 12, 13]))
            pairs.append(shuffle(builder, left, right, [2, 3, 10, 11, 6, 7, 14, 15]))
    low = [shuffle(builder, pairs[i], pairs[i + 4], [0, 1, 2, 3, 8, 9, 10, 11]) for i in range(4)]
    high = [shuffle(builder, pairs[i], pairs[i + 4], [4, 5, 6, 7, 12, 13, 14, 15]) for i in range(4)]
    return low + high


@intrinsic
def transpose(context, target, i, target_stride, source, j, source_stride):
    """target[i + r * target_stride + c] = source[j + c * source_stride + r]  for r, c < 8: an 8 x 8 transpose."""

    def emit(ctx, builder, sig, args):
        to, i, to_stride, source, j, stride = args
        rows = []
        for k in range(8):
            place = builder.add(j, builder.mul(stride, stride.type(k)))
            rows.append(_unaligned(builder.load(_pointer(ctx, builder, sig.args[3], source, place, _WIDTHS[0].llvm))))
        for k, column in enumerate(_transposed(builder, rows)):
            place = builder.add(i, builder.mul(to_stride, to_stride.type(k)))
            _unaligned(builder.store(column, _pointer(ctx, builder, sig.args[0], to, place, _WIDTHS[0].llvm)))
        return ctx.get_dummy_value()

    return types.void(target, types.intp, types.intp, source, types.intp, types.intp), emit


absolute = _unary(_absolute, "|x|.")


@intrinsic
def where_less(context, a, b, x, y):
    """x in the lanes where a < b, else y."""

    def emit(ctx, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return a(a, b, x, y), emit


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


@intrinsic
def store_first(context, array, i, x, count):
    """array[i : i + count] = the first lanes of x; no more than that is written."""

    def emit(ctx, builder, sig, args):
        place = _pointer(ctx, builder, sig.args[0], args[0], args[1], args[2].type)
        given = [args[2], place, _INT(4), first_lanes(builder, x.count, args[3])]
        call(builder, f"llvm.masked.store.v{x.count}f32.p0", given, ir.VoidType())
        return ctx.get_dummy_value()

    return types.void(array, types.intp, x, types.intp), emit


def _erf(builder: Any, x: Any) -> Any:
    """Abramowitz & Stegun (1964) 7.1.26, within 1.5e-7."""
    one, size = _constant(x, 1.0), _absolute(builder, x)
    t = builder.fdiv(one, _fma(builder, size, _constant(x, 0.3275911), one))
    p = _polynomial(builder, t, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0))
    y = _fma(builder, builder.fneg(p), _exp(builder, builder.fneg(builder.fmul(x, x))), one)
    return call(builder, f"llvm.copysign.v{x.type.count}f32", [y, x], x.type)


erf = _unary(_erf, "The error function, within 1.5e-7.")
