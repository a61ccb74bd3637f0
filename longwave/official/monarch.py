"""Structured matrices of github.com/HazyResearch/fly (commit 6b73449) and github.com/HazyResearch/butterfly (7217b5d).

Monarch: block-diagonal and Monarch products and their linear layers, the learned Fourier transform in Monarch form.
Butterfly: real, complex and unitary butterflies and the transforms made of them; block butterflies.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import BlockdiagLinear, MonarchLinear
from longwave.official.blocks import Call, Formula
from longwave.official.source import WHOLE, Flag, Name, Names, Size, Source, System, Turn
from longwave.ops import blockdiag_multiply, butterfly, monarch


def as_complex(x: Tensor, features: int) -> tuple[Tensor, bool]:
    """x as it is, or complex where its last axis is (real, imaginary) rather than the features; and whether it was."""
    pairs = not x.is_complex() and x.shape[-1] == 2 != features
    return (torch.view_as_complex(x.contiguous()) if pairs else x), pairs


class MonarchProduct(Source):
    """y = monarch(x, w1, w2): blockdiag_butterfly_multiply."""

    k: Size
    q: Size
    p: Size
    l: Size
    s: Size
    r: Size

    def build(self) -> nn.Module:
        shapes = {"w1": (self.k, self.q, self.p), "w2": (self.l, self.s, self.r)}
        return Formula(lambda m, x: monarch(x, m.w1, m.w2), **shapes)


class BlockdiagProduct(Source):
    """y = blockdiag_multiply(x, w)."""

    nblocks: Size
    q: Size
    p: Size

    def build(self) -> nn.Module:
        return Formula(lambda m, x: blockdiag_multiply(x, m.w), w=(self.nblocks, self.q, self.p))


class Monarch(Source):
    """MonarchLinear."""

    ignored = frozenset({"device", "dtype"})
    in_features: Size
    out_features: Size
    nblocks: Size = 4
    bias: Flag = True

    def build(self) -> nn.Module:
        return MonarchLinear(self.in_features, self.out_features, self.nblocks, self.bias)


def _shuffled(layer: Any, x: Tensor) -> Tensor:
    """The layer of x (..., in_features), seen as a matrix with a row a block and transposed."""
    blocks, _, width = layer.weight.shape
    x = F.pad(x, (0, blocks * width - x.shape[-1]))
    return layer(x.unflatten(-1, (blocks, width)).transpose(-1, -2).flatten(-2))


class Blockdiag(Monarch):
    """BlockdiagLinear."""

    shuffle: Flag = False

    def build(self) -> nn.Module:
        layer = BlockdiagLinear(self.in_features, self.out_features, self.nblocks, self.bias)
        return Call(layer, _shuffled if self.shuffle else lambda layer, x: layer(x))

    def names(self) -> Names:
        return [Name("", "model.")]


class MonarchFourier(Source):
    """ButterflyFFT, a Monarch matrix that starts as the Fourier transform; it does not look at its ``sizes``."""

    ignored = frozenset({"direction", "norm", "sizes"})
    n: Size

    @property
    def sizes(self) -> tuple[int, int]:
        """The larger and the smaller of the factors of n nearest to its root."""
        small = next(i for i in range(math.isqrt(self.n), 0, -1) if self.n % i == 0)
        return self.n // small, small

    def build(self) -> nn.Module:
        k, l = self.sizes
        module = Formula(self.run, w1_bfly=(k, l, l, 2), w2_bfly=(l, k, k, 2))
        module.register_buffer("perm", torch.arange(self.n).view(l, k).T.flatten())
        return module

    def run(self, m: Any, x: Tensor) -> Tensor:
        """x (..., n), real or complex, or (..., n, 2) -> complex, or pairs where those came in."""
        x, pairs = as_complex(x, self.n)
        w1, w2 = (torch.view_as_complex(w.contiguous()) for w in (m.w1_bfly, m.w2_bfly))
        y = monarch(x[..., m.perm].reshape(-1, self.n), w1, w2).reshape(x.shape)
        return torch.view_as_real(y) if pairs else y

    def names(self) -> Names:
        return [Name("perm", "perm", Turn(self._transposition, lambda t: t)), Name("", "")]

    def _transposition(self, perm: Tensor) -> Tensor:
        k, l = self.sizes
        if not torch.equal(perm.long().cpu(), torch.arange(self.n).view(l, k).T.flatten()):
            raise ValueError(f"'perm' is not the transposition of {l} x {k} that the official code makes")
        return perm.long()


class Butterfly(Source):
    """Butterfly in all its forms:  y = butterfly(x) + bias."""

    ignored = frozenset({"init"})
    in_size: Size
    out_size: Size
    bias: Flag = True
    complex: Flag = False
    increasing_stride: Flag = True
    nblocks: Size = 1
    transpose: Flag = False
    conjugate: Flag = False
    subtwiddle: Flag = False

    def build(self) -> nn.Module:
        levels = (self.in_size - 1).bit_length()
        pair = (2,) if self.complex else ()
        stacks = -(-self.out_size // 2**levels)
        shapes = {"twiddle": (stacks, self.nblocks, levels, 2**levels // 2, 2, 2, *pair)}
        return Formula(self.run, **shapes, **({"bias": (self.out_size, *pair)} if self.bias else {}))

    def run(self, m: Any, x: Tensor) -> Tensor:
        """x (..., in), or complex pairs (..., in, 2) -> (..., out), or pairs where those came in."""
        twiddle, bias, pairs = m.twiddle, m.bias if self.bias else None, False
        increasing, out_size = self.increasing_stride, self.out_size
        if self.complex:
            twiddle = torch.view_as_complex(twiddle.contiguous())
            bias = None if bias is None else torch.view_as_complex(bias.contiguous())
            x, pairs = as_complex(x, self.in_size)
            twiddle = twiddle.conj() if self.conjugate else twiddle
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


def _unitary(angles: Tensor) -> Tensor:
    """Four angles a matrix, phi, alpha, psi and chi, to a 2 x 2 unitary matrix."""
    phi, alpha, psi, chi = angles.unbind(-1)
    angles = torch.stack([alpha + psi, alpha + chi, alpha - chi, alpha - psi], dim=-1)
    sizes = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], dim=-1)
    return torch.stack([sizes * angles.cos(), sizes * angles.sin()], dim=-1).unflatten(-2, (2, 2))


class ButterflyUnitary(Butterfly):
    """ButterflyUnitary, whose matrices are kept as angles."""

    complex: Literal[True] = True

    def names(self) -> Names:
        return [Name("twiddle", "twiddle", Turn(_unitary, lambda t: t.flatten(-3)[..., :4])), Name("", "")]


class BlockButterfly(Source):
    """block_butterfly_multiply, which pads or cuts its input and cuts its output."""

    ignored = frozenset({"input_size"})
    nstacks: Size
    nblocks: Size
    log_n: Size
    block_size: Size
    increasing_stride: Flag = True
    output_size: Size | None = None

    def build(self) -> nn.Module:
        n, b = 2**self.log_n, self.block_size
        if self.output_size is not None and self.output_size > n * b:
            raise ValueError(
                f"the option output_size = {self.output_size} is above the {n * b} features that there are"
            )
        return Formula(self.run, twiddle=(self.nstacks, self.nblocks, self.log_n, n // 2, 2, 2, b, b))

    def run(self, m: Any, x: Tensor) -> Tensor:
        """x (B, stacks, features) -> (B, stacks, output_size)."""
        x = F.pad(x, (0, 2**self.log_n * self.block_size - x.shape[-1]))
        return butterfly(x, m.twiddle, increasing=self.increasing_stride)[..., : self.output_size]


_REAL = {"dct2": True, "dct3": False, "dct4": True, "dst2": True, "dst4": True}  # permuted first?


class Transform(Source):
    """fft, ifft, dct and dst: a permutation and a complex butterfly, in one order or the other."""

    ignored = frozenset({"normalized"})
    kind: Literal["fft", "ifft", "dct2", "dct3", "dct4", "dst2", "dst4"] = "fft"
    n: Size
    br_first: Flag = True

    @property
    def permuted_first(self) -> bool:
        """Whether the permutation comes before the butterfly, which then starts with its closest pairs."""
        return _REAL.get(self.kind, self.br_first)

    def build(self) -> nn.Module:
        if self.n < 2 or self.n & (self.n - 1):
            raise ValueError(f"the option n = {self.n} is no power of two >= 2")
        module = Formula(self.run, twiddle=(1, 1, self.n.bit_length() - 1, self.n // 2, 2, 2, 2))
        module.register_buffer("permutation", torch.zeros(self.n, dtype=torch.int64))
        return module

    def run(self, m: Any, x: Tensor) -> Tensor:
        """x (..., n) or complex pairs (..., n, 2) -> y in the same form."""
        real, first = self.kind in _REAL, self.permuted_first
        x, pairs = (x, False) if real else as_complex(x, self.n)
        x = x[..., m.permutation] if first else x
        twiddle = torch.view_as_complex(m.twiddle.contiguous())
        y = butterfly(x.reshape(-1, 1, self.n), twiddle, increasing=first).reshape(x.shape)
        y = y if first else y[..., m.permutation]
        return y.real if real else torch.view_as_real(y) if pairs else y

    def names(self) -> Names:
        permutation, twiddle = ("0", "1") if self.permuted_first else ("1", "0")
        if self.kind in _REAL:  # with a conversion before and behind the butterfly
            permutation, twiddle = ("0", "2") if self.permuted_first else ("3", "1")
        return [Name(f"{permutation}.permutation", "permutation", WHOLE), Name(f"{twiddle}.twiddle", "twiddle")]


SYSTEMS = {
    "monarch": System(MonarchProduct, BlockdiagProduct, Monarch, Blockdiag, MonarchFourier),
    "butterfly": System(Butterfly, ButterflyUnitary, BlockButterfly, Transform),
}
