"""Monarch Mixer of github.com/HazyResearch/m2 (commit 7d359e8): its sequence mixer, and M2-BERT."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import MixerSpec, mixer
from longwave.models.spec import CHANNEL_MIXERS
from longwave.nn import HyenaFilter, without_bias
from longwave.official.bert import Bert
from longwave.official.source import Alias, Flag, Name, Names, Shapes, Size, Source, State, System, Turn, inside, under
from longwave.ops import causal_conv


class Residual(nn.Module):
    """y = Hyena(x) + W_o (r * x), x with a norm before: what no mixer of ours has.

    Args:
        model: a mixer, with its own state where it is causal.
        residual: r, of the causal one; that of the other is within the mixer.
        norm: of the input.
    """

    def __init__(self, model: Any, residual: HyenaFilter | None, norm: nn.Module):
        super().__init__()
        self.model, self.residual, self.norm = model, residual, norm

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        x = self.norm(x)
        y, _ = self.model(x)
        if self.residual is None:
            return y
        r = causal_conv(x, self.residual(x.shape[1]), skip=self.residual.bias)
        return y + without_bias(self.model.out_proj, r)


def _gate_first(t: Tensor) -> Tensor:
    x_1, x_0, v = t.chunk(3)  # the gate of the input comes first there
    return torch.cat([x_0, x_1, v])


class MonarchMixerSequenceMixing(Source):
    """MonarchMixerSequenceMixing."""

    ignored = frozenset({"dropout", "hyena_kernel_lr", "hyena_lr_pos_emb", "hyena_wd", "hyena_filter_dropout"})
    optional = True
    d_model: Size
    l_max: Size = 128
    bidirectional: Flag = False
    hyena_w: float = 10.0
    hyena_w_mod: float = 1.0
    hyena_emb_dim: Size = 3
    hyena_filter_order: Size = 16
    residual_long_conv: Flag = False
    hyena_training_additions: Flag = False

    def options(self) -> dict[str, Any]:
        """Of all filters, under our names."""
        return {"frequency": self.hyena_w, "emb_dim": self.hyena_emb_dim, "width": self.hyena_filter_order}

    @property
    def whole(self) -> bool:
        """Whether it is one mixer of ours."""
        return self.bidirectional and self.residual_long_conv

    def mixer(self) -> MixerSpec:
        """Its mixer, as data, but for a norm and a residual that not all have."""
        if self.whole:
            norm = "layer" if self.hyena_training_additions else None
            return mixer("monarch_mixer", max_len=self.l_max, norm=norm, **self.options())
        return mixer("hyena_two_sided" if self.bidirectional else "hyena", max_len=self.l_max, **self.options())

    def build(self) -> nn.Module:
        residual = None
        if self.residual_long_conv and not self.bidirectional:
            residual = HyenaFilter(self.d_model, self.l_max, **self.options(), skip=True)
        outside = self.hyena_training_additions and not self.whole
        norm = nn.LayerNorm(self.d_model) if outside else nn.Identity()
        return Residual(self.mixer().build(self.d_model), residual, norm)

    def names(self) -> Names:
        causal = self.residual_long_conv and not self.bidirectional
        return [
            *(inside("filter_fn2.", "residual.", self._filter("implicit_filter")) if causal else []),
            *inside("", "model.", self.mixer_names()),
            Name("layernorm.", "norm."),
        ]

    def mixer_names(self) -> Names:
        """Of :meth:`mixer`."""
        places = {"filter_fn": ("filter_fn", "filter_ahead"), "filter_fn2": ("residual", "residual_ahead")}
        table: Names = []
        for name in ("filter_fn", "filter_fn2") if self.whole else ("filter_fn",):
            for side, place in zip(("", "_rev") if self.bidirectional else ("",), places[name]):
                table += inside(f"{name}.", f"{place}.", self._filter(f"implicit_filter{side}"))
        linear = Turn(_gate_first, lambda t: t)
        return [
            *table,
            Name("in_linear.", "in_proj.", linear),
            Name("short_filter.", "short_filter.", linear),
            Name("out_linear.", "out_proj."),
            Name("layernorm.", "norm."),
        ]

    def _filter(self, mlp: str) -> Names:
        """Of one filter; the one ahead has an MLP of its own, and the same sine, positions and window."""
        names: Names = []
        faster = Turn(lambda t: t * self.hyena_w_mod, lambda t: t)
        for i in (1, 3, 5):
            freq, first = f"{mlp}.{i}.freq", "implicit_filter.1.freq"
            names += [Alias(freq, first)] if freq != first else []
            names.append(Name(freq, f"implicit_filter.{i}.freq", faster))
        return [*names, Name(f"{mlp}.", "implicit_filter."), Name("", "")]


DENSE = Turn(lambda t: t[None], lambda t: t[0])  # one block


class M2Bert(Bert):
    """BertForMaskedLM and BertForSequenceClassification of M2-BERT, ``cls`` (danfu09/m2-bert-80M, ...-8k-retrieval)."""

    prefix = "bert."
    ignored = Bert.ignored | {
        "alibi_starting_size", "long_conv_kernel_learning_rate", "hyena_lr_pos_emb", "hyena_wd", "hyena_filter_dropout",
        "use_flash_mm", "use_flash_fft", "position_embedding_type",
    }  # fmt: skip
    cls: Literal["BertForMaskedLM", "BertForSequenceClassification"] = "BertForMaskedLM"
    num_hidden_layers: Size = 12
    use_positional_encodings: Flag = False
    pool_all: Flag = False
    use_glu_mlp: Literal[True] = True
    use_monarch_mlp: Flag = False
    monarch_mlp_nblocks: Size = 4
    monarch_mixer_sequence_mixing: Literal[True] = True
    bidirectional: Literal[True] = True
    residual_long_conv: Flag = False
    long_conv_l_max: Size = 128
    hyena_w: float = 10.0
    hyena_w_mod: float = 1.0
    hyena_emb_dim: Size = 5
    hyena_filter_order: Size = 64
    hyena_training_additions: Flag = False

    @property
    def classifies(self) -> bool:
        return self.cls == "BertForSequenceClassification"

    @property
    def positioned(self) -> bool:
        return self.use_positional_encodings

    def token_norm(self) -> float:
        return 1e-12  # whatever the option says

    def sequence_mixing(self) -> MonarchMixerSequenceMixing:
        """The options of every layer's mixer."""
        names = MonarchMixerSequenceMixing.model_fields.keys() - {"d_model", "l_max"}
        said = {name: getattr(self, name) for name in names}
        return MonarchMixerSequenceMixing(d_model=self.hidden_size, l_max=self.long_conv_l_max, **said)

    def mixer(self) -> MixerSpec:
        if self.hyena_training_additions and not self.residual_long_conv:
            raise ValueError("hyena_training_additions are carried over where there is residual_long_conv, as released")
        return self.sequence_mixing().mixer()

    def block(self) -> dict[str, Any]:
        blocks = self.monarch_mlp_nblocks if self.use_monarch_mlp else 1
        expand = self.intermediate_size / self.hidden_size
        return {"block": "one_norm", "channel": CHANNEL_MIXERS.make("blockdiag_glu", expand=expand, blocks=blocks)}

    def pooling(self) -> Literal["mean", "first"]:
        return "mean" if self.pool_all else "first"

    def pooled(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """That of the first token, or the mean over those where attention_mask is 1."""
        if not self.pool_all:
            return x[:, 0]
        mask = torch.ones_like(x[..., 0]) if attention_mask is None else attention_mask
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def layer_names(self) -> Names:
        maps = {"mlp.gated_layers.": "channel.up.", "mlp.wo.": "channel.down."}
        turn = [] if self.use_monarch_mlp else [DENSE]
        return [
            *inside("attention.", "mixer.", self.sequence_mixing().mixer_names()),
            *(Name(f"{theirs}weight", f"{ours}weight", *turn) for theirs, ours in maps.items()),
            *(Name(theirs, ours) for theirs, ours in maps.items()),
            Name("mlp.layernorm.", "norm2."),
        ]

    def extra(self) -> Shapes:
        return super().extra() if self.positioned else {}

    def rename(self, state: State) -> State:
        """Checkpoints of training runs hold the model under ``model.``"""
        return under("model.", state) or state

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        """All but what neither config.json nor shapes say, which is as in all releases."""
        tensors = under("model.", shapes) or shapes
        layer = under("bert.encoder.layer.0.", tensors)
        if "attention.filter_fn.bias" not in layer:
            return None
        up, (width, features) = layer["mlp.gated_layers.weight"], layer["attention.filter_fn.implicit_filter.0.weight"]
        head = "SequenceClassification" if "classifier.weight" in tensors else "MaskedLM"
        untold = ("layer_norm_eps", "hidden_act", "pad_token_id", "pool_all", "hyena_w", "hyena_w_mod")
        return {
            **{name: config[name] for name in untold if name in config},
            **cls.described(tensors),
            "cls": f"BertFor{head}",
            "intermediate_size": layer["mlp.wo.weight"][-1] * (up[0] if len(up) == 3 else 1),
            "use_monarch_mlp": len(up) == 3,
            "monarch_mlp_nblocks": up[0] if len(up) == 3 else 1,
            "use_positional_encodings": "bert.embeddings.position_embeddings.weight" in tensors,
            "long_conv_l_max": layer["attention.filter_fn.pos_emb.z"][1],
            "hyena_emb_dim": features,
            "hyena_filter_order": width,
            "residual_long_conv": "attention.filter_fn2.bias" in layer,
            "bidirectional": "attention.filter_fn.implicit_filter_rev.0.weight" in layer,
            "hyena_training_additions": "attention.layernorm.weight" in layer,
        }


SYSTEMS = {"m2": System(MonarchMixerSequenceMixing, M2Bert)}
