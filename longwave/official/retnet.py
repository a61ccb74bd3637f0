"""RetNet: the decoder of microsoft/torchscale, of its GitHub and its PyPI release, and fla's naive retention."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import Growing, RetNet
from longwave.mixers.retnet import Retained, ScoreSums, sums_of_decays
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.nn import RMSNorm, append_time
from longwave.nn.padding import is_real
from longwave.official.blocks import ELEMENTWISE, Call, logits
from longwave.official.source import Flag, Name, Names, Positive, Size, Source, System, Turn, numbered
from longwave.ops import linear_attention

AT_MOST = 5e4  # of what scores are divided by


class KeysSoFar(NamedTuple):
    k: Growing  # (B, t, H, N)
    position: Growing  # (B, t) int64, of every key, -1 at padding


class AbsoluteScoreSums:
    """sqrt(r) clamp(sum of |scores| / sqrt(r), 1, 5e4),  r the sum of the decays: as torchscale's parallel form has it.

    No state of one size gives it, so it keeps all keys: O(L^2) time. torchscale's own recurrence leaves it out.
    """

    def init_state(self, like: Tensor) -> KeysSoFar:
        """No keys."""
        B, H, N, _ = like.shape
        return KeysSoFar(like.new_zeros(B, 0, H, N), torch.zeros(B, 0, dtype=torch.int64, device=like.device))

    def __call__(self, chunk: Retained, state: KeysSoFar | None) -> tuple[Tensor, KeysSoFar | None]:
        """What y is divided by, (B, L, H, 1), and the next state."""
        B, L = chunk.k.shape[:2]
        k, here = chunk.k, chunk.position()
        position = here.expand(B, L)
        if chunk.padding is not None:
            position = position.masked_fill(~is_real(L, chunk.padding), -1)
        if state is not None:
            state = KeysSoFar(append_time(state.k, k), append_time(state.position, position))
            k, position = state
        lag = here[:, :, None] - position[:, None]  # (B, L, t)
        past = (lag >= 0) & (position >= 0)[:, None]
        decay = torch.where(past[..., None], (lag[..., None] * chunk.decay).exp(), 0)  # (B, L, t, H)
        sums = torch.einsum("blhn,bthn->blth", chunk.q, k).abs().mul(decay).sum(2)[..., None]
        root = sums_of_decays(chunk).sqrt()
        return root * (sums / root).clamp(1, AT_MOST), state


class Constant:
    """What another one says, as a constant to the gradient."""

    def __init__(self, normalizer: Any):
        self.normalizer, self.init_state = normalizer, normalizer.init_state

    def __call__(self, chunk: Retained, state: Any) -> tuple[Tensor, Any]:
        sums, state = self.normalizer(chunk, state)
        return sums.detach(), state


class GatedMLP(nn.Module):
    """fc2(act(fc1 x) * gate x), without biases."""

    def __init__(self, d_model: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.gate = (nn.Linear(d_model, hidden, bias=False) for _ in range(2))
        self.act, self.fc2 = ELEMENTWISE[activation](), nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.gate(x))


class RetNetDecoder(Source):
    """RetNetDecoder of its GitHub head, or of the ``release`` 0.3.0 on PyPI, which options and weights do not tell."""

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

    def mixer(self) -> RetNet:
        """Of a layer."""
        D = self.decoder_embed_dim
        expand = self.decoder_value_embed_dim / D
        mixer = RetNet(D, self.decoder_retention_heads, expand, norm_eps=self.layernorm_eps)
        mixer.normalizer = Constant(AbsoluteScoreSums() if self.release == "github" else ScoreSums())
        return mixer

    def build(self) -> nn.Module:
        eps = self.layernorm_eps
        channel = partial(GatedMLP, hidden=self.decoder_ffn_embed_dim, activation=self.activation_fn)
        backbone = Backbone([self.mixer() for _ in range(self.decoder_layers)], partial(RMSNorm, eps=eps), channel)
        return Call(LM(backbone, self.vocab_size, tied=False), logits)

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
            Name("ffn.", "channel."),
        ]
        return [
            Name((words, *norm), "model.embedding.weight", Turn(self.embedded, lambda t: (t, *[t[0]] * len(norm)))),
            Name(head, "model.head.weight"),
            Name("layer_norm.", "model.backbone.norm."),
            Name(
                "retnet_rel_pos.angle",
                tuple(f"{mixer}angle" for mixer in every),
                Turn(lambda t: (t[::2],) * layers, lambda *t: t[0].repeat_interleave(2)),
            ),
            Name(
                "retnet_rel_pos.decay",
                tuple(f"{mixer}decay" for mixer in every),
                Turn(lambda t: (t,) * layers, lambda *t: t[0]),
            ),
            *numbered(layers, "layers.{}.", "model.backbone.layers.{}.", layer),
        ]


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
