"""Mamba's selective scan (S6): a diagonal state space whose step, input and output maps depend on the input."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check_groups(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: object) -> None:
    groups = [x.shape[2] if x.ndim == 4 else 1 for x in (B, C)]
    if groups[0] != groups[1] or len(A) % groups[0]:
        raise ValueError(
            f"selective_scan: B has {groups[0]} groups and C {groups[1]}; both need the same number, "
            f"which divides E = {len(A)}"
        )


@Op(
    u="B L E", dt="B L E", A="E N : any", B="B L N | B L G N : any", C="B L N | B L G N : any", D="E",
    state="B E N : any", z="B L E", dt_bias="E", check=_check_groups,
    returns={"y": "B L E : u", "last": "B E N : float32+u+A+B+C+state"},
)  # fmt: skip
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t],   y[t] = (C[t] . h[t] + D u[t]) silu(z[t]).

    Source: Gu & Dao (2023) "Mamba", arXiv:2312.00752, algorithm 2 and eq. 2a-2b; B is discretised by Euler's rule, as
    in the authors' code. Where A, B, C or the state is complex (one half of each conjugate pair), C . h stands for
    2 Re(C . h).

    Args:
        u: (B, L, E) input.
        dt: (B, L, E) step sizes; with softplus, before it. dt = 0 leaves the state as it was.
        A: (E, N) continuous state matrix, real or complex, negative real part.
        B, C: (B, L, G, N) input and output maps of G groups of E/G neighbouring channels; (B, L, N) is one group.
        D: (E,) skip weight.
        state: (B, E, N) the state before the first step; None is zero.
        z: (B, L, E) gate.
        dt_bias: (E,) added to dt.
        softplus: dt becomes log(1 + exp(dt + dt_bias)).
    Returns:
        y: (B, L, E) in the dtype of u.
        state: (B, E, N) after the last step.
    Raises:
        ValueError: where sizes or devices disagree, or G does not divide E.
    Cost: O(L E N) time; the portable form keeps one state a chunk and recomputes the rest in the backward pass.
    """
    u_, dt, A, B, C, h = prepare(u, dt, A, B, C, state, dt_bias, softplus)
    groups = A.shape[0] // B.shape[2]
    B, C = B.repeat_interleave(groups, dim=2), C.repeat_interleave(groups, dim=2)
    decay = torch.exp(dt[..., None] * A)  # (B, L, E, N)
    drive = (dt * u_)[..., None] * B
    ys = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        ys.append((h * C[:, t]).sum(-1))
    return finish(torch.stack(ys, dim=1), u, D, z), h


def prepare(u, dt, A, B, C, state, dt_bias, softplus):
    """u, dt ready to use, A, B and C with their groups (B, L, G, N), and the state, in the working dtypes."""
    work = at_least_float32(torch.promote_types(u.dtype, A.dtype.to_real()))
    inner = functools.reduce(torch.promote_types, (x.dtype for x in (A, B, C, state) if x is not None), work)
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    dt = dt.to(work)
    dt = dt if dt_bias is None else dt + dt_bias.to(work)
    dt = F.softplus(dt) if softplus else dt
    h = u.new_zeros(u.shape[0], *A.shape, dtype=inner) if state is None else state.to(inner)
    return u.to(work), dt, A.to(inner), B.to(inner), C.to(inner), h


def finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """y of sum_n C h (B, L, E): the real part of both halves, the skip and the gate."""
    y = 2 * y.real if y.is_complex() else y
    y = y if D is None else y + D.to(y.dtype) * u.to(y.dtype)
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)
