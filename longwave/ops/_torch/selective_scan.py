# mypy: no-check-untyped-defs
"""Mamba's selective scan, a chunk of time at a time: one state a chunk is kept, the rest is made again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops._torch.linear_scan import scan
from longwave.ops.selective_scan import finish, prepare


def forward(u, dt, A, B, C, D, state, z, dt_bias, softplus, keep):
    """(y (B, L, E), the last state (B, E, N)), and the state before each chunk (B, chunks, E, N)."""
    u_, dt, A, B, C, h = prepare(u, dt, A, B, C, state, dt_bias, softplus)
    ys, starts = [], []
    for t in _chunks(u, A):
        starts.append(h)
        _, hs = _states(u_[:, t], dt[:, t], A, B[:, t], h)
        ys.append(_outputs(hs, C[:, t]))
        h = hs[:, -1]
    return (finish(torch.cat(ys, dim=1), u, D, z), h.clone()), torch.stack(starts, dim=1) if keep else None


def saved(u, dt, A, B, C, D, state, z, dt_bias, softplus):
    """Like the states before each chunk."""
    *_, h = prepare(u, dt, A, B, C, state, dt_bias, softplus)
    return h.new_empty(u.shape[0], -(-u.shape[1] // _chunk_length(u, A)), *A.shape)


def backward(needed, dy, dlast, u, dt, A, B, C, D, z, dt_bias, softplus, saved):
    """Chunks from the last to the first; the exponents' gradient is that of dt A."""
    raw, shapes = dt, (B.shape, C.shape)
    u, dt, A, B, C, _ = prepare(u, dt, A, B, C, saved[:, 0], dt_bias, softplus)
    dy = torch.zeros_like(u) if dy is None else dy.to(u.dtype)
    inner = dy if z is None else dy * F.silu(z.to(dy.dtype))
    direct_y = 2 * inner if A.is_complex() else inner
    carry = torch.zeros_like(saved[:, 0]) if dlast is None else dlast  # gradient of the state after the chunk
    du, ddt, dA, dB, dC = (torch.zeros_like(x) for x in (u, dt, A, B, C))
    y = torch.empty_like(u)
    G = B.shape[2]
    for i, t in reversed(list(enumerate(_chunks(u, A)))):
        u_t, dt_t, B_t, C_t = u[:, t], dt[:, t], B[:, t], C[:, t]
        decay, h = _states(u_t, dt_t, A, B_t, saved[:, i])
        if "z" in needed:
            y[:, t] = finish(_outputs(h, C_t), u_t, D, None)
        dy_t = direct_y[:, t].unflatten(2, (G, -1)).to(A.dtype)  # (B, T, G, P)
        direct = (dy_t[..., None] * C_t[:, :, :, None].conj_physical()).flatten(2, 3)  # (B, T, E, N)
        later = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1), value=1.0).conj_physical().flatten(2)
        g = scan(later, direct.flatten(2), carry.flatten(1), reverse=True).view_as(decay)
        g_groups = g.unflatten(2, (G, -1))
        if "C" in needed:
            dC[:, t] = torch.einsum("btgp,btgpn->btgn", dy_t, h.unflatten(2, (G, -1)).conj_physical())
        if "B" in needed:
            dB[:, t] = torch.einsum("btgpn,btgp->btgn", g_groups, (dt_t * u_t).unflatten(2, (G, -1)).to(A.dtype))
        if needed & {"u", "dt", "dt_bias"}:
            d_input = _real(torch.einsum("btgpn,btgn->btgp", g_groups, B_t.conj_physical())).flatten(2)  # of dt u
            du[:, t], ddt[:, t] = d_input * dt_t, d_input * u_t
        if needed & {"A", "dt", "dt_bias"}:
            before = torch.cat([saved[:, i : i + 1], h[:, :-1]], dim=1)
            d_exponent = g * before.conj_physical() * decay.conj_physical()
            dA += (d_exponent * dt_t[..., None]).sum((0, 1))
            ddt[:, t] += _real((d_exponent * A.conj_physical()).sum(-1))
        carry = decay[:, 0].conj_physical() * g[:, 0]
    if softplus:
        raw = raw.to(ddt.dtype) if dt_bias is None else raw.to(ddt.dtype) + dt_bias.to(ddt.dtype)
        ddt = torch.ops.aten.softplus_backward(ddt, raw, 1, 20)
    grads = {"dt": ddt, "A": dA, "B": dB.view(shapes[0]), "C": dC.view(shapes[1]), "state": carry}
    if "dt_bias" in needed:
        grads["dt_bias"] = ddt.sum((0, 1))
    if "D" in needed:
        grads["D"] = (inner * u).sum((0, 1))
    if "z" in needed:
        grads["z"] = torch.ops.aten.silu_backward(dy * y, z.to(dy.dtype))
    return {**grads, "u": du if D is None else du + inner * D}


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _outputs(h: Tensor, C: Tensor) -> Tensor:
    """sum_n C h (B, T, E)."""
    return torch.einsum("btgpn,btgn->btgp", h.unflatten(2, (C.shape[2], -1)), C).flatten(2)


def _chunk_length(u: Tensor, A: Tensor) -> int:
    return torch.sym_max(16, 2**20 // (u.shape[0] * A.numel()))  # of sizes that a graph does not know, too


def _chunks(u: Tensor, A: Tensor) -> list[slice]:
    """Chunks of time whose (B, T, E, N) tensors are a few MB, so none of the whole length exists."""
    T = _chunk_length(u, A)
    return [slice(t, min(t + T, u.shape[1])) for t in range(0, u.shape[1], T)]


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of one chunk, (B, T, E, N) each."""
    G = B.shape[2]
    decay = torch.exp(dt[..., None].to(A.dtype) * A)
    drive = ((dt * u).unflatten(2, (G, -1))[..., None] * B[:, :, :, None]).flatten(2, 3)  # (B, T, E, N)
    return decay, scan(decay.flatten(2), drive.flatten(2), h.flatten(1)).view_as(decay)
