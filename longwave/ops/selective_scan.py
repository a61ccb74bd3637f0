"""Mamba's selective scan (S6): a diagonal state space whose step, input and output maps depend on the input."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32, numba_why_not
from longwave.ops.linear_scan import scan_


@Op(
    u="B L E", dt="B L E", A="E N", B="B L N|B L G N", C="B L N|B L G N", D="E", state="B E N", z="B L E", dt_bias="E",
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
    in the authors' code. With a complex A (one half of each conjugate pair) C . h stands for 2 Re(C . h).

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
    u_, dt, B, C, h = _prepare(u, dt, A, B, C, state, dt_bias, softplus)
    groups = A.shape[0] // B.shape[2]
    B, C = B.repeat_interleave(groups, dim=2), C.repeat_interleave(groups, dim=2)
    decay = torch.exp(dt[..., None] * A)  # (B, L, E, N)
    drive = (dt * u_)[..., None] * B
    ys = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        ys.append((h * C[:, t]).sum(-1))
    return _finish(torch.stack(ys, dim=1), u, D, z), h


@selective_scan.backend("torch")
def _chunked(u, dt, A, B, C, D=None, state=None, *, z=None, dt_bias=None, softplus=False):
    u_, dt, B, C, h = _prepare(u, dt, A, B, C, state, dt_bias, softplus)
    y, _, h = _scan(u_, dt, A.to(h.dtype), B, C, h)
    return _finish(y, u, D, z), h


def _prepare(u, dt, A, B, C, state, dt_bias, softplus):
    """All in the working dtype, dt ready to use, B and C with their groups (B, L, G, N)."""
    E, N = A.shape
    work = at_least_float32(torch.promote_types(u.dtype, A.real.dtype))
    inner = torch.promote_types(work, A.dtype)
    B, C = _grouped(B, C, E)
    dt = dt.to(work)
    dt = dt if dt_bias is None else dt + dt_bias.to(work)
    dt = F.softplus(dt) if softplus else dt
    h = torch.zeros(len(u), E, N, dtype=inner, device=u.device) if state is None else state.to(inner)
    return u.to(work), dt, B.to(inner), C.to(inner), h


def _grouped(B: Tensor, C: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Both (B, L, G, N)."""
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    if B.shape[2] != C.shape[2] or E % B.shape[2]:
        raise ValueError(
            f"selective_scan: B has {B.shape[2]} groups and C {C.shape[2]}; both need the same number, "
            f"which divides E = {E}"
        )
    return B, C


def _finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = 2 * y.real if y.is_complex() else y
    y = y if D is None else y + D.to(y.dtype) * u.to(y.dtype)
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def _chunks(u: Tensor, A: Tensor) -> list[slice]:
    """Chunks of time whose (B, T, E, N) tensors are a few MB, so none of the whole length exists."""
    T = max(16, 2**20 // (len(u) * A.numel()))
    return [slice(t, min(t + T, u.shape[1])) for t in range(0, u.shape[1], T)]


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of one chunk, (B, T, E, N) each."""
    G = B.shape[2]
    decay = torch.exp(dt[..., None].to(A.dtype) * A)
    drive = ((dt * u).unflatten(2, (G, -1))[..., None] * B[:, :, :, None]).flatten(2, 3)  # (B, T, E, N)
    return decay, scan_(decay.flatten(2), drive.flatten(2), h.flatten(1)).view_as(decay)


@torch.library.custom_op("longwave::selective_scan", mutates_args=())
def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_n C h (B, L, E), the state before each chunk (B, chunks, E, N), the state after the last step)."""
    G, ys, starts = B.shape[2], [], []
    for t in _chunks(u, A):
        starts.append(h)
        _, hs = _states(u[:, t], dt[:, t], A, B[:, t], h)
        ys.append(torch.einsum("btgpn,btgn->btgp", hs.unflatten(2, (G, -1)), C[:, t]).flatten(2))
        h = hs[:, -1]
    return torch.cat(ys, dim=1), torch.stack(starts, dim=1), h.clone()


@_scan.register_fake
def _(u, dt, A, B, C, h):
    starts = h.new_empty(len(h), len(_chunks(u, A)), *A.shape)
    return u.new_empty(u.shape, dtype=h.dtype), starts, torch.empty_like(h)


@torch.library.custom_op("longwave::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dh: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    G = B.shape[2]
    du, ddt, dA, dB, dC = (torch.zeros_like(x) for x in (u, dt, A, B, C))
    carry = dh  # gradient of the state after the chunk
    for i, t in reversed(list(enumerate(_chunks(u, A)))):
        u_t, dt_t, B_t, C_t = u[:, t], dt[:, t], B[:, t], C[:, t]
        decay, h = _states(u_t, dt_t, A, B_t, starts[:, i])
        dy_t = dy[:, t].unflatten(2, (G, -1))  # (B, T, G, P)
        dC[:, t] = torch.einsum("btgp,btgpn->btgn", dy_t, h.unflatten(2, (G, -1)).conj())
        direct = (dy_t[..., None] * C_t[:, :, :, None].conj()).flatten(2, 3)  # (B, T, E, N)
        later = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1), value=1.0).conj().flatten(2)
        g = scan_(later, direct.flatten(2), carry.flatten(1), reverse=True).view_as(decay)
        g_groups = g.unflatten(2, (G, -1))
        before = torch.cat([starts[:, i : i + 1], h[:, :-1]], dim=1)
        d_exponent = g * before.conj() * decay.conj()  # of dt A
        dA += (d_exponent * dt_t[..., None]).sum((0, 1))
        d_input = _real(torch.einsum("btgpn,btgn->btgp", g_groups, B_t.conj())).flatten(2)  # of dt u
        dB[:, t] = torch.einsum("btgpn,btgp->btgn", g_groups, (dt_t * u_t).unflatten(2, (G, -1)).to(A.dtype))
        du[:, t] = d_input * dt_t
        ddt[:, t] = d_input * u_t + _real((d_exponent * A.conj()).sum(-1))
        carry = decay[:, 0].conj() * g[:, 0]
    return du, ddt, dA, dB, dC, carry.clone()


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


