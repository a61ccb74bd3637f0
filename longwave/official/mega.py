"""Mega in its official forms: the authors' modules, those of state-spaces/s4, Hugging Face's, and lucidrains'.

github.com/facebookresearch/mega (commit aeaa4b4), github.com/state-spaces/s4 (commit e757cef, megablock.py),
transformers 4.40.2 (modeling_mega.py), mega-pytorch 0.1.0. They are modules and no specs: the authors' blocks norm
inside the layer or behind the sum, for images by batch norm, and their wikitext-103 model has an adaptive softmax.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.mega import BothWays, DistanceBias, Mega, MegaTwoSided
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.nn import NORMS, EMAFilter, Filter, LongConv, Truncated
from longwave.official.blocks import Call, Elementwise, FeedForward, ResidualBlock, mixed
from longwave.official.replicas.mega import Float32RotaryBias, Float32Softmax
from longwave.official.source import (
    Alias,
    Count,
    Flag,
    Name,
    Names,
    Size,
    Source,
    System,
    Turn,
    inside,
    numbered,
    unused,
)

NAMED = {"layernorm": "layer", "rmsnorm": "rms", "scalenorm": "scale"}
Norm = Literal["layernorm", "rmsnorm", "scalenorm"]
Attention = Literal["softmax", "laplace", "relu2"]
Bias = Literal["simple", "rotary"]
EMA = ("delta", "alpha", "beta", "gamma")  # as the authors and we call what an average has


def halves(official: str, ours: str, both: bool, column: bool) -> Name:
    """A parameter of averages (C, N), or (C, N, 1) in a column; of both directions one behind the other."""
    shown = (lambda t: t[..., None]) if column else (lambda t: t)
    flat = (lambda t: t[..., 0]) if column else (lambda t: t)
    if not both:
        return Name(official, f"filter.{ours}", Turn(flat, shown))
    split = Turn(lambda t: flat(t).chunk(2), lambda a, b: shown(torch.cat([a, b])))
    return Name(official, (f"filter.{ours}", f"ahead.{ours}"), split)


def average(D: int, N: int, bidirectional: bool, causal: bool, truncation: int | None) -> LongConv | BothWays:
    """The authors' moving averages: of the past alone, with a state, or of both directions."""

    def one() -> Filter:
        return EMAFilter(D, N) if truncation is None else Truncated(D, EMAFilter(D, N), truncation)

    if causal and bidirectional:
        raise ValueError("bidirectional = True sees the future, so it is none of a causal layer")
    return LongConv(one()) if causal else BothWays(one(), one() if bidirectional else None)


def average_names(bidirectional: bool, truncated: bool, betas: bool = True, official: tuple[str, ...] = EMA) -> Names:
    """Of :func:`average` under official names of EMA; ``betas`` tells whether those of beta are columns."""
    inner = "inner." if truncated else ""
    columns = (True, True, betas, False)
    return [halves(theirs, inner + ours, bidirectional, c) for theirs, ours, c in zip(official, EMA, columns)]


def ends(padding_mask: Tensor | None) -> Tensor | None:
    """How many steps at the end of each row of a mask (B, L) are padding, its ones.

    Raises:
        ValueError: for padding elsewhere, which counts as time in the official code.
    """
    if padding_mask is None:
        return None
    padded = padding_mask.bool()
    if not torch.equal(padded, padded.cummax(1).values):
        raise ValueError("padding is carried over at the end of rows alone, since here it takes no time elsewhere")
    return padded.sum(1)


def layer(
    D: int,
    S: int,
    E: int,
    N: int,
    *,
    causal: bool,
    bidirectional: bool,
    chunk: int,
    truncation: int | None,
    attention: str,
    bias: str,
    max_positions: int,
    norm: str,
    prenorm: bool,
) -> ResidualBlock:
    """Gated attention within its residual, by the authors' options; a chunk below 1 is none."""
    size = chunk if chunk > 0 else None
    biases = {"rotary": "rotary", "simple": {"kind": "simple", "max_len": size or max_positions}}
    parts: Any = {"attention": attention, "bias": biases[bias], "norm": norm if prenorm else None}
    mixer = (Mega if causal else MegaTwoSided)(D, S, E / D, size, **parts)
    mixer.move = average(D, N, bidirectional, causal, truncation)
    return ResidualBlock(mixer, nn.Identity() if prenorm else NORMS.make(norm).build(D), False)


