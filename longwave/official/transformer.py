"""Transformers of Hugging Face transformers: GPT-2, GPT-NeoX (Pythia), Llama, as ordinary language models."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from longwave.errors import nearest, shown
from longwave.mixers import MIXERS
from longwave.models.spec import CHANNEL_MIXERS, LMSpec
from longwave.nn import POSITIONS
from longwave.official.blocks import Call, ModelSource, positioned_logits
from longwave.official.source import (
    HUGGING_FACE,
    Alias,
    Flag,
    Name,
    Names,
    Positive,
    Size,
    State,
    System,
    Turn,
    apart,
    inside,
    mapping,
    numbered,
)

Gelu = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish"]
GELU_BY_TANH = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
ACTIVATIONS = {**GELU_BY_TANH, "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}

TRANSPOSED = Turn(lambda t: t.T, lambda t: t.T)
NUMBERS = r"\.(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq)$|\.rotary_emb\.inv_freq$"  # no parameters


class Pretrained(ModelSource):
    """What the models have in common."""

    ignored = HUGGING_FACE
    optional = True

    def build(self) -> nn.Module:
        return Call(self.spec().build(), positioned_logits)

    def rename(self, state: State) -> State:
        """Older checkpoints hold masks and frequencies besides."""
        return {key: tensor for key, tensor in state.items() if not re.search(NUMBERS, key)}


def heads_width(width: int, heads: int) -> int:
    """Width of a head.

    Raises:
        ValueError: where heads do not divide the width.
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return width // heads


def attention_names(prefix: str, heads: int, kv_heads: int, width: int, out: str = "o_proj.") -> Names:
    """Of attention with a map each for queries, keys and values."""
    packed = apart(heads * width, kv_heads * width, kv_heads * width)
    return [
        Name(tuple(f"{prefix}{part}_proj." for part in "qkv"), "mixer.Wqkv.", packed),
        Name(f"{prefix}{out}", "mixer.out_proj."),
    ]


def glu_names(gate: str, up: str, down: str, hidden: int) -> Names:
    """Of a gated channel mixer."""
    return [Name((gate, up), "channel.up.", apart(hidden, hidden)), Name(down, "channel.down.")]


def decoder_names(
    blocks: Sequence[Names],
    tied: bool,
    embedding: str = "model.embed_tokens.",
    layers: str = "model.layers.{}.",
    last: str = "model.norm.",
) -> Names:
    """Of a language model, from the names in its blocks and what stands before them."""
    return [
        *([Alias("lm_head.weight", f"{embedding}weight")] if tied else []),
        Name(embedding, "model.embedding."),
        Name("lm_head.", "model.head."),
        *(
            name
            for i, block in enumerate(blocks)
            for name in inside(layers.format(i), f"model.backbone.layers.{i}.", block)
        ),
        Name(last, "model.backbone.norm."),
    ]


