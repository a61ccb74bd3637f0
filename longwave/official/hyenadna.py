"""HyenaDNA of github.com/HazyResearch/hyena-dna (commit d553021): the operator, and the models that are released.

They are released twice: as the authors' checkpoints (LongSafari/hyenadna-tiny-1k-seqlen, ...), and for transformers
(LongSafari/hyenadna-tiny-1k-seqlen-hf, ...), whose code is beside them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.models.heads import HEADS
from longwave.models.spec import AnyModel, ClassifierSpec, LMSpec
from longwave.nn import NORMS
from longwave.official.blocks import Call, ModelSource, logits
from longwave.official.safari_hyena import StandaloneHyena
from longwave.official.safari_lm import CHARACTERS, WORDS, Layer, LMBackbone, described, released, today
from longwave.official.source import (
    HUGGING_FACE,
    Alias,
    Count,
    Flag,
    Name,
    Names,
    Positive,
    Shapes,
    Size,
    State,
    System,
    inside,
    part,
)
from longwave.tokenizer import HYENADNA, dna

TOKENIZER = dna(HYENADNA)  # of the authors' CharacterTokenizer, but that all that is no base is refused
FILTER = {"modulate": True, "w": 10}  # of layer, in all released models


class Operator(StandaloneHyena):
    """HyenaOperator, whose window has a floor, unlike in Hyena's own code."""

    ignored = StandaloneHyena.ignored | {"short_filter_order", "_name_"}
    shift: float = 0.05


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    """What the head of a language model would see, input_ids (B, L) -> (B, L, D)."""
    return model.backbone(model.embedding(input_ids))[0]


def _labels(model: Any, input_ids: Tensor) -> Tensor:
    """A classifier of whole rows, input_ids (B, L) -> (B, classes)."""
    return model(input_ids)


class HyenaDNAModel(LMBackbone):
    """The language model's body, and where ``use_head`` a label a row, of the mean over time."""

    ignored = LMBackbone.ignored | {"checkpoint_mixer", "checkpoint_mlp", "return_hidden_state"}
    tokenizer = TOKENIZER
    layer: Any
    attn_layer_idx: None = None
    attn_cfg: None = None
    use_head: Flag = False
    n_classes: Size = 2

    def layers(self) -> list[Layer]:
        return [part("layer", Operator, self.layer, d_model=self.d_model)] * self.n_layer

    def spec(self) -> AnyModel:
        if self.use_head:
            return ClassifierSpec(pattern=self.pattern(), classes=self.n_classes, **self.parts())
        return super().spec()

    def build(self) -> nn.Module:
        return Call(self.spec().build(), _labels if self.use_head else _hidden)

    def names(self) -> Names:
        head = Name("head.output_transform.", "head.") if self.use_head else Name(WORDS, "head.weight")
        return [Alias("lm_head.weight", WORDS), *inside("", "model.", [*self.model_names(), head])]

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        tensors = today(released(shapes))
        if WORDS not in tensors or tensors[WORDS][0] > CHARACTERS:
            return None
        options = described(config, tensors, lambda sizes: FILTER)
        head = tensors.get("head.output_transform.weight")
        return options if options is None or head is None else {**options, "use_head": True, "n_classes": head[0]}

    def rename(self, state: State) -> State:
        """Released checkpoints are of training runs, some with layers inside what makes their activations again."""
        return today(released(state))


class HuggingFaceHyenaDNA(ModelSource):
    """HyenaDNAForCausalLM, and of ``num_labels`` HyenaDNAForSequenceClassification, beside the models on the Hub."""

    hf_type = "hyenadna"
    tokenizer = TOKENIZER
    ignored = HUGGING_FACE | {
        "use_bias", "embed_dropout", "hyena_dropout", "hyena_filter_dropout", "auto_map",
        "output_hidden_states", "use_return_dict",
    }  # fmt: skip
    optional = True
    vocab_size: Size = 12
    d_model: Size = 256
    d_inner: Size | None = None
    train_freq: Literal[True] = True
    max_seq_len: Size = 1024
    emb_dim: Size = 3
    n_layer: Size = 12
    num_inner_mlps: Size = 2
    hyena_order: Literal[2] = 2  # of others the authors' code fails
    short_filter_order: Literal[3] = 3
    filter_order: Size = 64
    layer_norm_epsilon: Positive = 1e-5
    pad_vocab_size_multiple: Size = 8
    activation_freq: Positive = 1.0
    pad_token_id: Count | None = None
    tie_word_embeddings: Flag = True
    num_labels: Size | None = None

    def authors(self) -> HyenaDNAModel:
        """The same by the authors' own options."""
        layer = {
            "l_max": self.max_seq_len,
            "emb_dim": self.emb_dim,
            "num_inner_mlps": self.num_inner_mlps,
            "filter_order": self.filter_order,
            "w": self.activation_freq,
        }
        names = ("d_model", "n_layer", "d_inner", "vocab_size", "pad_vocab_size_multiple")
        return HyenaDNAModel.read({name: getattr(self, name) for name in names}, layer=layer)

    def spec(self) -> AnyModel:
        authors = self.authors()
        final = NORMS.make("layer", eps=self.layer_norm_epsilon)  # the others have 1e-5 whatever the option says
        fields = {"pattern": authors.pattern(), "final_norm": final, **authors.parts()}
        if self.num_labels is None:
            return LMSpec(tied=self.tie_word_embeddings, **fields)
        head = HEADS.make("linear", bias=False)
        return ClassifierSpec(classes=self.num_labels, pooling="last", head=head, **fields)

    def build(self) -> nn.Module:
        return Call(self.spec().build(), logits if self.num_labels is None else self._labels)

    def _labels(self, model: Any, input_ids: Tensor) -> Tensor:
        """Logits (B, labels) at the token before the first ``pad_token_id``, or at the last; padding takes part."""
        y = model.head(model.backbone(model.encoder(input_ids))[0])
        padding = torch.zeros_like(input_ids) if self.pad_token_id is None else input_ids.eq(self.pad_token_id).int()
        return y[torch.arange(len(y)), padding.argmax(1) - 1]

    def names(self) -> Names:
        model = inside("hyena.", "model.", self.authors().model_names())
        if self.num_labels is not None:
            return [*model, Name("score.", "model.head.")]
        words = f"hyena.{WORDS}"
        tied = self.tie_word_embeddings
        head: Names = [Alias("lm_head.weight", words), Name(words, "model.head.weight")]
        return [*model, *(head if tied else [Name("lm_head.", "model.head.")])]

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        if super().found(config, shapes) is None or f"hyena.{WORDS}" not in shapes:
            return None
        labels = {"num_labels": shapes["score.weight"][0]} if "score.weight" in shapes else {}
        return {**config, **labels}


SYSTEMS = {"hyenadna": System(HyenaDNAModel, Operator, HuggingFaceHyenaDNA)}
