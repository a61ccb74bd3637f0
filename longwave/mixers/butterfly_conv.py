"""ButterflyConv: LongConv whose Fourier transforms are learned butterfly (Monarch) matrices.

Source: Fu et al. (2023) "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646,
sec. 3.3, FlashButterfly with learned matrices; LongConv with ``block_fft_conv`` of github.com/HazyResearch/safari,
whose two transforms have these names. A learned transform has one length and knows absolute positions, so the layer
is neither causal nor a convolution: it is for whole sequences, and positions count from the first real token.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longwave.mixers.base import WholeMixer
from longwave.nn import FreeFilter, Hint, MonarchFFT, OutputGLU, monarch_conv, monarch_sizes
from longwave.nn.filters.base import require_max_len


class ButterflyConv(WholeMixer, name="butterfly_conv"):
    """y = GLU(W gelu(Re F^-1 (U x . K k) + D x)), U and K learned in ``order`` factors, k = squash(free taps).

    Args:
        d_model: D.
        max_len: longest sequence; the transforms have twice as many points, rounded up to a power of two.
        order: factors of a transform: 2 costs O(L^1.5), 3 O(L^(4/3)), and so on.
        shared: whether all features have the same transforms.
        noise: what is added to the Fourier matrices at the start; with 0 the layer starts as a long convolution.
        squash: soft threshold on the taps.
        decay: taps start under an exponential decay.
        dropout: of taps, in training.
    Raises:
        ValueError: for max_len < 1, an order that the length cannot have, or on a sequence longer than max_len.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 32, "squash": 0.001, "decay": True},
        {"max_len": 17, "order": 3, "shared": True, "noise": 0.05, "squash": 0.0},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"kernel.kernel": Hint(max_lr=1e-3)}

    def __init__(
        self,
        d_model: int,
        max_len: int,
        order: int = 2,
        shared: bool = False,
        noise: float = 0.01,
        squash: float = 0.003,
        decay: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d_model = d_model
        self.kernel = FreeFilter(d_model, max_len, squash=squash, decay=decay, dropout=dropout)
        self.sizes = monarch_sizes(2 * max_len, order)
        if min(self.sizes) < 2:
            raise ValueError(f"butterfly_conv: max_len = {max_len} is too short for transforms of order = {order}")
        features = 1 if shared else d_model
        self.block_fft_u, self.block_fft_k = (MonarchFFT(features, self.sizes, noise=noise) for _ in range(2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        max_len = self.kernel.max_len
        require_max_len("a learned transform", max_len, x.shape[1])
        y = monarch_conv(
            x, self.kernel(max_len), self.sizes, transform_u=self.block_fft_u, transform_k=self.block_fft_k, skip=self.D
        )
        return OutputGLU.around(self.output_linear, y)
