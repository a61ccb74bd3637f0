"""Padding takes no time: the real tokens of a row stand first, and what is behind them is as if it were not there.

``padding`` (B,) int64 says how many steps at the end of each row are padding; None is none.
"""

import torch
from torch import Tensor

from longwave.ops import short_conv


def take_steps(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) at the steps index (B, S) of each row: (B, S, ...)."""
    B, T = x.shape[:2]
    rows = torch.arange(0, B * T, T, device=x.device)[:, None] + index
    flat = x.reshape(B * T, -1)  # whole rows are moved: measured 10 to 40 times faster than a gather along axis 1
    return flat.gather(0, rows.reshape(-1, 1).expand(-1, flat.shape[1])).view(*index.shape, *x.shape[2:])


def real_first(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to bring the real tokens of mask (B, L) to the front, each row in its order.

    Returns:
        order: (B, L), ``take_steps(x, order)`` has the real tokens first.
        back: (B, L), its inverse.
        padding: (B,).
    """
    padded, real = (~mask).cumsum(1), mask.cumsum(1)
    back = torch.where(mask, real, real[:, -1:] + padded) - 1
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(back)
    return torch.empty_like(back).scatter(1, back, steps), back, padded[:, -1]


def last_real(mask: Tensor) -> Tensor:
    """(B,) the step of the last real token of each row of mask (B, L), or 0 where there is none."""
    return (mask.cumsum(1) * mask).argmax(1)


def is_real(length: int, padding: Tensor) -> Tensor:
    """(B, length) bool: True at real tokens."""
    return torch.arange(length, device=padding.device) < (length - padding)[:, None]


def silence(x: Tensor, padding: Tensor | None, value: float = 0.0) -> Tensor:
    """x (B, L, C) with zeros, or the value, at padding, by selection: what is not finite there goes nowhere, nor do its
    gradients."""
    return x if padding is None else x.masked_fill(~is_real(x.shape[1], padding)[..., None], value)


def last_steps(x: Tensor, padding: Tensor | None, count: int) -> Tensor:
    """The last ``count`` real steps (B, count, ...) of x (B, T, ...), count <= T; where a row has no more, its padding
    comes before them, so zeros stand in front of a row that is silent at padding."""
    T = x.shape[1]
    if padding is None:
        return x[:, T - count :]
    return take_steps(x, (torch.arange(T - count, T, device=x.device) - padding[:, None]) % T)


def padded_short_conv(
    u: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, padding: Tensor | None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`longwave.ops.short_conv` of rows that are silent at padding; the state is the last K-1 real inputs."""
    y, after = short_conv(u, weight, bias, past, silu=silu)
    if padding is not None and past is not None:
        after = last_steps(torch.cat([past.to(u.dtype), u], dim=1), padding, weight.shape[1] - 1)
    return y, after
