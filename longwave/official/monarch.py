"""Structured matrices of github.com/HazyResearch/fly (commit 6b73449) and github.com/HazyResearch/butterfly (7217b5d).

Monarch: block-diagonal and Monarch products and their linear layers, the learned Fourier transform in Monarch form.
Butterfly: real, complex and unitary butterflies and the transforms made of them; block butterflies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import BlockdiagLinear, MonarchLinear
from longwave.official.system import Choice, Family, Options, Shapes, Size, State, System
from longwave.ops import blockdiag_multiply, butterfly, monarch


def as_complex(x: Tensor, features: int) -> tuple[Tensor, bool]:
    """x as it is, or complex where its last axis is (real, imaginary) rather than the features; and whether it was."""
    pairs = not x.is_complex() and x.shape[-1] == 2 != features
    return (torch.view_as_complex(x.contiguous()) if pairs else x), pairs


class BlockdiagProduct(nn.Module):
    """y = blockdiag_multiply(x, w)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k p) -> (..., k q)."""
        return blockdiag_multiply(x, self.w)


class MonarchProduct(nn.Module):
    """y = monarch(x, w1, w2)."""

    def __init__(self, first: tuple[int, ...], second: tuple[int, ...]):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(first)), nn.Parameter(torch.zeros(second))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k p) -> (..., s l)."""
        return monarch(x, self.w1, self.w2)


class Shuffled(nn.Module):
    """A block-diagonal layer behind a transposition of its input, seen as a matrix with a row a block.

    Args:
        model: the layer.
    """

    def __init__(self, model: BlockdiagLinear):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        blocks, _, width = self.model.weight.shape
        x = F.pad(x, (0, blocks * width - x.shape[-1]))
        return self.model(x.unflatten(-1, (blocks, width)).transpose(-1, -2).flatten(-2))


