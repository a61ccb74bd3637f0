"""Linear layers whose matrices are block-diagonal, Monarch or butterfly: fewer parameters and multiplications."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.ops import blockdiag_multiply, butterfly, monarch


def _bias(out_features: int, bias: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(out_features)) if bias else None


def _check(in_features: int, out_features: int, blocks: int) -> None:
    if min(in_features, out_features, blocks) < 1:
        raise ValueError(
            f"a structured linear layer needs sizes and blocks >= 1; got in_features = {in_features}, "
            f"out_features = {out_features}, blocks = {blocks}"
        )


def _rows(x: Tensor, width: int) -> Tensor:
    """x (..., in) as (rows, width), zeros behind."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))  # which copies


def _finished(y: Tensor, like: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    """y (rows, wider) cut, put into the shape of ``like`` and shifted."""
    y = y[:, :out_features].reshape(*like.shape[:-1], out_features)
    return y if bias is None else y + bias


class BlockdiagLinear(nn.Module):
    """y = diag(W_1, ..., W_k) x + b: every block of features is mapped on its own.

    Source: Dao et al. (2022) "Monarch", arXiv:2204.00595, sec. 3.1; ``BlockdiagLinear`` of
    github.com/HazyResearch/fly.

    Args:
        in_features, out_features: any sizes; where the blocks do not divide them, zeros are put behind the input and
            the output is cut.
        blocks: k, how many there are.
        bias: whether there is b.
    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int = 4, bias: bool = True):
        super().__init__()
        _check(in_features, out_features, blocks)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(blocks, -(-out_features // blocks), -(-in_features // blocks)))
        self.bias = _bias(out_features, bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight.shape[2] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = blockdiag_multiply(_rows(x, len(self.weight) * self.weight.shape[2]), self.weight)
        return _finished(y, x, self.out_features, self.bias)


class MonarchLinear(nn.Module):
    """y = M x + b with a Monarch matrix M: two block-diagonal factors, of as many blocks each.

    Source: Dao et al. (2022) "Monarch", arXiv:2204.00595, sec. 3.1; ``MonarchLinear`` of
    github.com/HazyResearch/fly, with its parameter names.

    Args:
        in_features, out_features: any sizes; zeros are put behind the input, and the output is cut.
        blocks: of each factor; sqrt(n) of them for the fewest multiplications.
        bias: whether there is b.
    Parameters:
        blkdiag1, blkdiag2: (blocks, q, in / blocks), (blocks, out / blocks, q), rounded up; q is the smaller of the
            two block widths, in / blocks and out / blocks.
    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int = 4, bias: bool = True):
        super().__init__()
        _check(in_features, out_features, blocks)
        self.in_features, self.out_features = in_features, out_features
        p, s = -(-in_features // blocks), -(-out_features // blocks)
        self.blkdiag1 = nn.Parameter(torch.empty(blocks, min(p, s), p))
        self.blkdiag2 = nn.Parameter(torch.empty(blocks, s, min(p, s)))
        self.bias = _bias(out_features, bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for factor in (self.blkdiag1, self.blkdiag2):
            factor.uniform_(-(factor.shape[2] ** -0.5), factor.shape[2] ** -0.5)
        if self.bias is not None:
            self.bias.uniform_(-(self.out_features**-0.5), self.out_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = monarch(_rows(x, len(self.blkdiag1) * self.blkdiag1.shape[2]), self.blkdiag1, self.blkdiag2)
        return _finished(y, x, self.out_features, self.bias)


class ButterflyLinear(nn.Module):
    """y = B x + b with B a product of ``depth`` butterfly matrices, as many of them on top of each other as y needs.

    Source: Dao et al. (2019) "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations",
    arXiv:1903.05895; Dao et al. (2020) "Kaleidoscope", arXiv:2012.14966; ``Butterfly`` of
    github.com/HazyResearch/butterfly, with its parameter names.

    Args:
        in_features, out_features: any sizes; zeros are put behind the input up to a power of two n, and of
            ceil(out_features / n) stacks of n outputs the first out_features are kept.
        depth: D, how many butterflies are multiplied; every second one runs in the other direction.
        increasing: whether the first one starts with its closest pairs.
        bias: whether there is b.
        complex: whether parameters and output are complex.
    Parameters:
        twiddle: (S, D, log2 n, n/2, 2, 2), with a last axis of two (real, imaginary) where complex; see
            :func:`longwave.ops.butterfly`. They start as random rotations, so that B is orthogonal (unitary).
    Raises:
        ValueError: for sizes or a depth below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int = 1,
        *,
        increasing: bool = True,
        bias: bool = True,
        complex: bool = False,
    ):
        super().__init__()
        if min(in_features, out_features, depth) < 1:
            raise ValueError(
                f"a butterfly needs sizes and a depth >= 1; got in_features = {in_features}, "
                f"out_features = {out_features}, depth = {depth}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.increasing, self.complex = increasing, complex
        levels = (in_features - 1).bit_length()
        self.width = 2**levels
        pair = (2, 2, 2) if complex else (2, 2)
        stacks = -(-out_features // self.width)
        self.twiddle = nn.Parameter(torch.empty(stacks, depth, levels, self.width // 2, *pair))
        size = (out_features, 2) if complex else (out_features,)
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        angle = 2 * math.pi * torch.rand_like(self.twiddle[..., 0, 0, 0] if self.complex else self.twiddle[..., 0, 0])
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
        if self.complex:
            phase = 2 * math.pi * torch.rand_like(rotation[..., 0])[..., None]  # one for each row
            rotation = torch.stack([rotation * phase.cos(), rotation * phase.sin()], dim=-1)
        self.twiddle.copy_(rotation)
        if self.bias is not None:
            self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        twiddle: Tensor = self.twiddle
        bias: Tensor | None = self.bias
        if self.complex:
            twiddle = torch.view_as_complex(twiddle.contiguous())
            bias = None if bias is None else torch.view_as_complex(bias)
        stacked = _rows(x, self.width)[:, None].expand(-1, len(twiddle), -1)
        return _finished(butterfly(stacked, twiddle, increasing=self.increasing).flatten(1), x, self.out_features, bias)
