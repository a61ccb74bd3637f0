"""Hyena: gates and implicit long convolutions in turn, a data-controlled operator without attention.

Source: Poli et al. (2023) "Hyena Hierarchy", arXiv:2302.10866, definition 3.1 and algorithm 3. Parameter names are
those of the authors' HyenaOperator (github.com/HazyResearch/safari).
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from longwave.mixers.base import Mixer, zero_padding
from longwave.nn import HyenaFilter, conv_with_past
from longwave.ops import short_conv


class HyenaState(NamedTuple):
    short: Tensor  # (B, K-1, (order+1) D) the short convolution's past
    pasts: tuple[Tensor, ...]  # order - 1 times (B, t, D): every gated input so far


class Hyena(Mixer, name="hyena"):
    """v <- v x_i;  v <- k_i * v + bias_i v;  for every order;  y = W_o (v x_0).

    Args:
        d_model: D.
        max_len: longest sequence.
        order: of the recurrence, >= 2: order + 1 projections, order - 1 long convolutions.
        d_conv: K, taps of the short convolution on the projections.
        emb_dim, width, inner_layers, frequency, target, slowest, fastest, shift: of the implicit filter, see
            :class:`longwave.nn.HyenaFilter`.
    Raises:
        ValueError: for order < 2, and on a sequence longer than max_len.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "width": 8, "emb_dim": 5},
        {"max_len": 32, "order": 3, "d_conv": 4, "width": 4, "emb_dim": 3, "frequency": 1.0, "shift": 0.05},
    )

    def __init__(
        self,
        d_model: int,
        max_len: int,
        order: int = 2,
        d_conv: int = 3,
        emb_dim: int = 33,
        width: int = 64,
        inner_layers: int = 2,
        frequency: float = 14.0,
        target: float = 1e-2,
        slowest: float = 1.5,
        fastest: float = 0.3,
        shift: float = 0.0,
    ):
        super().__init__()
        if order < 2:
            raise ValueError(f"hyena needs order >= 2; got {order}")
        self.d_model, self.order = d_model, order
        inner = (order + 1) * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, inner), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.filter_fn = HyenaFilter(
            d_model * (order - 1),
            max_len,
            emb_dim=emb_dim,
            width=width,
            inner_layers=inner_layers,
            frequency=frequency,
            target=target,
            slowest=slowest,
            fastest=fastest,
            shift=shift,
        )

    def init_state(self, batch: int) -> HyenaState:
        weight, (inner, _, K) = self.in_proj.weight, self.short_filter.weight.shape
        past = weight.new_zeros(batch, 0, self.d_model)
        return HyenaState(weight.new_zeros(batch, K - 1, inner), (past,) * (self.order - 1))

    def forward(self, x: Tensor, state: HyenaState | None = None, *, mask: Tensor | None = None):
        short, pasts = (None, [None] * (self.order - 1)) if state is None else state
        conv = self.short_filter
        u, short = short_conv(zero_padding(self.in_proj(x), mask), conv.weight[:, 0], conv.bias, short)
        first, *gates, v = zero_padding(u, mask).chunk(self.order + 1, dim=-1)
        length = x.shape[1] if state is None else x.shape[1] + state.pasts[0].shape[1]
        taps = self.filter_fn(length).unflatten(0, (self.d_model, -1)).unbind(1)  # order - 1 times (D, length)
        biases = self.filter_fn.bias.unflatten(0, (self.d_model, -1)).unbind(1)
        kept = []
        for gate, k, bias, past in zip(reversed(gates), taps, biases, pasts):
            v, past = conv_with_past(v, k, past, skip=bias, gate_in=gate)
            kept.append(past)
        return self.out_proj(v * first), None if state is None else HyenaState(short, tuple(kept))
