"""Language models of github.com/HazyResearch: SimpleLMHeadModel and ConvLMHeadModel of safari, SSMLMHeadModel of H3.

The last is what the released H3 checkpoints load into. All have the blocks of flash_attn 0.2: Hyena or H3 layers,
attention at some, in the order norm, mixer, norm, MLP; the head is the embedding.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from longwave.errors import nearest
from longwave.mixers import Attention, LearnedPositions, Mixer
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.nn import MLP, POSITIONS
from longwave.official.blocks import Call, logits, positioned_logits
from longwave.official.safari_h3 import H3ConvLayer, H3Layer
from longwave.official.safari_hyena import HyenaOperator
from longwave.official.source import (
    Alias,
    Count,
    Flag,
    Layer,
    Name,
    Names,
    Size,
    Source,
    State,
    System,
    inside,
    part,
    under,
)


class MHA(Source):
    """MHA of flash_attn."""

    ignored = frozenset({"dropout", "use_flash_attn", "fused_bias_fc", "checkpointing", "layer_idx", "device", "dtype"})
    d_model: Size
    num_heads: Size
    bias: Flag = True
    rotary_emb_dim: Count = 0
    rotary_emb_base: float = 10_000.0
    rotary_emb_scale_base: Literal[0, None] = 0
    rotary_emb_interleaved: Literal[False] = False
    dwconv: Flag = False
    softmax_scale: float | None = None
    causal: Literal[True] = True
    cross_attn: Literal[False] = False
    return_residual: Literal[False] = False

    def mixer(self) -> Mixer:
        """The layer, freshly drawn."""
        D, H, turned = self.d_model, self.num_heads, self.rotary_emb_dim
        if D % H:
            raise ValueError(f"num_heads = {H} does not divide d_model = {D}")
        if turned % 2 or turned > D // H:
            raise ValueError(f"rotary_emb_dim = {turned} must be even, <= {D // H}, the width of a head")
        rotary = POSITIONS.make("rotary", base=self.rotary_emb_base, dim=turned) if turned else None
        conv = 3 if self.dwconv else 0
        return Attention(D, H, positions=rotary, bias=self.bias, out_bias=True, d_conv=conv, scale=self.softmax_scale)

    def mixer_names(self) -> Names:
        """Of :meth:`mixer`."""
        return self.names()


LAYERS: dict[str, type[HyenaOperator | H3Layer | H3ConvLayer]] = {
    "hyena": HyenaOperator,
    "h3": H3Layer,
    "h3-conv": H3ConvLayer,
}


class LMBackbone(Source):
    """The options of a model without a head, of layers that a subclass has; names start with ``backbone.``."""

    ignored = frozenset(
        {"resid_dropout", "embed_dropout", "dropout_cls", "initializer_cfg", "fused_mlp", "fused_dropout_add_ln"}
        | {"residual_in_fp32", "process_group", "sequence_parallel", "use_flashfftconv", "device", "dtype", "_name_"}
    )
    optional = True
    d_model: Size
    n_layer: Size
    d_inner: Size | None = None
    vocab_size: Size
    layer: Any = None
    attn_layer_idx: Sequence[Count] | None = None
    attn_cfg: Any = None
    max_position_embeddings: Count = 0
    layer_norm_epsilon: float = 1e-5
    pad_vocab_size_multiple: Size = 1

    def layers(self) -> list[Layer]:
        """Those of every depth."""
        raise NotImplementedError

    def model(self) -> LM:
        """The language model, freshly drawn."""
        expand = (self.d_inner or 4 * self.d_model) / self.d_model
        norm = partial(nn.LayerNorm, eps=self.layer_norm_epsilon)
        known = self.max_position_embeddings
        positions = LearnedPositions(self.d_model, known) if known else None
        mixers = [layer.mixer() for layer in self.layers()]
        backbone = Backbone(mixers, norm, partial(MLP, expand=expand), positions=positions)
        return LM(backbone, -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple)

    def model_names(self) -> Names:
        """Of :meth:`model`; the head is the embedding."""
        table: Names = []
        for i, layer in enumerate(self.layers()):
            block = [*inside("mixer.", "mixer.", layer.mixer_names()), Name("mlp.", "channel."), Name("", "")]
            table += inside(f"backbone.layers.{i}.", f"backbone.layers.{i}.", block)
        words = "backbone.embeddings.word_embeddings.weight"
        table += [Name("backbone.ln_f.", "backbone.norm."), Name(words, "embedding.weight"), Name(words, "head.weight")]
        return [*table, Name("backbone.embeddings.position_embeddings.", "backbone.positions.")]


def released(state: State) -> State:
    """A checkpoint of a training run holds the model under ``model.``, and other things: the model's keys alone."""
    return under("model.", state) or state


class LMHeadModel(LMBackbone):
    """SimpleLMHeadModel, ConvLMHeadModel and SSMLMHeadModel."""

    ssm_cfg: Any = None

    def layers(self) -> list[Layer]:
        found: list[Layer] = []
        for i in range(self.n_layer):
            if i in (self.attn_layer_idx or ()):
                found.append(part("attn_cfg", MHA, self.attn_cfg, d_model=self.d_model))
            elif self.ssm_cfg is not None or self.layer is None:
                found.append(part("ssm_cfg", H3Layer, self.ssm_cfg or {}, d_model=self.d_model))
            else:
                name = self.layer.get("_name_") if isinstance(self.layer, Mapping) else None
                if name not in LAYERS:
                    raise ValueError(
                        f"layer: no layer _name_ = {name!r} is carried over; longwave has {', '.join(LAYERS)}"
                        f"{nearest(str(name), LAYERS)}"
                    )
                found.append(part("layer", LAYERS[name], self.layer, d_model=self.d_model))
        return found

    def build(self) -> nn.Module:
        return Call(self.model(), positioned_logits if self.max_position_embeddings else logits)

    def names(self) -> Names:
        head = Alias("lm_head.weight", "backbone.embeddings.word_embeddings.weight")
        return [head, *inside("", "model.", self.model_names())]

    def rename(self, state: State) -> State:
        """The authors' remapping of older checkpoints, as in their ``load_state_dict``."""
        renamed = {}
        for key, tensor in released(state).items():
            key = re.sub(r"^s4seq\.encoder\.", "backbone.", key)
            key = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", key)
            key = re.sub(r"^backbone\.norm\.", "backbone.ln_0.", key)
            if ".rotary_emb." not in key:  # frequencies and scales, which are no parameters
                renamed[key] = tensor
        if "backbone.ln_0.weight" in renamed:
            renamed = {_shifted(key, self.n_layer): tensor for key, tensor in renamed.items()}
        for i in self.attn_layer_idx or ():  # once three projections
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


SYSTEMS = {"hyenalm": System(LMHeadModel), "h3lm": System(LMHeadModel)}
