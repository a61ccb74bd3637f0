"""Language models of github.com/HazyResearch: SimpleLMHeadModel and ConvLMHeadModel of safari, SSMLMHeadModel of H3.

The last is what the released H3 checkpoints load into. All have the blocks of flash_attn 0.2: Hyena or H3 layers,
attention at some, in the order norm, mixer, norm, MLP; the head is the embedding.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from longwave.errors import nearest
from longwave.mixers.base import zero_padding
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.nn import MLP, append_time, rotate
from longwave.official.blocks import LMFace, MixerFace
from longwave.official.safari_h3 import H3_CONV, H3_LAYER
from longwave.official.safari_hyena import HYENA, is_variant
from longwave.official.system import (
    Choice,
    Number,
    Options,
    Shapes,
    Size,
    Sizes,
    State,
    System,
    prefixed,
    read_part,
    under,
)
from longwave.ops import attention, short_conv


class MHAState(NamedTuple):
    k: Tensor  # (B, t, H, P) every key so far
    v: Tensor  # (B, t, H, P)
    seen: Tensor  # (B, t) bool: False at padding
    short: Tensor  # (B, 2, 3 D) the short convolution's past, or (B, 0, 3 D) where there is none


class MHA(nn.Module):
    """Attention as in flash_attn's MHA, with the call of a mixer: rotary positions on a part of each head.

    Args:
        d_model: D.
        heads: H, divides D.
        bias: on Wqkv; the output has one anyway.
        rotary_dim: how many dimensions of each head are turned.
        rotary_base: of the rotary frequencies.
        dwconv: a depthwise convolution of three taps on queries, keys and values.
        scale: of the logits, default P^-0.5.
    Raises:
        ValueError: where heads does not divide d_model, or rotary_dim is odd or above the width of a head.
    """

    name, causal = "attention", True

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        bias: bool = True,
        rotary_dim: int = 0,
        rotary_base: float = 10_000.0,
        dwconv: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        if d_model % heads:
            raise ValueError(f"num_heads = {heads} does not divide d_model = {d_model}")
        if rotary_dim % 2 or rotary_dim > d_model // heads:
            raise ValueError(f"rotary_emb_dim = {rotary_dim} must be even, <= {d_model // heads}, the width of a head")
        self.d_model, self.heads, self.scale = d_model, heads, scale
        self.rotary_dim, self.rotary_base = rotary_dim, rotary_base
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.dwconv_qkv = nn.Conv1d(3 * d_model, 3 * d_model, 3, groups=3 * d_model) if dwconv else None
        self.out_proj = nn.Linear(d_model, d_model)

    def init_state(self, batch: int) -> MHAState:
        """The state before the first token."""
        weight = self.Wqkv.weight
        empty = weight.new_zeros(batch, 0, self.heads, self.d_model // self.heads)
        seen = torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)
        short = weight.new_zeros(batch, 0 if self.dwconv_qkv is None else 2, 3 * self.d_model)
        return MHAState(empty, empty, seen, short)

    def forward(
        self, x: Tensor, state: MHAState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MHAState | None]:
        """See :class:`longwave.mixers.Mixer`."""
        qkv, short = self.Wqkv(x), None if state is None else state.short
        if self.dwconv_qkv is not None:
            weight, bias = self.dwconv_qkv.weight[:, 0], self.dwconv_qkv.bias
            qkv, short = short_conv(zero_padding(qkv, mask), weight, bias, short)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, P) each
        start = 0 if state is None else state.k.shape[1]
        q, k = self._rotated(q, start), self._rotated(k, start)
        if state is not None and short is not None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            seen = append_time(state.seen, real)
            state = MHAState(append_time(state.k, k), append_time(state.v, v), seen, short)
            k, v, mask = state.k.to(q.dtype), state.v.to(q.dtype), state.seen
        return self.out_proj(attention(q, k, v, mask=mask, scale=self.scale).flatten(2)), state

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        if not self.rotary_dim:
            return x
        turned, kept = x.tensor_split([self.rotary_dim], dim=-1)
        return torch.cat([rotate(turned, start, self.rotary_base), kept], dim=-1)


def _mha_keys(o: Options) -> Shapes:
    D = o.d_model
    keys: Shapes = {"Wqkv.weight": (3 * D, D), "out_proj.weight": (D, D), "out_proj.bias": (D,)}
    if o.bias:
        keys["Wqkv.bias"] = (3 * D,)
    if o.dwconv:
        keys |= {"dwconv_qkv.weight": (3 * D, 1, 3), "dwconv_qkv.bias": (3 * D,)}
    return keys


def _build_mha(o: Options) -> nn.Module:
    return MHA(
        o.d_model,
        o.num_heads,
        bias=o.bias,
        rotary_dim=o.rotary_emb_dim,
        rotary_base=o.rotary_emb_base,
        dwconv=o.dwconv,
        scale=o.softmax_scale,
    )


ATTENTION = System(
    options={
        "d_model": Size(),
        "num_heads": Size(),
        "bias": True,
        "rotary_emb_dim": 0,
        "rotary_emb_base": 10_000.0,
        "rotary_emb_scale_base": Choice(0, None),
        "rotary_emb_interleaved": Choice(False),
        "dwconv": False,
        "softmax_scale": Number(None),
        "causal": Choice(True),
        "cross_attn": Choice(False),
        "return_residual": Choice(False),
    },
    ignored=frozenset({"dropout", "use_flash_attn", "fused_bias_fc", "checkpointing", "layer_idx", "device", "dtype"}),
    keys=_mha_keys,
    build=_build_mha,
    convert=lambda state, o: state,
)
LAYERS = {"hyena": HYENA, "h3": H3_LAYER, "h3-conv": H3_CONV}


class Stateless(nn.Module):
    """An official layer that cannot stop and go on, with the call of a mixer.

    Args:
        layer: x (B, L, D) -> y (B, L, D).
        d_model: D.
    """

    name, causal = "official layer", True

    def __init__(self, layer: nn.Module, d_model: int):
        super().__init__()
        self.layer, self.d_model = layer, d_model

    def init_state(self, batch: int) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{type(self.layer).__name__} has no state here; call the model on whole sequences")

    def forward(self, x: Tensor, state: None = None, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
        """See :class:`longwave.mixers.Mixer`; the mask is not looked at."""
        if state is not None:
            self.init_state(len(x))
        return self.layer(x), None


class PositionedState(NamedTuple):
    seen: Tensor  # (B,) int64: real tokens so far
    backbone: Any  # of the blocks


class PositionedLM(nn.Module):
    """A language model that adds a learned vector to each token by its position; generation takes it as an LM.

    Args:
        lm: the model without positions.
        positions: how many there are.
    """

    def __init__(self, lm: LM, positions: int):
        super().__init__()
        self.lm = lm
        self.positions = nn.Embedding(positions, lm.backbone.d_model)

    @property
    def embedding(self) -> nn.Embedding:
        return self.lm.embedding

    @property
    def vocab(self) -> int:
        return self.lm.vocab

    def init_state(self, batch: int) -> PositionedState:
        """The state before the first token of ``batch`` sequences."""
        seen = torch.zeros(batch, dtype=torch.int64, device=self.positions.weight.device)
        return PositionedState(seen, self.lm.init_state(batch))

    def hidden(
        self,
        ids: Tensor,
        state: PositionedState | None = None,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, PositionedState | None]:
        """What the head sees (B, L, D), and the state. Padding has no position; position_ids (B, L) name others.

        Raises:
            ValueError: where there are more tokens than positions.
        """
        real = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        counted = real.cumsum(1) + (0 if state is None else state.seen[:, None])
        where = (counted - 1).clamp(min=0) if position_ids is None else position_ids
        if where.max() >= (known := self.positions.num_embeddings):
            raise ValueError(f"the model has max_position_embeddings = {known}; the sequence needs {where.max() + 1}")
        x, after = self.lm.backbone(
            self.lm.embedding(ids) + self.positions(where), None if state is None else state.backbone, mask=mask
        )
        return x, None if after is None else PositionedState(counted[:, -1], after)

    def forward(
        self,
        ids: Tensor,
        state: PositionedState | None = None,
        *,
        mask: Tensor | None = None,
        last: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, PositionedState | None]:
        """See :class:`longwave.models.LM`."""
        x, state = self.hidden(ids, state, mask=mask, position_ids=position_ids)
        return self.lm.head(x[:, -1:] if last else x), state


def padded_vocab(o: Options) -> int:
    """The vocabulary, rounded up to the multiple that the authors ask for."""
    return -(-o.vocab_size // o.pad_vocab_size_multiple) * o.pad_vocab_size_multiple


def layers(o: Options) -> list[tuple[System, Options]]:
    """The official layer and its options at every depth."""
    attentive = set(o.attn_layer_idx or ())
    found: list[tuple[System, Options]] = []
    for i in range(o.n_layer):
        if i in attentive:
            found.append((ATTENTION, read_part("attn_cfg", ATTENTION.read, o.attn_cfg, d_model=o.d_model)))
        elif o.ssm_cfg is not None or o.layer is None:
            found.append((H3_LAYER, read_part("ssm_cfg", H3_LAYER.read, o.ssm_cfg or {}, d_model=o.d_model)))
        else:
            name = o.layer.get("_name_") if isinstance(o.layer, Mapping) else None
            if name not in LAYERS:
                raise ValueError(
                    f"layer: no layer _name_ = {name!r} is carried over; longwave has {', '.join(LAYERS)}"
                    f"{nearest(str(name), LAYERS)}"
                )
            found.append((LAYERS[name], read_part("layer", LAYERS[name].read, o.layer, d_model=o.d_model)))
    return found


def backbone_keys(o: Options, parts: list[tuple[System, Options]]) -> Shapes:
    """The keys of an LMBackbone with these layers, with their shapes."""
    D, inner = o.d_model, o.d_inner or 4 * o.d_model
    keys: Shapes = {"backbone.embeddings.word_embeddings.weight": (padded_vocab(o), D)}
    if o.max_position_embeddings > 0:
        keys["backbone.embeddings.position_embeddings.weight"] = (o.max_position_embeddings, D)
    for i, (system, options) in enumerate(parts):
        block = prefixed("mixer.", system.keys(options))
        block |= {f"{norm}.{key}": (D,) for norm in ("norm1", "norm2") for key in ("weight", "bias")}
        block |= {"mlp.fc1.weight": (inner, D), "mlp.fc1.bias": (inner,)}
        block |= {"mlp.fc2.weight": (D, inner), "mlp.fc2.bias": (D,)}
        keys |= prefixed(f"backbone.layers.{i}.", block)
    return {**keys, "backbone.ln_f.weight": (D,), "backbone.ln_f.bias": (D,)}


def backbone_aliases(parts: list[tuple[System, Options]]) -> dict[str, str]:
    """The aliases among an LMBackbone's keys."""
    return {
        f"backbone.layers.{i}.mixer.{key}": f"backbone.layers.{i}.mixer.{first}"
        for i, (system, options) in enumerate(parts)
        for key, first in system.aliases(options).items()
    }


