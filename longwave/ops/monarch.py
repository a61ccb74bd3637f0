"""Monarch matrices: two block-diagonal factors with a transposition between them, and the nearest one to a matrix."""

import math

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check_blocks(x: Tensor, weight: Tensor) -> None:
    _check_width("blockdiag_multiply", x, weight)


@Op(x="... N : any", weight="K Q P : any", check=_check_blocks, returns={"y": "... K*Q : x+weight"})
def blockdiag_multiply(x: Tensor, weight: Tensor) -> Tensor:
    """y = diag(W_1, ..., W_K) x: every block of x by a matrix of its own.

    Source: Dao et al. (2022) "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    arXiv:2204.00595, sec. 3.1.

    Args:
        x: (..., K P) real or complex, with any axes in front.
        weight: (K, Q, P), one block a row.
    Returns:
        y: (..., K Q) in the wider dtype of the two.
    Raises:
        ValueError: where x is not as wide as the blocks together, or devices disagree.
    Cost: O(K Q P) multiply-adds for every row of x.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    work = at_least_float32(dtype)
    return (x.to(work) @ torch.block_diag(*weight.to(work)).T).to(dtype)


@blockdiag_multiply.backend("torch")
def _(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return _blocks(x.to(dtype), weight.to(dtype)).flatten(-2)


def _check_chain(x: Tensor, w1: Tensor, w2: Tensor) -> None:
    M, _, R = w2.shape
    if len(w1) * w1.shape[1] != M * R:
        raise ValueError(
            f"monarch: the blocks of w1 {tuple(w1.shape)} give {len(w1) * w1.shape[1]} features; those of "
            f"w2 {tuple(w2.shape)} take {M * R}"
        )
    _check_width("monarch", x, w1)


@Op(
    x="... N : any", w1="K Q P : any", w2="M S R : any", check=_check_chain, returns={"y": "... S*M : x+w1+w2"}
)  # fmt: skip
def monarch(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """y = P_2 diag(w2) P_1 diag(w1) x, the permutations being transpositions of the vector seen as a matrix.

    Source: Dao et al. (2022) "Monarch", arXiv:2204.00595, def. 3.1 and sec. 3.1; in the order of the authors'
    ``blockdiag_butterfly_multiply`` (github.com/HazyResearch/fly). With h = diag(w1) x:
    y[s M + m] = sum_r w2[m, s, r] h[r M + m].

    Args:
        x: (..., K P) real or complex, with any axes in front.
        w1: (K, Q, P), the blocks that come first.
        w2: (M, S, R), with M R = K Q. Q = M is the Monarch matrix of the paper, Q = M rank has blocks of higher rank.
    Returns:
        y: (..., S M) in the widest dtype.
    Raises:
        ValueError: where the sizes do not chain, or devices disagree.
    Cost: O(K Q P + M S R) multiply-adds for every row of x: O(n^1.5) where all of them are sqrt(n).
    """
    h, w2 = _middle(x, w1, w2, "reference")
    return blockdiag_multiply(h, w2, backend="reference").unflatten(-1, (len(w2), -1)).transpose(-1, -2).flatten(-2)


@monarch.backend("torch")
def _(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h, w2 = _middle(x, w1, w2, "torch")
    return _blocks(h, w2).transpose(-1, -2).flatten(-2)


def monarch_project(matrix: Tensor, blocks: tuple[int, int] | None = None, rank: int = 1) -> tuple[Tensor, Tensor]:
    """The factors (w1, w2) of the Monarch matrix that is nearest to a dense one in the Frobenius norm.

    Source: Dao et al. (2022) "Monarch", arXiv:2204.00595, sec. 3.2, algorithm 1: seen as K M blocks of S x P, every
    block of a Monarch matrix has rank 1, so each is replaced by its best approximation of that rank, found by SVD.

    Args:
        matrix: (S M, K P) real or complex.
        blocks: (K, M), how many blocks w1 and w2 have; by default the factors of the two sizes that are nearest to
            their square roots, K the larger and M the smaller one.
        rank: of the blocks, 1 <= rank <= min(S, P).
    Returns:
        w1: (K, rank M, P) and w2: (M, S, K rank), in the matrix's dtype; each block's pair has a free sign (a free
        phase where complex), their product has none.
    Raises:
        ValueError: for a tensor that is no matrix, blocks that do not divide it, or a rank that it cannot have.
    Cost: O(m n min(S, P)) for a matrix of m x n, in float64.
    """
    if matrix.ndim != 2:
        raise ValueError(f"monarch_project: matrix must be (m, n); got shape {tuple(matrix.shape)}")
    rows, columns = matrix.shape
    K, M = blocks or (columns // _root_factor(columns), _root_factor(rows))
    if K < 1 or M < 1 or columns % K or rows % M:
        raise ValueError(f"monarch_project: blocks = ({K}, {M}) do not divide {columns} columns and {rows} rows")
    S, P = rows // M, columns // K
    if not 1 <= rank <= min(S, P):
        raise ValueError(f"monarch_project: blocks of {S} x {P} have no rank {rank}; it is 1 to {min(S, P)}")
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    U, sizes, V = torch.linalg.svd(wide.view(S, M, K, P).permute(2, 1, 0, 3), full_matrices=False)  # (K, M, S, P)
    root = sizes[..., :rank].sqrt()
    w1 = (root[..., None] * V[..., :rank, :]).transpose(1, 2)  # (K, rank, M, P)
    w2 = (U[..., :rank] * root[..., None, :]).permute(1, 2, 0, 3)  # (M, S, K, rank)
    return w1.flatten(1, 2).to(matrix.dtype), w2.flatten(2, 3).to(matrix.dtype)


def _check_width(op: str, x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != len(weight) * weight.shape[2]:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} features; {len(weight)} blocks of {tuple(weight.shape[1:])} take "
            f"{len(weight) * weight.shape[2]}"
        )


def _blocks(x: Tensor, weight: Tensor) -> Tensor:
    """(..., K P) -> (..., K, Q)."""
    return torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (len(weight), -1)), weight)


def _middle(x: Tensor, w1: Tensor, w2: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """diag(w1) x, permuted for w2, and w2, in one dtype."""
    M, _, R = w2.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, w1.dtype), w2.dtype)
    h = blockdiag_multiply(x.to(dtype), w1.to(dtype), backend=backend)
    return h.unflatten(-1, (R, M)).transpose(-1, -2).flatten(-2), w2.to(dtype)


def _root_factor(n: int) -> int:
    """The largest factor of n that is at most its root."""
    return next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
