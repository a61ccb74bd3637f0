"""Models as data: what a recipe writes down, a checkpoint stores, and ``build`` turns into modules."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, TypeAdapter, ValidationInfo, field_validator
from torch import nn

from longwave.mixers import MIXERS, AnyMixer, Mixer
from longwave.models.backbone import Backbone, Block
from longwave.models.classifier import Classifier
from longwave.models.lm import LM
from longwave.models.masked_lm import MaskedLM
from longwave.models.sashimi import Level, Sashimi
from longwave.nn import MLP, RMSNorm, SwiGLU
from longwave.spec import Parts, PartSpec, Spec, read_kind


class ChannelSpec(PartSpec):
    """A channel mixer as data."""

    def build(self, d_model: int) -> nn.Module:
        """The module, freshly drawn."""
        return self._built(d_model)


CHANNEL_MIXERS: Parts[nn.Module, ChannelSpec] = Parts(
    "channel mixer", ChannelSpec, given=("d_model",), classes={"swiglu": SwiGLU, "mlp": MLP}
)
AnyChannelMixer = Annotated[SerializeAsAny[ChannelSpec], BeforeValidator(CHANNEL_MIXERS.field)]


class BackboneSpec(Spec):
    """A stack of blocks.

    Fields:
        d_model: D, the width of all layers.
        pattern: mixers, cycled over the layers: one for a pure model, several for a hybrid. A name alone takes the
            mixer's defaults.
        layers: how many, at most 4,096; default one turn of the pattern.
        channel: channel mixer of every block, or null.
        norm: rms | layer.
        norm_eps: its epsilon.
        dropout: probability on both branches of a block, in [0, 1).
    """

    d_model: int = Field(ge=1)
    pattern: list[AnyMixer] = Field(min_length=1)
    layers: int | None = Field(None, ge=1, le=4096)
    channel: AnyChannelMixer | None = CHANNEL_MIXERS.make("swiglu")
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(1e-5, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @field_validator("layers")
    @classmethod
    def _one_turn(cls, layers: int | None, info: ValidationInfo) -> int | None:
        return len(info.data.get("pattern", ())) or None if layers is None else layers

    def build_backbone(self) -> Backbone | Sashimi:
        """The blocks, freshly drawn."""
        return Backbone(self._mixers(self.d_model), self._norm(), self._channel(), self.dropout)

    def _mixers(self, d_model: int) -> list[Mixer]:
        assert self.layers is not None
        return [self.pattern[i % len(self.pattern)].build(d_model) for i in range(self.layers)]

    def _norm(self) -> Callable[[int], nn.Module]:
        return partial(RMSNorm if self.norm == "rms" else nn.LayerNorm, eps=self.norm_eps)

    def _channel(self) -> Callable[[int], nn.Module] | None:
        return None if self.channel is None else self.channel.build


class LanguageSpec(BackboneSpec):
    """What tells tokens.

    Fields:
        vocab: V, how many token ids there are; in a recipe default the task's.
        tied: whether the map to logits is the embedding.
    """

    vocab: int | None = Field(None, ge=1)
    tied: bool = True

    def known_vocab(self) -> int:
        """``vocab``, which a model needs at the latest when it is built."""
        if self.vocab is None:
            raise ValueError("a language model needs vocab, the number of token ids")
        return self.vocab


class LMSpec(LanguageSpec):
    """A language model, see :class:`longwave.models.LM`."""

    kind: Literal["lm"] = "lm"

    def build(self) -> LM:
        """The model, freshly drawn."""
        return LM(self.build_backbone(), self.known_vocab(), self.tied)


class SashimiSpec(LanguageSpec):
    """A language model over :class:`longwave.models.Sashimi`, by default the paper's with S4D in the place of S4.

    Audio becomes its tokens by :func:`longwave.nn.mu_law_encode`.

    Fields, where they differ from those of a stack:
        d_model: width at the full sampling rate.
        pattern, layers: of every level.
        pool: by what factors the rate is divided, from the full rate down.
        expand: by what factor the width grows at every pool.
    """

    kind: Literal["sashimi"] = "sashimi"
    d_model: int = Field(64, ge=1)
    pattern: list[AnyMixer] = Field([MIXERS.make("s4d")], min_length=1)
    layers: int | None = Field(8, ge=1, le=4096)
    channel: AnyChannelMixer | None = CHANNEL_MIXERS.make("mlp", expand=2.0)
    norm: Literal["rms", "layer"] = "layer"
    pool: list[Annotated[int, Field(ge=1)]] = Field([4, 4])
    expand: int = Field(2, ge=1)

    def build_backbone(self) -> Sashimi:
        """The levels, freshly drawn."""
        norm, channel = self._norm(), self._channel()
        widths = [self.d_model * self.expand**i for i in range(len(self.pool) + 1)]
        levels = [Level([Block(mixer, norm, channel, self.dropout) for mixer in self._mixers(d)]) for d in widths]
        return Sashimi(levels, self.pool, norm(self.d_model))

    def build(self) -> LM:
        """The model, freshly drawn."""
        return LM(self.build_backbone(), self.known_vocab(), self.tied)


class MaskedLMSpec(LanguageSpec):
    """A masked language model, see :class:`longwave.models.MaskedLM`."""

    kind: Literal["masked_lm"] = "masked_lm"

    def build(self) -> MaskedLM:
        """The model, freshly drawn."""
        return MaskedLM(self.build_backbone(), self.known_vocab(), self.tied)


class ClassifierSpec(BackboneSpec):
    """A classifier, see :class:`longwave.models.Classifier`.

    Fields, besides those of a stack:
        classes: how many labels there are.
        vocab: token ids are embedded, so many; or null.
        features: real inputs of this width are mapped; or null. One of vocab and features is given.
        pooling: mean over the real tokens, the last of them, or the first.
    """

    kind: Literal["classifier"] = "classifier"
    classes: int = Field(ge=1)
    vocab: int | None = Field(None, ge=1)
    features: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last", "first"] = "mean"

    def build(self) -> Classifier:
        """The model, freshly drawn."""
        return Classifier(
            self.build_backbone(), self.classes, vocab=self.vocab, features=self.features, pooling=self.pooling
        )


MODELS: dict[str, type[BackboneSpec]] = {
    "lm": LMSpec,
    "masked_lm": MaskedLMSpec,
    "sashimi": SashimiSpec,
    "classifier": ClassifierSpec,
}
ModelSpec = Annotated[
    LMSpec | MaskedLMSpec | SashimiSpec | ClassifierSpec,
    BeforeValidator(partial(read_kind, "model", MODELS, MODELS.__getitem__)),
]
MODEL_SPEC: TypeAdapter[LMSpec | MaskedLMSpec | SashimiSpec | ClassifierSpec] = TypeAdapter(ModelSpec)
