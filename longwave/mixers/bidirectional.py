"""Bidirectional: any causal mixer read forwards, another one read backwards, joined by a linear map.

Source: Schuster & Paliwal (1997) "Bidirectional Recurrent Neural Networks"; the outer
``bidirectional`` of the authors' SequenceModel (github.com/state-spaces/s4), whose second layer sees the sequence
backwards here.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longwave.mixers.base import MIXERS, AnyMixer, WholeMixer
from longwave.nn.padding import is_real


class Bidirectional(WholeMixer, name="bidirectional"):
    """y = W [f(x) | reverse(g(reverse(x)))].

    Args:
        d_model: D.
        inner: the causal mixer, by name or as ``{"kind": name, ...}`` with its options.
    Raises:
        ValueError: for an unknown mixer or option, or a mixer that looks ahead already.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"inner": {"kind": "s4d", "d_state": 4}},
        {"inner": {"kind": "mamba", "d_state": 4}},
    )

    def __init__(self, d_model: int, inner: AnyMixer):
        super().__init__()
        spec = MIXERS.read(inner)
        self.d_model = d_model
        self.forwards, self.backwards = spec.build(d_model), spec.build(d_model)
        if not self.forwards.causal:
            raise ValueError(f"bidirectional takes a causal mixer; {spec.kind!r} looks ahead already: use it as it is")
        self.output_linear = nn.Linear(2 * d_model, d_model)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        mask = None if padding is None else is_real(x.shape[1], padding)
        past, _ = self.forwards(x, mask=mask)
        future, _ = self.backwards(x.flip(1), mask=None if mask is None else mask.flip(1))
        return self.output_linear(torch.cat([past, future.flip(1)], dim=-1))