def gated(block: Any, x: Tensor, padding: Tensor | None) -> Tensor:
    """The layer of x (B, L, D), with values at padding as the official code has them."""
    return block.norm(x + block.mixer.mix(x, None, padding)[0])


def layer_names(move: str, averages: Names, prenorm: bool, bias: str) -> Names:
    """Of :func:`layer`, whose average has names under ``move`` there."""
    return [
        *([unused("rel_pos_bias._float_tensor", 1)] if bias == "rotary" else []),
        Name("norm.norm.", "mixer.norm." if prenorm else "norm."),
        *inside(move, "mixer.move.", averages),
        Name("", "mixer."),
    ]


class AuthorsEMA(Source):
    """MultiHeadEMA of the authors: time, batch, channel; silu behind it."""

    ignored = frozenset({"padding_mask"})
    embed_dim: Size
    ndim: Size = 2
    bidirectional: Flag = False
    truncation: Size | None = None

    def build(self) -> nn.Module:
        both = self.bidirectional
        return Call(average(self.embed_dim, self.ndim, both, not both, self.truncation), self.run)

    def run(self, model: Any, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (L, B, D) -> the same shape; padding_mask (B, L) has ones at what is not averaged."""
        x = x.transpose(0, 1)
        n = x if padding_mask is None else x.masked_fill(padding_mask.bool()[..., None], 0)
        return F.silu(model(n)[0] + model.D * (x - n)).transpose(0, 1)

    def names(self) -> Names:
        averages = average_names(self.bidirectional, self.truncation is not None)
        return inside("", "model.", [*averages, Name("omega", "D")])


class S4EMA(Source):
    """MultiHeadEMA of state-spaces/s4: batch, time, channel; nothing behind it."""

    d_model: Size
    d_state: Size = 2
    bidirectional: Flag = False
    l_max: None = None

    def build(self) -> nn.Module:
        return Call(average(self.d_model, self.d_state, self.bidirectional, not self.bidirectional, None), mixed)

    def names(self) -> Names:
        averages = average_names(self.bidirectional, False, betas=False)
        return inside("", "model.", [*averages, Name("omega", "D")])


class AuthorsLayer(Source):
    """MovingAverageGatedAttention of the authors: time, batch, channel."""

    ignored = frozenset({"dropout", "attention_dropout", "hidden_dropout", "feature_dropout", "export"})
    embed_dim: Size
    zdim: Size
    hdim: Size
    ndim: Size
    activation: Literal["silu"] = "silu"
    attention_activation: Attention = "softmax"
    bidirectional: Flag = False
    chunk_size: Size | Literal[-1] = -1
    truncation: Size | None = None
    norm_type: Norm = "layernorm"
    prenorm: Flag = True
    norm_affine: Literal[True] = True
    rel_pos_bias: Bias = "simple"
    max_positions: Size = 1024
    causal: Flag = False  # whether the mask of the run is
    causal_attn_mask: Flag = False  # the same

    def build(self) -> nn.Module:
        block = layer(
            self.embed_dim,
            self.zdim,
            self.hdim,
            self.ndim,
            causal=self.causal or self.causal_attn_mask,
            bidirectional=self.bidirectional,
            chunk=self.chunk_size,
            truncation=self.truncation,
            attention=self.attention_activation,
            bias=self.rel_pos_bias,
            max_positions=self.max_positions,
            norm=NAMED[self.norm_type],
            prenorm=self.prenorm,
        )
        return Call(block, self.run)

    def run(
        self, block: Any, x: Tensor, padding_mask: Tensor | None = None, attn_mask_is_causal: Tensor | None = None
    ) -> Tensor:
        """x (L, B, D) -> the same shape.

        Args:
            padding_mask: (B, L), ones at padding.
            attn_mask_is_causal: the option ``causal`` says it.
        """
        return gated(block, x.transpose(0, 1), ends(padding_mask)).transpose(0, 1)

    def names(self) -> Names:
        averages = [*average_names(self.bidirectional, self.truncation is not None), Name("omega", "D")]
        return inside("", "model.", layer_names("move.", averages, self.prenorm, self.rel_pos_bias))


class AuthorsLayerInFloat32(AuthorsLayer):
    """The same with the softmax as it stands there, in float32."""

    def build(self) -> nn.Module:
        module: Any = super().build()
        if self.attention_activation == "softmax":
            module.model.mixer.attention = Float32Softmax()
        return module


class AuthorsFeedForward(Source):
    """NormalizedFeedForwardNetwork of the authors."""

    ignored = frozenset({"dropout", "hidden_dropout", "feature_dropout", "export"})
    embed_dim: Size
    ffn_hidden_dim: Size
    activation: Elementwise = "silu"
    norm_type: Norm = "layernorm"
    prenorm: Flag = True
    norm_affine: Literal[True] = True

    def build(self) -> nn.Module:
        D = self.embed_dim
        norm = NORMS.make(NAMED[self.norm_type]).build(D)
        return Call(ResidualBlock(FeedForward(D, self.ffn_hidden_dim, self.activation), norm, self.prenorm), mixed)

    def names(self) -> Names:
        return inside("", "model.", [Name("norm.norm.", "norm."), Name("", "mixer.")])


class S4MegaBlock(Source):
    """MegaBlock of state-spaces/s4: gated attention, then a feed-forward network."""

    ignored = frozenset({"dropout", "drop_attin", "drop_attout", "drop_ffn", "tie_dropout"})
    d_model: Size
    d_attin: Size
    d_attout: Size
    d_state: Size
    activation: Literal["silu", "swish"] = "silu"
    attention_activation: Attention = "softmax"
    bidirectional: Flag = False
    chunk: Size | Literal[-1] = -1
    l_max: None = None
    norm: Literal["layer"] = "layer"
    prenorm: Flag = True
    rel_pos_bias: Bias = "simple"
    max_positions: Size = 1024
    ff_expand: Size = 2
    transposed: Literal[False] = False
    mode: Literal["mega"] = "mega"

    def build(self) -> nn.Module:
        D = self.d_model
        block = layer(
            D,
            self.d_attin,
            self.d_attout,
            self.d_state,
            causal=False,
            bidirectional=self.bidirectional,
            chunk=self.chunk,
            truncation=None,
            attention=self.attention_activation,
            bias=self.rel_pos_bias,
            max_positions=self.max_positions,
            norm=self.norm,
            prenorm=self.prenorm,
        )
        feed = ResidualBlock(FeedForward(D, self.ff_expand * D, self.activation), nn.LayerNorm(D), self.prenorm)
        if self.rel_pos_bias == "rotary":
            block.mixer.rel_pos_bias = Float32RotaryBias(self.d_attin)
        return Call(nn.ModuleDict({"mega": block, "nffn": feed}), self.run)

    def run(self, blocks: Any, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> the same shape; padding_mask (B, L) has ones at padding."""
        return mixed(blocks["nffn"], gated(blocks["mega"], x, ends(padding_mask)))

    def names(self) -> Names:
        averages = [*average_names(self.bidirectional, False, betas=False), Name("omega", "D")]
        feed = [Name("layer.ff.0.0.", "mixer.fc1."), Name("layer.ff.2.", "mixer.fc2."), Name("norm.norm.", "norm.")]
        table = [
            *inside("nffn.", "nffn.", feed),
            *inside("", "mega.", layer_names("ssm.", averages, self.prenorm, self.rel_pos_bias)),
        ]
        return inside("", "model.", table)


class HuggingFace(Source):
    """MegaModel, or MegaForCausalLM with ``is_decoder``, of transformers; ``cls`` says which."""

    ignored = frozenset(
        {"hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_prob", "nffn_activation_dropout_prob"}
        | {"use_feature_dropout", "classifier_dropout", "initializer_range", "ema_delta_alpha_range", "ema_beta_range"}
        | {"ema_gamma_omega_range", "bos_token_id", "eos_token_id", "use_cache", "num_attention_heads"}
        | {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
    )
    optional = True
    cls: Literal["MegaModel", "MegaForCausalLM"] = "MegaForCausalLM"
    vocab_size: Size = 30522
    hidden_size: Size = 128
    num_hidden_layers: Size = 4
    intermediate_size: Size = 256
    ema_projection_size: Size = 16
    bidirectional: Flag = True
    shared_representation_size: Size = 64
    use_chunking: Flag = False
    chunk_size: Size | Literal[-1] = -1
    truncation: Size | None = None
    normalize_before_mega: Literal[True] = True
    normalization_type: Literal["layernorm", "scalenorm"] = "scalenorm"
    norm_affine: Literal[True] = True
    activation: Literal["silu"] = "silu"
    attention_activation: Attention = "softmax"
    use_normalized_ffn: Literal[True] = True
    nffn_hidden_size: Size = 256
    normalize_before_ffn: Literal[True] = True
    max_positions: Size = 2048
    add_token_type_embeddings: Flag = False
    type_vocab_size: Size = 2
    pad_token_id: Count | None = 1
    relative_positional_bias: Bias = "rotary"
    add_lm_hidden_dense_layer: Literal[True] = True
    tie_word_embeddings: Flag = True
    is_decoder: Flag = False
    add_cross_attention: Literal[False] = False

    def build(self) -> nn.Module:
        if self.cls == "MegaForCausalLM" and not (self.is_decoder and not self.add_token_type_embeddings):
            raise ValueError("MegaForCausalLM is carried over with is_decoder = True and without types of tokens")
        D, norm = self.hidden_size, NORMS.make(NAMED[self.normalization_type])
        mixers = [self._layer().mixer for _ in range(self.num_hidden_layers)]
        backbone: Any = Backbone(mixers, norm.build, self._feed_forward)
        backbone.norm = nn.Identity()
        for block in backbone.layers:
            block.norm1 = nn.Identity()  # the mixer has it
        if self.cls == "MegaForCausalLM":
            model: Any = LM(backbone, self.vocab_size, tied=False)
            model.embedding.padding_idx = self.pad_token_id
            model.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, self.vocab_size))
            if self.tie_word_embeddings:
                model.head[2].weight = model.embedding.weight
            return Call(model, lambda model, input_ids, attention_mask=None: model(input_ids, mask=attention_mask)[0])
        words = nn.Embedding(self.vocab_size, D, padding_idx=self.pad_token_id)
        parts = {"word_embeddings": words, "backbone": backbone}
        if self.add_token_type_embeddings:
            parts["token_type_embeddings"] = nn.Embedding(self.type_vocab_size, D)
        return Call(nn.ModuleDict(parts), self.encode)

    def _layer(self) -> Any:
        return layer(
            self.hidden_size,
            self.shared_representation_size,
            self.intermediate_size,
            self.ema_projection_size,
            causal=self.is_decoder,
            bidirectional=self.bidirectional,
            chunk=self.chunk_size if self.use_chunking else -1,
            truncation=self.truncation,
            attention=self.attention_activation,
            bias=self.relative_positional_bias,
            max_positions=self.max_positions if self.chunk_size < 0 else self.chunk_size,
            norm=NAMED[self.normalization_type],
            prenorm=True,
        )

    def _feed_forward(self, width: int) -> nn.Module:
        hidden = self.nffn_hidden_size
        return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def encode(
        self, m: Any, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, L) each -> (B, L, D); attention_mask has ones at real tokens."""
        x = m["word_embeddings"](input_ids)
        if self.add_token_type_embeddings:
            x = x + m["token_type_embeddings"](
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        padding = None if attention_mask is None else ends(attention_mask == 0)
        for block in m["backbone"].layers:
            x = x + block.mixer.mix(x, None, padding)[0]
            x = x + block.channel(block.norm2(x))
        return x

    def names(self) -> Names:
        official = ("damping_factor", "decay_factor", "ema_expansion_matrix", "kernel_projection_matrix")
        averages = average_names(self.bidirectional, self.truncation is not None, official=official)
        bias = "rel_pos_bias.rel_pos_bias"
        if self.relative_positional_bias == "rotary":
            distances = Name("rel_pos_bias.b_param", "mixer.rel_pos_bias.beta")
        else:
            distances = Name(bias, f"mixer.{bias}", self._unused_distances())
        table = [
            distances,
            Name("qk_weight", "mixer.gamma"),
            Name("qk_bias", "mixer.beta"),
            *layer_names("ema_gate.", [*averages, Name("residual_weight", "D")], True, self.relative_positional_bias),
        ]
        feed = [Name("fc1.", "channel.0."), Name("fc2.", "channel.2."), Name("norm.norm.", "norm2.")]
        block = [*inside("nffn.", "", feed), *inside("mega_layer.", "", table)]
        ours = "model.backbone.layers.{}."
        if self.cls == "MegaForCausalLM":
            words = "mega.embedding_layer.word_embeddings."
            return [
                *([Alias("lm_head.weight", f"{words}weight")] if self.tie_word_embeddings else []),
                Name(words, "model.embedding."),
                *numbered(self.num_hidden_layers, "mega.layers.{}.", ours, block),
                Name("dense.", "model.head.0."),
                Name("lm_head.", "model.head.2."),
            ]
        return [
            *numbered(self.num_hidden_layers, "layers.{}.", ours, block),
            unused("pooler.dense.weight", self.hidden_size, self.hidden_size),
            unused("pooler.dense.bias", self.hidden_size),
            Name("embedding_layer.", "model."),
        ]

    def _unused_distances(self) -> Turn:
        """With chunks the official table keeps the length that it had without, and its beginning is used."""
        rows = 2 * self.max_positions - 1
        return Turn(lambda t: t[: 2 * self.chunk_size - 1] if self.chunk_size > 0 else t, lambda t: t.new_empty(rows))


class T5Bias(DistanceBias):
    """A learned number for every distance below 16, and for 16 ranges of longer ones, times sqrt(S)."""

    BUCKETS, LONGEST = 32, 128

    def __init__(self, width: int):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.zeros(self.BUCKETS, 1))

    def row(self, past: int, ahead: int) -> Tensor:
        exact = self.BUCKETS // 2
        distance = torch.arange(past, -ahead - 1, -1, device=self.weight.device).clamp(min=0)
        octaves = (distance.clamp(min=1) / exact).double().log() / math.log(self.LONGEST / exact)
        far = (exact + (octaves * exact).long()).clamp(max=self.BUCKETS - 1)
        return self.weight[torch.where(distance < exact, distance, far), 0] * self.width**0.5


def _as_ema(alphas: Tensor, dampen: Tensor, expansion: Tensor, reduction: Tensor) -> tuple[Tensor, ...]:
    """delta, alpha, beta and gamma with the taps  sum_n expansion reduction s ((1 - s) sigmoid(dampen))^l,
    s = sigmoid(alphas) (N,), of expansion and reduction (N, D)."""
    s = alphas.sigmoid()
    p = (1 - (1 - s) * dampen.sigmoid()).sqrt().logit()[None].expand(expansion.shape[1], -1)
    beta = (s[:, None] * expansion).T / p.sigmoid() * len(s) ** 0.5
    return p, p, beta, reduction.T


def _both_as_ema(*official: Tensor) -> tuple[Tensor, ...]:
    (past, future), (past_out, future_out) = (t.chunk(2) for t in official[4:])
    a, d, reverse_a, reverse_d = official[:4]
    return *_as_ema(a, d, past, past_out), *_as_ema(reverse_a, reverse_d, future, future_out)


def _official_both(d: Tensor, a: Tensor, b: Tensor, g: Tensor, *ahead: Tensor) -> tuple[Tensor, ...]:
    return d[0], a[0], d[0], a[0], torch.cat([b.T, b.T]), torch.cat([g.T, g.T])


class Lucidrains(Source):
    """MultiHeadedEMA or MegaLayer of mega-pytorch; ``cls`` says which."""

    cls: Literal["MultiHeadedEMA", "MegaLayer"] = "MegaLayer"
    dim: Size = 128
    heads: Size | None = None
    bidirectional: Flag = False
    norm_mhesa_heads: Literal[False] = False
    ema_heads: Size = 16
    attn_dim_qk: Size = 64
    attn_dim_value: Size = 256
    laplacian_attn_fn: Literal[False] = False
    causal: Literal[True] = True

    def build(self) -> nn.Module:
        if self.cls == "MultiHeadedEMA":
            if self.heads is None:
                raise ValueError("the option 'heads' is missing")
            move = average(self.dim, self.heads, self.bidirectional, not self.bidirectional, None)
            move.D.data.zero_()
            return Call(move, mixed)
        mixer = Mega(self.dim, self.attn_dim_qk, self.attn_dim_value / self.dim, None)
        mixer.move = average(self.dim, self.ema_heads, False, True, None)
        mixer.move.D.data.zero_()
        mixer.h_proj.bias.data.zero_()
        replaced: Any = mixer
        replaced.activation, replaced.rel_pos_bias = nn.Identity(), T5Bias(self.attn_dim_qk)
        return Call(ResidualBlock(mixer, nn.Identity(), True), mixed)

    def names(self) -> Names:
        official: tuple[str, ...] = ("alphas", "dampen_factors", "expansion", "reduction")
        ours = tuple(f"filter.{name}" for name in EMA)
        one = Turn(_as_ema, lambda d, a, b, g: (d[0], a[0], b.T, g.T))
        if self.cls == "MultiHeadedEMA" and self.bidirectional:
            official = (*official[:2], "reverse_alphas", "reverse_dampen_factors", *official[2:])
            ours += tuple(f"ahead.{name}" for name in EMA)
            one = Turn(_both_as_ema, _official_both)
        averages: Names = [Name(official, ours, one), Name((), "D")]
        if self.cls == "MultiHeadedEMA":
            return inside("", "model.", averages)
        S, E, D = self.attn_dim_qk, self.attn_dim_value, self.dim
        attention = "single_headed_attn."
        gates = ("to_update_gate.0.", f"{attention}to_qk.0.", "to_reset_gate.0.")
        width = Turn(  # ours divides products by sqrt(S), theirs by sqrt(D)
            lambda t: torch.cat([t[:1] * (S / D) ** 0.5, t[1:]]), lambda t: t
        )
        weights = Turn(lambda u, z, r, h: torch.cat([u, z, r, h.T]), lambda t: _parted(t, D, S, E))
        biases = Turn(lambda *parts: torch.cat(parts), lambda t: t.split([D, S, E, D]))
        table = [
            *inside("multi_headed_ema.", "move.", averages),
            Name((*(f"{gate}weight" for gate in gates), "Wh"), "mx_proj.weight", weights),
            Name((*(f"{gate}bias" for gate in gates), "bh"), "mx_proj.bias", biases),
            Name("Uh", "h_proj.weight", Turn(lambda t: t.T, lambda t: t.T)),
            Name((), "h_proj.bias"),
            Name(f"{attention}to_v.0.", "v_proj."),
            Name(f"{attention}offsetscale.gamma", "gamma", width),
            Name(f"{attention}offsetscale.beta", "beta", width),
            Name(f"{attention}rel_pos_bias.relative_attention_bias.weight", "rel_pos_bias.weight"),
        ]
        return inside("", "model.mixer.", table)


def _parted(weight: Tensor, D: int, S: int, E: int) -> tuple[Tensor, ...]:
    u, z, r, h = weight.split([D, S, E, D])
    return u, z, r, h.T


SYSTEMS = {
    "mega_ema": System(AuthorsEMA),
    "fbmegaema": System(AuthorsEMA),
    "megaema": System(S4EMA),
    "mega_layer": System(AuthorsLayer),
    "fbmega": System(AuthorsLayerInFloat32),
    "mega_nffn": System(AuthorsFeedForward),
    "megablock": System(S4MegaBlock),
    "mega_hf": System(HuggingFace),
    "mega_lucidrains": System(Lucidrains),
}
