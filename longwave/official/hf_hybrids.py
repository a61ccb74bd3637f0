"""Models of Hugging Face transformers (5.23) whose layers are not all of one kind, or no attention: RecurrentGemma,
Qwen3-Next without experts, LFM2, xLSTM.

Each is its layer of hf_layers.py and, for the others, attention. Qwen3-Next's experts have no counterpart here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longwave.errors import shown
from longwave.mixers import MixerSpec, mixer
from longwave.models.spec import CHANNEL_MIXERS, LMSpec
from longwave.official.hf_layers import (
    Lfm2ShortConv,
    Qwen3NextGatedDeltaNet,
    RecurrentGemmaRecurrentBlock,
    XLSTMLayer,
)
from longwave.official.source import (
    HUGGING_FACE,
    Count,
    Flag,
    Name,
    Names,
    Positive,
    Shapes,
    Size,
    System,
    Turn,
    inside,
)
from longwave.official.transformer import Pretrained, attention_names, decoder_names, glu_names, heads_width, rope

LINEAR, FULL = "linear_attention", "full_attention"


def _is_attention(kinds: Sequence[str] | None, layers: int, attention: str, other: str) -> list[bool]:
    """Of every layer, by its name in ``layer_types``.

    Raises:
        ValueError: for other names, or as many as there are not layers.
    """
    if kinds is None:
        raise ValueError("the option 'layer_types' is missing")
    for kind in kinds:
        if kind not in (attention, other):
            raise ValueError(f"layer_types: {shown(kind)} is not carried over; longwave has {other}, {attention}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers = {layers}")
    return [kind == attention for kind in kinds]


class RecurrentGemma(Pretrained, RecurrentGemmaRecurrentBlock):
    """RecurrentGemmaForCausalLM."""

    hf_type = "recurrent_gemma"
    tokenizer = "Gemma's (google/recurrentgemma-2b)"
    ignored: ClassVar[frozenset[str]] = HUGGING_FACE | {"w_init_variance_scale", "final_w_init_variance_scale"}
    vocab_size: Size = 256000
    num_hidden_layers: Size = 26
    intermediate_size: Size = 7680
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    attention_window_size: Size = 2048
    attention_bias: Flag = False
    logits_soft_cap: Positive = 30.0
    rms_norm_eps: Positive = 1e-6
    block_types: Sequence[Literal["recurrent", "attention"]] = ("recurrent", "recurrent", "attention")
    embeddings_scale_by_sqrt_dim: Literal[True] = True
    tie_word_embeddings: Flag = True
    rope_parameters: Any = None
    rope_theta: Positive = 10_000.0
    partial_rotary_factor: Positive = 0.5

    def sizes(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys, width of a head."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads or H, self.head_dim or heads_width(self.hidden_size, H)

    def attention(self) -> MixerSpec:
        """That of the other layers, as data."""
        H, J, P = self.sizes()
        rotary = rope(self.rope_theta, self.partial_rotary_factor, P, self.rope_parameters, None)
        window, bias = self.attention_window_size, self.attention_bias
        options = {"positions": rotary, "window": window, "bias": bias, "out_bias": True}
        return mixer("attention", heads=H, kv_heads=J, head_dim=P, **options)

    def spec(self) -> LMSpec:
        D, kinds = self.hidden_size, {"recurrent": self.mixer(), "attention": self.attention()}
        return LMSpec(
            vocab=self.vocab_size,
            d_model=D,
            pattern=[kinds[kind] for kind in self.block_types],
            layers=self.num_hidden_layers,
            channel=CHANNEL_MIXERS.make("glu", expand=self.intermediate_size // 2 / D, bias=True),
            norm="offset_rms",
            norm_eps=self.rms_norm_eps,
            tied=self.tie_word_embeddings,
            embedding_scale=torch.tensor(math.sqrt(D), dtype=torch.bfloat16, device="cpu").item(),  # as they round it
            soft_cap=self.logits_soft_cap,
        )

    def names(self) -> Names:
        mixers = {
            "recurrent": inside("temporal_block.", "mixer.", self.mixer_names()),
            "attention": attention_names("temporal_block.", *self.sizes()),
        }
        gate, up, down = (f"mlp_block.{name}_proj." for name in ("gate", "up", "down"))
        shared = [
            Name("temporal_pre_norm.", "norm1."),
            Name("channel_pre_norm.", "norm2."),
            *glu_names(gate, up, down, self.intermediate_size // 2),
        ]
        kinds = [self.block_types[i % len(self.block_types)] for i in range(self.num_hidden_layers)]
        blocks = [[*shared, *mixers[kind]] for kind in kinds]
        return decoder_names(blocks, self.tie_word_embeddings, last="model.final_norm.")


class Qwen3Next(Pretrained, Qwen3NextGatedDeltaNet):
    """Qwen3NextForCausalLM whose blocks have one channel mixer each, and no experts."""

    hf_type = "qwen3_next"
    tokenizer = "Qwen's (Qwen/Qwen3-Next-80B-A3B-Instruct)"
    ignored: ClassVar[frozenset[str]] = HUGGING_FACE | {
        "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "norm_topk_prob",
        "output_router_logits", "router_aux_loss_coef", "full_attention_interval",
    }  # fmt: skip
    vocab_size: Size = 151936
    num_hidden_layers: Size = 48
    num_attention_heads: Size = 16
    num_key_value_heads: Size = 2
    head_dim: Size = 256
    intermediate_size: Size = 5632
    attention_bias: Flag = False
    tie_word_embeddings: Flag = False
    num_experts: Count = 512
    decoder_sparse_step: Size = 1
    mlp_only_layers: Sequence[Count] | None = None
    layer_types: Sequence[str] | None = None
    rope_parameters: Any = None
    rope_scaling: Any = None
    rope_theta: Positive = 10_000.0
    partial_rotary_factor: Positive = 0.25

    def attends(self) -> list[bool]:
        """Whether a layer is attention."""
        return _is_attention(self.layer_types, self.num_hidden_layers, FULL, LINEAR)

    def attention(self) -> MixerSpec:
        """That of some layers, as data."""
        H, J, P = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        rotary = rope(self.rope_theta, self.partial_rotary_factor, P, self.rope_parameters, self.rope_scaling)
        options = {"positions": rotary, "qk_norm": {"kind": "offset_rms", "eps": self.rms_norm_eps}, "gate": True}
        return mixer("attention", heads=H, kv_heads=J, head_dim=P, bias=self.attention_bias, **options)

    def spec(self) -> LMSpec:
        plain = self.mlp_only_layers or []
        experts = [
            i for i in range(self.num_hidden_layers) if i not in plain and not (i + 1) % self.decoder_sparse_step
        ]
        if self.num_experts and experts:
            raise ValueError(
                f"num_experts = {self.num_experts} in layers {shown(experts)} are not carried over; longwave has one "
                "channel mixer a block, num_experts = 0"
            )
        return LMSpec(
            vocab=self.vocab_size,
            d_model=self.hidden_size,
            pattern=[self.attention() if attends else self.mixer() for attends in self.attends()],
            channel=CHANNEL_MIXERS.make("swiglu", expand=self.intermediate_size / self.hidden_size),
            norm="offset_rms",
            norm_eps=self.rms_norm_eps,
            tied=self.tie_word_embeddings,
        )

    def names(self) -> Names:
        H, J, P = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        attention = [
            *(
                Name(
                    tuple(f"self_attn.{x}_proj.{what}" for x in "qkv"),
                    (f"mixer.Wqkv.{what}", f"mixer.gate_proj.{what}"),
                    _gated(H, J, P),
                )
                for what in ("weight", "bias")
            ),
            Name("self_attn.o_proj.", "mixer.out_proj."),
            Name("self_attn.", "mixer."),
        ]
        shared = [
            Name("input_layernorm.", "norm1."),
            Name("post_attention_layernorm.", "norm2."),
            *glu_names("mlp.gate_proj.", "mlp.up_proj.", "mlp.down_proj.", self.intermediate_size),
        ]
        linear = inside("linear_attn.", "mixer.", self.mixer_names())
        blocks = [[*shared, *(attention if attends else linear)] for attends in self.attends()]
        return decoder_names(blocks, self.tie_word_embeddings)


def _gated(heads: int, kv_heads: int, width: int) -> Turn:
    """Queries and gates head by head, keys, values <-> all queries, keys and values; all gates."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, gate = (t.flatten(0, 1) for t in q.unflatten(0, (heads, 2, -1)).unbind(1))
        return torch.cat([q, k, v]), gate

    def official(qkv: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width])
        both = torch.stack([t.unflatten(0, (heads, -1)) for t in (q, gate)], dim=1)
        return both.flatten(0, 2), k, v

    return Turn(ours, official)


