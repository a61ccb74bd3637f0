"""Hyena and H3 as variants of github.com/HazyResearch/safari (commit 02220c6) compute them."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from longwave.mixers import Hyena
from longwave.mixers.base import Mixer
from longwave.nn import Filter, HyenaFilter
from longwave.official.replicas.conv import Conv, circular_conv
from longwave.ops import short_conv


class NormalizedFilter(Filter):
    """A Hyena filter whose taps at every time are divided by their L1 norm over the channels.

    Args:
        inner: the filter.
    """

    def __init__(self, inner: HyenaFilter):
        super().__init__()
        self.inner, self.channels = inner, inner.channels

    @property
    def bias(self) -> Tensor:
        """That of the inner filter."""
        return self.inner.bias

    def forward(self, length: int) -> Tensor:
        k = self.inner(length)
        return k / k.abs().sum(0, keepdim=True)


def variant_hyena(model: Hyena, x: Tensor, outer: bool, blocks: int) -> Tensor:
    """Hyena in one head with two switches of the authors.

    Args:
        model: whose parts are used.
        x: (B, L, D).
        outer: ``outer_mixing``:  v <- v sum_c x_i[c], one gate for all channels.
        blocks: ``num_blocks``: the sequence is cut into so many pieces, each convolved on a circle of twice its length
            with the taps of the whole sequence, so that those behind the length of a piece look ahead in it.
    """
    D, conv, filter, L = model.d_model, model.short_filter, model.filter_fn, x.shape[1]
    if L % blocks:
        raise ValueError(f"num_blocks = {blocks} does not divide the length {L}")
    u, _ = short_conv(model.in_proj(x), conv.weight[:, 0], conv.bias)
    first, *gates, v = u.unflatten(1, (blocks, -1)).flatten(0, 1).chunk(model.order + 1, dim=-1)
    taps = filter(L).unflatten(0, (D, -1)).unbind(1)
    for gate, k, bias in zip(reversed(gates), taps, filter.bias.unflatten(0, (D, -1)).unbind(1)):
        v = v * (gate.sum(-1, keepdim=True) if outer else gate)
        v = circular_conv(v, k, 2 * L // blocks, bias)
    return model.out_proj((v * first).unflatten(0, (len(x), blocks)).flatten(1, 2))


class H3Conv(nn.Module):
    """H3 whose two state spaces are free taps:  y = W_o (q . conv(shift(k) v)).

    Both convolutions live on a circle of 2 L steps, as the authors' do: taps from L on look ahead, so that on fewer
    steps than there are taps it is not causal.

    Args:
        d_model: D.
        k_conv, conv: the convolutions of the keys, and of their products with the values.
    """

    def __init__(self, d_model: int, k_conv: Conv, conv: Conv):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.k_conv, self.conv = k_conv, conv
        self.k_D, self.D = (nn.Parameter(torch.zeros(d_model)) for _ in range(2))
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        k, _ = self.k_conv(self.k_proj(x), self.k_D)
        y, _ = self.conv(k * self.v_proj(x), self.D)
        return self.output_linear(self.q_proj(x) * y)


class WholeSequences(Mixer):
    """An official layer that cannot stop and go on, as a mixer of whole sequences; it does not look at masks.

    Args:
        layer: x (B, L, D) -> y (B, L, D).
        d_model: D.
    """

    name = "official layer"

    def __init__(self, layer: nn.Module, d_model: int):
        super().__init__()
        self.layer, self.d_model = layer, d_model

    def init_state(self, batch: int) -> NoReturn:
        raise ValueError("this official layer has no state here; call the model on whole sequences")

    def mix(self, x: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, None]:
        return self.layer(x), None
