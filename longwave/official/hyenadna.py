"""HyenaDNA of github.com/HazyResearch/hyena-dna (commit d553021): the operator, and the model that is released."""

from typing import Any

from torch import Tensor, nn

from longwave.models.lm import LM
from longwave.official.safari_hyena import StandaloneHyena
from longwave.official.safari_lm import LMBackbone, released
from longwave.official.source import Flag, Layer, Name, Names, Size, State, System, inside, part


class Operator(StandaloneHyena):
    """HyenaOperator, whose window has a floor, unlike in Hyena's own code."""

    ignored = StandaloneHyena.ignored | {"short_filter_order", "_name_"}
    shift: float = 0.05


class Released(nn.Module):
    """What the head would see, or with a head of its own a label a row.

    Args:
        model: the language model it was trained as; generation takes it as it is.
        head: of the mean over time, or None.
    """

    def __init__(self, model: LM, head: nn.Module | None):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, L) -> (B, L, D), or (B, classes)."""
        x, _ = self.model.backbone(self.model.embedding(input_ids))
        return x if self.head is None else self.head(x.mean(1))


class HyenaDNAModel(LMBackbone):
    """The language model's body, and where ``use_head`` a label a row."""

    ignored = LMBackbone.ignored | {"checkpoint_mixer", "checkpoint_mlp", "return_hidden_state"}
    layer: Any
    attn_layer_idx: None = None
    attn_cfg: None = None
    use_head: Flag = False
    n_classes: Size = 2

    def layers(self) -> list[Layer]:
        return [part("layer", Operator, self.layer, d_model=self.d_model)] * self.n_layer

    def build(self) -> nn.Module:
        return Released(self.model(), nn.Linear(self.d_model, self.n_classes) if self.use_head else None)

    def names(self) -> Names:
        return [*inside("", "model.", self.model_names()), Name("head.output_transform.", "head.")]

    def rename(self, state: State) -> State:
        """Released checkpoints are of training runs, some with layers inside what makes their activations again."""
        return {
            key.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp."): tensor
            for key, tensor in released(state).items()
            if key != "lm_head.weight"  # which is the embedding
        }


SYSTEMS = {"hyenadna": System(HyenaDNAModel, Operator)}
