"""Language models of github.com/HazyResearch: SimpleLMHeadModel and ConvLMHeadModel of safari, SSMLMHeadModel of H3.

The last is what the released H3 checkpoints load into. All have the blocks of flash_attn 0.2: Hyena or H3 layers,
attention at some, in the order norm, mixer, norm, MLP; the head is the embedding.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import nn

from longwave.errors import nearest
from longwave.mixers import Mixer, MixerSpec, mixer
from longwave.models.lm import LM
from longwave.models.spec import CHANNEL_MIXERS, AnyModel, LMSpec
from longwave.official.blocks import Call, ModelSource, logits, positioned_logits
from longwave.official.safari_h3 import H3ConvLayer, H3Layer
from longwave.official.safari_hyena import HyenaOperator
from longwave.official.source import (
    Alias,
    Count,
    Flag,
    Name,
    Names,
    Shapes,
    Size,
    Source,
    State,
    System,
    inside,
    part,
    under,
)

T = TypeVar("T")

WORDS = "backbone.embeddings.word_embeddings.weight"
CHARACTERS = 16  # as many ids has HyenaDNA, and 30,000 more what is released here

# What shapes do not tell of released models, by d_model, and the layers with attention or n_layer
HEADS = {768: 12, 1024: 16, 2048: 16, 2560: 20}
TURNED: dict[tuple[int, tuple[int, ...]], int] = {(2560, (10, 21)): 64}  # rotary_emb_dim
FILTERS: dict[tuple[int, int], dict[str, Any]] = {(864, 18): {"modulate": False, "w": 14}}  # of layer


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

    def mixer(self) -> MixerSpec:
        """The layer, as data."""
        D, H, turned = self.d_model, self.num_heads, self.rotary_emb_dim
        if D % H:
            raise ValueError(f"num_heads = {H} does not divide d_model = {D}")
        if turned % 2 or turned > D // H:
            raise ValueError(f"rotary_emb_dim = {turned} must be even, <= {D // H}, the width of a head")
        rotary = {"kind": "rotary", "base": self.rotary_emb_base, "dim": turned} if turned else None
        more = {"bias": self.bias, "out_bias": True, "d_conv": 3 if self.dwconv else 0, "scale": self.softmax_scale}
        return mixer("attention", heads=H, positions=rotary, **more)

    def drawn(self) -> Mixer:
        """The same, freshly drawn."""
        return self.mixer().build(self.d_model)

    def mixer_names(self) -> Names:
        """Of :meth:`drawn`."""
        return self.names()


class Layer(Protocol):
    """The options of a layer: its mixer as data, freshly drawn, and the names of the mixer's tensors.

    Some options of the authors make it what no mixer of ours is; then there are no data.
    """

    def mixer(self) -> MixerSpec: ...
    def drawn(self) -> Mixer: ...
    def mixer_names(self) -> Names: ...


LAYERS: dict[str, type[HyenaOperator | H3Layer | H3ConvLayer]] = {
    "hyena": HyenaOperator,
    "h3": H3Layer,
    "h3-conv": H3ConvLayer,
}


class LMBackbone(ModelSource):
    """A model of layers that a subclass has; names start with ``backbone.``."""

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

    @abstractmethod
    def layers(self) -> list[Layer]:
        """Those of every depth."""

    def parts(self) -> dict[str, Any]:
        """The fields of a spec but for the mixers."""
        known = self.max_position_embeddings
        return {
            "d_model": self.d_model,
            "layers": self.n_layer,
            "channel": CHANNEL_MIXERS.make("mlp", expand=(self.d_inner or 4 * self.d_model) / self.d_model),
            "positions": mixer("learned_positions", max_len=known) if known else None,
            "norm": "layer",
            "norm_eps": self.layer_norm_epsilon,
            "vocab": -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple,
        }

    def pattern(self) -> list[MixerSpec]:
        """The mixers, or one where all are the same."""
        mixers = [layer.mixer() for layer in self.layers()]
        return mixers[:1] if mixers[1:] == mixers[:-1] else mixers

    def spec(self) -> AnyModel:
        return LMSpec(pattern=self.pattern(), **self.parts())

    def language_model(self) -> LM:
        """The language model, freshly drawn, its layers with what no mixer has."""
        model = LMSpec(pattern=[mixer("learned_positions", max_len=1)], **self.parts()).build()
        for i, layer in enumerate(self.layers()):
            model.get_submodule(f"backbone.layers.{i}").mixer = layer.drawn()
        return model

    def model_names(self) -> Names:
        """Of all but a head; that of a language model is the embedding."""
        table: Names = []
        for i, layer in enumerate(self.layers()):
            block = [*inside("mixer.", "mixer.", layer.mixer_names()), Name("mlp.", "channel."), Name("", "")]
            table += inside(f"backbone.layers.{i}.", f"backbone.layers.{i}.", block)
        return [
            *table,
            Name("backbone.ln_f.", "backbone.norm."),
            Name("backbone.embeddings.position_embeddings.", "backbone.positions."),
            Name(WORDS, "embedding.weight"),
            Name(WORDS, "encoder.weight"),  # of a classifier
        ]


def released(state: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint of a training run holds the model under ``model.``, and other things: the model's keys, and those
    of what is learned around it."""
    model = under("model.", state)
    around = {key: value for key, value in state.items() if key.startswith(("encoder.", "decoder."))}
    return model | around if model else dict(state)


