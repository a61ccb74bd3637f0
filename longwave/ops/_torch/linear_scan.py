"""The linear recurrence in 2 sqrt(L) steps: groups of time side by side, then their ends one after another."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import at_least_float32


def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h (B, L, C)."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (a, b, h0)))
    work = at_least_float32(dtype)
    return scan(a.to(work), b.to(work), h0.to(work)).to(dtype).contiguous()


def backward(needed: set[str], dh: Tensor, a: Tensor, h0: Tensor, h: Tensor) -> dict[str, Tensor]:
    """db is the scan reversed of dh, the others are products of it."""
    work = at_least_float32(h.dtype)
    db = scan(
        F.pad(a[:, 1:], (0, 0, 0, 1)).conj_physical().to(work),
        dh.to(work),
        h0.new_zeros(h0.shape, dtype=work),
        reverse=True,
    )
    grads = {"b": db, "h0": a[:, 0].conj_physical() * db[:, 0]}
    if "a" in needed:
        grads["a"] = db * torch.cat([h0[:, None].to(h.dtype), h[:, :-1]], 1).conj_physical()
    return grads


def scan(a: Tensor, b: Tensor, h0: Tensor, reverse: bool = False) -> Tensor:
    """The scan without its gradient; changes no input.

    ``reverse`` runs from the last step to the first:  h[t] = a[t] h[t+1] + b[t],  h[L] = h0.
    """
    B, L, C = b.shape
    T = math.isqrt(L - 1) + 1
    G = -(-L // T)
    p = _groups(a, G, T, 1.0)  # padding leaves the state as it is
    h = _groups(b, G, T, 0.0)
    steps, before = (range(T - 2, -1, -1), 1) if reverse else (range(1, T), -1)
    for t in steps:
        h[:, :, t].addcmul_(p[:, :, t], h[:, :, t + before])
        p[:, :, t] *= p[:, :, t + before]  # decay since the start of the group
    end = 0 if reverse else -1
    carries = [h0]
    for g in range(G - 1, 0, -1) if reverse else range(G - 1):
        carries.append(torch.addcmul(h[:, g, end], p[:, g, end], carries[-1]))
    carries = carries[::-1] if reverse else carries
    h.addcmul_(p, torch.stack(carries, dim=1)[:, :, None])
    return h.view(B, G * T, C)[:, :L]


def _groups(x: Tensor, G: int, T: int, padding: float) -> Tensor:
    """A copy of x (B, L, C) as (B, G, T, C)."""
    B, L, C = x.shape
    copy = x.new_empty(B, G * T, C)
    copy[:, :L] = x
    copy[:, L:] = padding
    return copy.view(B, G, T, C)