class MonarchFourier(nn.Module):
    """The authors' ButterflyFFT: a Monarch matrix that starts as the Fourier transform, behind a transposition.

    Args:
        sizes: (k, l) blocks of the two factors.
    """

    def __init__(self, sizes: tuple[int, int]):
        super().__init__()
        k, l = sizes
        self.w1_bfly, self.w2_bfly = nn.Parameter(torch.zeros(k, l, l, 2)), nn.Parameter(torch.zeros(l, k, k, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n), real or complex, or (..., n, 2) -> complex, or pairs where those came in."""
        k, l = self.w1_bfly.shape[:2]
        x, pairs = as_complex(x, k * l)
        w1, w2 = (torch.view_as_complex(w.contiguous()) for w in (self.w1_bfly, self.w2_bfly))
        turned = x.unflatten(-1, (l, k)).transpose(-1, -2).reshape(-1, k * l)
        y = monarch(turned, w1, w2).reshape(x.shape)
        return torch.view_as_real(y) if pairs else y


def _linear_keys(o: Options) -> Shapes:
    p, s = -(-o.in_features // o.nblocks), -(-o.out_features // o.nblocks)
    keys: Shapes = {"blkdiag1": (o.nblocks, min(p, s), p), "blkdiag2": (o.nblocks, s, min(p, s))}
    return keys | ({"bias": (o.out_features,)} if o.bias else {})


def _blockdiag_keys(o: Options) -> Shapes:
    keys: Shapes = {"weight": (o.nblocks, -(-o.out_features // o.nblocks), -(-o.in_features // o.nblocks))}
    return keys | ({"bias": (o.out_features,)} if o.bias else {})


def _build_blockdiag(o: Options) -> nn.Module:
    layer = BlockdiagLinear(o.in_features, o.out_features, o.nblocks, o.bias)
    return Shuffled(layer) if o.shuffle else layer


def _fourier_sizes(o: Options) -> tuple[int, int]:
    """The larger and the smaller of the factors of n nearest to its root; the official ``sizes`` is not looked at."""
    small = next(i for i in range(math.isqrt(o.n), 0, -1) if o.n % i == 0)
    return o.n // small, small


def _fourier_keys(o: Options) -> Shapes:
    k, l = _fourier_sizes(o)
    return {"perm": (o.n,), "w1_bfly": (k, l, l, 2), "w2_bfly": (l, k, k, 2)}


def _convert_fourier(state: State, o: Options) -> State:
    k, l = _fourier_sizes(o)
    if not torch.equal(state["perm"].long().cpu(), torch.arange(o.n).view(l, k).T.flatten()):
        raise ValueError(f"'perm' is not the transposition of {l} x {k} that the official code makes")
    return {key: state[key] for key in ("w1_bfly", "w2_bfly")}


_LINEAR = {"in_features": Size(), "out_features": Size(), "nblocks": 4, "bias": True}

MONARCH = Family(
    {
        "blockdiag_butterfly_multiply": System(
            options=dict.fromkeys("kqplsr", Size()),
            keys=lambda o: {"w1": (o.k, o.q, o.p), "w2": (o.l, o.s, o.r)},
            build=lambda o: MonarchProduct((o.k, o.q, o.p), (o.l, o.s, o.r)),
            convert=lambda state, o: state,
        ),
        "blockdiag_multiply": System(
            options=dict.fromkeys(("nblocks", "q", "p"), Size()),
            keys=lambda o: {"w": (o.nblocks, o.q, o.p)},
            build=lambda o: BlockdiagProduct(o.nblocks, o.q, o.p),
            convert=lambda state, o: state,
        ),
        "MonarchLinear": System(
            options=_LINEAR,
            ignored=frozenset({"device", "dtype"}),
            keys=_linear_keys,
            build=lambda o: MonarchLinear(o.in_features, o.out_features, o.nblocks, o.bias),
            convert=lambda state, o: state,
        ),
        "BlockdiagLinear": System(
            options={**_LINEAR, "shuffle": False},
            ignored=frozenset({"device", "dtype"}),
            keys=_blockdiag_keys,
            build=_build_blockdiag,
            convert=lambda state, o: {f"model.{key}" if o.shuffle else key: t for key, t in state.items()},
        ),
        "ButterflyFFT": System(
            options={"n": Size()},
            ignored=frozenset({"direction", "norm", "sizes"}),
            keys=_fourier_keys,
            build=lambda o: MonarchFourier(_fourier_sizes(o)),
            convert=_convert_fourier,
        ),
    }
)


class Butterflies(nn.Module):
    """The authors' Butterfly in all its forms:  y = butterfly(x) + bias.

    Args:
        twiddle: its shape; a last axis of (real, imaginary) behind 2 x 2 matrices where ``complex``.
        in_size, out_size: features that come in, and outputs that are kept.
        bias: whether there is one.
        complex: whether the parameters are pairs.
        increasing, transpose, conjugate, subtwiddle: as the official constructor and call have them.
    """

    def __init__(
        self,
        twiddle: tuple[int, ...],
        in_size: int,
        out_size: int,
        bias: bool,
        complex: bool,
        increasing: bool,
        transpose: bool = False,
        conjugate: bool = False,
        subtwiddle: bool = False,
    ):
        super().__init__()
        self.in_size, self.out_size = in_size, out_size
        self.complex, self.increasing = complex, increasing
        self.transpose, self.conjugate, self.subtwiddle = transpose, conjugate, subtwiddle
        self.twiddle = nn.Parameter(torch.zeros(twiddle))
        self.bias = nn.Parameter(torch.zeros((out_size, 2) if complex else (out_size,))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in), or complex pairs (..., in, 2) -> (..., out), or pairs where those came in."""
        pairs, increasing = False, self.increasing
        twiddle: Tensor = self.twiddle
        bias: Tensor | None = self.bias
        if self.complex:
            twiddle = torch.view_as_complex(twiddle.contiguous())
            bias = None if bias is None else torch.view_as_complex(bias.contiguous())
            x, pairs = as_complex(x, self.in_size)
            if self.conjugate:
                twiddle = twiddle.conj()
        out_size = self.out_size
        if self.subtwiddle:  # the factors that a shorter input needs, each with the pairs it needs
            levels = (x.shape[-1] - 1).bit_length()
            kept = slice(None, levels) if increasing else slice(twiddle.shape[2] - levels, None)
            twiddle = twiddle[:, :, kept, : 2**levels // 2]
            out_size = len(twiddle) * 2**levels
        if self.transpose:
            twiddle = twiddle.transpose(-1, -2).flip([1, 2])
            increasing = increasing == (twiddle.shape[1] % 2 == 0)
        n = 2 ** twiddle.shape[2]
        rows = F.pad(x.reshape(-1, x.shape[-1]), (0, n - x.shape[-1]))[:, None].expand(-1, len(twiddle), -1)
        y = butterfly(rows, twiddle, increasing=increasing).flatten(1)[:, :out_size]
        y = (y if bias is None else y + bias[:out_size]).reshape(*x.shape[:-1], out_size)
        return torch.view_as_real(y) if pairs else y


def _twiddle(o: Options, *pair: int) -> tuple[int, ...]:
    levels = (o.in_size - 1).bit_length()
    return (-(-o.out_size // 2**levels), o.nblocks, levels, 2**levels // 2, *pair)


def _butterfly_keys(o: Options, *pair: int) -> Shapes:
    keys: Shapes = {"twiddle": _twiddle(o, *pair)}
    return keys | ({"bias": (o.out_size, 2) if o.complex else (o.out_size,)} if o.bias else {})


def _build_butterfly(o: Options) -> Butterflies:
    pair = (2, 2, 2) if o.complex else (2, 2)
    calls = (o.transpose, o.conjugate, o.subtwiddle)
    return Butterflies(_twiddle(o, *pair), o.in_size, o.out_size, o.bias, o.complex, o.increasing_stride, *calls)


def _convert_unitary(state: State, o: Options) -> State:
    """Four angles a matrix, phi, alpha, psi and chi, to a 2 x 2 unitary matrix."""
    phi, alpha, psi, chi = state["twiddle"].unbind(-1)
    angles = torch.stack([alpha + psi, alpha + chi, alpha - chi, alpha - psi], dim=-1)
    sizes = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], dim=-1)
    entries = torch.stack([sizes * angles.cos(), sizes * angles.sin()], dim=-1)
    return {**state, "twiddle": entries.unflatten(-2, (2, 2))}


class BlockButterfly(nn.Module):
    """The authors' block_butterfly_multiply, which pads or cuts its input and cuts its output.

    Args:
        twiddle: (stacks, depth, log n, n / 2, 2, 2, b, b).
        increasing: whether the strides grow first.
        output_size: features that are kept, None for all.
    """

    def __init__(self, twiddle: tuple[int, ...], increasing: bool, output_size: int | None):
        super().__init__()
        self.increasing, self.output_size = increasing, output_size
        self.twiddle = nn.Parameter(torch.zeros(twiddle))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, stacks, features) -> (B, stacks, output_size)."""
        width = 2 ** self.twiddle.shape[2] * self.twiddle.shape[-1]
        x = F.pad(x, (0, width - x.shape[-1]))
        return butterfly(x, self.twiddle, increasing=self.increasing)[..., : self.output_size]


def _block_twiddle(o: Options) -> tuple[int, ...]:
    n, b = 2**o.log_n, o.block_size
    if o.output_size is not None and o.output_size > n * b:
        raise ValueError(f"the option output_size = {o.output_size} is above the {n * b} features that there are")
    return (o.nstacks, o.nblocks, o.log_n, n // 2, 2, 2, b, b)


class Transform(nn.Module):
    """The authors' fft, ifft, dct and dst: a permutation and a complex butterfly, in one order or the other.

    Args:
        n: points.
        permuted_first: whether the permutation comes before the butterfly, which then starts with its closest pairs.
        real: whether x and y are real.
    """

    permutation: Tensor

    def __init__(self, n: int, permuted_first: bool, real: bool):
        super().__init__()
        self.permuted_first, self.real = permuted_first, real
        levels = n.bit_length() - 1
        self.register_buffer("permutation", torch.zeros(n, dtype=torch.int64))
        self.twiddle = nn.Parameter(torch.zeros(1, 1, levels, n // 2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) or complex pairs (..., n, 2) -> y in the same form."""
        order = self.permutation
        x, pairs = (x, False) if self.real else as_complex(x, len(order))
        x = x[..., order] if self.permuted_first else x
        twiddle = torch.view_as_complex(self.twiddle.contiguous())
        y = butterfly(x.reshape(-1, 1, len(order)), twiddle, increasing=self.permuted_first).reshape(x.shape)
        y = y if self.permuted_first else y[..., order]
        if self.real:
            return y.real
        return torch.view_as_real(y) if pairs else y


_REAL_TRANSFORMS = {"dct2": True, "dct3": False, "dct4": True, "dst2": True, "dst4": True}  # permuted first?


def _transform_names(o: Options) -> tuple[str, str]:
    """The official keys of the permutation and of the twiddle factors."""
    if o.n < 2 or o.n & (o.n - 1):
        raise ValueError(f"the option n = {o.n} is no power of two >= 2")
    if o.kind in _REAL_TRANSFORMS:  # with a conversion before and behind the butterfly
        return ("0.permutation", "2.twiddle") if _REAL_TRANSFORMS[o.kind] else ("3.permutation", "1.twiddle")
    return ("0.permutation", "1.twiddle") if o.br_first else ("1.permutation", "0.twiddle")


def _transform_keys(o: Options) -> Shapes:
    permutation, twiddle = _transform_names(o)
    return {permutation: (o.n,), twiddle: (1, 1, o.n.bit_length() - 1, o.n // 2, 2, 2, 2)}


def _convert_transform(state: State, o: Options) -> State:
    permutation, twiddle = (state[name] for name in _transform_names(o))
    return {"permutation": permutation.long(), "twiddle": twiddle}


_BUTTERFLY = {
    "in_size": Size(),
    "out_size": Size(),
    "bias": True,
    "increasing_stride": True,
    "nblocks": 1,
    "transpose": False,
    "conjugate": False,
    "subtwiddle": False,
}

BUTTERFLY = Family(
    {
        "Butterfly": System(
            options={**_BUTTERFLY, "complex": False},
            ignored=frozenset({"init"}),
            keys=lambda o: _butterfly_keys(o, *((2, 2, 2) if o.complex else (2, 2))),
            build=_build_butterfly,
            convert=lambda state, o: state,
        ),
        "ButterflyUnitary": System(
            options={**_BUTTERFLY, "complex": Choice(True)},
            ignored=frozenset({"init"}),
            keys=lambda o: _butterfly_keys(o, 4),
            build=_build_butterfly,
            convert=_convert_unitary,
        ),
        "block_butterfly_multiply": System(
            options={
                **dict.fromkeys(("nstacks", "nblocks", "log_n", "block_size"), Size()),
                "increasing_stride": True,
                "output_size": Size(None),
            },
            ignored=frozenset({"input_size"}),
            keys=lambda o: {"twiddle": _block_twiddle(o)},
            build=lambda o: BlockButterfly(_block_twiddle(o), o.increasing_stride, o.output_size),
            convert=lambda state, o: state,
        ),
        "special": System(
            options={"kind": Choice("fft", "ifft", *_REAL_TRANSFORMS), "n": Size(), "br_first": True},
            ignored=frozenset({"normalized"}),
            keys=_transform_keys,
            build=lambda o: Transform(o.n, _REAL_TRANSFORMS.get(o.kind, o.br_first), o.kind in _REAL_TRANSFORMS),
            convert=_convert_transform,
        ),
    }
)

SYSTEMS = {"monarch": MONARCH, "butterfly": BUTTERFLY}
