"""Hyena of github.com/HazyResearch/safari (commit 02220c6): the filter alone, the operator and the standalone one."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers import Hyena
from longwave.nn import Filter, HyenaFilter
from longwave.official.blocks import ELEMENTWISE, MixerFace
from longwave.official.system import Choice, Number, Options, Shapes, Size, State, System, prefixed
from longwave.ops import causal_conv, short_conv


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


class VariantHyena(nn.Module):
    """Hyena with two switches of the authors, in one head.

    Args:
        model: the operator whose parts are used.
        outer: ``outer_mixing``:  v <- v sum_c x_i[c], one gate for all channels.
        blocks: ``num_blocks``: the sequence is cut into so many pieces, each convolved on a circle of twice its length
            with the taps of the whole sequence, so that those behind the length of a piece look ahead in it.
    """

    def __init__(self, model: Hyena, outer: bool, blocks: int):
        super().__init__()
        self.model, self.outer, self.blocks = model, outer, blocks

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        D, conv, filter, L = self.model.d_model, self.model.short_filter, self.model.filter_fn, x.shape[1]
        if L % self.blocks:
            raise ValueError(f"num_blocks = {self.blocks} does not divide the length {L}")
        piece = L // self.blocks
        u, _ = short_conv(self.model.in_proj(x), conv.weight[:, 0], conv.bias)
        first, *gates, v = u.unflatten(1, (self.blocks, piece)).flatten(0, 1).chunk(self.model.order + 1, dim=-1)
        taps = filter(L).unflatten(0, (D, -1)).unbind(1)
        for gate, k, bias in zip(reversed(gates), taps, filter.bias.unflatten(0, (D, -1)).unbind(1)):
            gate = gate.sum(-1, keepdim=True).expand_as(v) if self.outer else gate
            ahead = k[:, piece + 1 : 2 * piece].flip(1) if self.blocks > 1 and piece > 1 else None
            v = causal_conv(v, k[:, :piece], skip=bias, gate_in=gate, k_future=ahead)
        return self.model.out_proj((v * first).unflatten(0, (len(x), self.blocks)).flatten(1, 2))


class FilterFace(nn.Module):
    """A filter behind the call of the authors' HyenaFilter, convolved with the input.

    Args:
        filter: the taps.
    """

    def __init__(self, filter: HyenaFilter | NormalizedFilter):
        super().__init__()
        self.filter = filter

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (B, C, L) -> {"k": the taps (1, L, C), "y": (B, C, L)}."""
        k = self.filter(x.shape[2])
        y = causal_conv(x.transpose(1, 2), k, skip=self.filter.bias)
        return {"k": k.T[None], "y": y.transpose(1, 2)}


def filter_keys(o: Options, channels: int) -> Shapes:
    """The keys of a HyenaFilter, with their shapes."""
    width = o.filter_order
    keys: Shapes = {
        "bias": (channels,),
        "pos_emb.z": (1, o.l_max, o.emb_dim),
        "pos_emb.t": (1, o.l_max, 1),
        "modulation.deltas": (1, 1, channels),
    }
    for i in range(o.num_inner_mlps + 1):
        keys[f"implicit_filter.{2 * i}.weight"] = (width, width if i else o.emb_dim)
        keys[f"implicit_filter.{2 * i}.bias"] = (width,)
        keys[f"implicit_filter.{2 * i + 1}.freq"] = (1, width)
    keys[f"implicit_filter.{2 * o.num_inner_mlps + 2}.weight"] = (channels, width)
    return keys


def filter_aliases(o: Options) -> dict[str, str]:
    """All layers of the filter share one sine."""
    freq = "implicit_filter.{}.freq".format
    return {freq(2 * i + 1): freq(1) for i in range(1, o.num_inner_mlps + 1)}


def build_filter(o: Options, channels: int) -> HyenaFilter | NormalizedFilter:
    """The taps of an authors' HyenaFilter."""
    filter = HyenaFilter(channels, o.l_max, **filter_options(o), skip=True)
    return NormalizedFilter(filter) if o.normalized else filter


def filter_options(o: Options) -> dict[str, Any]:
    """The options of the implicit filter under our names."""
    return {
        "emb_dim": o.emb_dim,
        "width": o.filter_order,
        "inner_layers": o.num_inner_mlps,
        "frequency": o.w,
        "target": o.target,
        "slowest": o.slow_decay_pct,
        "fastest": o.fast_decay_pct,
        "shift": o.shift if o.modulate else 0.0,
    }


def convert_filter(state: State, o: Options) -> State:
    """A HyenaFilter's tensors under our names."""
    ours = dict(state)
    if not o.modulate:
        ours["modulation.deltas"] = 0 * state["modulation.deltas"]  # a window of ones
    if not o.bias:
        ours["bias"] = 0 * state["bias"]
    for key, first in filter_aliases(o).items():
        ours[key] = state[first]
    return prefixed("inner.", ours) if o.normalized else ours


def hyena_keys(o: Options) -> Shapes:
    """The keys of a HyenaOperator, with their shapes."""
    D = o.d_model
    inner = (o.order + 1) * D
    keys: Shapes = {
        "in_proj.weight": (inner, D),
        "in_proj.bias": (inner,),
        "out_proj.weight": (D, D),
        "out_proj.bias": (D,),
        "short_filter.weight": (inner, 1, o.short_filter_order),
        "short_filter.bias": (inner,),
        **prefixed("filter_fn.", filter_keys(o, (o.order - 1) * D)),
    }
    if o.post_order_ffn:
        keys["ord_proj_w"] = (o.order, 1, 1)
    return keys


def one_sine(o: Options) -> dict[str, str]:
    """The aliases among a HyenaOperator's keys."""
    return {f"filter_fn.{key}": f"filter_fn.{first}" for key, first in filter_aliases(o).items()}


