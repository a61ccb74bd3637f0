"""Causal softmax attention with rotary positions or none.

Sources: Vaswani et al. (2017), arXiv:1706.03762, eq. 1; Su et al. (2021), arXiv:2104.09864, eq. 34. Parameter names are
those of flash_attn's MHA, which the H3 and Hyena hybrids use.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import append_time, rotate
from longwave.nn.padding import is_real
from longwave.ops import attention


class AttentionState(NamedTuple):
    k: Tensor  # (B, t, H, P) every key so far
    v: Tensor  # (B, t, H, P)
    seen: Tensor  # (B, t) bool: False at padding


class Attention(Mixer, name="attention"):
    """y = W_o softmax(q k^T / sqrt(P)) v, causal.

    Args:
        d_model: D.
        heads: H, divides D.
        rotary_base: base of the rotary frequencies; None gives no positions at all.
        bias: on the projections.
    Raises:
        ValueError: where heads does not divide d_model, or leaves odd heads for rotary pairs.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"heads": 2}, {"heads": 4, "rotary_base": None, "bias": False})

    def __init__(self, d_model: int, heads: int = 8, rotary_base: float | None = 10_000.0, bias: bool = True):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"attention: heads = {heads} does not divide d_model = {d_model}")
        if rotary_base is not None and d_model // heads % 2:
            raise ValueError(
                f"attention: rotary positions need an even head width; d_model = {d_model} over heads = {heads} "
                f"gives {d_model // heads}"
            )
        if rotary_base is not None and not rotary_base > 0:
            raise ValueError(f"attention: rotary_base > 0, or None for no positions; got {rotary_base}")
        self.d_model, self.heads, self.rotary_base = d_model, heads, rotary_base
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def init_state(self, batch: int) -> AttentionState:
        weight = self.Wqkv.weight
        empty = weight.new_zeros(batch, 0, self.heads, self.d_model // self.heads)
        return AttentionState(empty, empty, torch.zeros(batch, 0, dtype=torch.bool, device=weight.device))

    def mix(self, x: Tensor, state: AttentionState | None, padding: Tensor | None):
        start = 0 if state is None else state.seen.sum(1)  # by row: padding takes no position
        mask = None if padding is None else is_real(x.shape[1], padding)
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, P) each
        if self.rotary_base is not None:
            q, k = rotate(q, start, self.rotary_base), rotate(k, start, self.rotary_base)
        if state is not None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            state = AttentionState(append_time(state.k, k), append_time(state.v, v), append_time(state.seen, real))
            k, v, mask = state.k.to(q.dtype), state.v.to(q.dtype), state.seen
        y = attention(q, k, v, mask=mask)
        return self.out_proj(y.flatten(2)), state
