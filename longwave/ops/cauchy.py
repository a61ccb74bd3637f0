"""Sums of simple poles: the kernel maker of S4 in the frequency domain.

The poles are worked on a few MB at a time, so no (C, N, L) tensor exists; the backward pass makes them again.
Conjugates are physical: inside a compiled custom op torch overlooks a lazy one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(v="B C N", z="L", w="C N")
def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """k[l] = sum_n v[n] / (z[l] - w[n]) + conj(v[n]) / (z[l] - conj(w[n])): of each conjugate pair one half is given.

    Source: Gu et al. (2021) "S4", arXiv:2111.00396, sec. 3.2: a Cauchy matrix times a vector.

    Args:
        v: (B, C, N) complex weights.
        z: (L,) complex nodes, none of them equal to a w or its conjugate.
        w: (C, N) complex poles.
    Returns:
        k: (B, C, L) complex.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(C N L) divisions, O(B C L) memory.
    """
    pole, other = 1 / (z - w[..., None]), 1 / (z - w.conj()[..., None])  # (C, N, L)
    return torch.einsum("bcn,cnl->bcl", v, pole) + torch.einsum("bcn,cnl->bcl", v.conj(), other)


def _blocks(w: Tensor, L: int) -> Iterator[tuple[slice, slice]]:
    """Slices of channels and of nodes whose poles are 4 MB or so."""
    C, N = w.shape
    nodes = min(L, max(1, 2**18 // N))
    width = max(1, 2**18 // (N * nodes))
    for start in range(0, C, width):
        for first in range(0, L, nodes):
            yield slice(start, start + width), slice(first, first + nodes)


@torch.library.custom_op("longwave::cauchy", mutates_args=())
def _cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
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


@_cauchy.register_fake
def _(v, z, w):
    return v.new_empty(*v.shape[:2], len(z))


@torch.library.custom_op("longwave::cauchy_backward", mutates_args=())
def _cauchy_backward(dk: Tensor, v: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With r = 1 / (z - w), q = 1 / (z - conj(w)):  dv = sum_l dk conj(r) + conj(dk) q, and dw, dz with squares."""
    dv, dz, dw = torch.zeros_like(v), torch.zeros_like(z), torch.zeros_like(w)
    for c, s in _blocks(w, len(z)):
        r, q = 1 / (z[s] - w[c, :, None]), 1 / (z[s] - w[c, :, None].conj_physical())  # (c, N, s)
        d, weights = dk[:, c, s].transpose(0, 1).conj_physical(), v[:, c].transpose(0, 1)  # (c, B, s), (c, B, N)
        dv[:, c] += ((d @ r.mT).conj_physical() + d @ q.mT).transpose(0, 1)
        r, q = r * r, q * q
        dw[c] += (((d @ r.mT).conj_physical() + d @ q.mT) * weights.conj_physical()).sum(1)
        dz[s] -= (d * (weights @ r + weights.conj_physical() @ q)).sum((0, 1)).conj_physical()
    return dv, dz, dw


@_cauchy_backward.register_fake
def _(dk, v, z, w):
    return torch.empty_like(v), torch.empty_like(z), torch.empty_like(w)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dk):
    return _cauchy_backward(dk, *ctx.saved_tensors)


torch.library.register_autograd("longwave::cauchy", _backward, setup_context=_save)


@cauchy.backend("torch")
def _(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return _cauchy(v, z, w)