def build_hyena(o: Options) -> nn.Module:
    """A HyenaOperator, freshly drawn."""
    if o.num_blocks < 1 or o.l_max % o.num_blocks:
        raise ValueError(f"the option num_blocks = {o.num_blocks} does not divide l_max = {o.l_max}")
    model = Hyena(o.d_model, o.l_max, order=o.order, d_conv=o.short_filter_order, **filter_options(o))
    if o.normalized:
        model.filter_fn = NormalizedFilter(model.filter_fn)  # type: ignore[assignment]
    if o.activation not in (None, "id", "identity", "linear"):
        model.out_proj = nn.Sequential(ELEMENTWISE[o.activation](), model.out_proj)  # type: ignore[assignment]
    return VariantHyena(model, o.outer_mixing, o.num_blocks) if is_variant(o) else MixerFace(model)


def is_variant(o: Options) -> bool:
    """Whether it is more than longwave's Hyena, which has a state."""
    return o.outer_mixing or o.num_blocks > 1


def convert_hyena(state: State, o: Options, *, features_first: bool) -> State:
    """A HyenaOperator's tensors under our names.

    ``features_first``: filter channel (d, i) sits at d (order - 1) + i, as ours; else at i D + d.
    """
    ours: State = {}
    filter: State = {}
    for key, tensor in state.items():
        (filter if key.startswith("filter_fn.") else ours)[key.removeprefix("filter_fn.")] = tensor
    if not features_first:
        last = f"implicit_filter.{2 * o.num_inner_mlps + 2}.weight"
        for key, axis in ((last, 0), ("bias", 0), ("modulation.deltas", 2)):
            filter[key] = filter[key].unflatten(axis, (o.order - 1, o.d_model)).transpose(axis, axis + 1)
            filter[key] = filter[key].flatten(axis, axis + 1)
    if o.post_order_ffn:  # a factor after every convolution; the rest is linear in v, so x_0 takes them all
        factor = ours.pop("ord_proj_w")[: o.order - 1].prod()
        for key in ("short_filter.weight", "short_filter.bias"):
            x_0, others = ours[key].tensor_split([o.d_model])
            ours[key] = torch.cat([factor * x_0, others])
    ours |= prefixed("filter_fn.", convert_filter(filter, o))
    if o.activation not in (None, "id", "identity", "linear"):
        ours = {key.replace("out_proj.", "out_proj.1."): tensor for key, tensor in ours.items()}
    return prefixed("model.", ours)


_MLP_OPTIONS = {
    "emb_dim": 3,
    "num_inner_mlps": Size(2, least=0),
    "w": 1.0,
    "modulate": True,
    "shift": 0.0,
    "target": Number(1e-2, above=0),
    "fast_decay_pct": Number(0.3, above=0),
    "slow_decay_pct": Number(1.5, above=0),
    "rate": Choice(1.0),
}
FILTER_OPTIONS = {"d_model": Size(), "l_max": Size(), "order": 2, "filter_order": 64, **_MLP_OPTIONS}
FILTER_IGNORED = frozenset(
    {"dropout", "filter_dropout", "lr", "lr_pos_emb", "modulation_lr", "wd", "fused_fft_conv", "use_flashfftconv"}
    | {"local_order", "linear_mixer", "channels"}  # in published configs; the authors' code does not look at them
)


def _in_operator(o: Options) -> Options:
    """The options of the filter alone under the names of the operators."""
    return Options(**{**vars(o), "filter_order": o.order, "l_max": o.seq_len})


HYENA_FILTER = System(
    options={"d_model": Size(), "order": 16, "seq_len": 1024, **_MLP_OPTIONS, "bias": True, "normalized": False},
    ignored=FILTER_IGNORED,
    keys=lambda o: filter_keys(_in_operator(o), o.d_model),
    build=lambda o: FilterFace(build_filter(_in_operator(o), o.d_model)),
    convert=lambda state, o: prefixed("filter.", convert_filter(state, _in_operator(o))),
    aliases=lambda o: filter_aliases(_in_operator(o)),
    optional=True,
)

HYENA = System(
    options={
        **FILTER_OPTIONS,
        "bias": True,
        "normalized": False,
        "short_filter_order": 3,
        "activation": Choice(*ELEMENTWISE, default="id"),
        "outer_mixing": False,
        "post_order_ffn": False,
        "num_heads": Choice(1),
        "num_blocks": 1,
        "inner_factor": Choice(1),
        "filter_cls": Choice("hyena-filter"),
    },
    ignored=FILTER_IGNORED | {"fused_bias_fc", "jit_filter", "return_state", "layer_idx", "device", "dtype"},
    keys=hyena_keys,
    build=build_hyena,
    convert=partial(convert_hyena, features_first=True),
    aliases=one_sine,
    optional=True,
)


def as_full(o: Options) -> Options:
    """The options of the full operator that the standalone one leaves at their defaults."""
    defaults = {"short_filter_order": 3, "activation": "id", "outer_mixing": False, "post_order_ffn": False}
    return Options(**vars(o), **defaults, num_blocks=1, bias=True, normalized=False)


HYENA_STANDALONE = System(
    options=FILTER_OPTIONS,
    ignored=FILTER_IGNORED | {"bias", "normalized"},  # it takes these two and does not look at them
    keys=lambda o: hyena_keys(as_full(o)),
    build=lambda o: build_hyena(as_full(o)),
    convert=lambda state, o: convert_hyena(state, as_full(o), features_first=False),
    aliases=one_sine,
    optional=True,
)

SYSTEMS = {"hyenafilter": HYENA_FILTER, "hyena": HYENA, "hyenastandalone": HYENA_STANDALONE}
