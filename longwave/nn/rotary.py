"""Rotary positions."""

import torch
from torch import Tensor


def rotate(x: Tensor, start: int | Tensor, base: float = 10_000.0) -> Tensor:
    """Turn the pairs (i, i + P/2) of every head by an angle that grows with the position.

    Source: Su et al. (2021) "RoFormer", arXiv:2104.09864, eq. 34. Angles are in float64: at position 1e6 an angle in
    float32 is off by 0.04 rad.

    Args:
        x: (B, L, H, P), P even.
        start: position of x[:, 0], in tokens; (B,) where rows have different ones.
        base: of the frequencies base^(-2i/P).
    """
    P = x.shape[-1]
    frequency = base ** (-torch.arange(0, P, 2, device=x.device, dtype=torch.float64) / P)
    turn = _turn(torch.arange(x.shape[1], device=x.device), frequency)  # (L, P/2)
    first = _turn(torch.as_tensor(start, device=x.device).view(-1, 1), frequency)  # (B or 1, 1, P/2)
    turn = (turn * first)[:, :, None]
    cos, sin = turn.real.to(x.dtype), turn.imag.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _turn(position: Tensor, frequency: Tensor) -> Tensor:
    angle = position[..., None] * frequency
    return torch.polar(torch.ones_like(angle), angle)
