"""Layers of models of Hugging Face transformers (5.23), one mixer each, from the config of its whole model."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import MixerSpec, mixer
from longwave.official.blocks import Call, mixed
from longwave.official.source import (
    HUGGING_FACE,
    Flag,
    Name,
    Names,
    Positive,
    Size,
    Source,
    System,
    Turn,
    apart,
    inside,
)

OF_ANY_MODEL = HUGGING_FACE | {
    "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "attention_bias", "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor",
    "layer_types",
}  # fmt: skip


class HFLayer(Source):
    """A mixer, called as the layer is without a cache."""

    ignored: ClassVar[frozenset[str]] = OF_ANY_MODEL
    hidden_size: Size

    @abstractmethod
    def mixer(self) -> MixerSpec:
        """It, as data."""

    def mixer_names(self) -> Names:
        """Of its tensors."""
        return [Name("", "")]

    def build(self) -> nn.Module:
        return Call(self.mixer().build(self.hidden_size), mixed)

    def names(self) -> Names:
        return inside("", "model.", self.mixer_names())


def _grouped(groups: int, sizes: Sequence[int]) -> Turn:
    """Rows in groups, in each so many of one kind, then of the next <-> all of one kind, then all of the next."""

    def ours(t: Tensor) -> Tensor:
        return torch.cat([kind.flatten(0, 1) for kind in t.unflatten(0, (groups, -1)).split(list(sizes), 1)])

    def official(t: Tensor) -> Tensor:
        kinds = t.split([groups * size for size in sizes])
        return torch.cat([kind.unflatten(0, (groups, -1)) for kind in kinds], 1).flatten(0, 1)

    return Turn(ours, official)


class Qwen3NextGatedDeltaNet(HFLayer):
    """Qwen3NextGatedDeltaNet."""

    ignored: ClassVar[frozenset[str]] = OF_ANY_MODEL | {
        "decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size",
        "num_experts_per_tok", "num_experts", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef",
        "mlp_only_layers",
    }  # fmt: skip
    hidden_size: Size = 2048
    linear_num_key_heads: Size = 16
    linear_num_value_heads: Size = 32
    linear_key_head_dim: Size = 128
    linear_value_head_dim: Size = 128
    linear_conv_kernel_dim: Size = 4
    rms_norm_eps: Positive = 1e-6
    hidden_act: Literal["silu", "swish"] = "silu"

    def mixer(self) -> MixerSpec:
        return mixer(
            "gated_deltanet",
            heads=self.linear_num_value_heads,
            groups=self.linear_num_key_heads,
            key_dim=self.linear_key_head_dim,
            head_dim=self.linear_value_head_dim,
            d_conv=self.linear_conv_kernel_dim,
            eps=self.rms_norm_eps,
        )

    def mixer_names(self) -> Names:
        G, N = self.linear_num_key_heads, self.linear_key_head_dim
        heads = self.linear_num_value_heads // G
        P = heads * self.linear_value_head_dim
        qkvz, ba = "in_proj_qkvz.weight", "in_proj_ba.weight"
        turned = [Name(qkvz, qkvz, _grouped(G, [N, N, P, P])), Name(ba, ba, _grouped(G, [heads, heads]))]
        return [*turned, Name("", "")]


class RecurrentGemmaRecurrentBlock(HFLayer):
    """RecurrentGemmaRecurrentBlock, its RecurrentGemmaRglru inside."""

    ignored: ClassVar[frozenset[str]] = OF_ANY_MODEL | {
        "attention_window_size", "logits_soft_cap", "rms_norm_eps", "block_types", "w_init_variance_scale",
        "final_w_init_variance_scale",
    }  # fmt: skip
    hidden_size: Size = 2560
    num_attention_heads: Size = 10
    lru_width: Size | None = None
    conv1d_width: Size = 4
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    def mixer(self) -> MixerSpec:
        return mixer("rg_lru", width=self.lru_width, heads=self.num_attention_heads, d_conv=self.conv1d_width)

    def mixer_names(self) -> Names:
        heads = self.num_attention_heads
        weights = Turn(lambda i, r: torch.cat([i, r], 2).mT, lambda t: t.mT.chunk(2, 2))
        biases = Turn(lambda i, r: torch.cat([i, r], 1).flatten(), lambda t: t.unflatten(0, (heads, -1)).chunk(2, 1))
        gates = [
            Name((f"rg_lru.input_gate_{what}", f"rg_lru.recurrent_gate_{what}"), f"gates.{what}", turn)
            for what, turn in (("weight", weights), ("bias", biases))
        ]
        return [*gates, Name("rg_lru.recurrent_param", "recurrent_param"), Name("", "")]


class Lfm2ShortConv(HFLayer):
    """Lfm2ShortConv."""

    ignored: ClassVar[frozenset[str]] = OF_ANY_MODEL | {
        "norm_eps", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "full_attn_idxs",
    }  # fmt: skip
    hidden_size: Size = 2560
    conv_L_cache: Size = 3
    conv_bias: Flag = False

    def mixer(self) -> MixerSpec:
        return mixer("lfm2_conv", d_conv=self.conv_L_cache, bias=self.conv_bias)


class XLSTMLayer(HFLayer):
    """xLSTMLayer."""

    ignored: ClassVar[frozenset[str]] = OF_ANY_MODEL | {
        "embedding_dim", "num_blocks", "norm_reduction_force_float32", "add_out_norm", "chunkwise_kernel",
        "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states", "autocast_kernel_dtype",
        "inference_state_dtype", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "output_logit_soft_cap",
        "max_inference_chunksize",
    }  # fmt: skip
    hidden_size: Size = 4096
    num_heads: Size = 8
    use_bias: Flag = False
    norm_eps: Positive = 1e-6
    qk_dim_factor: Positive = 0.5
    v_dim_factor: Positive = 1.0
    eps: Positive = 1e-6
    gate_soft_cap: Positive | None = 15.0
    weight_mode: Literal["single", "fused"] = "single"

    def widths(self) -> tuple[int, int]:
        """Of all queries, and of all values."""
        return int(self.hidden_size * self.qk_dim_factor), int(self.hidden_size * self.v_dim_factor)

    def mixer(self) -> MixerSpec:
        qk, v = self.widths()
        return mixer(
            "mlstm",
            heads=self.num_heads,
            key_width=qk,
            value_width=v,
            bias=self.use_bias,
            gate_cap=self.gate_soft_cap,
            norm_eps=self.norm_eps,
            eps=self.eps,
        )

    def mixer_names(self) -> Names:
        (qk, v), table = self.widths(), []
        if self.weight_mode == "single":
            parts = {
                "qkv_opreact": {"q": qk, "k": qk, "v": v, "ogate_preact": v},
                "ifgate_preact": {"igate_preact": self.num_heads, "fgate_preact": self.num_heads},
            }
            table = [
                Name(tuple(f"{name}.{what}" for name in sizes), f"{ours}.{what}", apart(*sizes.values()))
                for ours, sizes in parts.items()
                for what in ("weight", "bias")
            ]
        return [*table, Name("", "")]


SYSTEMS = {
    "qwen3_next_gated_deltanet": System(Qwen3NextGatedDeltaNet),
    "recurrent_gemma_block": System(RecurrentGemmaRecurrentBlock),
    "lfm2_short_conv": System(Lfm2ShortConv),
    "xlstm_layer": System(XLSTMLayer),
}
