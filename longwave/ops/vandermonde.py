"""Powers of diagonal state matrices as sums over modes: the kernel maker of S4D, and its transpose.

Both use  l = i + m j  with m ~ sqrt(L): two small tables of powers, built by doubling in complex128 whatever the dtype,
joined by one real batched GEMM. No (C, N, L) tensor exists; the backward pass keeps no table and makes them again.
"""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


def near_root(length: int) -> tuple[int, int]:
    """(m, J) with m (J - 1) < length <= m J, m a power of two near the root."""
    m = 1
    while m * m < length:
        m *= 2
    return m, -(-length // m)


def _check_length(x: Tensor, c: Tensor, length: int) -> None:
    if length < 1:
        raise ValueError(f"vandermonde: length must be at least 1; got {length}")


@Op(x="C N : complex", c="B C N : complex", check=_check_length, returns={"k": "B C length : c.real"})
def vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    """k[l] = 2 Re sum_n c[n] x[n]^l,  l < length: one half of each conjugate pair is given, both count.

    Source: Gu et al. (2022) "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv:2206.11893, sec. 3.2.

    Args:
        x: (C, N) complex nodes, |x| <= 1 for a stable system.
        c: (B, C, N) complex weights.
        length: L >= 1.
    Returns:
        k: (B, C, L) real.
    Raises:
        ValueError: where sizes or devices disagree, or length < 1.
    Cost: O(C N L) multiply-adds as GEMM, O(C N sqrt(L)) memory besides the result.
    """
    wide = x.to(torch.complex128)
    powers = wide[..., None] ** torch.arange(length, device=x.device)  # (C, N, L)
    return 2 * torch.einsum("bcn,cnl->bcl", c.to(wide.dtype), powers).real.to(c.real.dtype)


@Op(x="C N : complex", u="B C L", returns={"m": "B C N : x"})
def vandermonde_transpose(x: Tensor, u: Tensor) -> Tensor:
    """m[n] = sum_l x[n]^l u[l]: what a state has gathered from the inputs u, newest first.

    Source: the transpose of :func:`vandermonde`.

    Args:
        x: (C, N) complex nodes.
        u: (B, C, L) real.
    Returns:
        m: (B, C, N) complex.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: as vandermonde.
    """
    wide = x.to(torch.complex128)
    powers = wide[..., None] ** torch.arange(u.shape[2], device=x.device)  # (C, N, L)
    return torch.einsum("bcl,cnl->bcn", u.to(wide.dtype), powers).to(x.dtype)
