"""Butterfly matrices: products of log n sparse factors, each of which mixes pairs at one distance."""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check(x: Tensor, twiddle: Tensor, increasing: bool) -> None:
    levels, half, *pair = twiddle.shape[2:6]
    blocks = list(twiddle.shape[6:]) or [1, 1]
    if pair != [2, 2] or half != 2**levels // 2 or blocks[0] != blocks[1]:
        raise ValueError(
            f"butterfly: twiddle must be (S, D, log2 n, n/2, 2, 2) or (S, D, log2 n, n/2, 2, 2, b, b); "
            f"got shape {tuple(twiddle.shape)}"
        )
    if x.shape[2] != 2**levels * blocks[0]:
        raise ValueError(
            f"butterfly: x has {x.shape[2]} features; {levels} factors with blocks of {blocks[0]} take "
            f"{2**levels * blocks[0]}"
        )


@Op(
    x="B S N : any", twiddle="S D F G I J | S D F G I J Q P : any", check=_check,
    returns={"y": "B S N : x+twiddle"},
)  # fmt: skip
def butterfly(x: Tensor, twiddle: Tensor, *, increasing: bool = True) -> Tensor:
    """Multiply by D butterfly matrices in turn, whose factors take strides 1, 2, 4, ..., n/2 and back again.

    Source: Dao et al. (2019) "Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations",
    arXiv:1903.05895, sec. 3; blocks as in Chen et al. (2021) "Pixelated Butterfly", arXiv:2112.00029. Layout of the
    authors' ``butterfly_multiply`` (github.com/HazyResearch/butterfly) and ``block_butterfly_multiply``
    (github.com/HazyResearch/fly). The factor of stride s maps every pair (x[i], x[i + s]), i = 2 s d + t with t < s,
    by the 2 x 2 matrix number s d + t.

    Args:
        x: (B, S, n b) real or complex, a vector for each of S stacks.
        twiddle: (S, D, log2 n, n/2, 2, 2), or (S, D, log2 n, n/2, 2, 2, b, b) where the entries of the 2 x 2 matrices
            are themselves matrices, b x b, and act on b neighbours at once.
        increasing: whether the first of the D matrices starts with stride 1; the next one goes the other way.
    Returns:
        y: (B, S, n b) in the wider dtype of the two; bf16 and fp16 are multiplied in float32.
    Raises:
        ValueError: where shapes are not as above, or devices disagree.
    Cost: O(D n log(n) b^2) multiply-adds a vector.
    """
    dtype = torch.promote_types(x.dtype, twiddle.dtype)
    work = at_least_float32(dtype)
    y = x.to(work)
    for factor, stride in _factors(twiddle.to(work), increasing):
        y = torch.einsum("sij,bsj->bsi", _dense(factor, stride), y)
    return y.to(dtype)


@butterfly.backend("torch")
def _(x: Tensor, twiddle: Tensor, *, increasing: bool = True) -> Tensor:
    dtype = torch.promote_types(x.dtype, twiddle.dtype)
    work = at_least_float32(dtype)
    y = x.to(work)
    for factor, stride in _factors(twiddle.to(work), increasing):
        pairs = y.unflatten(-1, (-1, 2, stride, factor.shape[-1]))  # (B, S, n / 2 s, 2, s, b)
        y = torch.einsum("sdtijkl,bsdjtl->bsditk", factor.unflatten(1, (-1, stride)), pairs).flatten(2)
    return y.to(dtype)


def _factors(twiddle: Tensor, increasing: bool) -> Iterator[tuple[Tensor, int]]:
    """Every factor (S, n/2, 2, 2, b, b) and its stride, in the order in which they act."""
    if twiddle.ndim == 6:
        twiddle = twiddle[..., None, None]
    levels = twiddle.shape[2]
    for d in range(twiddle.shape[1]):
        for level in range(levels):
            upwards = increasing == (d % 2 == 0)
            yield twiddle[:, d, level], 2 ** (level if upwards else levels - 1 - level)


def _dense(factor: Tensor, stride: int) -> Tensor:
    """A factor as matrices (S, n b, n b)."""
    S, half, b = len(factor), factor.shape[1], factor.shape[-1]
    dense = factor.new_zeros(S, 2 * half, b, 2 * half, b)
    for number in range(half):
        i = number + number // stride * stride
        for row in range(2):
            for column in range(2):
                dense[:, i + row * stride, :, i + column * stride] = factor[:, number, row, column]
    return dense.view(S, 2 * half * b, 2 * half * b)
