"""Modules of github.com/jxiw/BiGS (commit 96fa408): S4dLayer, BiGSLayer, the masked language model, the classifier."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from longwave.mixers import MixerSpec, mixer
from longwave.mixers.bigs import shared_conv
from longwave.models.backbone import Block
from longwave.nn import LongConv, S4DFilter
from longwave.official.bert import Bert
from longwave.official.blocks import Call, mixed
from longwave.official.source import Alias, Name, Names, Shapes, Size, Source, System, Turn, inside, unused


def _modes(C: Tensor) -> tuple[Tensor, Tensor]:
    """A mode counts once, where ours and its conjugate do; and has no B, which is 1 here."""
    return C[None] / 2, C.new_tensor([1.0, 0.0]).expand_as(C)[None]


# Real parts are kept below -1e-4 by clamping them.
_S4D: Names = [
    Name("D", "D"),
    Name("kernel.C", ("filter.C", "filter.B"), Turn(_modes, lambda C, B: C[0])),
    Name("kernel.log_step", "filter.log_dt"),
    Name("kernel.A_re", "filter.log_A_real", Turn(lambda t: (-t.clamp(max=-1e-4)).log()[None], lambda t: t[0])),
    Name("kernel.A_im", "filter.A_imag", Turn(lambda t: t[None], lambda t: t[0])),
]
_LAYER: Names = [
    Name("LayerNorm.", "norm1."),
    *(name for ssm in ("fs4", "bs4") for name in inside(f"{ssm}.", f"mixer.{ssm}.", _S4D)),
    Name("", "mixer."),
]


class BigsModel(Bert):
    """BiGSForMaskedLM and BiGSForSequenceClassification, ``cls`` (JunxiongWang/BiGS_128, ..., BiGS_128_MNLI, ...)."""

    prefix = "bigs."
    ignored = Bert.ignored | {"pre_norm", "decode", "use_pykeops_kernel"}
    cls: Literal["BiGSForMaskedLM", "BiGSForSequenceClassification"] = "BiGSForMaskedLM"
    num_hidden_layers: Size = 24
    position_embedding_type: Any = "absolute"
    num_ssm: Size = 64
    pooler_type: Any = "non_padding_mean"

    @property
    def classifies(self) -> bool:
        return self.cls == "BiGSForSequenceClassification"

    @property
    def positioned(self) -> bool:
        return self.position_embedding_type == "absolute"

    def mixer(self) -> MixerSpec:
        return mixer("bigs", d_state=2 * self.num_ssm, expand=self.intermediate_size / self.hidden_size)

    def block(self) -> dict[str, Any]:
        return {"channel": None}

    def pooling(self) -> Literal["mean", "first"]:
        return "mean"

    def pooled(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The mean over all tokens, or over those where attention_mask is 1."""
        if self.pooler_type == "mean":
            return x.mean(1)
        if attention_mask is None:
            raise ValueError("pooler_type = 'non_padding_mean' needs attention_mask")
        return (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)

    def layer_names(self) -> Names:
        return _LAYER

    def names(self) -> Names:
        D, known = self.hidden_size, self.max_position_embeddings
        positions: Names = [] if self.positioned else [unused("bigs.embeddings.position_embeddings.weight", known, D)]
        if self.classifies:
            return [*positions, *super().names()]
        bias = "cls.predictions.bias"
        head: Names = [Alias("cls.predictions.decoder.bias", bias), Name(bias, "model.head.decoder.bias")]
        return [*positions, *head, *super().names()]

    def extra(self) -> Shapes:
        """The pooler of a model with the head over tokens does nothing, and is left out by some."""
        D = self.hidden_size
        pooler = {} if self.classifies else {"bigs.pooler.dense.weight": (D, D), "bigs.pooler.dense.bias": (D,)}
        return super().extra() | pooler

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        layer = "bigs.encoder.layer.0."
        if f"{layer}fs4.D" not in shapes:
            return None
        inner, modes = shapes[f"{layer}dv.weight"][0], shapes[f"{layer}fs4.kernel.C"][0]
        head = "SequenceClassification" if "classifier.weight" in shapes else "MaskedLM"
        told = {"intermediate_size": inner, "num_ssm": modes, "cls": f"BiGSFor{head}", **cls.described(shapes)}
        return {**config, **told}


class Layers(Source):
    """S4dLayer and BiGSLayer, ``cls``; options of the models do not matter."""

    ignored = BigsModel.ignored | BigsModel.model_fields.keys() - {"cls", "hidden_size", "intermediate_size", "num_ssm"}
    cls: Literal["S4dLayer", "BiGSLayer"]
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    layer_norm_eps: float = 1e-12
    num_ssm: Size = 64

    def build(self) -> nn.Module:
        if self.cls == "S4dLayer":
            return Call(LongConv(S4DFilter(1, 2 * self.num_ssm)), lambda conv, x: shared_conv(x, conv))
        layer = mixer("bigs", d_state=2 * self.num_ssm, expand=self.intermediate_size / self.hidden_size)
        return Call(Block(layer.build(self.hidden_size), partial(nn.LayerNorm, eps=self.layer_norm_eps)), mixed)

    def names(self) -> Names:
        return inside("", "model.", _S4D if self.cls == "S4dLayer" else _LAYER)


SYSTEMS = {"bigs": System(BigsModel, Layers)}