class GPT2(Pretrained):
    """GPT2LMHeadModel, and GPT2Model's checkpoints, whose keys have no ``transformer.``"""

    hf_type = "gpt2"
    tokenizer = "GPT-2's (openai-community/gpt2)"
    ignored = Pretrained.ignored | {
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn", "n_ctx",
    }  # fmt: skip
    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Size = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: Gelu = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    scale_attn_weights: Flag = True
    scale_attn_by_inverse_layer_idx: Flag = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: Flag = True

    def spec(self) -> LMSpec:
        D, H = self.n_embd, self.n_head
        usual = heads_width(D, H) ** -0.5
        scale = usual if self.scale_attn_weights else 1.0
        scales = [scale / (i + 1 if self.scale_attn_by_inverse_layer_idx else 1) for i in range(self.n_layer)]
        mixers = [MIXERS.make("attention", heads=H, positions=None, scale=None if s == usual else s) for s in scales]
        return LMSpec(
            vocab=self.vocab_size,
            d_model=D,
            pattern=mixers if self.scale_attn_by_inverse_layer_idx else mixers[:1],
            layers=self.n_layer,
            positions=MIXERS.make("learned_positions", max_len=self.n_positions),
            channel=CHANNEL_MIXERS.make(
                "mlp", expand=(self.n_inner or 4 * D) / D, activation=ACTIVATIONS[self.activation_function]
            ),
            norm="layer",
            norm_eps=self.layer_norm_epsilon,
            tied=self.tie_word_embeddings,
        )

    def names(self) -> Names:
        words = "transformer.wte.weight"
        parts = {"attn.c_attn": "mixer.Wqkv", "attn.c_proj": "mixer.out_proj", "mlp.c_fc": "channel.fc1"}
        block: Names = [Name("ln_1.", "norm1."), Name("ln_2.", "norm2.")]
        for theirs, ours in (parts | {"mlp.c_proj": "channel.fc2"}).items():
            block += [Name(f"{theirs}.weight", f"{ours}.weight", TRANSPOSED), Name(f"{theirs}.bias", f"{ours}.bias")]
        return [
            *([Alias("lm_head.weight", words)] if self.tie_word_embeddings else []),
            Name(words, "model.embedding.weight"),
            Name("lm_head.weight", "model.head.weight"),
            Name("transformer.wpe.", "model.backbone.positions."),
            *numbered(self.n_layer, "transformer.h.{}.", "model.backbone.layers.{}.", block),
            Name("transformer.ln_f.", "model.backbone.norm."),
        ]

    def rename(self, state: State) -> State:
        """Released checkpoints are without ``transformer.``, and hold masks besides."""
        state = super().rename(state)
        if any(key.startswith("transformer.") for key in state):
            return state
        return {key if key.startswith("lm_head.") else f"transformer.{key}": t for key, t in state.items()}


class GPTNeoX(Pretrained):
    """GPTNeoXForCausalLM, with older names of its options and of its head too."""

    hf_type = "gpt_neox"
    tokenizer = "GPT-NeoX's (EleutherAI/gpt-neox-20b)"
    vocab_size: Size = 50432
    hidden_size: Size = 6144
    num_hidden_layers: Size = 44
    num_attention_heads: Size = 64
    intermediate_size: Size = 24576
    hidden_act: Gelu = "gelu"
    layer_norm_eps: Positive = 1e-5
    tie_word_embeddings: Flag = False
    use_parallel_residual: Flag = True
    attention_bias: Flag = True
    rope_parameters: Any = None
    rope_scaling: Any = None
    rotary_pct: Positive = 0.25
    rotary_emb_base: Positive = 10_000.0

    def spec(self) -> LMSpec:
        D, H = self.hidden_size, self.num_attention_heads
        rotary = rope(self.rotary_emb_base, self.rotary_pct, heads_width(D, H), self.rope_parameters, self.rope_scaling)
        return LMSpec(
            vocab=self.vocab_size,
            d_model=D,
            pattern=[MIXERS.make("attention", heads=H, positions=rotary, bias=self.attention_bias)],
            layers=self.num_hidden_layers,
            channel=CHANNEL_MIXERS.make(
                "mlp", expand=self.intermediate_size / D, activation=ACTIVATIONS[self.hidden_act]
            ),
            block="parallel" if self.use_parallel_residual else "sequential",
            norm="layer",
            norm_eps=self.layer_norm_eps,
            tied=self.tie_word_embeddings,
        )

    def names(self) -> Names:
        words, H = "gpt_neox.embed_in.weight", self.num_attention_heads
        packed = Turn(  # head by head its query, key and value; ours are all queries, all keys, all values
            lambda t: t.unflatten(0, (H, 3, -1)).transpose(0, 1).flatten(0, 2),
            lambda t: t.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(0, 2),
        )
        block: Names = [
            Name("input_layernorm.", "norm1."),
            Name("attention.query_key_value.", "mixer.Wqkv.", packed),
            Name("attention.dense.", "mixer.out_proj."),
            Name("post_attention_layernorm.", "norm2."),
            Name("mlp.dense_h_to_4h.", "channel.fc1."),
            Name("mlp.dense_4h_to_h.", "channel.fc2."),
        ]
        return [
            *([Alias("lm_head.weight", words)] if self.tie_word_embeddings else []),
            Name(words, "model.embedding.weight"),
            Name("lm_head.weight", "model.head.weight"),
            *numbered(self.num_hidden_layers, "gpt_neox.layers.{}.", "model.backbone.layers.{}.", block),
            Name("gpt_neox.final_layer_norm.", "model.backbone.norm."),
        ]

    def rename(self, state: State) -> State:
        """The head was once ``embed_out``."""
        return {key.replace("embed_out.", "lm_head."): tensor for key, tensor in super().rename(state).items()}


