"""LongConv: one free tap a step, kept in check by squashing, then a gated linear unit.

Source: Fu et al. (2023) "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646.
Parameter names are those of the authors' LongConv (github.com/HazyResearch/safari).
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import FreeFilter, Hint, OutputGLU, init_conv_state, long_conv
from longwave.nn.filters import Smooth


class LongConvState(NamedTuple):
    past: Tensor  # (B, t, channels D) every input so far, once a filter


class LongConvMixer(Mixer, name="long_conv"):
    """y = GLU(W gelu([k_c * x + D_c x]_c)) with k = squash(smooth(free taps)).

    Args:
        d_model: D.
        max_len: longest sequence, one tap a step.
        channels: c, filters a feature, which the linear map after them joins.
        squash: soft threshold on the taps.
        smooth: odd width of the moving average over the taps; 1 is none.
        decay: taps start under an exponential decay.
        dropout: of taps, in training.
    Raises:
        ValueError: for channels < 1, an even width of the average, and on a sequence longer than max_len.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "squash": 0.001},
        {"max_len": 32, "channels": 2, "squash": 0.001, "smooth": 5, "decay": True},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"kernel.kernel": Hint(max_lr=1e-3)}

    def __init__(
        self,
        d_model: int,
        max_len: int,
        channels: int = 1,
        squash: float = 0.003,
        smooth: int = 1,
        decay: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"long_conv needs channels >= 1; got {channels}")
        self.d_model, self.channels = d_model, channels
        rows = channels * d_model
        average = Smooth(smooth) if smooth != 1 else None
        self.kernel = FreeFilter(rows, max_len, squash=squash, smooth=average, decay=decay, dropout=dropout)
        self.D = nn.Parameter(torch.empty(rows))
        self.output_linear = OutputGLU(rows, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> LongConvState:
        return LongConvState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: LongConvState | None = None, *, mask: Tensor | None = None):
        past = None if state is None else state.past
        y, past = long_conv(zero_padding(x, mask).repeat(1, 1, self.channels), self.kernel, past, skip=self.D)
        return self.output_linear(y), None if past is None else LongConvState(past)
