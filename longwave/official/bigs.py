"""Modules of github.com/jxiw/BiGS (commit 96fa408): S4dLayer, BiGSLayer, the masked language model, the classifier."""

from functools import partial

import torch
from torch import Tensor, nn

from longwave.mixers import BiGS
from longwave.mixers.bigs import shared_conv
from longwave.models.backbone import Backbone, Block
from longwave.models.masked_lm import MaskedLMHead
from longwave.nn import LongConv, S4DFilter
from longwave.official.blocks import ELEMENTWISE, MixerFace
from longwave.official.system import Choice, Options, Shapes, Size, State, System, prefixed, under


class SharedConv(nn.Module):
    """One filter and one skip weight for all channels:  y = k * x + D x.

    Args:
        modes: N, complex.
    """

    def __init__(self, modes: int):
        super().__init__()
        self.conv = LongConv(S4DFilter(1, 2 * modes))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> y (B, L, C)."""
        return shared_conv(x, self.conv)


class Embeddings(nn.Module):
    """norm(word + kind of token + position).

    Args:
        o: the official options.
    """

    def __init__(self, o: Options):
        super().__init__()
        self.word_embeddings = nn.Embedding(o.vocab_size, o.hidden_size, padding_idx=o.pad_token_id)
        self.token_type_embeddings = nn.Embedding(o.type_vocab_size, o.hidden_size)
        self.position_embeddings = nn.Embedding(o.max_position_embeddings, o.hidden_size)
        self.LayerNorm = nn.LayerNorm(o.hidden_size, eps=o.layer_norm_eps)
        self.positions = o.position_embedding_type == "absolute"

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """(B, L) each -> (B, L, D)."""
        L, longest = input_ids.shape[1], self.position_embeddings.num_embeddings
        if self.positions and position_ids is None and longest < L:
            raise ValueError(f"the model has max_position_embeddings = {longest}; the sequence has {L} tokens")
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(kinds)
        if self.positions:
            places = torch.arange(L, device=input_ids.device) if position_ids is None else position_ids
            x = x + self.position_embeddings(places)
        return self.LayerNorm(x)


class Encoder(nn.Module):
    """The embeddings and the layers; no norm behind the last.

    Args:
        o: the official options.
    """

    def __init__(self, o: Options):
        super().__init__()
        self.embeddings = Embeddings(o)
        self.backbone = Backbone([_mixer(o) for _ in range(o.num_hidden_layers)], _norm(o))
        self.backbone.norm = nn.Identity()

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """See :class:`Embeddings`. As in the official model nothing is masked: padding takes part."""
        return self.backbone(self.embeddings(input_ids, token_type_ids, position_ids))[0]


class MaskedLMFace(nn.Module):
    """The masked language model:  logits = module(input_ids=ids).

    Args:
        o: the official options.
    """

    def __init__(self, o: Options):
        super().__init__()
        self.encoder = Encoder(o)
        self.head = MaskedLMHead(o.hidden_size, o.vocab_size, o.layer_norm_eps, ELEMENTWISE[o.hidden_act]())
        if o.tie_word_embeddings:
            self.head.decoder.weight = self.encoder.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, L) each -> logits (B, L, V); the official model does not look at attention_mask."""
        return self.head(self.encoder(input_ids, token_type_ids, position_ids))


