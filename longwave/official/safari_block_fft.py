"""BlockFFT of github.com/HazyResearch/safari (commit 02220c6), a Fourier transform in learned blocks."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.nn.block_fft import BlockFFT, block_fft, dft_matrices
from longwave.nn.module import widened
from longwave.official.blocks import ELEMENTWISE, Call, Elementwise
from longwave.official.replicas.conv import Transform
from longwave.official.source import Alias, Flag, Name, Names, Size, Source, System, Turn, inside, unused

_RADIX = 16  # of the official transform, whatever its max_m


class BlockOptions(Source):
    """The transform of any length."""

    ignored = frozenset({"dft_lr", "dropout"})
    learn_dft_matrices: Flag = True
    H: Size = 1
    max_m: Size = 16
    learn_additive: Flag = False
    activation: Elementwise = None

    def transform(self) -> Transform:
        """It, fixed or learned."""
        if self.max_m & (self.max_m - 1):
            raise ValueError(f"the option max_m = {self.max_m} is no power of two")
        activation = None if self.activation is None else ELEMENTWISE[self.activation]()
        if not self.learn_dft_matrices:
            return partial(block_fft, activation=activation)
        if self.max_m < _RADIX:
            raise ValueError(
                f"the option max_m = {self.max_m} leaves out the matrix of {_RADIX}, which is always needed"
            )
        return BlockFFT(self.H, _RADIX, activation)

    def transform_names(self) -> Names:
        """Every matrix has two names; ours are whole, where the official ones are added to the Fourier matrices."""
        sizes = [2**i for i in range(1, self.max_m.bit_length())] if self.learn_dft_matrices else []
        turn = Turn(self._added, lambda t: t)
        return [
            *(Alias(f"dft_matrices.{i}", f"mat_{n}") for i, n in enumerate(sizes)),
            *(Name(f"mat_{n}", f"mat_{n}", turn) for n in sizes if n <= _RADIX),
            *(unused(f"mat_{n}", self.H, n, n, 2) for n in sizes if n > _RADIX),
        ]

    def _added(self, matrix: Tensor) -> Tensor:
        if not self.learn_additive:
            return matrix
        fourier = dft_matrices(_RADIX, torch.complex128)[matrix.shape[1]]
        return matrix + torch.view_as_real(fourier).to(matrix)


class BlockTransform(BlockOptions):
    """BlockFFT."""

    N: Size
    forward: Literal[True] = True

    def build(self) -> nn.Module:
        transform: Any = self.transform()
        return Call(transform, self.run) if self.learn_dft_matrices else Call(nn.Identity(), self.run_fixed)

    def run(self, transform: Any, x: Tensor) -> dict[str, Tensor]:
        """x (..., H, L) complex, or (..., H, L, 2) real -> {"re", "im"}, (..., H, N rounded up to a power of two)."""
        y = transform(x if x.is_complex() else torch.view_as_complex(*widened(x.contiguous())), self.N)
        return {"re": y.real, "im": y.imag}

    def run_fixed(self, nothing: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """The same without weights."""
        return self.run(self.transform(), x)

    def names(self) -> Names:
        return inside("", "model.", self.transform_names())


SYSTEMS = {"blockfft": System(BlockTransform)}
