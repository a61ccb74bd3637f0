"""Hyena: gates and implicit long convolutions in turn, a data-controlled operator without attention.

Source: Poli et al. (2023) "Hyena Hierarchy", arXiv:2302.10866, definition 3.1 and algorithm 3. Parameter names are
those of the authors' HyenaOperator (github.com/HazyResearch/safari). The two-sided one is the sequence mixer of Fu et
al. (2023) "Monarch Mixer", arXiv:2310.12109, sec. 4 and app., without its second convolutions.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer, WholeMixer
from longwave.mixers.states import Growing
from longwave.nn import (
    HyenaFilter,
    ModalFilter,
    Taps,
    conv_with_past,
    derived,
    init_conv_state,
    long_conv,
    online_length,
    taps_needed,
)
from longwave.nn.padding import padded_short_conv, silence
from longwave.ops import causal_conv


class HyenaState(NamedTuple):
    short: Tensor  # (B, K-1, (order+1) D) the short convolution's past
    pasts: tuple[Growing, ...]  # order - 1 times (B, t, D): every gated input so far


class HyenaGates(Mixer):
    """What all layers share: projections with a short convolution behind them."""

    def __init__(self, d_model: int, order: int, d_conv: int):
        super().__init__()
        if order < 2 or d_conv < 1:
            raise ValueError(f"hyena needs order >= 2 and d_conv >= 1; got order = {order}, d_conv = {d_conv}")
        self.d_model, self.order = d_model, order
        inner = (order + 1) * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, inner), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(inner, inner, d_conv, groups=inner)

    def project(
        self, x: Tensor, short: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """(x_0, the gates in the order of their use, v, the short convolution's state), from x (B, L, D)."""
        conv = self.short_filter
        u = silence(self.in_proj(x), padding)
        u, short = padded_short_conv(u, conv.weight[:, 0], conv.bias, short, padding)
        first, *gates, v = silence(u, padding).chunk(self.order + 1, dim=-1)
        return first, gates[::-1], v, short


class HyenaLayer(HyenaGates):
    """What the layers with implicit filters share.

    Attributes:
        filters: names of the implicit filters; those that look back have the weights of the present input too.
    """

    filters: ClassVar[tuple[str, ...]]
    filter_fn: HyenaFilter

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
        super().__init__(d_model, order, d_conv)
        for name in self.filters:
            filter = HyenaFilter(
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
                skip=not name.endswith("_ahead"),
            )
            self.register_module(name, filter)

    def by_order(self, t: Tensor) -> tuple[Tensor, ...]:
        """A filter's tensor (D (order - 1), ...), feature by feature, as order - 1 times (D, ...)."""
        return t.unflatten(0, (self.d_model, -1)).unbind(1)


class Hyena(HyenaLayer, name="hyena"):
    """v <- v x_i;  v <- k_i * v + bias_i v;  for every order;  y = W_o (v x_0).

    Args:
        d_model: D.
        max_len: longest sequence.
        order: of the recurrence, >= 2: order + 1 projections, order - 1 long convolutions.
        d_conv: K >= 1, taps of the short convolution on the projections.
        emb_dim, width, inner_layers, frequency, target, slowest, fastest, shift: of the implicit filter, see
            :class:`longwave.nn.HyenaFilter`.
    Raises:
        ValueError: for order < 2 or d_conv < 1, what the filter refuses, and on a sequence longer than max_len.
    """

    filters = ("filter_fn",)
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "width": 8, "emb_dim": 5},
        {"max_len": 32, "order": 3, "d_conv": 4, "width": 4, "emb_dim": 3, "frequency": 1.0, "shift": 0.05},
    )

    @derived
    def prepared(self, length: int) -> tuple[Taps, ...]:
        """The taps of every order, for steps that are to come."""
        return tuple(map(Taps, self.by_order(self.filter_fn(length))))

    def init_state(self, batch: int) -> HyenaState:
        weight = self.short_filter.weight
        inner, _, K = weight.shape
        past = weight.new_zeros(batch, 0, self.d_model)
        return HyenaState(weight.new_zeros(batch, K - 1, inner), (past,) * (self.order - 1))

    def mix(self, x: Tensor, state: HyenaState | None, padding: Tensor | None):
        short, pasts = (None, [None] * (self.order - 1)) if state is None else state
        first, gates, v, short = self.project(x, short, padding)
        length = x.shape[1]
        if state is not None:
            length = max(taps_needed(self.filter_fn, past, length, padding) for past in state.pasts)
        steps = None if state is None else online_length(self.filter_fn, length)
        taps: Any = self.by_order(self.filter_fn(length)) if steps is None else self.prepared(steps)
        biases = self.by_order(self.filter_fn.bias)
        kept = []
        for gate, k, bias, past in zip(gates, taps, biases, pasts):
            v, past = conv_with_past(v, k, past, padding, skip=bias, gate_in=gate)
            kept.append(past)
        return self.out_proj(v * first), None if state is None else HyenaState(short, tuple(kept))