class ClassifierFace(nn.Module):
    """The classifier of sequences:  logits = module(input_ids=ids, attention_mask=mask).

    Args:
        o: the official options.
    """

    def __init__(self, o: Options):
        super().__init__()
        self.encoder, self.everywhere = Encoder(o), o.pooler_type == "mean"
        self.dense = nn.Linear(o.hidden_size, o.hidden_size)
        self.classifier = nn.Linear(o.hidden_size, o.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, L) each -> logits (B, labels); attention_mask says over which tokens the mean is taken."""
        x = self.encoder(input_ids, token_type_ids, position_ids)
        if self.everywhere:
            pooled = x.mean(1)
        elif attention_mask is None:
            raise ValueError("pooler_type = 'non_padding_mean' needs attention_mask")
        else:
            pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.classifier(self.dense(pooled).tanh())


def _norm(o: Options) -> partial[nn.LayerNorm]:
    return partial(nn.LayerNorm, eps=o.layer_norm_eps)


def _mixer(o: Options) -> BiGS:
    return BiGS(o.hidden_size, 2 * o.num_ssm, o.intermediate_size / o.hidden_size)


def _build(o: Options) -> nn.Module:
    if o.cls == "S4dLayer":
        return SharedConv(o.num_ssm)
    if o.cls == "BiGSLayer":
        return MixerFace(Block(_mixer(o), _norm(o)))
    return MaskedLMFace(o) if o.cls == "BiGSForMaskedLM" else ClassifierFace(o)


LINEAR = ("dv", "du_forward", "du_backward", "duc_forward", "duc_backward", "dol", "do")


def _linear(name: str, d_in: int, d_out: int) -> Shapes:
    return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}


def _norm_keys(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return prefixed(f"{prefix}.", shapes)


def _s4d_keys(o: Options) -> Shapes:
    N = o.num_ssm
    return {"D": (1,), **_under("kernel", {"C": (N, 2), "log_step": (1,), "A_re": (N,), "A_im": (N,)})}


def _layer_keys(o: Options) -> Shapes:
    D, E = o.hidden_size, o.intermediate_size
    widths = {"dv": (D, E), "dol": (D, E), "do": (E, D)}
    keys = {**_norm_keys("LayerNorm", D), **_under("fs4", _s4d_keys(o)), **_under("bs4", _s4d_keys(o))}
    for name in LINEAR:
        keys |= _linear(name, *widths.get(name, (D, D)))
    return keys


def _keys(o: Options) -> Shapes:
    if o.cls == "S4dLayer":
        return _s4d_keys(o)
    if o.cls == "BiGSLayer":
        return _layer_keys(o)
    D, V = o.hidden_size, o.vocab_size
    model: Shapes = {
        "embeddings.word_embeddings.weight": (V, D),
        "embeddings.position_embeddings.weight": (o.max_position_embeddings, D),
        "embeddings.token_type_embeddings.weight": (o.type_vocab_size, D),
        **_norm_keys("embeddings.LayerNorm", D),
        **_linear("pooler.dense", D, D),
    }
    for i in range(o.num_hidden_layers):
        model |= _under(f"encoder.layer.{i}", _layer_keys(o))
    keys = _under("bigs", model)
    if o.cls == "BiGSForSequenceClassification":
        return {**keys, **_linear("classifier", D, o.num_labels)}
    head = {
        **_linear("transform.dense", D, D),
        **_norm_keys("transform.LayerNorm", D),
        "bias": (V,),
        **_linear("decoder", D, V),
    }
    return {**keys, **_under("cls.predictions", head)}


def _aliases(o: Options) -> dict[str, str]:
    if o.cls != "BiGSForMaskedLM":
        return {}
    aliases = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    if o.tie_word_embeddings:
        aliases["cls.predictions.decoder.weight"] = "bigs.embeddings.word_embeddings.weight"
    return aliases


def _position_ids(o: Options) -> Shapes:
    """Older checkpoints hold 0, 1, 2, ... besides the weights."""
    return {"bigs.embeddings.position_ids": (1, o.max_position_embeddings)} if "Layer" not in o.cls else {}


def _convert_s4d(state: State) -> State:
    """Real parts are kept below -1e-4 by clamping them; a mode counts once, where ours and its conjugate do."""
    A_im = state["kernel.A_im"]
    return {
        "D": state["D"],
        "filter.log_dt": state["kernel.log_step"],
        "filter.log_A_real": (-state["kernel.A_re"].clamp(max=-1e-4)).log()[None],
        "filter.A_imag": A_im[None],
        "filter.B": torch.stack([torch.ones_like(A_im), torch.zeros_like(A_im)], dim=-1)[None],
        "filter.C": state["kernel.C"][None] / 2,
    }


def _convert_layer(state: State) -> State:
    ours = {"norm1.weight": state["LayerNorm.weight"], "norm1.bias": state["LayerNorm.bias"]}
    for ssm in ("fs4", "bs4"):
        ours |= prefixed(f"mixer.{ssm}.", _convert_s4d(under(f"{ssm}.", state)))
    return ours | {f"mixer.{name}.{key}": state[f"{name}.{key}"] for name in LINEAR for key in ("weight", "bias")}


def _convert(state: State, o: Options) -> State:
    if o.cls == "S4dLayer":
        return prefixed("conv.", _convert_s4d(state))
    if o.cls == "BiGSLayer":
        return prefixed("model.", _convert_layer(state))
    embeddings = under("bigs.embeddings.", state)
    ours = {f"encoder.embeddings.{key}": t for key, t in embeddings.items() if key != "position_ids"}
    for i in range(o.num_hidden_layers):
        layer = _convert_layer(under(f"bigs.encoder.layer.{i}.", state))
        ours |= prefixed(f"encoder.backbone.layers.{i}.", layer)
    if o.cls == "BiGSForSequenceClassification":
        return ours | {
            "dense.weight": state["bigs.pooler.dense.weight"],
            "dense.bias": state["bigs.pooler.dense.bias"],
            "classifier.weight": state["classifier.weight"],
            "classifier.bias": state["classifier.bias"],
        }
    words = "bigs.embeddings.word_embeddings.weight"
    return ours | {
        "head.dense.weight": state["cls.predictions.transform.dense.weight"],
        "head.dense.bias": state["cls.predictions.transform.dense.bias"],
        "head.norm.weight": state["cls.predictions.transform.LayerNorm.weight"],
        "head.norm.bias": state["cls.predictions.transform.LayerNorm.bias"],
        "head.decoder.weight": state[words if o.tie_word_embeddings else "cls.predictions.decoder.weight"],
        "head.decoder.bias": state["cls.predictions.bias"],
    }


BIGS = System(
    options={
        "cls": Choice(
            "S4dLayer", "BiGSLayer", "BiGSForMaskedLM", "BiGSForSequenceClassification", default="BiGSForMaskedLM"
        ),
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "intermediate_size": 3072,
        "hidden_act": Choice("gelu", "relu", "silu", "swish", "tanh", "sigmoid"),
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": Size(0, least=0, none=True),
        "position_embedding_type": "absolute",
        "num_ssm": 64,
        "pooler_type": "non_padding_mean",
        "num_labels": 2,
        "tie_word_embeddings": True,
    },
    ignored=frozenset(
        {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "initializer_range", "use_cache"}
        | {"pre_norm", "decode", "use_pykeops_kernel", "num_attention_heads", "gradient_checkpointing"}
        | {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
        | {"id2label", "label2id", "problem_type", "finetuning_task", "bos_token_id", "eos_token_id", "return_dict"}
    ),
    keys=_keys,
    build=_build,
    convert=_convert,
    aliases=_aliases,
    optional=True,
    extra=_position_ids,
)

SYSTEMS = {"bigs": BIGS}