def _build_mixer(system: System, options: Options) -> Any:
    layer = system.build(options)
    if _is_stateless(system, options):
        return Stateless(layer, options.d_model)
    return layer.model if isinstance(layer, MixerFace) else layer


def _convert_mixer(state: State, system: System, options: Options) -> State:
    ours = system.convert(state, options)
    if _is_stateless(system, options):
        return prefixed("layer.", ours)
    return {key.removeprefix("model."): t for key, t in ours.items()}


def _is_stateless(system: System, options: Options) -> bool:
    return system is H3_CONV or (system is HYENA and is_variant(options))


def build_lm(o: Options, parts: list[tuple[System, Options]]) -> LM | PositionedLM:
    """The language model with these layers, freshly drawn."""
    mixers = [_build_mixer(system, options) for system, options in parts]
    inner = o.d_inner or 4 * o.d_model
    norm = partial(nn.LayerNorm, eps=o.layer_norm_epsilon)
    lm = LM(Backbone(mixers, norm, partial(MLP, expand=inner / o.d_model)), padded_vocab(o))
    return PositionedLM(lm, o.max_position_embeddings) if o.max_position_embeddings > 0 else lm


def convert_lm(state: State, o: Options, parts: list[tuple[System, Options]]) -> State:
    """The tensors of an LMBackbone under the names of :func:`build_lm`, the head tied."""
    embedding = state["backbone.embeddings.word_embeddings.weight"]
    ours = {"embedding.weight": embedding, "head.weight": embedding}
    ours |= prefixed("backbone.norm.", under("backbone.ln_f.", state))
    for i, (system, options) in enumerate(parts):
        block = under(f"backbone.layers.{i}.", state)
        new = {key.replace("mlp.", "channel."): t for key, t in block.items() if not key.startswith("mixer.")}
        mixer = _convert_mixer(under("mixer.", block), system, options)
        new |= prefixed("mixer.", mixer)
        ours |= prefixed(f"backbone.layers.{i}.", new)
    if o.max_position_embeddings > 0:
        ours = prefixed("lm.", ours)
        ours["positions.weight"] = state["backbone.embeddings.position_embeddings.weight"]
    return ours