class LaughingHyenaState(NamedTuple):
    short: Tensor  # (B, K-1, (order+1) D) the short convolution's past
    hidden: tuple[Tensor, ...]  # order - 1 times (B, D, N/2) complex


class LaughingHyena(HyenaGates, name="laughing_hyena"):
    """LaughingHyena: Hyena with filters of few free modes, so that its state is constant; what Hyena is distilled into.

    Source: Massaroli et al. (2023) "Laughing Hyena Distillery", arXiv:2310.18780, sec. 3; see
    :func:`longwave.models.distill`.

    Args:
        d_model: D.
        d_state: N, even, real state size of each filter, see :class:`longwave.nn.ModalFilter`.
        order, d_conv: as in :class:`Hyena`.
    Raises:
        ValueError: for an odd d_state, order < 2 or d_conv < 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"d_state": 4}, {"d_state": 2, "order": 3, "d_conv": 4})

    def __init__(self, d_model: int, d_state: int = 16, order: int = 2, d_conv: int = 3):
        super().__init__(d_model, order, d_conv)
        self.filters = nn.ModuleList(ModalFilter(d_model, d_state) for _ in range(order - 1))
        self.bias = nn.Parameter(torch.empty(order - 1, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.bias.normal_()

    def modes(self) -> Iterator[ModalFilter]:
        """The filters, of one order after the other."""
        return cast("Iterator[ModalFilter]", iter(self.filters))

    def init_state(self, batch: int) -> LaughingHyenaState:
        weight = self.short_filter.weight
        inner, _, K = weight.shape
        hidden = tuple(init_conv_state(filter, batch) for filter in self.modes())
        return LaughingHyenaState(weight.new_zeros(batch, K - 1, inner), hidden)

    def mix(self, x: Tensor, state: LaughingHyenaState | None, padding: Tensor | None):
        short, hidden = (None, [None] * (self.order - 1)) if state is None else state
        first, gates, v, short = self.project(x, short, padding)
        after = []
        for gate, filter, bias, h in zip(gates, self.modes(), self.bias, hidden):
            v, h = long_conv(v, filter, h, padding, skip=bias, gate_in=gate)
            after.append(h)
        return self.out_proj(v * first), None if state is None else LaughingHyenaState(short, tuple(after))


class HyenaTwoSided(WholeMixer, HyenaLayer, name="hyena_two_sided"):
    """HyenaTwoSided: Hyena whose long convolutions look ahead too, as in M2-BERT; the short one looks back alone.

    v <- v x_i;  v[t] <- sum_s k_i[s] v[t-s] + sum_s f_i[s] v[t+1+s] + bias_i v[t];  ...;  y = W_o (v x_0).

    Args:
        d_model: D.
        max_len: longest sequence.
        order, d_conv: as in :class:`Hyena`.
        emb_dim, width, inner_layers, frequency, target, slowest, fastest, shift: of both implicit filters, k behind
            and f ahead, see :class:`longwave.nn.HyenaFilter`.
    Raises:
        ValueError: as :class:`Hyena`.
    """

    filters = ("filter_fn", "filter_ahead")
    filter_ahead: HyenaFilter
    examples = Hyena.examples

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        first, gates, v, _ = self.project(x, None, padding)
        k, f = (self.by_order(filter(x.shape[1])) for filter in (self.filter_fn, self.filter_ahead))
        for gate, behind, ahead, bias in zip(gates, k, f, self.by_order(self.filter_fn.bias)):
            v = causal_conv(v, behind, skip=bias, gate_in=gate, k_future=ahead)
        return self.out_proj(v * first)
