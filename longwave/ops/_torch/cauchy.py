"""Sums of simple poles, a few MB of them at a time: no (C, N, L) tensor exists, the backward pass makes them again."""

from collections.abc import Iterator

import torch
from torch import Tensor


def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """A pair together is  (2 Re(v) z - 2 Re(v conj(w))) / ((z - w) (z - conj(w))): one division for two poles."""
    B, C = v.shape[:2]
    weights = 2 * torch.cat([v.real, (v * w.conj_physical()).real]).transpose(0, 1)  # (C, 2 B, N) real
    k = v.new_empty(B, C, len(z))
    for c, s in _blocks(w, len(z)):
        to_z = z[s] - w[c, :, None]
        pairs = torch.view_as_real(1 / (to_z * (z[s] - w[c, :, None].conj_physical()))).flatten(2)  # (c, N, 2 s) real
        one, other = torch.view_as_complex(torch.bmm(weights[c], pairs).unflatten(2, (-1, 2))).chunk(2, dim=1)
        k[:, c, s] = (one * z[s] - other).transpose(0, 1)
    return k


def backward(needed: set[str], dk: Tensor, v: Tensor, z: Tensor, w: Tensor) -> dict[str, Tensor]:
    """With r = 1 / (z - w), q = 1 / (z - conj(w)):  dv = sum_l dk conj(r) + conj(dk) q, and dw, dz with squares."""
    dv, dz, dw = torch.zeros_like(v), torch.zeros_like(z), torch.zeros_like(w)
    for c, s in _blocks(w, len(z)):
        r, q = 1 / (z[s] - w[c, :, None]), 1 / (z[s] - w[c, :, None].conj_physical())  # (c, N, s)
        d, weights = dk[:, c, s].transpose(0, 1).conj_physical(), v[:, c].transpose(0, 1)  # (c, B, s), (c, B, N)
        dv[:, c] += ((d @ r.mT).conj_physical() + d @ q.mT).transpose(0, 1)
        r, q = r * r, q * q
        dw[c] += (((d @ r.mT).conj_physical() + d @ q.mT) * weights.conj_physical()).sum(1)
        if "z" in needed:
            dz[s] -= (d * (weights @ r + weights.conj_physical() @ q)).sum((0, 1)).conj_physical()
    return {"v": dv, "z": dz, "w": dw}


def _blocks(w: Tensor, L: int) -> Iterator[tuple[slice, slice]]:
    """Slices of channels and of nodes whose poles are 4 MB or so."""
    C, N = w.shape
    nodes = min(L, max(1, 2**18 // N))
    width = max(1, 2**18 // (N * nodes))
    for start in range(0, C, width):
        for first in range(0, L, nodes):
            yield slice(start, start + width), slice(first, first + nodes)