def released(state: State) -> State:
    """A checkpoint of a training run holds the model under ``model.``, and other things: the model's keys alone."""
    within = under("model.", state)
    return within or state


def _rename(state: State, o: Options) -> State:
    """The authors' remapping of older checkpoints, as in their ``load_state_dict``."""
    renamed = {}
    for key, tensor in released(state).items():
        key = re.sub(r"^s4seq\.encoder\.", "backbone.", key)
        key = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", key)
        key = re.sub(r"^backbone\.norm\.", "backbone.ln_0.", key)
        if ".rotary_emb." not in key:  # frequencies and scales, which are no parameters
            renamed[key] = tensor
    if "backbone.ln_0.weight" in renamed:
        renamed = {_shifted(key, o.n_layer): tensor for key, tensor in renamed.items()}
    for i in o.attn_layer_idx or ():  # once three projections
        mixer = f"backbone.layers.{i}.mixer"
        for kind in ("weight", "bias"):
            if f"{mixer}.q_proj.{kind}" in renamed:
                parts = [renamed.pop(f"{mixer}.{name}_proj.{kind}") for name in "qkv"]
                renamed[f"{mixer}.Wqkv.{kind}"] = torch.cat(parts)
            if f"{mixer}.output_linear.{kind}" in renamed:
                renamed[f"{mixer}.out_proj.{kind}"] = renamed.pop(f"{mixer}.output_linear.{kind}")
    return renamed


