"""Heads as data: from what a backbone made to logits, over the labels of a row or the ids of a token."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.models.masked_lm import MaskedLMHead
from longwave.spec import Parts, PartSpec


class LinearHead(nn.Linear):
    """W x + b.

    Args:
        d_model: D.
        classes: how many labels there are.
        bias: whether there is b.
    """

    def __init__(self, d_model: int, classes: int, bias: bool = True):
        super().__init__(d_model, classes, bias)


class TanhHead(nn.Module):
    """out(tanh(dense x)).

    Source: Devlin et al. (2018) "BERT", arXiv:1810.04805, the pooler of the authors' code and the map behind it.

    Args:
        d_model: D.
        classes: how many labels there are.
    """

    def __init__(self, d_model: int, classes: int):
        super().__init__()
        self.dense, self.out = nn.Linear(d_model, d_model), nn.Linear(d_model, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., classes)."""
        return self.out(self.dense(x).tanh())


class HeadSpec(PartSpec):
    """A head as data."""

    def build(self, d_model: int, classes: int) -> Any:
        """The module, freshly drawn."""
        return self._built(d_model, classes)


HEADS: Parts[nn.Module, HeadSpec] = Parts(
    "head", HeadSpec, given=("d_model", "classes"), classes={"linear": LinearHead, "tanh": TanhHead}, of=nn.Module
)
TOKEN_HEADS: Parts[MaskedLMHead, HeadSpec] = Parts(
    "head", HeadSpec, given=("d_model", "vocab"), classes={"bert": MaskedLMHead}, of=MaskedLMHead
)
AnyHead = Annotated[SerializeAsAny[HeadSpec], BeforeValidator(HEADS.field)]
AnyTokenHead = Annotated[SerializeAsAny[HeadSpec], BeforeValidator(TOKEN_HEADS.field)]
