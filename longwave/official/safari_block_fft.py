"""BlockFFT of github.com/HazyResearch/safari (commit 02220c6), a Fourier transform in learned blocks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from longwave.nn.block_fft import BlockFFT, block_fft, dft_matrices
from longwave.nn.module import at_least_float32
from longwave.official.blocks import ELEMENTWISE
from longwave.official.system import Choice, Options, Shapes, Size, State, System, prefixed

Transform = Callable[[Tensor, int], Tensor]
_RADIX = 16  # of the official transform, whatever its max_m


def _matrix_sizes(o: Options) -> list[int]:
    """Of the official parameters: max_m says how many there are, and no more than that."""
    if o.max_m < 1 or o.max_m & (o.max_m - 1):
        raise ValueError(f"the option max_m = {o.max_m} is no power of two")
    if not o.learn_dft_matrices:
        return []
    if o.max_m < _RADIX:
        raise ValueError(f"the option max_m = {o.max_m} leaves out the matrix of {_RADIX}, which is always needed")
    return [2**i for i in range(1, o.max_m.bit_length())]


def block_keys(o: Options) -> Shapes:
    """The official keys, every matrix under two names."""
    shapes = [(o.H, n, n, 2) for n in _matrix_sizes(o)]
    return {
        **{f"mat_{shape[1]}": shape for shape in shapes},
        **{f"dft_matrices.{i}": shape for i, shape in enumerate(shapes)},
    }


def block_aliases(o: Options) -> dict[str, str]:
    """The second name of every matrix, to the first."""
    return {f"dft_matrices.{i}": f"mat_{n}" for i, n in enumerate(_matrix_sizes(o))}


def build_block(o: Options) -> Transform:
    """The transform, fixed or learned."""
    activation = None if o.activation is None else ELEMENTWISE[o.activation]()
    if not _matrix_sizes(o):
        return partial(block_fft, activation=activation)
    return BlockFFT(o.H, _RADIX, activation)


def _build_face(o: Options) -> nn.Module:
    if o.N < 1:
        raise ValueError(f"the option N = {o.N} is below 1")
    return BlockFFTFace(build_block(o), o.N)


def convert_block(state: State, o: Options) -> State:
    """The official matrices as ours: whole, where the official ones are added to the Fourier matrices."""
    ours = {}
    if o.learn_dft_matrices:
        for n, fourier in dft_matrices(_RADIX, torch.complex128).items():
            ours[f"mat_{n}"] = state[f"mat_{n}"]
            if o.learn_additive:
                ours[f"mat_{n}"] = ours[f"mat_{n}"] + torch.view_as_real(fourier).to(ours[f"mat_{n}"])
    return ours


class BlockFFTFace(nn.Module):
    """A transform behind the call of the authors' BlockFFT, complex numbers as pairs.

    Args:
        model: the transform.
        length: N.
    """

    def __init__(self, model: Transform, length: int):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (..., H, L) complex, or (..., H, L, 2) real -> {"re", "im"}, (..., H, N rounded up to a power of two)."""
        y = self.model(x if x.is_complex() else torch.view_as_complex(*at_least_float32(x.contiguous())), self.length)
        return {"re": y.real, "im": y.imag}


_BLOCK_OPTIONS = {
    "learn_dft_matrices": True,
    "H": 1,
    "max_m": 16,
    "learn_additive": False,
    "activation": Choice(*ELEMENTWISE, default=None),
}

BLOCK_FFT = System(
    options={**_BLOCK_OPTIONS, "N": Size(), "forward": Choice(True)},
    ignored=frozenset({"dft_lr", "dropout"}),
    keys=block_keys,
    build=_build_face,
    convert=lambda state, o: prefixed("model.", convert_block(state, o)),
    aliases=block_aliases,
)
BLOCK_FFT_ARGS = replace(BLOCK_FFT, options=_BLOCK_OPTIONS)  # to read them; the LongConv around says the length

SYSTEMS = {"blockfft": BLOCK_FFT}
