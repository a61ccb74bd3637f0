"""What a block puts before its parts, and attention behind its queries and keys."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.nn.module import widened
from longwave.ops import rms_norm
from longwave.spec import Parts, PartSpec


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm of the last axis, forward and backward in one pass each on a CPU.

    Args:
        d_model: D.
        eps: > 0, added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__(d_model, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


class OffsetRMSNorm(nn.Module):
    """(1 + weight) x / sqrt(mean x^2 + eps) of the last axis: weights near 1 keep their digits in 16 bits.

    Source: Gemma Team (2024) "Gemma", arXiv:2403.08295, in the authors' code.

    Args:
        d_model: D.
        eps: > 0, added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(d_model)), eps

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, 1 + widened(self.weight)[0], self.eps)


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) of the last axis, without weights.

    Args:
        d_model: D, which does not matter.
        eps: > 0, added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm of the last axis.

    Args:
        d_model: D.
        eps: > 0, added to the variance.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__(d_model, eps)


NO_EPS = 1e-30  # of a norm without an epsilon: constants become zeros rather than NaN


class ScalarLayerNorm(nn.Module):
    """s (x - mean(x) + m) / sqrt(variance(x) + eps) of the last axis, with one s and one m for all features.

    Source: TransposedLN of github.com/state-spaces/s4, which has no eps.

    Args:
        d_model: D, which does not matter.
        eps: > 0, added to the variance.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.m, self.s, self.eps = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1)), eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.m.zero_()
        self.s.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        wide, m, s = widened(x, self.m, self.s)
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        return (s * (wide - mean + m) * (variance + self.eps).rsqrt()).to(x.dtype)


class ScaleNorm(nn.Module):
    """scalar x / sqrt(mean x^2 + eps) of the last axis, with one scalar for all features.

    Source: Nguyen & Salazar (2019) "Transformers without Tears", arXiv:1910.05895, as Mega has it.

    Args:
        d_model: D, which does not matter.
        eps: > 0, added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.scalar, self.eps = nn.Parameter(torch.ones(1)), eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scalar)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.scalar * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class NoNorm(nn.Identity):
    """x as it is.

    Args:
        d_model: D, which does not matter.
    """

    def __init__(self, d_model: int):
        super().__init__()


class NormSpec(PartSpec):
    """A norm as data."""

    def build(self, d_model: int) -> nn.Module:
        """The module, freshly drawn."""
        return self._built(d_model)


NORMS: Parts[nn.Module, NormSpec] = Parts(
    "norm",
    NormSpec,
    given=("d_model",),
    classes={
        "rms": RMSNorm,
        "layer": LayerNorm,
        "scale": ScaleNorm,
        "scalar_layer": ScalarLayerNorm,
        "offset_rms": OffsetRMSNorm,
        "plain_rms": PlainRMSNorm,
        "none": NoNorm,
    },
)
AnyNorm = Annotated[SerializeAsAny[NormSpec], BeforeValidator(NORMS.field)]
