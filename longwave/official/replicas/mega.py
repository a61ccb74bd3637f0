"""What github.com/facebookresearch/mega and its copy in state-spaces/s4 have in float32 whatever the model is in."""

import math

import torch
from torch import Tensor, nn


class Float32Softmax(nn.Module):
    """:class:`longwave.mixers.mega.Softmax` in no more than float32."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """q (..., L, S), k (..., T, S) -> (..., L, T)."""
        logits = ((q * q.shape[-1] ** -0.5) @ k.mT + bias).masked_fill(~seen, float("-inf"))
        return logits.softmax(-1, dtype=torch.float32).to(logits.dtype)


class Float32RotaryBias(nn.Module):
    """:class:`longwave.mixers.mega.RotaryBias` with angles, sines and cosines in float32, by position.

    Args:
        width: S, even.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.zeros(1, width)) for _ in range(2))

    def forward(self, L: int, T: int, causal: bool) -> Tensor:
        """(L, T) for the last L of T steps and all of them."""
        return self._turned(self.alpha, T)[T - L :] @ self._turned(self.beta, T).T

    def _turned(self, x: Tensor, length: int) -> Tensor:
        half = x.shape[1] // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32, device=x.device) * -(math.log(10_000) / half))
        angles = torch.arange(length, dtype=torch.float32, device=x.device)[:, None] * rates
        sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
        left, right = x.chunk(2, dim=1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=1)
