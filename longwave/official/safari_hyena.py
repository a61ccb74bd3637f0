"""Hyena of github.com/HazyResearch/safari (commit 02220c6): the filter alone, the operator and the standalone one."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import Mixer, MixerSpec, mixer
from longwave.nn import HyenaFilter
from longwave.official.blocks import ELEMENTWISE, Call, Elementwise, mixed
from longwave.official.replicas.hyena import NormalizedFilter, WholeSequences, variant_hyena
from longwave.official.source import Alias, Count, Flag, Name, Names, One, Positive, Size, Source, System, Turn, inside
from longwave.ops import causal_conv

ZERO = Turn(lambda t: 0 * t, lambda t: t)


class Implicit(Source):
    """The options of every implicit filter."""

    ignored = frozenset(
        {"dropout", "filter_dropout", "lr", "lr_pos_emb", "modulation_lr", "wd", "fused_fft_conv", "use_flashfftconv"}
        | {"local_order", "linear_mixer", "channels"}  # in published configs; the authors' code does not look at them
    )
    optional = True
    d_model: Size
    emb_dim: Size = 3
    num_inner_mlps: Count = 2
    w: float = 1.0
    modulate: Flag = True
    shift: float = 0.0
    target: Positive = 1e-2
    fast_decay_pct: Positive = 0.3
    slow_decay_pct: Positive = 1.5
    rate: One = 1

    def options(self, width: int) -> dict[str, Any]:
        """The same under our names."""
        return {
            "emb_dim": self.emb_dim,
            "width": width,
            "inner_layers": self.num_inner_mlps,
            "frequency": self.w,
            "target": self.target,
            "slowest": self.slow_decay_pct,
            "fastest": self.fast_decay_pct,
            "shift": self.shift if self.modulate else 0.0,
        }

    def filter_names(self, *, bias: bool = True, normalized: bool = False) -> Names:
        """Of a filter; all its layers share one sine."""
        freq = "implicit_filter.{}.freq".format
        return [
            *(Alias(freq(2 * i + 1), freq(1)) for i in range(1, self.num_inner_mlps + 1)),
            *inside(
                "",
                "inner." if normalized else "",
                [
                    *([] if self.modulate else [Name("modulation.deltas", "modulation.deltas", ZERO)]),  # a window of 1
                    *([] if bias else [Name("bias", "bias", ZERO)]),
                    Name("", ""),
                ],
            ),
        ]


def _convolved(filter: Any, x: Tensor) -> dict[str, Tensor]:
    """x (B, C, L) -> {"k": the taps (1, L, C), "y": (B, C, L)}."""
    k = filter(x.shape[2])
    return {"k": k.T[None], "y": causal_conv(x.transpose(1, 2), k, skip=filter.bias).transpose(1, 2)}


class FilterAlone(Implicit):
    """HyenaFilter."""

    order: Size = 16
    seq_len: Size = 1024
    bias: Flag = True
    normalized: Flag = False

    def build(self) -> nn.Module:
        filter = HyenaFilter(self.d_model, self.seq_len, **self.options(self.order), skip=True)
        return Call(NormalizedFilter(filter) if self.normalized else filter, _convolved)

    def names(self) -> Names:
        return inside("", "model.", self.filter_names(bias=self.bias, normalized=self.normalized))


class Operator(Implicit):
    """The options that all forms of HyenaOperator have."""

    l_max: Size
    order: Size = 2
    filter_order: Size = 64

    def hyena(self, d_conv: int = 3) -> MixerSpec:
        """The mixer that all are, or are made of."""
        return mixer("hyena", max_len=self.l_max, order=self.order, d_conv=d_conv, **self.options(self.filter_order))


class HyenaOperator(Operator):
    """HyenaOperator: filter channel (d, i) sits at d (order - 1) + i, as ours."""

    ignored = Operator.ignored | {"fused_bias_fc", "jit_filter", "return_state", "layer_idx", "device", "dtype"}
    bias: Flag = True
    normalized: Flag = False
    short_filter_order: Size = 3
    activation: Elementwise = "id"
    outer_mixing: Flag = False
    post_order_ffn: Flag = False
    num_heads: Literal[1] = 1
    num_blocks: Size = 1
    inner_factor: Literal[1] = 1
    filter_cls: Literal["hyena-filter"] = "hyena-filter"

    @property
    def stateful(self) -> bool:
        """Whether it is longwave's Hyena, which has a state."""
        return not self.outer_mixing and self.num_blocks == 1

    @property
    def linear(self) -> bool:
        """Whether nothing comes before the last map."""
        return self.activation in (None, "id", "identity", "linear")

    def build(self) -> Call:
        if self.l_max % self.num_blocks:
            raise ValueError(f"the option num_blocks = {self.num_blocks} does not divide l_max = {self.l_max}")
        model: Any = self.hyena(self.short_filter_order).build(self.d_model)
        if self.normalized:
            model.filter_fn = NormalizedFilter(model.filter_fn)
        if not self.linear:
            model.out_proj = nn.Sequential(ELEMENTWISE[self.activation](), model.out_proj)
        variant = partial(variant_hyena, outer=self.outer_mixing, blocks=self.num_blocks)
        return Call(model, mixed if self.stateful else variant)

    def mixer(self) -> MixerSpec:
        """The layer of a language model, as data."""
        if not self.stateful or self.normalized or not self.linear:
            raise ValueError(
                "the mixer hyena has no normalized, activation, outer_mixing or num_blocks: from_official computes "
                "what this layer does, but it is no model of longwave"
            )
        return self.hyena(self.short_filter_order)

    def drawn(self) -> Mixer:
        """The same, freshly drawn, with what no mixer has."""
        call: Any = self.build()
        return call.model if self.stateful else WholeSequences(call, self.d_model)

    def mixer_names(self) -> Names:
        """Of :meth:`drawn`."""
        return self._table() if self.stateful else inside("", "layer.", self.names())

    def names(self) -> Names:
        return inside("", "model.", self._table())

    def _table(self) -> Names:
        scaled = Turn(self._scaled, lambda t: (t.new_empty(self.order, 1, 1), t))
        ffn = [Name(("ord_proj_w", name), name, scaled) for name in ("short_filter.weight", "short_filter.bias")]
        return [
            *(ffn if self.post_order_ffn else []),
            *([] if self.linear else [Name("out_proj.", "out_proj.1.")]),
            *inside("filter_fn.", "filter_fn.", self.filter_names(bias=self.bias, normalized=self.normalized)),
            Name("", ""),
        ]

    def _scaled(self, factors: Tensor, short: Tensor) -> Tensor:
        """A factor after every convolution; the rest is linear in v, so x_0 takes them all."""
        first, others = short.tensor_split([self.d_model])
        return torch.cat([factors[: self.order - 1].prod() * first, others])


