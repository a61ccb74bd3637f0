"""S4ND as a mixer: steps that are read from a picture, a video or a volume line by line are convolved over its axes.

Source: Nguyen et al. (2022) "S4ND: Modeling Images and Videos as Multidimensional Signals with State Spaces",
arXiv:2210.06583, sec. 4, in place of the attention of a vision transformer too (sec. 5.1), over its patches.
"""

import math
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from longwave.mixers.base import WholeMixer
from longwave.nn import FILTERS, S4ND, AnyFilter


class S4NDMixer(WholeMixer, name="s4nd"):
    """y = GLU(W gelu(K * x + D x)) over all axes; what lacks of the last line is silence.

    Args:
        d_model: D.
        shape: steps along each axis but the first: [32] for pictures of any height whose lines have 32 steps.
        filter: of every axis in both directions, see :class:`longwave.mixers.TwoSided`.
        ranks: how many products of filters are averaged.
    Raises:
        ValueError: where there is no second axis or one has no step, and for an unknown filter or option.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"shape": [4], "filter": {"kind": "free", "max_len": 32, "squash": 0.0}},
        {"shape": [2, 3], "filter": {"kind": "s4d", "d_state": 4}, "ranks": 2},
    )

    def __init__(
        self,
        d_model: int,
        shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)],
        filter: AnyFilter = FILTERS.make("s4d"),  # noqa: B008
        ranks: int = 1,
    ):
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"s4nd needs the steps along each axis but the first, such as shape = [32]; got {shape}")
        self.d_model, self.shape = d_model, tuple(shape)
        spec = FILTERS.read(filter)
        self.inner = S4ND(d_model, [spec.build(2 * ranks * d_model) for _ in range(1 + len(shape))], ranks=ranks)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        B, L, D = x.shape
        line = math.prod(self.shape)
        lines = (L + 2 * line - 1) // line  # one more than there are: of a single one torch.export makes another graph
        x = F.pad(x, (0, 0, 0, lines * line - L)).view(B, lines, *self.shape, D)
        return self.inner(x).view(B, lines * line, D)[:, :L]
