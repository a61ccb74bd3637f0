"""Models as data: what a recipe writes down, a checkpoint stores, and ``build`` turns into modules."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, TypeAdapter, ValidationInfo, field_validator
from torch import nn

from longwave.mixers import MIXERS, AnyMixer, Mixer
from longwave.models.autoencoder import Autoencoder
from longwave.models.backbone import Backbone, Block, Branches, OneNormBlock, ParallelBlock
from longwave.models.classifier import Classifier, PairClassifier
from longwave.models.heads import HEADS, TOKEN_HEADS, AnyHead, AnyTokenHead
from longwave.models.lm import LM
from longwave.models.masked_lm import MaskedLM
from longwave.models.pooling import Pooling
from longwave.models.regressor import Forecaster, Regressor
from longwave.models.sashimi import Level, Sashimi
from longwave.nn import GLU, MLP, NORMS, AnyNorm, BlockdiagGLU, SwiGLU
from longwave.spec import Parts, PartSpec, Spec, read_kind
from longwave.tasks.base import Task
from longwave.tasks.forms import Future, Label, Pair, Recovered, Targets, Tokens, Values


class ChannelSpec(PartSpec):
    """A channel mixer as data."""

    def build(self, d_model: int) -> nn.Module:
        """The module, freshly drawn."""
        return self._built(d_model)


CHANNEL_MIXERS: Parts[nn.Module, ChannelSpec] = Parts(
    "channel mixer",
    ChannelSpec,
    given=("d_model",),
    classes={"swiglu": SwiGLU, "glu": GLU, "mlp": MLP, "blockdiag_glu": BlockdiagGLU},
    of=nn.Module,
)
AnyChannelMixer = Annotated[SerializeAsAny[ChannelSpec], BeforeValidator(CHANNEL_MIXERS.field)]

Norm = Literal["rms", "layer", "offset_rms", "scalar_layer"]
SIZES = {  # what a model may leave open: a task has them by the same names
    "vocab": "token ids",
    "features": "features a step",
    "classes": "classes",
    "steps": "steps",
    "width": "numbers",
}


BLOCKS: dict[str, type[Branches]] = {"sequential": Block, "parallel": ParallelBlock, "one_norm": OneNormBlock}


class BackboneSpec(Spec):
    """A stack of blocks.

    Fields:
        d_model: D, the width of all layers.
        pattern: mixers, cycled over the layers: one for a pure model, several for a hybrid. A name alone takes the
            mixer's defaults, where it needs no option.
        layers: how many, at most 4,096; default one turn of the pattern.
        channel: channel mixer of every block, or null.
        block: sequential, x + mixer(norm x) and then x + channel(norm x); parallel, x + mixer(norm x) +
            channel(norm x); or one_norm, norm(u + channel u) with u = mixer x, for a mixer that passes x on itself.
        positions: a mixer that the inputs pass before the first block, such as learned_positions; or null.
        norm: rms | layer | offset_rms, whose weights are differences from 1 | scalar_layer, with one weight for all.
        norm_eps: its epsilon.
        first_norm: one before the first block, behind positions; or null.
        final_norm: the one behind the last block; default as the others.
        dropout: probability on both branches of a block, in [0, 1).
    """

    tells: ClassVar[type[Targets]]  # the form of targets
    of_pairs: ClassVar[bool] = False  # of two sequences together

    kind: str
    d_model: int = Field(ge=1)
    pattern: list[AnyMixer] = Field(min_length=1)
    layers: int | None = Field(None, ge=1, le=4096)
    channel: AnyChannelMixer | None = CHANNEL_MIXERS.make("swiglu")
    block: Literal["sequential", "parallel", "one_norm"] = "sequential"
    positions: AnyMixer | None = None
    norm: Norm = "rms"
    norm_eps: float = Field(1e-5, gt=0)
    first_norm: AnyNorm | None = None
    final_norm: AnyNorm | None = None
    dropout: float = Field(0.0, ge=0, lt=1)

    @field_validator("layers")
    @classmethod
    def _one_turn(cls, layers: int | None, info: ValidationInfo) -> int | None:
        return len(info.data.get("pattern", ())) or None if layers is None else layers

    @classmethod
    def serves(cls, task: Task) -> bool:
        """Whether it tells what the task asks for."""
        return cls.tells is type(task.targets) and cls.of_pairs == isinstance(task.inputs, Pair)

    def serving(self, task: Task) -> Self:
        """This with the task's sizes where it leaves them open.

        Raises:
            ValueError: where the task asks for something else, or of another size.
        """
        if not self.serves(task):
            asked = f"{task.targets.words}{' of pairs' * isinstance(task.inputs, Pair)}"
            fitting = " or ".join(name for name, spec in MODELS.items() if spec.serves(task))
            raise ValueError(
                f"model {self.kind} gives {self.tells.words}{' of pairs' * self.of_pairs}, and the task "
                f"{task.kind} asks for {asked}; {f'take the model {fitting}' if fitting else 'no model does'}"
            )
        sizes: dict[str, int] = {}
        for form in (task.inputs.of if isinstance(task.inputs, Pair) else task.inputs, task.targets):
            for name, size in vars(form).items():
                sizes[name] = max(size, sizes.get(name, 0))
        for name, size in sizes.items():
            own = getattr(self, name)
            if own is not None and own != size and not (own > size and name in ("vocab", "classes")):
                raise ValueError(f"model.{name} = {own} does not fit: the task has {size} {SIZES[name]}")
            sizes[name] = own or size
        return self.model_copy(update=sizes)

    def known(self, name: str) -> int:
        """A size, which a model needs at the latest when it is built."""
        size = getattr(self, name)
        if size is None:
            raise ValueError(f"model {self.kind} needs {name}, how many {SIZES[name]} there are")
        return size

    def build_backbone(self) -> Backbone | Sashimi:
        """The blocks, freshly drawn."""
        positions = None if self.positions is None else self.positions.build(self.d_model)
        parts = self._norm(), self._channel(), self.dropout
        first = None if self.first_norm is None else self.first_norm.build(self.d_model)
        return Backbone(self._mixers(self.d_model), *parts, BLOCKS[self.block], positions, first, self._final_norm())

    def _mixers(self, d_model: int) -> list[Mixer]:
        assert self.layers is not None
        return [self.pattern[i % len(self.pattern)].build(d_model) for i in range(self.layers)]

    def _norm(self) -> Callable[[int], nn.Module]:
        return partial(NORMS[self.norm], eps=self.norm_eps)

    def _final_norm(self) -> nn.Module:
        return (self._norm() if self.final_norm is None else self.final_norm.build)(self.d_model)

    def _channel(self) -> Callable[[int], nn.Module] | None:
        return None if self.channel is None else self.channel.build


class LanguageSpec(BackboneSpec):
    """What tells tokens.

    Fields:
        vocab: V, how many token ids there are; in a recipe default the task's.
        tied: whether the map to logits is the embedding.
    """

    tells = Tokens
    vocab: int | None = Field(None, ge=1)
    tied: bool = True

    @classmethod
    def serves(cls, task: Task) -> bool:
        """As others, where ids go in."""
        return super().serves(task) and isinstance(task.inputs, Tokens)


class NextTokenSpec(LanguageSpec):
    """What tells the next token, see :class:`longwave.models.LM`.

    Fields, besides those of what tells tokens:
        embedding_scale: what embeddings are multiplied by.
        head_bias: whether the map to logits has one.
        soft_cap: the magnitude that logits stay below; null for none.
    """

    embedding_scale: float = 1.0
    head_bias: bool = False
    soft_cap: float | None = Field(None, gt=0)

    def build(self) -> LM:
        """The model, freshly drawn."""
        head = {name: getattr(self, name) for name in ("tied", "embedding_scale", "head_bias", "soft_cap")}
        return LM(self.build_backbone(), self.known("vocab"), **head)


class LMSpec(NextTokenSpec):
    """A language model of blocks, see :class:`longwave.models.LM`."""

    kind: Literal["lm"] = "lm"


class SashimiSpec(NextTokenSpec):
    """A language model over :class:`longwave.models.Sashimi`, by default the paper's with S4D in the place of S4.

    Audio becomes its tokens by :func:`longwave.tasks.mu_law_encode`.

    Fields, where they differ from those of a stack:
        d_model: width at the full sampling rate.
        pattern, layers: of every level.
        block, positions, first_norm: sequential, null and null: its levels are of different rates.
        pool: by what factors the rate is divided, from the full rate down.
        expand: by what factor the width grows at every pool.
    """

    kind: Literal["sashimi"] = "sashimi"
    d_model: int = Field(64, ge=1)
    pattern: list[AnyMixer] = Field([MIXERS.make("s4d")], min_length=1)
    layers: int | None = Field(8, ge=1, le=4096)
    block: Literal["sequential"] = "sequential"
    positions: None = None
    first_norm: None = None
    channel: AnyChannelMixer | None = CHANNEL_MIXERS.make("mlp", expand=2.0)
    norm: Norm = "layer"
    pool: list[Annotated[int, Field(ge=1)]] = Field([4, 4])
    expand: int = Field(2, ge=1)

    def build_backbone(self) -> Sashimi:
        """The levels, freshly drawn."""
        norm, channel = self._norm(), self._channel()
        widths = [self.d_model * self.expand**i for i in range(len(self.pool) + 1)]
        levels = [Level([Block(mixer, norm, channel, self.dropout) for mixer in self._mixers(d)]) for d in widths]
        return Sashimi(levels, self.pool, self._final_norm())


class MaskedLMSpec(LanguageSpec):
    """A masked language model, see :class:`longwave.models.MaskedLM`.

    Fields, besides those of what tells tokens:
        types: how many types of tokens there are, such as of which of two sentences they are; or null.
        head: from what the backbone made of a token to logits.
    """

    kind: Literal["masked_lm"] = "masked_lm"
    types: int | None = Field(None, ge=1)
    head: AnyTokenHead = TOKEN_HEADS.make("bert")

    @classmethod
    def serves(cls, task: Task) -> bool:
        """As a language model, where it does not see what it is asked for."""
        return super().serves(task) and not task.asks_next

    def serving(self, task: Task) -> Self:
        """As others."""
        if task.asks_next:
            raise ValueError(
                f"model masked_lm sees the next token, which is what the task {task.kind} asks for; "
                "take the model lm, or a task that hides its targets, such as masked_text"
            )
        return super().serving(task)

    def build(self) -> MaskedLM:
        """The model, freshly drawn."""
        return MaskedLM(self.build_backbone(), self.known("vocab"), self.tied, self.types, self.head.build)


class EncodedSpec(BackboneSpec):
    """What takes ids or real numbers.

    Fields, besides those of a stack:
        vocab: token ids are embedded, so many; or null.
        features: real inputs of this width are mapped; or null. In a recipe default the task's, and elsewhere one of
            vocab and features is given.
    """

    vocab: int | None = Field(None, ge=1)
    features: int | None = Field(None, ge=1)


class PooledSpec(EncodedSpec):
    """What tells one thing of a whole sequence.

    Fields, besides those of what takes ids or real numbers:
        pooling: mean over the real tokens, the last of them, or the first.
        complement: of DNA, what each id is on the other strand, [3, 2, 1, 0, 4] of A C G T N: both strands are read,
            and what is told of them is the same; or null.
    """

    pooling: Pooling = "mean"
    complement: list[int] | None = None

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("vocab", "features", "pooling", "complement")}


class ClassifierSpec(PooledSpec):
    """A classifier, see :class:`longwave.models.Classifier`.

    Fields, besides those of what pools:
        classes: how many labels there are; in a recipe default the task's.
        types: how many types of tokens there are, such as of which of two sentences they are; or null.
        head: from what is pooled to logits.
    """

    tells = Label
    kind: Literal["classifier"] = "classifier"
    classes: int | None = Field(None, ge=1)
    types: int | None = Field(None, ge=1)
    head: AnyHead = HEADS.make("linear")

    def build(self) -> Classifier:
        """The model, freshly drawn."""
        more = {"types": self.types, "head": self.head.build, **self._options()}
        return Classifier(self.build_backbone(), self.known("classes"), **more)


class PairClassifierSpec(PooledSpec):
    """A classifier of pairs, see :class:`longwave.models.PairClassifier`.

    Fields, besides those of what pools:
        classes: how many labels there are; in a recipe default the task's.
    """

    tells, of_pairs = Label, True
    kind: Literal["pair_classifier"] = "pair_classifier"
    classes: int | None = Field(None, ge=1)

    def build(self) -> PairClassifier:
        """The model, freshly drawn."""
        return PairClassifier(self.build_backbone(), self.known("classes"), **self._options())


class RegressorSpec(PooledSpec):
    """Real numbers of a whole sequence, see :class:`longwave.models.Regressor`.

    Fields, besides those of what pools:
        width: how many numbers are told of a row; in a recipe default the task's.
    """

    tells = Values
    kind: Literal["regressor"] = "regressor"
    width: int | None = Field(None, ge=1)

    def build(self) -> Regressor:
        """The model, freshly drawn."""
        return Regressor(self.build_backbone(), self.known("width"), **self._options())


class ForecasterSpec(EncodedSpec):
    """Real numbers at the last steps, see :class:`longwave.models.Forecaster`.

    Fields, besides those of what takes ids or real numbers:
        steps: how many are told; in a recipe default the task's.
        width: how many numbers at each; in a recipe default the task's.
    """

    tells = Future
    kind: Literal["forecaster"] = "forecaster"
    steps: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)

    def build(self) -> Forecaster:
        """The model, freshly drawn."""
        steps, width = self.known("steps"), self.known("width")
        return Forecaster(self.build_backbone(), steps, width, vocab=self.vocab, features=self.features)


class AutoencoderSpec(BackboneSpec):
    """An auto-encoder of tokens, see :class:`longwave.models.Autoencoder`.

    Fields, besides those of a stack:
        vocab: V, how many token ids there are; in a recipe default the task's.
        pooling: the last of the real tokens, their mean, or the first.
    """

    tells = Recovered
    kind: Literal["autoencoder"] = "autoencoder"
    vocab: int | None = Field(None, ge=1)
    pooling: Pooling = "last"

    def build(self) -> Autoencoder:
        """The model, freshly drawn."""
        return Autoencoder(self.build_backbone(), self.known("vocab"), self.pooling, self._norm())


AnyModel = (
    LMSpec
    | MaskedLMSpec
    | SashimiSpec
    | ClassifierSpec
    | PairClassifierSpec
    | RegressorSpec
    | ForecasterSpec
    | AutoencoderSpec
)
MODELS: dict[str, type[AnyModel]] = {spec.model_fields["kind"].default: spec for spec in get_args(AnyModel)}
ModelSpec = Annotated[AnyModel, BeforeValidator(partial(read_kind, "model", MODELS, MODELS.__getitem__))]
MODEL_SPEC: TypeAdapter[AnyModel] = TypeAdapter(ModelSpec)