class LFM2(Pretrained, Lfm2ShortConv):
    """Lfm2ForCausalLM, with older names of its options too."""

    hf_type = "lfm2"
    tokenizer = "LFM2's (LiquidAI/LFM2-1.2B)"
    ignored: ClassVar[frozenset[str]] = HUGGING_FACE | {
        "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
        "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta",
        "use_pos_enc",
    }  # fmt: skip
    vocab_size: Size = 65536
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 8
    head_dim: Size | None = None
    intermediate_size: Size = 12288
    block_ff_dim: Size | None = None
    block_auto_adjust_ff_dim: Flag = True
    block_ffn_dim_multiplier: Positive | None = 1.0
    block_multiple_of: Size = 256
    norm_eps: Positive = 1e-5
    full_attn_idxs: Sequence[Count] | None = None
    layer_types: Sequence[str] | None = None
    tie_word_embeddings: Flag = True
    tie_embedding: Flag | None = None
    rope_parameters: Any = None
    rope_theta: Positive = 1_000_000.0

    def attends(self) -> list[bool]:
        """Whether a layer is attention."""
        layers = self.num_hidden_layers
        if self.layer_types is None:
            places = range(layers) if self.full_attn_idxs is None else self.full_attn_idxs
            return [i in places for i in range(layers)]
        return _is_attention(self.layer_types, layers, FULL, "conv")

    def tied(self) -> bool:
        """Whether the head is the embedding, which an older name said."""
        return self.tie_word_embeddings if self.tie_embedding is None else self.tie_embedding

    def hidden(self) -> int:
        """Width of the channel mixers."""
        hidden, multiple = self.block_ff_dim or self.intermediate_size, self.block_multiple_of
        if not self.block_auto_adjust_ff_dim:
            return hidden
        hidden = int(2 * hidden / 3)
        if self.block_ffn_dim_multiplier is None:
            return hidden
        return multiple * -(-int(self.block_ffn_dim_multiplier * hidden) // multiple)

    def sizes(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys, width of a head."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads, self.head_dim or heads_width(self.hidden_size, H)

    def attention(self) -> MixerSpec:
        """That of some layers, as data."""
        H, J, P = self.sizes()
        rotary, norm = rope(self.rope_theta, 1.0, P, self.rope_parameters, None), {"kind": "rms", "eps": self.norm_eps}
        return mixer("attention", heads=H, kv_heads=J, head_dim=P, bias=False, positions=rotary, qk_norm=norm)

    def spec(self) -> LMSpec:
        return LMSpec(
            vocab=self.vocab_size,
            d_model=self.hidden_size,
            pattern=[self.attention() if attends else self.mixer() for attends in self.attends()],
            channel=CHANNEL_MIXERS.make("swiglu", expand=self.hidden() / self.hidden_size),
            norm_eps=self.norm_eps,
            tied=self.tied(),
        )

    def names(self) -> Names:
        attention = [
            *attention_names("self_attn.", *self.sizes(), out="out_proj."),
            *(Name(f"self_attn.{x}_layernorm.", f"mixer.{x}_norm.") for x in "qk"),
        ]
        shared = [
            Name("operator_norm.", "norm1."),
            Name("ffn_norm.", "norm2."),
            *glu_names("feed_forward.w1.", "feed_forward.w3.", "feed_forward.w2.", self.hidden()),
        ]
        conv = inside("conv.", "mixer.", self.mixer_names())
        blocks = [[*shared, *(attention if attends else conv)] for attends in self.attends()]
        return decoder_names(blocks, self.tied(), last="model.embedding_norm.")


class XLSTM(Pretrained, XLSTMLayer):
    """xLSTMForCausalLM without biases."""

    hf_type = "xlstm"
    tokenizer = "GPT-NeoX's (EleutherAI/gpt-neox-20b)"
    ignored: ClassVar[frozenset[str]] = XLSTMLayer.ignored
    vocab_size: Size = 50304
    num_hidden_layers: Size = 32
    ffn_proj_factor: Positive = 2.667
    ffn_round_up_to_multiple_of: Size = 64
    output_logit_soft_cap: Positive | None = 30.0
    use_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False

    def hidden(self) -> int:
        """Width of the channel mixers."""
        multiple = self.ffn_round_up_to_multiple_of
        return multiple * int((self.hidden_size * self.ffn_proj_factor + multiple - 1) // multiple)

    def spec(self) -> LMSpec:
        return LMSpec(
            vocab=self.vocab_size,
            d_model=self.hidden_size,
            pattern=[self.mixer()],
            layers=self.num_hidden_layers,
            channel=CHANNEL_MIXERS.make("swiglu", expand=self.hidden() / self.hidden_size),
            norm_eps=self.norm_eps,
            tied=False,
            soft_cap=self.output_logit_soft_cap,
        )

    def names(self) -> Names:
        maps = ("ffn.proj_up_gate.", "ffn.proj_up.", "ffn.proj_down.")
        fused = [Name("ffn.proj_up_gate_z.", "channel.up."), Name("ffn.proj_down.", "channel.down.")]
        block = [
            Name("norm_mlstm.", "norm1."),
            Name("norm_ffn.", "norm2."),
            *inside("mlstm_layer.", "mixer.", self.mixer_names()),
            *(fused if self.weight_mode == "fused" else glu_names(*maps, self.hidden())),
        ]
        where = ("backbone.embeddings.", "backbone.blocks.{}.", "backbone.out_norm.")
        return decoder_names([block] * self.num_hidden_layers, False, *where)

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        if (found := super().found(config, shapes)) is None:
            return None
        older = {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}  # names of NX-AI/xLSTM-7b
        return {**found, **{new: found[old] for new, old in older.items() if old in found and new not in found}}


SYSTEMS = {
    "recurrent_gemma_hf": System(RecurrentGemma),
    "qwen3_next_hf": System(Qwen3Next),
    "lfm2_hf": System(LFM2),
    "xlstm_hf": System(XLSTM),
}
