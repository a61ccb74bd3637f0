"""Softmax attention through torch's scaled_dot_product_attention: FlashAttention where torch has it."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longwave.ops.dispatch import Op

QUERY_CHUNK = 512  # rows of a mask that exist at once


def _check_heads(q: Tensor, k: Tensor, *others: object) -> None:
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"attention: T = {k.shape[1]} keys for L = {q.shape[1]} queries; T >= L is needed")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: J = {k.shape[2]} key heads do not divide H = {q.shape[2]} query heads")


@Op(
    q="B L H P", k="B T J P", v="B T J V", mask="B T : bool", check=_check_heads, returns={"y": "B L H V : q"}
)  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, scale: float | None = None
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
    Returns:
        y: (B, L, H, V) in the dtype of q.
    Raises:
        ValueError: where sizes or devices disagree, T < L, or J does not divide H.
    Cost: O(L T) time; memory linear in L and T: masks exist for 512 queries at a time.
    """
    q_, k_, v_ = _heads(q, k, v)
    L, T = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    k_, v_ = k_.repeat_interleave(groups, 1), v_.repeat_interleave(groups, 1)
    logits = q_ @ k_.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, L, T)
    logits = logits.masked_fill(~_allowed(0, L, L, T, causal, mask, q.device), float("-inf"))
    return (logits.softmax(-1) @ v_).transpose(1, 2).to(q.dtype)


def _heads(*tensors: Tensor) -> list[Tensor]:
    """(B, H, L, P), in one dtype."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.transpose(1, 2).to(dtype) for x in tensors]


def _allowed(start: int, stop: int, L: int, T: int, causal: bool, mask: Tensor | None, device) -> Tensor:
    """(B or 1, 1, stop - start, T) bool: which keys the queries start..stop see."""
    position = torch.arange(T - L + start, T - L + stop, device=device)[:, None]
    keys = torch.arange(T, device=device)
    allowed = (keys <= position if causal else torch.ones_like(keys <= position))[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None] | (keys == position)
    return allowed


@attention.backend("torch")
def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    dtype, (q, k, v) = q.dtype, _heads(q, k, v)
    L, T = q.shape[2], k.shape[2]
    grouped = bool(q.shape[1] != k.shape[1])  # a size that is not known yet compares as a symbol
    if mask is None and (not causal or L == T or L == 1):
        is_causal = bool(causal and L > 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).to(dtype)

    def rows(q: Tensor, start: int) -> Tensor:
        stop = start + q.shape[2]
        seen = T - L + stop if causal else T
        allowed = _allowed(start, stop, L, T, causal, mask, q.device)[..., :seen]
        return F.scaled_dot_product_attention(
            q, k[:, :, :seen], v[:, :, :seen], allowed, scale=scale, enable_gqa=grouped
        )

    if L <= QUERY_CHUNK:
        return rows(q, 0).transpose(1, 2).to(dtype)
    # Recomputed in the backward pass, so that autograd keeps no mask of all L x T.
    chunks = zip(q.split(QUERY_CHUNK, dim=2), range(0, L, QUERY_CHUNK))
    again = torch.is_grad_enabled()
    ys = [checkpoint(rows, *chunk, use_reentrant=False) if again else rows(*chunk) for chunk in chunks]
    return torch.cat(ys, dim=2).transpose(1, 2).to(dtype)