def _shifted(key: str, n_layer: int) -> str:
    """Norms stood behind what they are in front of now: ln_0 before all, norm1 after the mixer, norm2 after the MLP."""
    if key.startswith("backbone.ln_0."):
        return key.replace("ln_0", "layers.0.norm1")
    found = re.fullmatch(r"backbone\.layers\.(\d+)\.norm([12])\.(\w+)", key)
    if found is None:
        return key
    layer, norm, kind = int(found[1]), found[2], found[3]
    if norm == "1":
        return f"backbone.layers.{layer}.norm2.{kind}"
    return f"backbone.ln_f.{kind}" if layer == n_layer - 1 else f"backbone.layers.{layer + 1}.norm1.{kind}"


_HEAD = {"lm_head.weight": "backbone.embeddings.word_embeddings.weight"}

BACKBONE_OPTIONS = {
    "d_model": Size(),
    "n_layer": Size(),
    "d_inner": Size(None),
    "vocab_size": Size(),
    "layer": None,
    "attn_layer_idx": Sizes(None, least=0),
    "attn_cfg": None,
    "max_position_embeddings": 0,
    "layer_norm_epsilon": 1e-5,
    "pad_vocab_size_multiple": 1,
}
BACKBONE_IGNORED = frozenset(
    {"resid_dropout", "embed_dropout", "dropout_cls", "initializer_cfg", "fused_mlp", "fused_dropout_add_ln"}
    | {"residual_in_fp32", "process_group", "sequence_parallel", "use_flashfftconv", "device", "dtype", "_name_"}
)

LANGUAGE_MODEL = System(
    options={**BACKBONE_OPTIONS, "ssm_cfg": None},
    ignored=BACKBONE_IGNORED,
    keys=lambda o: {**backbone_keys(o, layers(o)), "lm_head.weight": (padded_vocab(o), o.d_model)},
    build=lambda o: LMFace(build_lm(o, layers(o)), positioned=o.max_position_embeddings > 0),
    convert=lambda state, o: prefixed("model.", convert_lm(state, o, layers(o))),
    aliases=lambda o: {**_HEAD, **backbone_aliases(layers(o))},
    optional=True,
    rename=_rename,
)

SYSTEMS = {"hyenalm": LANGUAGE_MODEL, "h3lm": LANGUAGE_MODEL}
