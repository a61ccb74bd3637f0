"""Causal softmax attention: grouped heads, rotary positions, a window, norms of queries and keys, a short convolution,
a gate.

Sources: Vaswani et al. (2017), arXiv:1706.03762, eq. 1; Su et al. (2021), arXiv:2104.09864, eq. 34; grouped heads:
Ainslie et al. (2023), arXiv:2305.13245; the window: Beltagy et al. (2020), arXiv:2004.05150; the gate: Qiu et al.
(2025), arXiv:2505.06708. Parameter names are those
of flash_attn's MHA, which the H3 and Hyena hybrids use.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.mixers.states import Growing
from longwave.nn import NORMS, POSITIONS, AnyNorm, AnyPositions, append_time, like_output
from longwave.nn.padding import last_steps, padded_short_conv, silence
from longwave.ops import attention, attention_step


class AttentionState(NamedTuple):
    kv: Growing  # (B, t, 2 J, P) keys, and behind them values, of so many last tokens; a shorter row's stand at the end
    length: Tensor  # (B,) int64: real tokens so far
    short: Tensor  # (B, K-1, C) the short convolution's past, or (B, 0, C) where there is none


class Attention(Mixer, name="attention"):
    """y = W_o softmax(scale q k^T) v, causal; with a gate y = W_o (sigmoid(W_g x) . softmax(scale q k^T) v).

    Args:
        d_model: D.
        heads: H, of queries.
        kv_heads: J, of keys and values, divides H: head h looks up keys of head h J / H; None is H, 1 is multi-query.
        head_dim: P, width of a head; None is D / H.
        positions: what turns queries and keys by their positions; None for nothing.
        window: W >= 1, a token sees no more than the last W, itself included; None is all.
        qk_norm: of every head of queries and of keys, before positions; None for none.
        bias: on the projections.
        out_bias: on the last one; None is as ``bias``.
        d_conv: K, taps of a depthwise convolution on queries, keys and values; 0 for none.
        scale: of the logits; None is P^-0.5.
        gate: whether there is one.
    Raises:
        ValueError: where heads do not divide d_model and head_dim is None, kv_heads do not divide heads, the window is
            below 1, or positions refuse the width of a head.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "positions": None, "bias": False, "window": 5, "qk_norm": "rms"},
        {
            "heads": 2, "kv_heads": 1, "head_dim": 6, "d_conv": 3, "scale": 0.3, "out_bias": False, "gate": True,
            "positions": {"kind": "rotary", "dim": 2, "scaling": {"kind": "llama3", "length": 8}},
        },
    )  # fmt: skip

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: AnyPositions | None = POSITIONS.make("rotary"),  # noqa: B008
        window: int | None = None,
        qk_norm: AnyNorm | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        d_conv: int = 0,
        scale: float | None = None,
        gate: bool = False,
    ):
        super().__init__()
        if heads < 1 or (head_dim is None and d_model % heads):
            raise ValueError(f"attention: heads = {heads} does not divide d_model = {d_model}; or give head_dim")
        P = d_model // heads if head_dim is None else head_dim
        J = heads if kv_heads is None else kv_heads
        if J < 1 or heads % J:
            raise ValueError(f"attention: kv_heads = {kv_heads} does not divide heads = {heads}")
        for option, value, least in (("head_dim", P, 1), ("window", window, 1), ("d_conv", d_conv, 0)):
            if value is not None and value < least:
                raise ValueError(f"attention needs {option} >= {least}; got {value}")
        self.d_model, self.heads, self.kv_heads, self.head_dim = d_model, heads, J, P
        self.window, self.d_conv, self.scale = window, d_conv, scale
        seen = "every past token" if window is None else f"the last {window:,} tokens, its own included,"
        self.without_filter = f"looks at {seen} by content"
        C = (heads + 2 * J) * P
        self.Wqkv = nn.Linear(d_model, C, bias=bias)
        self.dwconv_qkv = nn.Conv1d(C, C, d_conv, groups=C) if d_conv else None
        self.q_norm, self.k_norm = (None if qk_norm is None else NORMS.read(qk_norm).build(P) for _ in "qk")
        self.positions = None if positions is None else POSITIONS.read(positions).build(P)
        self.gate_proj = nn.Linear(d_model, heads * P, bias=bias) if gate else None
        self.out_proj = nn.Linear(heads * P, d_model, bias=bias if out_bias is None else out_bias)

    def init_state(self, batch: int) -> AttentionState:
        like = like_output(self.Wqkv)
        kv = like.new_zeros(batch, 0, 2 * self.kv_heads, self.head_dim)
        short = like.new_zeros(batch, max(0, self.d_conv - 1), (self.heads + 2 * self.kv_heads) * self.head_dim)
        return AttentionState(kv, torch.zeros(batch, dtype=torch.int64, device=like.device), short)

    def mix(self, x: Tensor, state: AttentionState | None, padding: Tensor | None):
        H, J, L = self.heads, self.kv_heads, x.shape[1]
        qkv, short = self.Wqkv(x), None if state is None else state.short
        if self.dwconv_qkv is not None:
            conv = self.dwconv_qkv
            qkv, short = padded_short_conv(silence(qkv, padding), conv.weight[:, 0], conv.bias, short, padding)
        heads = qkv.view(*x.shape[:2], H + 2 * J, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.split([H, J, J], dim=2)
            heads = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=2)
        if self.positions is not None:
            heads = self.positions(heads, None if state is None else state.length, H + J)
        q, kv = heads.split([H, 2 * J], dim=2)
        if state is None:  # padding is behind all real tokens, which do not see it
            y = attention(q, *kv.chunk(2, dim=2), scale=self.scale, window=self.window)
            return self._out(x, y), None
        kv = append_time(state.kv, kv)
        past, T, seen = kv.to(q.dtype), kv.shape[1], state.length + L
        if L == 1:
            y = attention_step(q, past, seen, self.scale)
        else:
            mask = None if T == L else torch.arange(T, device=x.device) >= (T - seen)[:, None]
            y = attention(q, *past.chunk(2, dim=2), mask=mask, scale=self.scale, window=self.window)
        if padding is not None:
            kv, seen = last_steps(kv, padding, T), seen - padding
        state = AttentionState(self._kept(kv, L), seen, state.short if short is None else short)
        return self._out(x, y), state

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the input x (B, L, D) and what heads have found, y (B, L, H, P)."""
        y = y.flatten(2)
        return self.out_proj(y if self.gate_proj is None else y * self.gate_proj(x).sigmoid())

    def _kept(self, kv: Tensor, new: int) -> Tensor:
        """The keys and values that later tokens see; where many came in, in memory of no more than these."""
        if self.window is None:
            return kv
        if torch.compiler.is_exporting():  # of one size whatever came in: in front there may be what never was
            kv = F.pad(kv, (0, 0, 0, 0, self.window - 1, 0))
        kept = kv[:, -(self.window - 1) :] if self.window > 1 else kv[:, :0]
        return kept.clone() if torch.compiler.is_compiling() or new >= self.window else kept
