"""Powers of diagonal state matrices as sums over modes: the kernel maker of S4D, and its transpose.

Both use  l = i + m j  with m ~ sqrt(L): two small tables of powers, built by doubling in complex128 whatever the dtype,
joined by one real batched GEMM. No (C, N, L) tensor exists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(x="C N", c="B C N")
def vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    """k[l] = 2 Re sum_n c[n] x[n]^l,  l < length: one half of each conjugate pair is given, both count.

    Source: Gu et al. (2022) "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv:2206.11893, eq. 4.

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
    _check_length(length)
    wide = x.to(torch.complex128)
    powers = wide[..., None] ** torch.arange(length, device=x.device)  # (C, N, L)
    return 2 * torch.einsum("bcn,cnl->bcl", c.to(wide.dtype), powers).real.to(c.real.dtype)


@Op(x="C N", u="B C L")
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


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"vandermonde: length must be at least 1; got {length}")


def _powers(x: Tensor, count: int) -> Tensor:
    """x^0 .. x^(count-1) as (..., count), by doubling: log2(count) products deep, so nothing accumulates."""
    table, step = torch.ones_like(x)[..., None], x
    while table.shape[-1] < count:
        table = torch.cat([table, table * step[..., None]], dim=-1)
        step = step * step
    return table[..., :count]


def _tables(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(C, N, m) powers x^i and (C, N, J) powers x^(m j), with m J >= length."""
    wide = x.to(torch.complex128)
    m, top = 1, wide  # top = x^m
    while m * m < length:
        m, top = 2 * m, top * top
    fine, coarse = _powers(wide, m), _powers(top, -(-length // m))
    return fine.to(x.dtype), coarse.to(x.dtype)


@vandermonde.backend("torch")
def _(x: Tensor, c: Tensor, length: int) -> Tensor:
    _check_length(length)
    fine, coarse = _tables(x, length)
    left = c[..., None] * coarse  # (B, C, N, J)
    left = torch.cat([left.real, -left.imag], dim=2).transpose(2, 3)  # (B, C, J, 2N)
    right = torch.cat([fine.real, fine.imag], dim=1)  # (C, 2N, m)
    return 2 * (left @ right).flatten(2)[..., :length]


@vandermonde_transpose.backend("torch")
def _(x: Tensor, u: Tensor) -> Tensor:
    fine, coarse = _tables(x, u.shape[2])
    m, J = fine.shape[-1], coarse.shape[-1]
    grid = F.pad(u, (0, m * J - u.shape[2])).unflatten(2, (J, m)).to(fine.real.dtype)  # (B, C, J, m)
    table = torch.cat([fine.real, fine.imag], dim=1).transpose(1, 2)  # (C, m, 2N)
    re, im = (grid @ table).chunk(2, dim=-1)  # (B, C, J, N)
    return torch.einsum("bcjn,cnj->bcn", torch.complex(re, im), coarse)
