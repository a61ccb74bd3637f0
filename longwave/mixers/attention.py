"""Causal softmax attention with rotary positions or none, and a short convolution before it or none.

Sources: Vaswani et al. (2017), arXiv:1706.03762, eq. 1; Su et al. (2021), arXiv:2104.09864, eq. 34. Parameter names are
those of flash_attn's MHA, which the H3 and Hyena hybrids use.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.mixers.states import Growing
from longwave.nn import append_time, like_output, rotate
from longwave.nn.padding import is_real, padded_short_conv, silence
from longwave.ops import attention


class AttentionState(NamedTuple):
    k: Growing  # (B, t, H, P) every key so far
    v: Growing  # (B, t, H, P)
    seen: Growing  # (B, t) bool: False at padding
    short: Tensor  # (B, K-1, 3 D) the short convolution's past, or (B, 0, 3 D) where there is none


class Attention(Mixer, name="attention"):
    """y = W_o softmax(scale q k^T) v, causal.

    Args:
        d_model: D.
        heads: H, divides D.
        rotary_base: base of the rotary frequencies; None gives no positions at all.
        bias: on the projections.
        rotary_dim: how many dimensions of each head are turned; None is all.
        d_conv: K, taps of a depthwise convolution on queries, keys and values; 0 for none.
        scale: of the logits; None is P^-0.5.
    Raises:
        ValueError: where heads does not divide d_model, or the dimensions to turn are no pairs within a head.
    """

    without_filter = "looks at every past token by content"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 4, "rotary_base": None, "bias": False},
        {"heads": 2, "rotary_dim": 2, "d_conv": 3, "scale": 0.3},
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        rotary_base: float | None = 10_000.0,
        bias: bool = True,
        rotary_dim: int | None = None,
        d_conv: int = 0,
        scale: float | None = None,
    ):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"attention: heads = {heads} does not divide d_model = {d_model}")
        if d_conv < 0:
            raise ValueError(f"attention: d_conv >= 1 taps, or 0 for no convolution; got {d_conv}")
        width = d_model // heads
        turned = width if rotary_dim is None else rotary_dim
        if rotary_base is not None and rotary_dim is None and width % 2:
            raise ValueError(
                f"attention: rotary positions need an even head width; d_model = {d_model} over heads = {heads} "
                f"gives {width}"
            )
        if rotary_base is not None and (turned % 2 or not 2 <= turned <= width):
            raise ValueError(f"attention: rotary_dim must be even, 2 to {width}, the width of a head; got {rotary_dim}")
        if rotary_base is not None and not rotary_base > 0:
            raise ValueError(f"attention: rotary_base > 0, or None for no positions; got {rotary_base}")
        self.d_model, self.heads, self.rotary_base, self.rotary_dim = d_model, heads, rotary_base, turned
        self.d_conv, self.scale = d_conv, scale
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.dwconv_qkv = nn.Conv1d(3 * d_model, 3 * d_model, d_conv, groups=3 * d_model) if d_conv else None
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def init_state(self, batch: int) -> AttentionState:
        like = like_output(self.Wqkv)
        empty = like.new_zeros(batch, 0, self.heads, self.d_model // self.heads)
        short = like.new_zeros(batch, max(0, self.d_conv - 1), 3 * self.d_model)
        return AttentionState(empty, empty, torch.zeros(batch, 0, dtype=torch.bool, device=like.device), short)

    def mix(self, x: Tensor, state: AttentionState | None, padding: Tensor | None):
        start = 0 if state is None else state.seen.sum(1)  # by row: padding takes no position
        mask = None if padding is None else is_real(x.shape[1], padding)
        qkv, short = self.Wqkv(x), None if state is None else state.short
        if self.dwconv_qkv is not None:
            conv = self.dwconv_qkv
            qkv, short = padded_short_conv(silence(qkv, padding), conv.weight[:, 0], conv.bias, short, padding)
        qk, v = qkv.unflatten(-1, (3 * self.heads, -1)).tensor_split([2 * self.heads], dim=2)  # (B, L, 2 H or H, P)
        q, k = self._turned(qk, start).chunk(2, dim=2)
        if state is not None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            past, seen = (append_time(state.k, k), append_time(state.v, v)), append_time(state.seen, real)
            state = AttentionState(*past, seen, state.short if short is None else short)
            k, v, mask = state.k.to(q.dtype), state.v.to(q.dtype), state.seen
        y = attention(q, k, v, mask=mask, scale=self.scale)
        return self.out_proj(y.flatten(2)), state

    def _turned(self, x: Tensor, start: int | Tensor) -> Tensor:
        if self.rotary_base is None:
            return x
        turned, kept = x.tensor_split([self.rotary_dim], dim=-1)
        return torch.cat([rotate(turned, start, self.rotary_base), kept], dim=-1)
