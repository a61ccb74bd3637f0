"""What stands between a gated recurrence and the map out of it: a gate, and a norm before or behind it."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.ops import rms_norm
from longwave.spec import Parts, PartSpec


def gated(y: Tensor, z: Tensor) -> Tensor:
    """y silu(z), in the dtype of y."""
    return y * F.silu(z.to(y.dtype))


class GroupedNorm(nn.Module):
    """weight y / sqrt(mean(y^2) + eps), the mean over each of G groups of neighbouring features: what both norms are.

    Args:
        width: E.
        groups: G, divides E.
        eps: > 0, added to the mean squares.
    """

    def __init__(self, width: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)

    def normed(self, y: Tensor) -> Tensor:
        """y (..., E) -> (..., E)."""
        if self.groups == 1:
            return rms_norm(y, self.weight, self.eps)
        return rms_norm(y.unflatten(-1, (self.groups, -1)), self.weight.view(self.groups, -1), self.eps).flatten(-2)


class GateNorm(GroupedNorm):
    """norm(y silu(z)): gated first, then normed.

    Source: Dao & Gu (2024), arXiv:2405.21060, sec. 7.1, as in the authors' code.

    Args:
        width, groups: of the norm, which the owner gives.
        eps: > 0, added to the mean squares.
    """

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., E) -> (..., E)."""
        return self.normed(gated(y, z))


class NormGate(GroupedNorm):
    """norm(y) silu(z): normed first, then gated.

    Args:
        width, groups: of the norm, which the owner gives.
        eps: > 0, added to the mean squares.
    """

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., E) -> (..., E)."""
        return gated(self.normed(y), z)


class Gate(nn.Module):
    """y silu(z), without a norm.

    Args:
        width, groups: of a norm, if there were one.
    """

    def __init__(self, width: int, groups: int):
        super().__init__()

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., E) -> (..., E)."""
        return gated(y, z)


class GatedNormSpec(PartSpec):
    """A gated norm as data."""

    def build(self, width: int, groups: int) -> nn.Module:
        """The module, freshly drawn."""
        return self._built(width, groups)


GATED_NORMS: Parts[nn.Module, GatedNormSpec] = Parts(
    "gated norm",
    GatedNormSpec,
    given=("width", "groups"),
    classes={"gate_norm": GateNorm, "norm_gate": NormGate, "gate": Gate},
)
AnyGatedNorm = Annotated[SerializeAsAny[GatedNormSpec], BeforeValidator(GATED_NORMS.field)]
