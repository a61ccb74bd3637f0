"""LongConv: one free tap a step, kept in check by squashing, then a gated linear unit.

Source: Fu et al. (2023) "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646.
Parameter names are those of the authors' LongConv (github.com/HazyResearch/safari).
"""

from typing import Any, ClassVar, NamedTuple

from longwave.mixers.conv_layer import ConvLayer
from longwave.mixers.states import Growing
from longwave.nn import FreeFilter, Hint, OutputGLU
from longwave.nn.filters import Smooth


class LongConvState(NamedTuple):
    past: Growing  # (B, t, C) every input so far


class LongConvMixer(ConvLayer, name="long_conv"):
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

    State = LongConvState
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
        if channels < 1:
            raise ValueError(f"long_conv needs channels >= 1; got {channels}")
        average = Smooth(smooth) if smooth != 1 else None
        kernel = FreeFilter(channels * d_model, max_len, squash=squash, smooth=average, decay=decay, dropout=dropout)
        super().__init__(d_model, kernel, OutputGLU(channels * d_model, d_model))
