"""Sums of simple poles: the kernel maker of S4 in the frequency domain."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(v="B C N : complex", z="L : complex", w="C N : complex", returns={"k": "B C L : v+z+w"})
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
