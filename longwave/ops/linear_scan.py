"""The linear recurrence  h[t] = a[t] h[t-1] + b[t]  that diagonal state spaces, EMAs and gated linear RNNs share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


@Op(a="B L C", b="B L C", h0="B C")
def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t],  h[-1] = h0.

    Source: Blelloch (1990) sec. 1.4; the gradient is a scan reversed: Martin & Cundy (2018), arXiv:1709.04057, eq. 4-6.

    Args:
        a, b: (B, L, C) decay and input, real or complex.
        h0: (B, C) the state before the first step.
    Returns:
        h: (B, L, C); h[:, -1] is the state to resume from.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L) time and memory, 2 sqrt(L) steps one after another in the portable form.
    """
    h, hs = h0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def scan_(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The scan without gradient, sqrt(L) groups side by side; overwrites neither input."""
    B, L, C = b.shape
    T = math.isqrt(L - 1) + 1
    G = -(-L // T)
    pad = (0, 0, 0, G * T - L)
    p, h = (F.pad(x, pad).reshape(B, G, T, C).contiguous() for x in (a, b))
    p, h = (p.clone() if p.data_ptr() == a.data_ptr() else p), (h.clone() if h.data_ptr() == b.data_ptr() else h)
    for t in range(1, T):
        h[:, :, t].addcmul_(p[:, :, t], h[:, :, t - 1])
        p[:, :, t] *= p[:, :, t - 1]  # decay since the start of the group
    carries = [h0]
    for g in range(G - 1):
        carries.append(torch.addcmul(h[:, g, -1], p[:, g, -1], carries[-1]))
    h.addcmul_(p, torch.stack(carries, dim=1)[:, :, None])
    return h.view(B, G * T, C)[:, :L]


@torch.library.custom_op("longwave::linear_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), h0.dtype)
    work = dtype if dtype.is_complex else at_least_float32(dtype)
    return scan_(a.to(work), b.to(work), h0.to(work)).to(dtype).contiguous()


@_scan.register_fake
def _(a, b, h0):
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), h0.dtype)
    return torch.empty(b.shape, dtype=dtype, device=b.device)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _backward(ctx, dh):
    a, b, h0, h = ctx.saved_tensors
    a_next = F.pad(a[:, 1:], (0, 0, 0, 1)).conj().to(dh.dtype)
    db = _scan(a_next.flip(1), dh.flip(1), torch.zeros_like(dh[:, 0])).flip(1)
    h_before = torch.cat([h0[:, None].to(h.dtype), h[:, :-1]], dim=1)
    grads = (db * h_before.conj(), db, a[:, 0].conj() * db[:, 0])
    return tuple(_as(grad, like) for grad, like in zip(grads, (a, b, h0)))


def _as(grad: Tensor, like: Tensor) -> Tensor:
    return (grad.real if grad.is_complex() and not like.is_complex() else grad).to(like.dtype)


torch.library.register_autograd("longwave::linear_scan", _backward, setup_context=_save)


@linear_scan.backend("torch")
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return _scan(a, b, h0)
