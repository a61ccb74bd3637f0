"""Modules of github.com/jxiw/BiGS (commit 96fa408): S4dLayer, BiGSLayer, the masked language model, the classifier."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import BiGS
from longwave.mixers.bigs import shared_conv
from longwave.models.backbone import Backbone, Block
from longwave.models.masked_lm import MaskedLMHead
from longwave.nn import LongConv, S4DFilter
from longwave.official.blocks import ELEMENTWISE, Call, mixed
from longwave.official.source import (
    Alias,
    Count,
    Flag,
    Name,
    Names,
    Shapes,
    Size,
    Source,
    System,
    Turn,
    inside,
    numbered,
    unused,
)


class Encoder(nn.Module):
    """norm(word + kind of token + position), then the layers; no norm behind the last.

    Args:
        o: the official options.
    """

    def __init__(self, o: "Bigs"):
        super().__init__()
        D = o.hidden_size
        self.word_embeddings = nn.Embedding(o.vocab_size, D, padding_idx=o.pad_token_id)
        self.token_type_embeddings = nn.Embedding(o.type_vocab_size, D)
        self.position_embeddings = nn.Embedding(o.max_position_embeddings, D)
        self.LayerNorm = o.norm()(D)
        self.positions = o.position_embedding_type == "absolute"
        self.backbone = Backbone([o.mixer() for _ in range(o.num_hidden_layers)], o.norm())
        self.backbone.norm = nn.Identity()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, L) each -> (B, L, D). As in the official model nothing is masked: padding takes part."""
        L, longest = input_ids.shape[1], self.position_embeddings.num_embeddings
        if self.positions and position_ids is None and longest < L:
            raise ValueError(f"the model has max_position_embeddings = {longest}; the sequence has {L} tokens")
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(kinds)
        if self.positions:
            places = torch.arange(L, device=input_ids.device) if position_ids is None else position_ids
            x = x + self.position_embeddings(places)
        return self.backbone(self.LayerNorm(x))[0]


def _masked_lm(m: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
    """Inputs of :class:`Encoder` -> logits (B, L, V)."""
    return m["head"](m["encoder"](*inputs, **named))


# A mode counts once, where ours and its conjugate do; real parts are kept below -1e-4 by clamping them.
_S4D = [
    Name("D", "D"),
    Name("kernel.C", "filter.C", Turn(lambda t: t[None] / 2, lambda t: t[0])),
    Name("kernel.log_step", "filter.log_dt"),
    Name("kernel.A_re", "filter.log_A_real", Turn(lambda t: (-t.clamp(max=-1e-4)).log()[None], lambda t: t[0])),
    Name("kernel.A_im", "filter.A_imag", Turn(lambda t: t[None], lambda t: t[0])),
    Name((), "filter.B"),
]
_LAYER = [
    Name("LayerNorm.", "norm1."),
    *(name for ssm in ("fs4", "bs4") for name in inside(f"{ssm}.", f"mixer.{ssm}.", _S4D)),
    Name("", "mixer."),
]


class Bigs(Source):
    """One of the four classes, ``cls``; options of the others do not matter."""

    ignored = frozenset(
        {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "initializer_range", "use_cache"}
        | {"pre_norm", "decode", "use_pykeops_kernel", "num_attention_heads", "gradient_checkpointing"}
        | {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
        | {"id2label", "label2id", "problem_type", "finetuning_task", "bos_token_id", "eos_token_id", "return_dict"}
    )
    optional = True
    cls: Literal["S4dLayer", "BiGSLayer", "BiGSForMaskedLM", "BiGSForSequenceClassification"] = "BiGSForMaskedLM"
    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Size = 24
    intermediate_size: Size = 3072
    hidden_act: Literal["gelu", "relu", "silu", "swish", "tanh", "sigmoid"] = "gelu"
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: Count | None = 0
    position_embedding_type: Any = "absolute"
    num_ssm: Size = 64
    pooler_type: Any = "non_padding_mean"
    num_labels: Size = 2
    tie_word_embeddings: Flag = True

    def norm(self) -> partial[nn.LayerNorm]:
        """Makes every norm."""
        return partial(nn.LayerNorm, eps=self.layer_norm_eps)

    def mixer(self) -> BiGS:
        """Of a layer."""
        return BiGS(self.hidden_size, 2 * self.num_ssm, self.intermediate_size / self.hidden_size)

    def build(self) -> nn.Module:
        if self.cls == "S4dLayer":
            module: nn.Module = Call(LongConv(S4DFilter(1, 2 * self.num_ssm)), lambda conv, x: shared_conv(x, conv))
        elif self.cls == "BiGSLayer":
            module = Call(Block(self.mixer(), self.norm()), mixed)
        else:
            module = self._model()
        for part in module.modules():
            if isinstance(part, S4DFilter):
                part.B.data.copy_(part.B.new_tensor([1.0, 0.0]).expand_as(part.B))  # the official ones have no B
        return module

    def _model(self) -> nn.Module:
        encoder, D = Encoder(self), self.hidden_size
        if self.cls == "BiGSForSequenceClassification":
            parts = {"encoder": encoder, "dense": nn.Linear(D, D), "classifier": nn.Linear(D, self.num_labels)}
            return Call(nn.ModuleDict(parts), self.classify)
        head = MaskedLMHead(D, self.vocab_size, self.layer_norm_eps, ELEMENTWISE[self.hidden_act]())
        if self.tie_word_embeddings:
            head.decoder.weight = encoder.word_embeddings.weight
        return Call(nn.ModuleDict({"encoder": encoder, "head": head}), _masked_lm)

    def classify(self, m: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **named: Tensor) -> Tensor:
        """Inputs of :class:`Encoder` -> logits (B, labels); attention_mask says over which tokens the mean is taken."""
        x = m["encoder"](input_ids, **named)
        if self.pooler_type == "mean":
            pooled = x.mean(1)
        elif attention_mask is None:
            raise ValueError("pooler_type = 'non_padding_mean' needs attention_mask")
        else:
            pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return m["classifier"](m["dense"](pooled).tanh())

    def names(self) -> Names:
        if self.cls in ("S4dLayer", "BiGSLayer"):
            return inside("", "model.", _S4D if self.cls == "S4dLayer" else _LAYER)
        D, words, head = self.hidden_size, "bigs.embeddings.word_embeddings.weight", "cls.predictions."
        layers = ("bigs.encoder.layer.{}.", "model.encoder.backbone.layers.{}.")
        table = numbered(self.num_hidden_layers, *layers, _LAYER)
        table.append(Name("bigs.embeddings.", "model.encoder."))
        if self.cls == "BiGSForSequenceClassification":
            return [*table, Name("bigs.pooler.dense.", "model.dense."), Name("classifier.", "model.classifier.")]
        tied = [Alias(head + "decoder.weight", words)] if self.tie_word_embeddings else []
        return [
            *tied,
            Alias(head + "decoder.bias", head + "bias"),
            unused("bigs.pooler.dense.weight", D, D),
            unused("bigs.pooler.dense.bias", D),
            *table,
            Name(head + "bias", "model.head.decoder.bias"),
            Name(head + "decoder.", "model.head.decoder."),
            Name(head + "transform.dense.", "model.head.dense."),
            Name(head + "transform.LayerNorm.", "model.head.norm."),
        ]

    def extra(self) -> Shapes:
        """Older checkpoints hold 0, 1, 2, ... besides the weights."""
        return {} if "Layer" in self.cls else {"bigs.embeddings.position_ids": (1, self.max_position_embeddings)}


SYSTEMS = {"bigs": System(Bigs)}
