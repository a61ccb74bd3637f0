"""The linear recurrence  h[t] = a[t] h[t-1] + b[t]  that diagonal state spaces, EMAs and gated linear RNNs share."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32, numba_why_not


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


def scan_(a: Tensor, b: Tensor, h0: Tensor, reverse: bool = False) -> Tensor:
    """The scan without gradient, sqrt(L) groups side by side; changes neither input.

    ``reverse`` runs from the last step to the first:  h[t] = a[t] h[t+1] + b[t],  h[L] = h0.
    """
    B, L, C = b.shape
    T = math.isqrt(L - 1) + 1
    G = -(-L // T)
    p = _groups(a, G, T, 1.0)  # padding leaves the state as it is
    h = _groups(b, G, T, 0.0)
    steps, before = (range(T - 2, -1, -1), 1) if reverse else (range(1, T), -1)
    for t in steps:
        h[:, :, t].addcmul_(p[:, :, t], h[:, :, t + before])
        p[:, :, t] *= p[:, :, t + before]  # decay since the start of the group
    end = 0 if reverse else -1
    carries = [h0]
    for g in range(G - 1, 0, -1) if reverse else range(G - 1):
        carries.append(torch.addcmul(h[:, g, end], p[:, g, end], carries[-1]))
    carries = carries[::-1] if reverse else carries
    h.addcmul_(p, torch.stack(carries, dim=1)[:, :, None])
    return h.view(B, G * T, C)[:, :L]


def _groups(x: Tensor, G: int, T: int, padding: float) -> Tensor:
    """A copy of x (B, L, C) as (B, G, T, C)."""
    B, L, C = x.shape
    copy = x.new_empty(B, G * T, C)
    copy[:, :L] = x
    copy[:, L:] = padding
    return copy.view(B, G, T, C)


@torch.library.custom_op("longwave::linear_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, h0: Tensor, reverse: bool = False, backend: str = "torch") -> Tensor:
    if backend == "numba":
        from longwave.ops._numba import linear_scan as kernels

        return kernels.forward(a, b, h0, reverse)
    dtype = _promoted(a, b, h0)
    work = dtype if dtype.is_complex else at_least_float32(dtype)
    return scan_(a.to(work), b.to(work), h0.to(work), reverse).to(dtype).contiguous()


@_scan.register_fake
def _(a, b, h0, reverse=False, backend="torch"):
    return torch.empty(b.shape, dtype=_promoted(a, b, h0), device=b.device)


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


@torch.library.custom_op("longwave::linear_scan_backward", mutates_args=())
def _scan_backward(
    a: Tensor, h0: Tensor, h: Tensor, dh: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0, that of b in the dtype of h."""
    if backend == "numba":
        from longwave.ops._numba import linear_scan as kernels

        return kernels.backward(a, h0, h, dh, reverse)
    if reverse:
        later, before, first = F.pad(a[:, :-1], (0, 0, 1, 0)), torch.cat([h[:, 1:], h0[:, None].to(h.dtype)], 1), -1
    else:
        later, before, first = F.pad(a[:, 1:], (0, 0, 0, 1)), torch.cat([h0[:, None].to(h.dtype), h[:, :-1]], 1), 0
    db = _scan(later.conj().resolve_conj().to(dh.dtype), dh, torch.zeros_like(dh[:, 0]), not reverse)
    return _as(db * before.conj(), a), db, _as(a[:, first].conj() * db[:, first], h0)


@_scan_backward.register_fake
def _(a, h0, h, dh, reverse, backend):
    return tuple(x.new_empty(x.shape) for x in (a, h, h0))


def _save(ctx, inputs, output):
    a, b, h0, ctx.reverse, ctx.backend = inputs
    ctx.b = b.new_empty(0)
    ctx.save_for_backward(a, h0, output)


def _backward(ctx, dh):
    da, db, dh0 = _scan_backward(*ctx.saved_tensors, dh, ctx.reverse, ctx.backend)
    return da, _as(db, ctx.b), dh0, None, None


def _as(grad: Tensor, like: Tensor) -> Tensor:
    return (grad.real if grad.is_complex() and not like.is_complex() else grad).to(like.dtype).contiguous()


torch.library.register_autograd("longwave::linear_scan", _backward, setup_context=_save)


@linear_scan.backend("torch")
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return _scan(a, b, h0)


def _why_not_numba(a: Tensor, b: Tensor, h0: Tensor) -> str | None:
    if len({x.is_complex() for x in (a, b, h0)}) == 2:
        return "some tensors are real and some complex; the kernel takes one kind"
    return numba_why_not(a, b, h0)


@linear_scan.backend("numba", why_not=_why_not_numba)
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return _scan(a, b, h0, backend="numba")
