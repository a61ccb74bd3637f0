"""What models in the place of BERT have of it: embeddings, a head over tokens, a head over rows, names of tensors."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import MixerSpec, mixer
from longwave.models.embedding import embed
from longwave.models.heads import HEADS, TOKEN_HEADS
from longwave.models.spec import AnyModel, ClassifierSpec, MaskedLMSpec
from longwave.nn import NORMS
from longwave.official.blocks import Call, ModelSource
from longwave.official.source import HUGGING_FACE, Alias, Count, Flag, Name, Names, Shapes, Size, numbered


class Bert(ModelSource):
    """Embeddings, layers of a subclass without a norm behind the last, and one of two heads.

    Nothing is masked: padding takes part, as in the official models. In ours it does not, where a mask is given.

    Attributes:
        prefix: of the tensors of all but the heads.
    """

    prefix: ClassVar[str]
    tokenizer = "BERT's, without capitals (google-bert/bert-base-uncased)"
    ignored = HUGGING_FACE | {
        "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "num_attention_heads",
        "is_decoder", "finetuning_task", "gradient_checkpointing", "auto_map",
    }  # fmt: skip
    optional = True
    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Size
    intermediate_size: Size = 3072
    hidden_act: Literal["gelu", "relu", "silu", "swish"] = "gelu"
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: Count | None = 0
    num_labels: Size = 2
    tie_word_embeddings: Flag = True

    @property
    @abstractmethod
    def classifies(self) -> bool:
        """Whether it has the head over rows."""

    @property
    @abstractmethod
    def positioned(self) -> bool:
        """Whether positions are added."""

    @abstractmethod
    def mixer(self) -> MixerSpec:
        """Of every layer."""

    @abstractmethod
    def block(self) -> dict[str, Any]:
        """Fields of a spec that say what is around a mixer."""

    @abstractmethod
    def pooling(self) -> Literal["mean", "first"]:
        """What the head over rows sees."""

    def token_norm(self) -> float:
        """The epsilon in the head over tokens."""
        return self.layer_norm_eps

    def spec(self) -> AnyModel:
        fields: dict[str, Any] = {
            "d_model": self.hidden_size,
            "pattern": [self.mixer()],
            "layers": self.num_hidden_layers,
            "positions": mixer("learned_positions", max_len=self.max_position_embeddings) if self.positioned else None,
            "norm": "layer",
            "norm_eps": self.layer_norm_eps,
            "first_norm": NORMS.make("layer", eps=self.layer_norm_eps),
            "final_norm": NORMS.make("none"),
            "vocab": self.vocab_size,
            "types": self.type_vocab_size,
            **self.block(),
        }
        if self.classifies:
            return ClassifierSpec(classes=self.num_labels, pooling=self.pooling(), head=HEADS.make("tanh"), **fields)
        activation = "silu" if self.hidden_act == "swish" else self.hidden_act
        head = TOKEN_HEADS.make("bert", norm_eps=self.token_norm(), activation=activation)
        return MaskedLMSpec(tied=self.tie_word_embeddings, head=head, **fields)

    def build(self) -> nn.Module:
        model: Any = self.spec().build()
        (model.encoder if self.classifies else model.embedding).padding_idx = self.pad_token_id  # which does not learn
        return Call(model, self.label if self.classifies else self.tell)

    def encode(
        self,
        model: Any,
        embedding: nn.Embedding,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, L) each -> (B, L, D)."""
        L, longest = input_ids.shape[1], self.max_position_embeddings
        if self.positioned and position_ids is None and longest < L:
            raise ValueError(f"the model has max_position_embeddings = {longest}; the sequence has {L} tokens")
        x = embed(embedding, input_ids, token_type_ids)
        if self.positioned and position_ids is not None:  # in the place of those that the model adds
            table = model.backbone.positions.weight
            x = x + (table[position_ids] - table[torch.arange(L, device=table.device)])
        return model.backbone(x)[0]

    def tell(self, model: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Inputs of :meth:`encode` -> logits (B, L, V)."""
        return model.head(self.encode(model, model.embedding, *inputs, **named))

    def label(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *more: Tensor, **named: Tensor
    ) -> Tensor:
        """Inputs of :meth:`encode` -> logits (B, labels)."""
        x = self.encode(model, model.encoder, input_ids, attention_mask, *more, **named)
        return model.head(self.pooled(x, attention_mask))

    @abstractmethod
    def pooled(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """x (B, L, D) -> (B, D)."""

    def names(self) -> Names:
        p, words = self.prefix, f"{self.prefix}embeddings.word_embeddings.weight"
        embedding = "model.encoder." if self.classifies else "model.embedding."
        layers = (f"{p}encoder.layer.{{}}.", "model.backbone.layers.{}.")
        table: Names = [
            *numbered(self.num_hidden_layers, *layers, self.layer_names()),
            Name(words, f"{embedding}weight"),
            Name(f"{p}embeddings.token_type_embeddings.", f"{embedding}types."),
            Name(f"{p}embeddings.position_embeddings.", "model.backbone.positions."),
            Name(f"{p}embeddings.LayerNorm.", "model.backbone.first_norm."),
        ]
        if self.classifies:
            return [*table, Name(f"{p}pooler.dense.", "model.head.dense."), Name("classifier.", "model.head.out.")]
        head = "cls.predictions."
        return [
            *([Alias(f"{head}decoder.weight", words)] if self.tie_word_embeddings else []),
            *table,
            Name(f"{head}transform.dense.", "model.head.dense."),
            Name(f"{head}transform.LayerNorm.", "model.head.norm."),
            Name(f"{head}decoder.", "model.head.decoder."),
        ]

    @abstractmethod
    def layer_names(self) -> Names:
        """Of a layer."""

    def extra(self) -> Shapes:
        """Older checkpoints hold 0, 1, 2, ... besides the weights."""
        return {f"{self.prefix}embeddings.position_ids": (1, self.max_position_embeddings)}

    @classmethod
    def described(cls, tensors: Shapes) -> dict[str, Any]:
        """The options that names and shapes of tensors tell."""
        vocab, width = tensors[f"{cls.prefix}embeddings.word_embeddings.weight"]
        layers = 1 + max(int(k.split(".")[3]) for k in tensors if k.startswith(f"{cls.prefix}encoder.layer."))
        options = {
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "type_vocab_size": tensors[f"{cls.prefix}embeddings.token_type_embeddings.weight"][0],
        }
        positions = tensors.get(f"{cls.prefix}embeddings.position_embeddings.weight")
        options |= {} if positions is None else {"max_position_embeddings": positions[0]}
        return options | ({"num_labels": tensors["classifier.weight"][0]} if "classifier.weight" in tensors else {})
