"""LFM2's short convolution: the lightest of mixers, a gate before and a gate behind a few taps.

Source: Liquid AI (2025) "LFM2 Technical Report", arXiv:2511.23404, sec. 2; parameter names are those of Lfm2ShortConv
of Hugging Face transformers.
"""

from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Response, like_output
from longwave.nn.padding import padded_short_conv, silence


class LFM2ConvState(NamedTuple):
    conv: Tensor  # (B, K-1, D) the convolution's past


class LFM2Conv(Mixer, name="lfm2_conv"):
    """y = W_o (c . conv(b . u)),  [b | c | u] = W_i x.

    Args:
        d_model: D.
        d_conv: K, taps of the convolution.
        bias: on both maps and the convolution.
    Raises:
        ValueError: for d_conv < 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"d_conv": 4, "bias": True})

    def __init__(self, d_model: int, d_conv: int = 3, bias: bool = False):
        super().__init__()
        if d_conv < 1:
            raise ValueError(f"lfm2_conv needs d_conv >= 1; got {d_conv}")
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.conv = nn.Conv1d(d_model, d_model, d_conv, groups=d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def responses(self) -> list[Response]:
        """Its few taps; what gates them is content."""
        weight = self.conv.weight[:, 0].flip(1)

        def taps(length: int) -> Tensor:
            return F.pad(weight[:, :length], (0, max(0, length - weight.shape[1])))

        return [Response("conv", self.d_model, taps)]

    def init_state(self, batch: int) -> LFM2ConvState:
        return LFM2ConvState(like_output(self.in_proj).new_zeros(batch, self.conv.kernel_size[0] - 1, self.d_model))

    def mix(self, x: Tensor, state: LFM2ConvState | None, padding: Tensor | None):
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        taps, bias, past = self.conv.weight[:, 0], self.conv.bias, None if state is None else state.conv
        y, past = padded_short_conv(silence(b * u, padding), taps, bias, past, padding)
        return self.out_proj(c * y), None if state is None else LFM2ConvState(past)