class StandaloneHyena(Operator):
    """The standalone HyenaOperator: filter channel (d, i) sits at i D + d. It does not look at bias and normalized."""

    ignored = Operator.ignored | {"bias", "normalized"}

    def build(self) -> Call:
        return Call(self.drawn(), mixed)

    def mixer(self) -> MixerSpec:
        """The layer of a language model, as data."""
        return self.hyena()

    def drawn(self) -> Mixer:
        """The same, freshly drawn."""
        return self.mixer().build(self.d_model)

    def mixer_names(self) -> Names:
        """Of :meth:`mixer`."""
        axes = {f"implicit_filter.{2 * self.num_inner_mlps + 2}.weight": 0, "bias": 0}
        axes |= {"modulation.deltas": 2} if self.modulate else {}
        filter = [Name(name, name, self._feature_by_feature(axis)) for name, axis in axes.items()]
        return [*inside("filter_fn.", "filter_fn.", [*filter, *self.filter_names()]), Name("", "")]

    def _feature_by_feature(self, axis: int) -> Turn:
        sizes = (self.order - 1, self.d_model)
        turned = lambda t: t.unflatten(axis, sizes).transpose(axis, axis + 1).flatten(axis, axis + 1)  # noqa: E731
        return Turn(turned, lambda t: t)

    def names(self) -> Names:
        return inside("", "model.", self.mixer_names())


SYSTEMS = {
    "hyenafilter": System(FilterAlone),
    "hyena": System(HyenaOperator),
    "hyenastandalone": System(StandaloneHyena),
}
