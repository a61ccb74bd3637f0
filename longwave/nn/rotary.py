"""What attention knows of positions: rotary angles, and how they are scaled for longer texts than those of training."""

import math
from typing import Annotated

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.nn.frozen import derived
from longwave.ops import rotary
from longwave.spec import Parts, PartSpec


class LinearScaling:
    """Frequencies divided by a factor, as if tokens lay closer.  Source: Chen et al. (2023), arXiv:2306.15595.

    Args:
        factor: > 0.
    Raises:
        ValueError: for another factor.
    """

    def __init__(self, factor: float):
        self.factor = _positive("linear", "factor", factor)

    def __call__(self, frequency: Tensor) -> Tensor:
        """(R,) radians a token -> (R,)."""
        return frequency / self.factor


class Llama3Scaling:
    """Frequencies that turn slowly divided by a factor, fast ones kept, and those between in between.

    Source: Grattafiori et al. (2024) "The Llama 3 herd of models", arXiv:2407.21783, sec. 3.4, as in Meta's code: a
    frequency of n turns in ``length`` tokens is divided where n <= low, and kept where n >= high.

    Args:
        factor: > 0.
        low, high: turns, 0 < low < high.
        length: tokens of the texts that the model was trained on first, >= 1.
    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, factor: float = 8.0, low: float = 1.0, high: float = 4.0, length: int = 8192):
        self.factor = _positive("llama3", "factor", factor)
        self.low, self.high, self.length = low, high, _positive("llama3", "length", length)
        if not 0 < low < high < math.inf:
            raise ValueError(f"llama3 scaling needs 0 < low < high; got low = {low}, high = {high}")

    def __call__(self, frequency: Tensor) -> Tensor:
        """(R,) radians a token -> (R,)."""
        turns = self.length * frequency / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def _positive(scaling: str, option: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{scaling} scaling needs {option} > 0; got {value}")
    return value


Scaling = LinearScaling | Llama3Scaling


class ScalingSpec(PartSpec):
    """A scaling as data."""

    def build(self) -> Scaling:
        """It."""
        return self._built()


SCALINGS: Parts[Scaling, ScalingSpec] = Parts(
    "scaling", ScalingSpec, given=(), classes={"linear": LinearScaling, "llama3": Llama3Scaling}
)
AnyScaling = Annotated[SerializeAsAny[ScalingSpec], BeforeValidator(SCALINGS.field)]


class Rotary(nn.Module):
    """Pairs (i, i + R) of a head turned by angles position base^(-i/R), i < R: a product knows how far apart two are.

    Source: Su et al. (2021) "RoFormer", arXiv:2104.09864, eq. 34, in halves as in GPT-NeoX and Llama.

    Args:
        width: P, of a head.
        base: > 0.
        dim: 2 R, how many numbers of a head are turned, its first ones; even, 2 to P; None is all.
        scaling: of the frequencies; None leaves them.
    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, width: int, base: float = 10_000.0, dim: int | None = None, scaling: AnyScaling | None = None):
        super().__init__()
        if dim is None and width % 2:
            raise ValueError(f"rotary positions need an even head width; got {width}")
        self.dim = width if dim is None else dim
        if self.dim % 2 or not 2 <= self.dim <= width:
            raise ValueError(f"rotary positions: dim must be even, 2 to {width}, the width of a head; got {dim}")
        if not 0 < base < math.inf:
            raise ValueError(f"rotary positions need base > 0; got {base}")
        self.base, self.scaling = base, None if scaling is None else SCALINGS.read(scaling).build()

    @derived
    def frequency(self, device: torch.device) -> Tensor:
        """(R,) radians a token, float64."""
        frequency = self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim)
        return frequency if self.scaling is None else self.scaling(frequency)

    def forward(self, x: Tensor, start: Tensor | None, heads: int) -> Tensor:
        """The first heads of x (B, L, H, P) turned, the others as they are; see :func:`longwave.ops.rotary`."""
        return rotary(x, start, self.frequency(x.device), heads)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}"


class PositionsSpec(PartSpec):
    """Positions as data."""

    def build(self, width: int) -> nn.Module:
        """The module, called as :class:`Rotary` is."""
        return self._built(width)


POSITIONS: Parts[nn.Module, PositionsSpec] = Parts(
    "kind of positions", PositionsSpec, given=("width",), classes={"rotary": Rotary}
)
AnyPositions = Annotated[SerializeAsAny[PositionsSpec], BeforeValidator(POSITIONS.field)]
