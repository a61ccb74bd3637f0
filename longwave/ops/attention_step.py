"""One step of softmax attention over keys and values that lie together: what a token costs attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op


def _check(q: Tensor, past: Tensor, seen: Tensor, scale: float | None) -> None:
    if past.shape[2] % 2 or q.shape[2] % (past.shape[2] // 2):
        raise ValueError(
            f"attention_step: past holds keys and values of J heads, which divide H = {q.shape[2]} query heads; it has "
            f"{past.shape[2]} heads"
        )


@Op(
    q="B 1 H P", past="B T M P", seen="B : whole", check=_check, growing="T", returns={"y": "B 1 H P : q"}
)  # fmt: skip
def attention_step(q: Tensor, past: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """y = sum_s softmax_s(scale q . k[s]) v[s] over the last ``seen`` keys of each row.

    Source: Vaswani et al. (2017), arXiv:1706.03762, eq. 1.

    Args:
        q: (B, 1, H, P) queries.
        past: (B, T, 2 J, P), at every step J heads of keys and then J of values; J divides H (grouped keys).
        seen: (B,) int64 >= 1, how many of the last steps count; more than T are all.
        scale: of the logits, default P^-0.5.
    Returns:
        y: (B, 1, H, P) in the dtype of q.
    Raises:
        ValueError: where sizes or devices disagree, or J does not divide H.
    Cost: O(T) time, and T H numbers besides what it reads.
    """
    q_, k, v, allowed = _prepared(q, past, seen)
    groups = q.shape[2] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q_ @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)  # (B, H, 1, T)
    return (logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(1, 2).to(q.dtype)


def _prepared(q: Tensor, past: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, 1, P), k and v (B, J, T, P) in one dtype, and which keys count, (B, 1, 1, T)."""
    dtype, T = torch.promote_types(q.dtype, past.dtype), past.shape[1]
    k, v = past.to(dtype).transpose(1, 2).chunk(2, dim=1)
    allowed = torch.arange(T, device=q.device) >= (T - seen)[:, None, None, None]
    return q.to(dtype).transpose(1, 2), k, v, allowed


@attention_step.backend("torch")
def _sdpa(q: Tensor, past: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    q_, k, v, allowed = _prepared(q, past, seen)
    grouped = bool(q_.shape[1] != k.shape[1])
    y = F.scaled_dot_product_attention(q_, k, v, allowed, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).to(q.dtype)
