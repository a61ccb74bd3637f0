"""Softmax attention through torch's scaled_dot_product_attention: FlashAttention where torch has it."""

import functools
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longwave.ops.dispatch import Op
from longwave.ops.kernel import transform
from longwave.ops.opaque import opaque

QUERY_CHUNK = 512  # rows of a mask that exist at once
LEAST_CHUNK = 64  # with a window as many as it has keys, but no fewer than this


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: object, window: int | None):
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"attention: T = {k.shape[1]} keys for L = {q.shape[1]} queries; T >= L is needed")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: J = {k.shape[2]} key heads do not divide H = {q.shape[2]} query heads")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window >= 1, and causal; got window = {window}, causal = {causal}")


@Op(q="B L H P", k="B T J P", v="B T J V", mask="B T : bool", check=_check, returns={"y": "B L H V : q"})
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """y[t] = sum_s softmax_s(scale q[t] . k[s]) v[s].

    Source: Vaswani et al. (2017), arXiv:1706.03762, eq. 1; Dao et al. (2022) "FlashAttention", arXiv:2205.14135.

    Args:
        q: (B, L, H, P) queries. With T > L they are the last L of T positions: the T - L before are cached keys.
        k: (B, T, J, P) keys, J heads; J divides H (grouped keys).
        v: (B, T, J, V) values.
        causal: query t sees keys up to its own position; else it sees all.
        mask: (B, T) bool, True = real token, False = padding that no other query sees. A padded query sees itself, so
            its row is finite.
        scale: of the logits, default P^-0.5.
        window: W >= 1, a causal query sees no more than the last W keys, its own included; None is all.
    Returns:
        y: (B, L, H, V) in the dtype of q.
    Raises:
        ValueError: where sizes or devices disagree, T < L, J does not divide H, window < 1 or is not causal.
    Cost: O(L T) time, O(L W) with a window; memory linear in L and T: masks exist for 512 queries at a time.
    """
    q_, k_, v_ = _heads(q, k, v)
    L, T = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    k_, v_ = k_.repeat_interleave(groups, 1), v_.repeat_interleave(groups, 1)
    logits = q_ @ k_.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, L, T)
    allowed = _allowed(range(T - L, T), range(T), causal, mask, window or 0, q.device)
    return (logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v_).transpose(1, 2).to(q.dtype)


def _heads(*tensors: Tensor) -> list[Tensor]:
    """(B, H, L, P), in one dtype."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.transpose(1, 2).to(dtype) for x in tensors]


def _allowed(queries: range, keys: range, causal: bool, mask: Tensor | None, window: int, device) -> Tensor:
    """(B or 1, 1, queries, keys) bool: which keys each query sees, both told by their positions."""
    position = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    allowed = (key <= position if causal else torch.ones_like(key <= position))[None, None]
    if window:
        allowed = allowed & (key > position - window)
    if mask is not None:
        allowed = allowed & mask[:, None, None, keys.start : keys.stop] | (key == position)
    return allowed


@opaque(like=lambda q, k, v, mask, causal, window: q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3]))
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: int, window: int) -> Tensor:
    """(B, H, L, V) of q (B, H, L, P), k and v (B, J, T, P or V) and mask (B, T), a few queries at a time."""
    L, T = q.shape[2], k.shape[2]
    size = min(QUERY_CHUNK, max(LEAST_CHUNK, window)) if window else QUERY_CHUNK
    grouped = q.shape[1] != k.shape[1]
    if mask is None and L == T <= window:  # which is causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def rows(q: Tensor, begin: int, start: int, *near: Tensor) -> Tensor:
        """Queries from a position on, over pieces of keys from another on, and as many of values."""
        half = len(near) // 2
        k, v = (part[0] if half == 1 else torch.cat(part, dim=2) for part in (near[:half], near[half:]))
        ranges = range(begin, begin + q.shape[2]), range(start, start + k.shape[2])
        allowed = _allowed(*ranges, bool(causal), mask, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=grouped)

    queries, chunks = q.split(size, dim=2), []
    if window:  # pieces and not slices: the gradient of each slice would be as long as all keys
        sizes = [*([(T - L) % size] if (T - L) % size else []), *[size] * ((T - L) // size)]
        before, back = len(sizes), -(-(window - 1) // size)  # pieces in front of the first query; those a query sees
        sizes += [chunk.shape[2] for chunk in queries]
        starts, keys, values = [0, *accumulate(sizes)], k.split(sizes, dim=2), v.split(sizes, dim=2)
        for own, chunk in enumerate(queries, before):
            first = max(0, own - back)
            near = slice(first, own + 1)
            chunks.append((chunk, starts[own], starts[first], *keys[near], *values[near]))
    else:
        for begin, chunk in zip(range(T - L, T, size), queries):
            end = begin + chunk.shape[2] if causal else T
            chunks.append((chunk, begin, 0, k[:, :, :end], v[:, :, :end]))
    # Recomputed in the backward pass, so that autograd keeps no mask of all L x T; torch.func knows no such thing.
    again = size < L and torch.is_grad_enabled() and transform() is None
    return torch.cat([checkpoint(rows, *c, use_reentrant=False) if again else rows(*c) for c in chunks], dim=2)


@attention.backend("torch")
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    dtype, (q, k, v) = q.dtype, _heads(q, k, v)
    L, T = q.shape[2], k.shape[2]
    if mask is None and window is None and (not causal or L == T or L == 1):
        grouped = bool(q.shape[1] != k.shape[1])  # a size that is not known yet compares as a symbol
        is_causal = bool(causal and L > 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    else:
        q = q if scale is None else q * (scale * q.shape[3] ** 0.5)
        y = chunked_attention(q, k, v, mask, int(causal), window or 0)
    return y.transpose(1, 2).to(dtype)