class LMHeadModel(LMBackbone):
    """SimpleLMHeadModel, ConvLMHeadModel and SSMLMHeadModel.

    Attributes:
        mark: a tensor that layers of its kind have.
    """

    mark: ClassVar[str]
    tokenizer = "GPT-2's (openai-community/gpt2)"
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
        return Call(self.language_model(), positioned_logits if self.max_position_embeddings else logits)

    def names(self) -> Names:
        return [
            Alias("lm_head.weight", WORDS),
            *inside("", "model.", [*self.model_names(), Name(WORDS, "head.weight")]),
        ]

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        tensors = today(released(shapes))
        marked = any(key.endswith(f".mixer.{cls.mark}") for key in tensors)
        if not marked or WORDS not in tensors or tensors[WORDS][0] <= CHARACTERS:
            return None
        return described(config, tensors, FILTERS.get)

    def rename(self, state: State) -> State:
        """The authors' remapping of older checkpoints, as in their ``load_state_dict``."""
        renamed = {key: t for key, t in today(released(state)).items() if ".rotary_emb." not in key}  # no parameters
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


class H3LM(LMHeadModel):
    """Of H3's layers; released without a config in sizes of 125M to 2.7B (danfu09/H3-125M, ...)."""

    mark = "ssm_k_D"


class HyenaLM(LMHeadModel):
    """Of Hyena's layers; released without a config in a size of 153M (Zymrael/hyena-small-150b-tok)."""

    mark = "filter_fn.bias"


def today(state: Mapping[str, T]) -> dict[str, T]:
    """Names as they are now, where nothing but names has changed."""
    changes = {
        r"^s4seq\.encoder\.": "backbone.",
        r"^embedding\.": "backbone.embeddings.word_embeddings.",
        r"^backbone\.norm\.": "backbone.ln_0.",
        r"\.(mixer|mlp)\.layer\.": r".\1.",  # inside what makes their activations again
    }
    renamed = {}
    for key, value in state.items():
        for before, now in changes.items():
            key = re.sub(before, now, key)
        renamed[key] = value
    return renamed


def described(
    config: Mapping[str, Any], shapes: Shapes, filters: Callable[[tuple[int, int]], Mapping[str, Any] | None]
) -> Mapping[str, Any] | None:
    """The options of a model of H3 or Hyena layers and attention: of its config, or where there is none, as its
    shapes, by their names of today, and the releases tell; None where it is another model.

    Args:
        filters: the options of Hyena's layer that shapes do not tell, by d_model and n_layer; None where it is unknown.
    Raises:
        ValueError: where there is no config, shapes do not tell, and no release has them.
    """
    depth = 1 + max((int(key.split(".")[2]) for key in shapes if key.startswith("backbone.layers.")), default=-1)
    mixers = [under(f"backbone.layers.{i}.mixer.", shapes) for i in range(depth)]
    others = [i for i, mixer in enumerate(mixers) if {H3LM.mark, HyenaLM.mark} & mixer.keys()]
    if not others or "d_model" in config:
        return config if others else None
    D, first = shapes[WORDS][1], mixers[others[0]]
    options: dict[str, Any] = {
        "d_model": D,
        "n_layer": depth,
        "d_inner": shapes["backbone.layers.0.mlp.fc1.weight"][0],
        "vocab_size": shapes[WORDS][0],
        "max_position_embeddings": shapes.get("backbone.embeddings.position_embeddings.weight", (0,))[0],
    }
    if attention := [i for i in range(depth) if i not in others]:
        turned = mixers[attention[0]].get("rotary_emb.inv_freq", (TURNED.get((D, tuple(attention)), 0) // 2,))[0]
        heads = _told(HEADS.get(D), "how many heads attention has (attn_cfg: num_heads)", D)
        options |= {"attn_layer_idx": attention, "attn_cfg": {"num_heads": heads, "rotary_emb_dim": 2 * turned}}
    if H3LM.mark in first:
        taps, heads, systems = first["ssm_k_kernel.kernel.C"][-1], first["D"][0], first["kernel.kernel.A_imag"][0]
        shared = {"n_ssm": systems} if systems < heads else {}
        return options | {"ssm_cfg": {"d_state": taps, "head_dim": D // heads, **shared}}
    width, features = first["filter_fn.implicit_filter.0.weight"]
    untold = _told(filters((D, depth)), "whether filters have a window (layer: modulate)", D)
    layer = {
        "_name_": "hyena",
        "l_max": first["filter_fn.pos_emb.z"][1],
        "order": first["in_proj.weight"][0] // D - 1,
        "filter_order": width,
        "emb_dim": features,
        "num_inner_mlps": sum(bool(re.search(r"implicit_filter\.\d+\.bias$", key)) for key in first) - 1,
        "short_filter_order": first["short_filter.weight"][2],
    }
    return options | {"layer": {**layer, **untold}}


def _told(value: Any, what: str, width: int) -> Any:
    """What the releases tell."""
    if value is None:
        raise ValueError(
            f"shapes do not tell {what}, and none of the released models is {width} wide; put a config.json with all "
            "options beside the file, or give them all as key=value"
        )
    return value


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


SYSTEMS = {"hyenalm": System(HyenaLM), "h3lm": System(H3LM)}
