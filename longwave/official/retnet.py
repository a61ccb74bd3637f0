"""RetNet: the decoder of microsoft/torchscale, of its GitHub and its PyPI release, and fla's naive retention."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import mixer
from longwave.models.spec import CHANNEL_MIXERS, LMSpec
from longwave.official.blocks import Call, ModelSource
from longwave.official.source import (
    Flag,
    Name,
    Names,
    Positive,
    Shapes,
    Size,
    Source,
    State,
    System,
    Turn,
    numbered,
)
from longwave.official.transformer import glu_names
from longwave.ops import linear_attention


class RetNetDecoder(ModelSource):
    """RetNetDecoder of its GitHub head, or of the ``release`` 0.3.0 on PyPI, which options and weights do not tell.

    A checkpoint without options has torchscale's defaults in what its tensors do not tell: activation_fn,
    layernorm_eps, no_scale_embedding, release.
    """

    tokenizer = "whatever it was trained with: torchscale releases none"
    ignored = frozenset(
        {"dropout", "drop_path_rate", "activation_dropout", "checkpoint_activations", "fsdp", "ddp_rank", "subln"}
        | {"chunkwise_recurrent", "recurrent_chunk_size", "max_target_positions", "use_xmoe", "moe_top1_expert"}
        | {"moe_expert_count", "moe_gating_use_fp32", "moe_eval_capacity_token_fraction", "moe_second_expert_policy"}
        | {"moe_normalize_gate_prob_before_dropping", "rel_pos_buckets", "max_rel_pos"}
    )
    release: Literal["github", "0.3.0"] = "github"
    vocab_size: Size
    decoder_embed_dim: Size = 768
    decoder_value_embed_dim: Size = 1280
    decoder_retention_heads: Size = 3
    decoder_ffn_embed_dim: Size = 1280
    decoder_layers: Size = 12
    activation_fn: Literal["gelu", "relu", "swish"] = "gelu"
    layernorm_eps: Positive = 1e-6
    layernorm_embedding: Flag = False
    no_scale_embedding: Flag = True
    share_decoder_input_output_embed: Flag = False
    decoder_normalize_before: Literal[True] = True
    deepnorm: Literal[False] = False
    multiway: Literal[False] = False
    no_output_layer: Literal[False] = False
    moe_freq: Literal[0] = 0

    def spec(self) -> LMSpec:
        D, eps = self.decoder_embed_dim, self.layernorm_eps
        sums = "absolute_score_sums" if self.release == "github" else {"kind": "score_sums", "constant": True}
        expand = self.decoder_value_embed_dim / D
        retnet = mixer("retnet", heads=self.decoder_retention_heads, expand=expand, norm_eps=eps, normalizer=sums)
        gate = (
            {"kind": "swiglu"} if self.activation_fn == "swish" else {"kind": "glu", "activation": self.activation_fn}
        )
        return LMSpec(
            vocab=self.vocab_size,
            tied=False,
            d_model=D,
            pattern=[retnet],
            layers=self.decoder_layers,
            channel=CHANNEL_MIXERS.read({**gate, "expand": self.decoder_ffn_embed_dim / D}),
            norm_eps=eps,
        )

    def embedded(self, words: Tensor, *norm: Tensor) -> Tensor:
        """What the first layer reads of every token: the scale and the norm behind the embedding go into it."""
        words = words if self.no_scale_embedding else words * math.sqrt(self.decoder_embed_dim)
        return F.rms_norm(words, norm[0].shape, norm[0], self.layernorm_eps) if norm else words

    def names(self) -> Names:
        layers, heads = self.decoder_layers, self.decoder_retention_heads
        words, norm = "embed_tokens.weight", ["layernorm_embedding.weight"] * self.layernorm_embedding
        head = words if self.share_decoder_input_output_embed else "output_projection.weight"
        # pairs of neighbours there, halves of a head here
        halves = Turn(
            lambda t: t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2),
            lambda t: t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2),
        )
        every = [f"model.backbone.layers.{i}.mixer.rel_pos." for i in range(layers)]
        layer = [
            *(Name(f"retention.{x}_proj.weight", f"mixer.{x}_proj.weight", halves) for x in "qk"),
            Name("retention.", "mixer."),
            Name("retention_layer_norm.", "norm1."),
            Name("final_layer_norm.", "norm2."),
            *glu_names("ffn.fc1.", "ffn.gate.", "ffn.fc2.", self.decoder_ffn_embed_dim),
        ]
        return [
            Name((words, *norm), "model.embedding.weight", Turn(self.embedded, lambda t: (t, *[t[0]] * len(norm)))),
            Name(head, "model.head.weight"),
            Name("layer_norm.", "model.backbone.norm."),
            Name(
                "retnet_rel_pos.angle",
                tuple(f"{mixer}angle" for mixer in every),
                Turn(lambda t: tuple(t[::2].clone() for _ in every), lambda *t: t[0].repeat_interleave(2)),
            ),
            Name(
                "retnet_rel_pos.decay",
                tuple(f"{mixer}decay" for mixer in every),
                Turn(lambda t: tuple(t.clone() for _ in every), lambda *t: t[0]),
            ),
            *numbered(layers, "layers.{}.", "model.backbone.layers.{}.", layer),
        ]

    def rename(self, state: State) -> State:
        """Within fairseq's models it is ``decoder``."""
        return {key.removeprefix("decoder."): t for key, t in state.items()}

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        shapes = {key.removeprefix("decoder."): shape for key, shape in shapes.items()}
        if not {"retnet_rel_pos.decay", "embed_tokens.weight", "layers.0.ffn.fc1.weight"} <= shapes.keys():
            return None
        vocab, width = shapes["embed_tokens.weight"]
        return {name: value for name, value in config.items() if name in cls.model_fields} | {
            "vocab_size": vocab,
            "decoder_embed_dim": width,
            "decoder_value_embed_dim": shapes["layers.0.retention.v_proj.weight"][0],
            "decoder_retention_heads": shapes["retnet_rel_pos.decay"][0],
            "decoder_ffn_embed_dim": shapes["layers.0.ffn.fc1.weight"][0],
            "decoder_layers": sum(key.endswith(".ffn.fc1.weight") for key in shapes),
            "layernorm_embedding": "layernorm_embedding.weight" in shapes,
            "share_decoder_input_output_embed": "output_projection.weight" not in shapes,
        }


class NaiveRetention(Source):
    """naive_retention of fla-org/flash-linear-attention, which has no weights."""

    ignored = frozenset({"heads", "dk", "dv"})

    def build(self) -> nn.Module:
        return Call(nn.Identity(), self.run)

    @staticmethod
    def run(model: nn.Module, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> Any:
        """:func:`longwave.ops.linear_attention` with RetNet's decays in the authors' layout, time on axis 2.

        Args:
            q, k: (B, H, L, N).
            v: (B, H, L, P).
            state: (B, H, N, P), or None.
        Returns:
            y: (B, H, L, P), or with a state a dict of it and ``next_state``.
        """
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(q.shape[1], dtype=torch.float64, device=q.device))))
        q, k, v = (t.transpose(1, 2) for t in (q * q.shape[3] ** -0.5, k, v))
        y, end = linear_attention(q, k, v, decay.to(q.dtype), state)
        return y.transpose(1, 2) if state is None else {"y": y.transpose(1, 2), "next_state": end}


SYSTEMS = {"retnet_torchscale": System(RetNetDecoder), "retention_naive": System(NaiveRetention)}
