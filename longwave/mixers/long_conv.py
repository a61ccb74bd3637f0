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
    past: Tensor  # (B, t, D) every input so far


class LongConvMixer(Mixer, name="long_conv"):
    """y = GLU(W gelu(k * x + D x)) with k = squash(smooth(free taps)).

    Args:
        d_model: D.
        max_len: longest sequence, one tap a step.
        squash: soft threshold on the taps.
        smooth: odd width of the moving average over the taps; 1 is none.
        decay: taps start under an exponential decay.
        dropout: of taps, in training.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "squash": 0.001},
        {"max_len": 32, "squash": 0.01, "smooth": 5, "decay": True},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"kernel.kernel": Hint(max_lr=1e-3)}

    def __init__(
        self,
        d_model: int,
        max_len: int,
        squash: float = 0.003,
        smooth: int = 1,
        decay: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d_model = d_model
        average = Smooth(smooth) if smooth != 1 else None
        self.kernel = FreeFilter(d_model, max_len, squash=squash, smooth=average, decay=decay, dropout=dropout)
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> LongConvState:
        return LongConvState(init_conv_state(self.kernel, batch))

    def forward(self, x: Tensor, state: LongConvState | None = None, *, mask: Tensor | None = None):
        past = None if state is None else state.past
        y, past = long_conv(zero_padding(x, mask), self.kernel, past, skip=self.D)
        return self.output_linear(y), None if past is None else LongConvState(past)
