"""Sums over modes as GEMMs:  l = i + m j  with m ~ sqrt(L), so two small tables of powers are joined by one of them.

The tables are built by doubling in complex128 whatever the dtype. No (C, N, L) tensor exists; the backward pass keeps
no table and makes them again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.vandermonde import near_root


def forward(x: Tensor, c: Tensor, length: int) -> Tensor:
    """k (B, C, L)."""
    B, C, _ = c.shape
    k = c.new_empty(B, C, length, dtype=c.real.dtype)
    for s in blocks(x, B, length):
        k[:, s] = sum_of_modes(*tables(x[s], length), c[:, s].to(x.dtype))[..., :length].transpose(0, 1)
    return k


def backward(needed: set[str], dk: Tensor, x: Tensor, c: Tensor) -> dict[str, Tensor]:
    """dc = 2 conj(sum_l x^l dk[l]) and, with l x^(l-1) for x^l, dx: one GEMM for both, on tables made anew."""
    B, L = len(c), dk.shape[2]
    dx, dc = x.new_empty(x.shape), c.new_empty(c.shape)
    for s in blocks(x, 2 * B, L):
        sums = 2 * modes_of_sum(*tables(x[s], L), grid(dk[:, s], L, x.real.dtype, "x" in needed)).conj_physical()
        dc[:, s] = sums[:, :B].transpose(0, 1)
        if "x" in needed:
            dx[s] = (sums[:, B:] * c[:, s].transpose(0, 1).conj_physical()).sum(1)
    return {"x": dx, "c": dc}


def _powers(x: Tensor, count: int) -> Tensor:
    """x^0 .. x^(count-1) as (count, ...), by doubling: log2(count) products deep, so nothing accumulates."""
    table = x.new_empty(count, *x.shape)
    table[0], done, step = 1, 1, x
    while done < count:
        more = min(done, count - done)
        torch.mul(table[:more], step, out=table[done : done + more])
        done, step = done + more, step * step
    return table


def tables(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(m, c, N) powers x^i and (J, c, N) powers x^(m j)."""
    m, J = near_root(length)
    wide = x.to(torch.complex128)
    top = wide  # becomes x^m
    for _ in range(m.bit_length() - 1):
        top = top * top
    return _powers(wide, m).to(x.dtype), _powers(top, J).to(x.dtype)


def blocks(x: Tensor, B: int, length: int) -> Iterator[slice]:
    """Slices of channels whose tables and sequences are a few MB, so that they stay in the cache."""
    C, N = x.shape
    m, J = near_root(length)
    width = max(1, 2**18 // (N * (m + (B + 1) * J) + B * length)) if x.device.type == "cpu" else C
    for start in range(0, C, width):
        yield slice(start, min(start + width, C))


def sum_of_modes(fine: Tensor, coarse: Tensor, c: Tensor) -> Tensor:
    """2 Re sum_n c[n] x[n]^l  as (c, B, J m): Re of complex products is one real GEMM over interleaved parts."""
    (m, C, N), J, B = fine.shape, len(coarse), len(c)
    left = (2 * c[:, None] * coarse).conj_physical()  # (B, J, c, N)
    left, right = torch.view_as_real(left).reshape(B * J, C, 2 * N), torch.view_as_real(fine).view(m, C, 2 * N)
    return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).view(C, B, J * m)


def modes_of_sum(fine: Tensor, coarse: Tensor, u: Tensor) -> Tensor:
    """sum_l x[n]^l u[l]  as (c, B, N), of u (c, B, J m)."""
    (m, C, N), J, B = fine.shape, len(coarse), u.shape[1]
    table = torch.view_as_real(fine).view(m, C, 2 * N).transpose(0, 1)
    partial = torch.view_as_complex(torch.bmm(u.reshape(C, B * J, m), table).view(C, B, J, N, 2))
    return partial.mul_(coarse.transpose(0, 1)[:, None]).sum(2)


def grid(u: Tensor, length: int, work: torch.dtype, derivative: bool = False) -> Tensor:
    """u (B, c, L) as (c, B, J m), zeros behind; with ``derivative`` also (l+1) u[l+1] as B more rows."""
    B, c, L = u.shape
    m, J = near_root(length)
    grid = u.new_zeros(c, 2 * B if derivative else B, J * m, dtype=work)
    grid[:, :B, :L] = u.transpose(0, 1)
    if derivative:
        steps = torch.arange(1, L, dtype=work, device=u.device)
        torch.mul(grid[:, :B, 1:L], steps, out=grid[:, B:, : L - 1])
    return grid
