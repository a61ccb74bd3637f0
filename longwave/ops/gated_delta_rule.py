"""The gated delta rule: a memory that takes back what it knew of a key before it learns its new value."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check_groups(q: Tensor, k: Tensor, v: Tensor, *others: object) -> None:
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"gated_delta_rule: q and k have G = {q.shape[2]} groups, which must divide the H = {v.shape[2]} heads of v"
        )


@Op(
    q="B L G N", k="B L G N", v="B L H P", decay="B L H", beta="B L H", state="B H N P", check=_check_groups,
    returns={"y": "B L H P : v", "last": "B H N P : float32+q+v"},
)  # fmt: skip
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S' = exp(decay[t]) S[t-1],   S[t] = S' + k[t] (beta[t] (v[t] - S'^T k[t]))^T,   y[t] = S[t]^T q[t],  a head each.

    Source: Yang, Kautz & Hatamizadeh (2024) "Gated Delta Networks", arXiv:2412.06464, eq. 10; in chunks, Yang et al.
    (2024) "Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, sec. 3.2.

    Args:
        q, k: (B, L, G, N) queries and keys of G groups of H/G neighbouring heads; keys of norm 1 at most, with which
            the state stays bounded, and queries scaled beforehand.
        v: (B, L, H, P) values.
        decay: (B, L, H) logarithms of the decays, <= 0; -inf forgets everything.
        beta: (B, L, H) how much of a key's value is replaced, 0..1, or up to 2 where it may be turned around; 0
            learns nothing.
        state: (B, H, N, P) S before the first step; None is zero.
    Returns:
        y: (B, L, H, P) in the dtype of v.
        state: (B, H, N, P) S after the last step.
    Raises:
        ValueError: where sizes or devices disagree, or G does not divide H.
    Cost: O(L H N P) time, O(L) memory; the backward pass makes the states again, but for one in 256 steps.
    """
    S = prepare(q, v, state)
    H, work = v.shape[2], S.dtype
    q, k = (x.repeat_interleave(H // x.shape[2], dim=2).to(work) for x in (q, k))
    x, a, b = v.to(work), decay.to(work).exp(), beta.to(work)
    ys = []
    for t in range(q.shape[1]):
        S = a[:, t, :, None, None] * S
        change = b[:, t, :, None] * (x[:, t] - torch.einsum("bhn,bhnp->bhp", k[:, t], S))
        S = S + k[:, t, :, :, None] * change[:, :, None]
        ys.append(torch.einsum("bhn,bhnp->bhp", q[:, t], S))
    return torch.stack(ys, dim=1).to(v.dtype), S


def prepare(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The state in the working dtype, zeros where there is none."""
    work = at_least_float32(torch.promote_types(q.dtype, v.dtype))
    (B, _, H, P), N = v.shape, q.shape[3]
    return v.new_zeros(B, H, N, P, dtype=work) if state is None else state.to(work)
