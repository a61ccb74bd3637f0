"""Linear attention with a decay a head: the matrix state of retention, linear transformers and SSD (Mamba-2)."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


@Op(
    q="B L H N", k="B L H N", v="B L H P", decay="B L H", state="B H N P",
    returns={"y": "B L H P : v", "last": "B H N P : float32+q+v"},
)  # fmt: skip
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S[t] = exp(decay[t]) S[t-1] + k[t] v[t]^T,   y[t] = S[t]^T q[t],  for every head.

    Source: Katharopoulos et al. (2020), arXiv:2006.16236, eq. 18-20, without the denominator; with decay, Sun et al.
    (2023) "RetNet", arXiv:2307.08621, eq. 6 and, in chunks, eq. 7; Dao & Gu (2024), arXiv:2405.21060, sec. 6.

    Args:
        q, k: (B, L, H, N) queries and keys; scale them beforehand.
        v: (B, L, H, P) values.
        decay: (B, L, H) logarithms of the decays, <= 0; -inf forgets everything. None is no decay.
        state: (B, H, N, P) S before the first step; None is zero.
    Returns:
        y: (B, L, H, P) in the dtype of v.
        state: (B, H, N, P) S after the last step.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L N P) time as GEMMs of chunks of time, O(L) memory; the backward pass makes the states of chunks again.
    """
    decay, S = prepare(q, v, decay, state)
    q, k, x, a = q.to(S.dtype), k.to(S.dtype), v.to(S.dtype), decay.to(S.dtype).exp()
    ys = []
    for t in range(q.shape[1]):
        S = a[:, t, :, None, None] * S + k[:, t, :, :, None] * x[:, t, :, None, :]
        ys.append(torch.einsum("bhn,bhnp->bhp", q[:, t], S))
    return torch.stack(ys, dim=1).to(v.dtype), S


def prepare(q: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decay and state, made up where there is none; the state in the working dtype."""
    (B, L, H, N), P = q.shape, v.shape[3]
    work = at_least_float32(torch.promote_types(q.dtype, v.dtype))
    decay = q.new_zeros((), dtype=work).expand(B, L, H) if decay is None else decay
    return decay, q.new_zeros(B, H, N, P, dtype=work) if state is None else state.to(work)
