"""HyenaDNA of github.com/HazyResearch/hyena-dna (commit d553021): the operator, and the model that is released."""

from dataclasses import replace

from torch import Tensor, nn

from longwave.models.lm import LM
from longwave.official.safari_hyena import FILTER_IGNORED, FILTER_OPTIONS, HYENA_STANDALONE
from longwave.official.safari_lm import (
    BACKBONE_IGNORED,
    BACKBONE_OPTIONS,
    PositionedLM,
    backbone_aliases,
    backbone_keys,
    build_lm,
    convert_lm,
    released,
)
from longwave.official.system import (
    Anything,
    Choice,
    Family,
    Options,
    Shapes,
    State,
    System,
    prefixed,
    read_part,
)

OPERATOR = replace(  # the window has a floor, unlike in Hyena's own code
    HYENA_STANDALONE,
    options={**FILTER_OPTIONS, "shift": 0.05},
    ignored=FILTER_IGNORED | {"bias", "normalized", "short_filter_order", "_name_"},
)


class HyenaDNAFace(nn.Module):
    """The released model: what the head would see, or with a head of its own a label a row.

    Args:
        model: the language model it was trained as; generation takes it as it is.
        classes: how many labels, or None for no such head.
    """

    def __init__(self, model: LM | PositionedLM, d_model: int, classes: int | None):
        super().__init__()
        self.model = model
        self.head = None if classes is None else nn.Linear(d_model, classes)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids (B, L), position_ids (B, L) or None -> (B, L, D), or (B, classes) from the mean over time."""
        if isinstance(self.model, LM):
            x, _ = self.model.backbone(self.model.embedding(input_ids))
        else:
            x, _ = self.model.hidden(input_ids, position_ids=position_ids)
        return x if self.head is None else self.head(x.mean(1))


def _layers(o: Options) -> list[tuple[System, Options]]:
    return [(OPERATOR, read_part("layer", OPERATOR.read, o.layer, d_model=o.d_model))] * o.n_layer


def _keys(o: Options) -> Shapes:
    keys = backbone_keys(o, _layers(o))
    if o.use_head:
        keys |= {"head.output_transform.weight": (o.n_classes, o.d_model), "head.output_transform.bias": (o.n_classes,)}
    return keys


def _convert(state: State, o: Options) -> State:
    ours = prefixed("model.", convert_lm(state, o, _layers(o)))
    if o.use_head:
        ours |= {f"head.{key}": state[f"head.output_transform.{key}"] for key in ("weight", "bias")}
    return ours


def _rename(state: State, o: Options) -> State:
    """Released checkpoints are of training runs, some with layers inside what makes their activations again."""
    renamed = {}
    for key, tensor in released(state).items():
        if key != "lm_head.weight":  # which is the embedding
            renamed[key.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")] = tensor
    return renamed


MODEL = System(
    options={
        **BACKBONE_OPTIONS,
        "layer": Anything(),
        "attn_layer_idx": Choice(None),
        "attn_cfg": Choice(None),
        "use_head": False,
        "n_classes": 2,
    },
    ignored=BACKBONE_IGNORED | {"checkpoint_mixer", "checkpoint_mlp", "return_hidden_state"},
    keys=_keys,
    build=lambda o: HyenaDNAFace(build_lm(o, _layers(o)), o.d_model, o.n_classes if o.use_head else None),
    convert=_convert,
    aliases=lambda o: backbone_aliases(_layers(o)),
    optional=True,
    rename=_rename,
)

SYSTEMS = {"hyenadna": Family({"HyenaDNAModel": MODEL, "HyenaOperator": OPERATOR})}