@_scan_backward.register_fake
def _(dy, dh, u, dt, A, B, C, starts):
    return tuple(torch.empty_like(x) for x in (u, dt, A, B, C, dh))


def _save(ctx, inputs, output):
    u, dt, A, B, C, _ = inputs
    ctx.save_for_backward(u, dt, A, B, C, output[1])


def _backward(ctx, dy, _, dh):
    return _scan_backward(dy.contiguous(), dh, *ctx.saved_tensors)


torch.library.register_autograd("longwave::selective_scan", _backward, setup_context=_save)


def _why_not_fused(u, dt, A, B, C, D=None, state=None, *, z=None, dt_bias=None, softplus=False):
    tensors = (u, dt, A, B, C, D, state, z, dt_bias)
    if any(x is not None and x.is_complex() for x in tensors):
        return "a tensor is complex; the kernel computes in real numbers"
    return numba_why_not(*tensors)


@selective_scan.backend("numba", why_not=_why_not_fused)
def _(u, dt, A, B, C, D=None, state=None, *, z=None, dt_bias=None, softplus=False):
    E, N = A.shape
    B, C = _grouped(B, C, E)
    if N % 4:  # the kernel takes four states at a time
        A, B, C = (F.pad(x, (0, -N % 4)) for x in (A, B, C))
        state = None if state is None else F.pad(state, (0, -N % 4))
    inputs = (u, dt, A, B, C, D, state, z, dt_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, h, _ = _fused(*inputs, softplus, keep)
    return y, h[..., :N] if N % 4 else h


_EVERY = 32  # steps between two states that the fused form keeps


@torch.library.custom_op("longwave::selective_scan_fused", mutates_args=())
def _fused(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, the state after the last step, the state before every 32nd (B, L / 32, N, E) for the backward pass)."""
    from longwave.ops._numba import selective_scan as kernels

    assert kernels.T == _EVERY, "the kernel keeps other states than the fake says"
    return kernels.forward(u, dt, A, B, C, D, state, z, dt_bias, softplus, keep)


@_fused.register_fake
def _(u, dt, A, B, C, D, state, z, dt_bias, softplus, keep):
    h = u.new_empty(len(u), *A.shape, dtype=torch.float32)
    return u.new_empty(u.shape), h, h.new_empty(len(u), -(-u.shape[1] // _EVERY) if keep else 0, *A.shape[::-1])


@torch.library.custom_op("longwave::selective_scan_fused_backward", mutates_args=())
def _fused_backward(
    dy: Tensor, dh: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, kept: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, dt, A, B, C, D, state, z and dt_bias; of what is None something to be ignored."""
    from longwave.ops._numba import selective_scan as kernels

    return kernels.backward(dy, dh, u, dt, A, B, C, D, z, dt_bias, kept, softplus)


@_fused_backward.register_fake
def _(dy, dh, u, dt, A, B, C, D, z, dt_bias, kept, softplus):
    shapes = (u.shape, u.shape, A.shape, B.shape, C.shape, A.shape[:1], dh.shape, u.shape if z is not None else (0,))
    return tuple(u.new_empty(shape, dtype=torch.float32) for shape in (*shapes, A.shape[:1]))


def _save_fused(ctx, inputs, output):
    u, dt, A, B, C, D, _, z, dt_bias, ctx.softplus, _ = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:9]]
    ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, output[2])


def _backward_fused(ctx, dy, dh, _):
    grads = _fused_backward(dy, dh, *ctx.saved_tensors, ctx.softplus)
    return *(None if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes)), None, None


torch.library.register_autograd("longwave::selective_scan_fused", _backward_fused, setup_context=_save_fused)
