"""Powers of diagonal state matrices as sums over modes: the kernel maker of S4D, and its transpose.

Both use  l = i + m j  with m ~ sqrt(L): two small tables of powers, built by doubling in complex128 whatever the dtype,
joined by one real batched GEMM. No (C, N, L) tensor exists; the backward pass keeps no table and makes them again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(x="C N", c="B C N")
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
    """x^0 .. x^(count-1) as (count, ...), by doubling: log2(count) products deep, so nothing accumulates."""
    table = x.new_empty(count, *x.shape)
    table[0], done, step = 1, 1, x
    while done < count:
        more = min(done, count - done)
        torch.mul(table[:more], step, out=table[done : done + more])
        done, step = done + more, step * step
    return table


def _split(length: int) -> tuple[int, int]:
    """(m, J) with m J >= length, m a power of two near the root."""
    m = 1
    while m * m < length:
        m *= 2
    return m, -(-length // m)


def _tables(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(m, c, N) powers x^i and (J, c, N) powers x^(m j)."""
    m, J = _split(length)
    wide = x.to(torch.complex128)
    top = wide  # becomes x^m
    for _ in range(m.bit_length() - 1):
        top = top * top
    return _powers(wide, m).to(x.dtype), _powers(top, J).to(x.dtype)


def _blocks(x: Tensor, B: int, length: int) -> Iterator[slice]:
    """Slices of channels whose tables and sequences are a few MB, so that they stay in the cache."""
    C, N = x.shape
    m, J = _split(length)
    width = max(1, 2**18 // (N * (m + (B + 1) * J) + B * length)) if x.device.type == "cpu" else C
    for start in range(0, C, width):
        yield slice(start, min(start + width, C))


def _sum_of_modes(fine: Tensor, coarse: Tensor, c: Tensor) -> Tensor:
    """2 Re sum_n c[n] x[n]^l  as (c, B, J m): Re of complex products is one real GEMM over interleaved parts."""
    (m, C, N), J, B = fine.shape, len(coarse), len(c)
    left = (2 * c[:, None] * coarse).conj().resolve_conj()  # (B, J, c, N)
    left, right = torch.view_as_real(left).reshape(B * J, C, 2 * N), torch.view_as_real(fine).view(m, C, 2 * N)
    return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).view(C, B, J * m)


def _modes_of_sum(fine: Tensor, coarse: Tensor, u: Tensor) -> Tensor:
    """sum_l x[n]^l u[l]  as (c, B, N), of u (c, B, J m)."""
    (m, C, N), J, B = fine.shape, len(coarse), u.shape[1]
    table = torch.view_as_real(fine).view(m, C, 2 * N).transpose(0, 1)
    partial = torch.view_as_complex(torch.bmm(u.reshape(C, B * J, m), table).view(C, B, J, N, 2))
    return partial.mul_(coarse.transpose(0, 1)[:, None]).sum(2)


def _grid(u: Tensor, length: int, work: torch.dtype, derivative: bool = False) -> Tensor:
    """u (B, c, L) as (c, B, J m), zeros behind; with ``derivative`` also (l+1) u[l+1] as B more rows."""
    B, c, L = u.shape
    m, J = _split(length)
    grid = u.new_zeros(c, 2 * B if derivative else B, J * m, dtype=work)
    grid[:, :B, :L] = u.transpose(0, 1)
    if derivative:
        steps = torch.arange(1, L, dtype=work, device=u.device)
        torch.mul(grid[:, :B, 1:L], steps, out=grid[:, B:, : L - 1])
    return grid


@torch.library.custom_op("longwave::vandermonde", mutates_args=())
def _vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    B, C, _ = c.shape
    k = c.new_empty(B, C, length, dtype=c.real.dtype)
    for s in _blocks(x, B, length):
        k[:, s] = _sum_of_modes(*_tables(x[s], length), c[:, s].to(x.dtype))[..., :length].transpose(0, 1)
    return k


@_vandermonde.register_fake
def _(x, c, length):
    return c.new_empty(*c.shape[:2], length, dtype=c.dtype.to_real())


@torch.library.custom_op("longwave::vandermonde_backward", mutates_args=())
def _vandermonde_backward(dk: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dc = 2 conj(sum_l x^l dk[l]) and, with l x^(l-1) for x^l, dx: one GEMM for both, on tables made anew."""
    B, L = len(c), dk.shape[2]
    dx, dc = torch.empty_like(x), torch.empty_like(c)
    for s in _blocks(x, 2 * B, L):
        sums = 2 * _modes_of_sum(*_tables(x[s], L), _grid(dk[:, s], L, x.real.dtype, derivative=True)).conj()
        dc[:, s] = sums[:, :B].transpose(0, 1)
        dx[s] = (sums[:, B:] * c[:, s].transpose(0, 1).conj()).sum(1)
    return dx, dc


@_vandermonde_backward.register_fake
def _(dk, x, c):
    return torch.empty_like(x), torch.empty_like(c)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, dk):
    return *_vandermonde_backward(dk, *ctx.saved_tensors), None


torch.library.register_autograd("longwave::vandermonde", _backward, setup_context=_save)


@vandermonde.backend("torch")
def _(x: Tensor, c: Tensor, length: int) -> Tensor:
    _check_length(length)
    return _vandermonde(x, c, length)


@torch.library.custom_op("longwave::vandermonde_transpose", mutates_args=())
def _transpose(x: Tensor, u: Tensor) -> Tensor:
    B, C, L = u.shape
    m = x.new_empty(B, C, x.shape[1])
    for s in _blocks(x, B, L):
        m[:, s] = _modes_of_sum(*_tables(x[s], L), _grid(u[:, s], L, x.real.dtype)).transpose(0, 1)
    return m


@_transpose.register_fake
def _(x, u):
    return x.new_empty(*u.shape[:2], x.shape[1])


@torch.library.custom_op("longwave::vandermonde_transpose_backward", mutates_args=())
def _transpose_backward(dm: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """du[l] = Re sum_n x^l conj(dm), and dx through l x^(l-1)."""
    L = u.shape[2]
    dx, du = torch.empty_like(x), torch.empty_like(u, memory_format=torch.contiguous_format)
    for s in _blocks(x, 2 * len(u), L):
        fine, coarse = _tables(x[s], L)
        du[:, s] = _sum_of_modes(fine, coarse, dm[:, s].conj() / 2)[..., :L].transpose(0, 1)
        slopes = _modes_of_sum(fine, coarse, _grid(u[:, s], L, x.real.dtype, derivative=True))[:, len(u) :]
        dx[s] = (slopes.conj() * dm[:, s].transpose(0, 1)).sum(1)
    return dx, du


@_transpose_backward.register_fake
def _(dm, x, u):
    return torch.empty_like(x), torch.empty_like(u, memory_format=torch.contiguous_format)


def _save_transpose(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_transpose(ctx, dm):
    return _transpose_backward(dm, *ctx.saved_tensors)


torch.library.register_autograd("longwave::vandermonde_transpose", _backward_transpose, setup_context=_save_transpose)


@vandermonde_transpose.backend("torch")
def _(x: Tensor, u: Tensor) -> Tensor:
    return _transpose(x, u)