class Llama(Pretrained):
    """LlamaForCausalLM, with older names of its options too."""

    hf_type = "llama"
    tokenizer = "Llama's, of its generation (such as meta-llama/Llama-3.2-1B)"
    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Size = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: Flag = False
    attention_bias: Flag = False
    mlp_bias: Flag = False
    rope_theta: Positive = 10_000.0
    rope_parameters: Any = None
    rope_scaling: Any = None

    def sizes(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys, width of a head."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads or H, self.head_dim or heads_width(self.hidden_size, H)

    def spec(self) -> LMSpec:
        H, J, P = self.sizes()
        rotary = rope(self.rope_theta, 1.0, P, self.rope_parameters, self.rope_scaling)
        mixer = MIXERS.make("attention", heads=H, kv_heads=J, head_dim=P, positions=rotary, bias=self.attention_bias)
        return LMSpec(
            vocab=self.vocab_size,
            d_model=self.hidden_size,
            pattern=[mixer],
            layers=self.num_hidden_layers,
            channel=CHANNEL_MIXERS.make("swiglu", expand=self.intermediate_size / self.hidden_size, bias=self.mlp_bias),
            norm_eps=self.rms_norm_eps,
            tied=self.tie_word_embeddings,
        )

    def names(self) -> Names:
        block: Names = [
            Name("input_layernorm.", "norm1."),
            *attention_names("self_attn.", *self.sizes()),
            Name("post_attention_layernorm.", "norm2."),
            *glu_names("mlp.gate_proj.", "mlp.up_proj.", "mlp.down_proj.", self.intermediate_size),
        ]
        return decoder_names([block] * self.num_hidden_layers, self.tie_word_embeddings)


ROPE = {  # kinds of scaling, and the option here of each option there
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "length",
    },
}


def rope(base: float, share: float, width: int, parameters: Any, scaling: Any) -> Any:
    """Rotary positions, as ``rope_parameters`` has it, or as older configs do.

    Args:
        base, share: of a config without ``rope_parameters``; share is of the numbers of a head that are turned.
        width: of a head.
        parameters: ``rope_parameters``, or None.
        scaling: ``rope_scaling`` of older configs, or None.
    Raises:
        ValueError: for an option or a kind of scaling that is not carried over.
    """
    name = "rope_scaling" if parameters is None else "rope_parameters"
    given: dict[str, Any] = dict(mapping(scaling or {} if parameters is None else parameters))
    base, share = given.pop("rope_theta", base), given.pop("partial_rotary_factor", share)
    older = given.pop("type", "default")
    kind = given.pop("rope_type", older)
    if kind != "default" and kind not in ROPE:
        raise ValueError(
            f"{name}: rope_type = {shown(kind)} is not carried over; longwave has default, {', '.join(ROPE)}"
            f"{nearest(str(kind), ROPE)}"
        )
    names = ROPE.get(kind, {})
    for option in given:
        if option not in names:
            raise ValueError(f"{name}: there is no option {option!r} of {kind!r}{nearest(option, names)}")
    for option in names:
        if option not in given:
            raise ValueError(f"{name}: {kind!r} needs the option {option!r}")
    scaled = {"kind": kind, **{names[option]: value for option, value in given.items()}} if names else None
    return POSITIONS.make("rotary", base=base, dim=int(width * share), scaling=scaled)


SYSTEMS = {"gpt2_hf": System(GPT2), "gptneox_hf": System(GPTNeoX), "llama_hf": System(Llama)}
