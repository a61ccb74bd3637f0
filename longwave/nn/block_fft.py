"""The Fourier transform as a product of small matrices, which may be learned."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.module import Hint, widened

Activation = Callable[[Tensor], Tensor]


def dft_matrices(
    radix: int = 16, dtype: torch.dtype = torch.complex64, device: torch.device | str | None = None
) -> dict[int, Tensor]:
    """The matrices exp(-2 pi i j k / n), (n, n) each, for n = 2, 4, ..., radix; angles are in float64.

    Raises:
        ValueError: for a radix that is no power of two >= 2.
    """
    if radix < 2 or radix & (radix - 1):
        raise ValueError(f"radix = {radix} is no power of two >= 2")
    sizes = [2**i for i in range(1, radix.bit_length())]
    return {n: roots_of_unity(n, n, n, device).to(dtype) for n in sizes}


def roots_of_unity(rows: int, columns: int, period: int, device: torch.device | str | None = None) -> Tensor:
    """exp(-2 pi i j k / period), (rows, columns) in complex128.

    The Fourier matrix of size n where all three are n; the twiddle factors between a transform of the rows and one of
    the columns where the period is rows * columns.
    """
    turns = torch.arange(rows, device=device)[:, None] * torch.arange(columns, device=device) % period
    angle = turns.double() * (-2 * torch.pi / period)
    return torch.polar(torch.ones_like(angle), angle)


def block_fft(
    x: Tensor, length: int, matrices: Mapping[int, Tensor] | None = None, activation: Activation | None = None
) -> Tensor:
    """The transform of Cooley and Tukey in blocks of R, with any matrices in place of the Fourier matrices.

    Source: Fu et al. (2023) "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646, on
    FlashButterfly and its learned matrices; ``BlockFFT`` of github.com/HazyResearch/safari, which fails where
    length <= R and here is one matrix. Of length = R n, as a matrix (R, n): multiply by the R x R matrix, by
    exp(-2 pi i j k / length), transpose, and go on likewise with the axis of n; n <= R takes the n x n matrix.

    Args:
        x: (..., H, T) real or complex. Behind it come zeros up to the length; what is behind the length is dropped.
        length: >= 1; rounded up to a power of two.
        matrices: (n, n) or (H, n, n) complex, or with H = 1, for n = 2, 4, ..., R; None for the Fourier matrices up
            to 16, which make this ``torch.fft.fft``.
        activation: elementwise, on the real and the imaginary parts (..., 2) behind every matrix.
    Returns:
        (..., H, length rounded up), complex in the widest dtype of x and the matrices, at least complex64.
    Raises:
        ValueError: for a length < 1, or matrices of H that does not fit x.
    Cost: O(length R log_R(length)) time.
    """
    if length < 1:
        raise ValueError(f"length = {length} is below 1")
    size = 1 << (length - 1).bit_length()
    if matrices is None:
        matrices = dft_matrices(dtype=torch.promote_types(x.dtype, torch.complex64), device=x.device)
    R, sizes, rest = max(matrices), [], size
    while rest > R:
        sizes.append(R)
        rest //= R
    return monarch_fft(x, [matrices[n] for n in [*sizes, rest] if n > 1], activation)


def monarch_sizes(length: int, order: int) -> tuple[int, ...]:
    """``order`` powers of two as near to each other as can be, the larger ones first, whose product is >= length.

    Raises:
        ValueError: for a length or an order below 1.
    """
    if length < 1 or order < 1:
        raise ValueError(f"length and order are at least 1; got length = {length}, order = {order}")
    bits = (length - 1).bit_length()
    return tuple(2 ** (bits // order + (i < bits % order)) for i in range(order))


def fourier_factors(
    sizes: Sequence[int], dtype: torch.dtype = torch.complex64, device: torch.device | str | None = None
) -> list[Tensor]:
    """The Fourier matrix of every size: with them :func:`monarch_fft` is ``torch.fft.fft``."""
    return [roots_of_unity(n, n, n, device).to(dtype) for n in sizes]


def monarch_fft(x: Tensor, matrices: Sequence[Tensor], activation: Activation | None = None) -> Tensor:
    """The Fourier transform of length N = n_1 n_2 ... n_p as p Monarch factors, with any matrices as the blocks.

    Source: Fu et al. (2023), arXiv:2302.06646, sec. 3.3 (order-p butterfly decomposition); Fu et al. (2023)
    "FlashFFTConv", arXiv:2311.05908, sec. 3.1 and algorithm 1. Of x as a matrix (n_1, N / n_1): multiply by the first
    matrix, by exp(-2 pi i j k / N), transpose, and go on likewise with the axis of N / n_1.

    Args:
        x: (..., H, T) real or complex. Behind it come zeros up to N; what is behind N is dropped.
        matrices: p of them, (n_i, n_i) or (H, n_i, n_i) complex, or with H = 1.
        activation: elementwise, on the real and the imaginary parts (..., 2) behind every matrix.
    Returns:
        (..., H, N), complex in the widest dtype of x and the matrices, at least complex64.
    Raises:
        ValueError: for matrices that are not square or of H that does not fit x.
    Cost: O(N (n_1 + ... + n_p)) time.
    """
    dtype = torch.promote_types(x.dtype, torch.complex64)
    for matrix in matrices:
        dtype = torch.promote_types(dtype, matrix.dtype)
        if matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"the matrices of a transform are square; got shape {tuple(matrix.shape)}")
        if matrix.ndim > 2 and x.ndim > 1 and len({1, len(matrix), x.shape[-2]}) > 2:
            raise ValueError(f"x has {x.shape[-2]} features; the matrices have {len(matrix)}")
    size = math.prod([matrix.shape[-1] for matrix in matrices])
    x = F.pad(x, (0, size - x.shape[-1])).to(dtype)
    return _columns(x[..., None], [matrix.to(dtype) for matrix in matrices], activation)[..., 0]


def _columns(x: Tensor, matrices: Sequence[Tensor], activation: Activation | None) -> Tensor:
    """The transform of every column of x (..., N, C)."""
    if not matrices:
        return x
    N, C, R = *x.shape[-2:], matrices[0].shape[-1]
    if N == R:
        return _apply(matrices[0], x, activation)
    n = N // R
    x = _apply(matrices[0], x.unflatten(-2, (R, n)).flatten(-2), activation).unflatten(-1, (n, C))  # (..., R, n, C)
    x = x * roots_of_unity(R, n, N, x.device).to(x.dtype)[..., None]
    x = _columns(x.transpose(-3, -2).flatten(-2), matrices[1:], activation)  # (..., n, R C)
    return x.unflatten(-1, (R, C)).flatten(-3, -2)


def _apply(matrix: Tensor, x: Tensor, activation: Activation | None) -> Tensor:
    x = matrix @ x
    return x if activation is None else torch.view_as_complex(activation(torch.view_as_real(x)).contiguous())


class BlockFFT(nn.Module):
    """:func:`block_fft` with learned matrices, which start as the Fourier matrices.

    Args:
        features: H, each with its own matrices; 1 for the same ones everywhere.
        radix: R, the largest matrix, a power of two >= 2.
        activation: behind every matrix.
    Parameters:
        mat_2, mat_4, ..., mat_R: (H, n, n, 2), real and imaginary parts; those that a length does not need get no
            gradient.
    Raises:
        ValueError: for any other radix.
    """

    optim_hints: ClassVar[dict[str, Hint]] = {"mat_*": Hint(max_lr=1e-3)}

    def __init__(self, features: int, radix: int = 16, activation: Activation | None = None):
        super().__init__()
        self.radix, self.activation = radix, activation
        for n in dft_matrices(radix):
            self.register_parameter(f"mat_{n}", nn.Parameter(torch.empty(features, n, n, 2)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for n, matrix in dft_matrices(self.radix).items():
            getattr(self, f"mat_{n}").copy_(torch.view_as_real(matrix))

    def forward(self, x: Tensor, length: int) -> Tensor:
        """x (..., H, T) real or complex -> (..., H, length rounded up to a power of two) complex."""
        pairs = {int(name.removeprefix("mat_")): p for name, p in self.named_parameters(recurse=False)}
        matrices = {n: torch.view_as_complex(widened(p)[0].contiguous()) for n, p in pairs.items()}
        return block_fft(x, length, matrices, self.activation)


class MonarchFFT(nn.Module):
    """:func:`monarch_fft` of one length with learned matrices, which start as the Fourier matrices or near them.

    Source: Fu et al. (2023), arXiv:2302.06646, sec. 3.3, the learned butterflies.

    Args:
        features: H, each with its own matrices; 1 for the same ones everywhere.
        sizes: n_1, ..., n_p, each >= 2; the length is their product. p is the order of the decomposition.
        noise: standard deviation of what is added to the Fourier matrices at the start, >= 0; 0.01 is the start of
            the authors' ``learn_additive``, whose parameters are the difference alone.
        activation: behind every matrix.
    Parameters:
        factors.i: (H, n_i, n_i, 2), real and imaginary parts.
    Raises:
        ValueError: for no sizes, one below 2, or a negative noise.
    """

    optim_hints: ClassVar[dict[str, Hint]] = {"factors.*": Hint(max_lr=1e-3)}

    def __init__(
        self, features: int, sizes: Sequence[int], *, noise: float = 0.0, activation: Activation | None = None
    ):
        super().__init__()
        if not sizes or min(sizes) < 2 or noise < 0:
            raise ValueError(
                f"a learned transform needs sizes >= 2 and noise >= 0; got sizes = {tuple(sizes)}, noise = {noise}"
            )
        self.sizes, self.noise, self.activation = tuple(sizes), noise, activation
        self.factors = nn.ParameterList(torch.empty(features, n, n, 2) for n in sizes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for factor, fourier in zip(self.factors, fourier_factors(self.sizes, device=self.factors[0].device)):
            factor.normal_(std=self.noise).add_(torch.view_as_real(fourier))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H, T) real or complex -> (..., H, n_1 ... n_p) complex."""
        factors = [torch.view_as_complex(factor.contiguous()) for factor in widened(*self.factors)]
        return monarch_fft(x, factors, self.activation)
