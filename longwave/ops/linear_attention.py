"""Linear attention with decays: the matrix state of retention, Mamba-2 (SSD), mLSTM and gated linear attention."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check_groups(q: Tensor, k: Tensor, v: Tensor, *others: object) -> None:
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"linear_attention: q and k have G = {q.shape[2]} groups, which must divide the H = {v.shape[2]} heads of v"
        )


@Op(
    q="B L G N", k="B L G N", v="B L H P", decay="H | B L H | B L G N", state="B H N P", check=_check_groups,
    returns={"y": "B L H P : v", "last": "B H N P : float32+q+v"},
)  # fmt: skip
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S[t] = exp(decay[t]) S[t-1] + k[t] v[t]^T,   y[t] = S[t]^T q[t],  for every head.

    Source: Katharopoulos et al. (2020), arXiv:2006.16236, eq. 18-20, without the denominator; with a decay a head, Sun
    et al. (2023) "RetNet", arXiv:2307.08621, eq. 6; with one a head and a step, Dao & Gu (2024), arXiv:2405.21060,
    sec. 6; with one a key channel and a step, Yang et al. (2024) "GLA", arXiv:2312.06635, eq. 3.

    Args:
        q, k: (B, L, G, N) queries and keys of G groups of H/G neighbouring heads; scale them beforehand.
        v: (B, L, H, P) values.
        decay: logarithms of the decays, <= 0; -inf forgets everything. (H,) is constant, (B, L, H) one a step for all
            of a head's state, (B, L, G, N) one a step for every row n of the states of a group. None is no decay.
        state: (B, H, N, P) S before the first step; None is zero.
    Returns:
        y: (B, L, H, P) in the dtype of v.
        state: (B, H, N, P) S after the last step.
    Raises:
        ValueError: where sizes or devices disagree, or G does not divide H.
    Cost: O(L H N P) time, O(L) memory; the backward pass makes the states again.
    """
    decay, S = prepare(q, v, decay, state)
    H, work = v.shape[2], S.dtype
    q, k, a = (x.repeat_interleave(H // x.shape[2], dim=2).to(work) for x in (q, k, decay))
    a, x = a.exp(), v.to(work)
    ys = []
    for t in range(q.shape[1]):
        S = a[:, t, :, :, None] * S + k[:, t, :, :, None] * x[:, t, :, None, :]
        ys.append(torch.einsum("bhn,bhnp->bhp", q[:, t], S))
    return torch.stack(ys, dim=1).to(v.dtype), S


def prepare(q: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decays (B, L, H, 1) or (B, L, G, N) and the state in the working dtype; made up where there is none."""
    (B, L, _, N), (H, P) = q.shape, v.shape[2:]
    work = at_least_float32(torch.promote_types(q.dtype, v.dtype))
    decay = q.new_zeros(H, dtype=work) if decay is None else decay
    decay = decay if decay.ndim == 4 else decay.expand(B, L, H)[..., None]
    return decay, q.new_zeros(B, H, N, P, dtype=work) if state is None else state.to(work)
