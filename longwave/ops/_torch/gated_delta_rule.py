"""The gated delta rule in chunks of time, as matrix products; only what hands on the state goes chunk by chunk.

What step t changes, w[t] = beta[t] (v[t] - S'^T k[t]), depends on what its chunk changed before by a triangular system,
(I + A) W = beta (V - so_far K S). As A does not depend on the state S at the start of the chunk, W = U - E S with U and
E of many chunks at once; and the same backwards.

Letters: R rows times heads, M chunks of a span, T steps of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.gated_delta_rule import prepare

CHUNK, SPAN, ROWS = 32, 256, 4  # steps of a chunk and of a span, and rows times heads, that a cache holds together
NOTHING = -1000.0  # exp of it is 0 in float64 too: the least exponent that is summed, so that -inf is allowed


class _Span(NamedTuple):
    """What the steps of chunks do to each other, whatever state they find: (R, M, T, ...)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor  # (R, M, T, 1)
    so_far: Tensor  # (R, M, T, 1) decay from the start of the chunk up to step t
    to_end: Tensor  # (R, M, T, 1) decay after step t
    over_all: Tensor  # (R, M, 1, 1)
    between: Tensor  # (R, M, T, T) decay after step s up to step t, for s <= t, else 0
    inverse: Tensor  # (R, M, T, T) of I + A
    U: Tensor  # (R, M, T, P)
    E: Tensor  # (R, M, T, N)


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, keep: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(y (B, L, H, P), the last state (B, H, N, P)), and the states before each span."""
    state = prepare(q, v, state)
    y, last, before = v.new_empty(v.shape), state.new_empty(state.shape), saved(q, k, v, decay, beta, state)
    for b, spans in _parts(v):
        S = state[b].flatten(0, 1)  # (R, N, P)
        for i, t in enumerate(spans):
            before[b, i] = S.view_as(before[b, i])
            span = _span(q[b, t], k[b, t], v[b, t], decay[b, t], beta[b, t], state.dtype)
            W, starts, S = _changes(span, S)
            scores = (span.q @ span.k.mT).mul_(span.between)
            _put(y[b, t], (scores @ W).addcmul_(span.q @ starts, span.so_far))
        last[b] = S.view_as(last[b])
    return (y, last), before


def saved(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None) -> Tensor:
    """Room for the states (B, spans, H, N, P)."""
    (B, L, H, P), N = v.shape, q.shape[3]
    return v.new_empty(B, -(-L // SPAN), H, N, P, dtype=prepare(q, v, state).dtype)


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor,
    beta: Tensor, saved: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Spans from the last to the first.

    The gradient of a decay follows from the others: it is S dS at the start of a chunk, and from each step to the next
    it grows by what is written, k dk, and shrinks by what is read, k dk and q dq. What a step does to itself decays by
    nothing and cancels there, so it is left out before.
    """
    work, H = saved.dtype, v.shape[2]
    dy = torch.zeros_like(v) if dy is None else dy
    dlast = saved.new_zeros(saved[:, 0].shape) if dlast is None else dlast
    dq, dk, dv, ddecay, dbeta = (x.new_empty(x.shape) for x in (q, k, v, decay, beta))
    dstate = saved.new_empty(saved[:, 0].shape)
    for b, spans in _parts(v):
        dS = dlast[b].flatten(0, 1).to(work)
        for i, t in reversed(list(enumerate(spans))):
            span = _span(q[b, t], k[b, t], v[b, t], decay[b, t], beta[b, t], work)
            W, starts, _ = _changes(span, saved[b, i].flatten(0, 1))
            dy_t, keys = _chunks(dy[b, t], H, work), span.k * span.to_end
            scores = (span.q @ span.k.mT).mul_(span.between)
            dW, dstarts, dends = scores.mT @ dy_t, (span.q * span.so_far).mT @ dy_t, torch.empty_like(starts)
            for m in reversed(range(dW.shape[1])):
                dends[:, m] = dS
                dW[:, m].baddbmm_(keys[:, m], dS)
                dS = dstarts[:, m].baddbmm_(span.E[:, m].mT, dW[:, m], alpha=-1).addcmul_(dS, span.over_all[:, m])
            dU, before = span.inverse.mT @ dW, span.between.tril_(-1)
            of_scores, of_system = (dy_t @ W.mT).mul_(before), (dU @ W.mT).mul_(before)
            dq_t = (of_scores @ span.k).addcmul_(dy_t @ starts.mT, span.so_far)
            read = (of_system @ span.k).addcmul_(dU @ starts.mT, span.so_far)
            dbeta_t = (dU * span.v).sum(3) - (span.k * read).sum(3)
            of_system, read, to_itself = of_system * span.beta, read * span.beta, (dy_t * W).sum(3, keepdim=True)
            dk_t = (of_scores.mT @ span.q).sub_(of_system.mT @ span.k).addcmul_(W @ dends.mT, span.to_end)
            if "decay" in needed:
                change = (span.k * (dk_t + read)).sum(3, dtype=torch.float64) - (span.q * dq_t).sum(3)
                change = change.roll(1, 2)
                change[:, :, 0] = (starts * dstarts).sum((2, 3), dtype=torch.float64)
                _put(ddecay[b, t, :, None], change.cumsum(2)[..., None])
            _put(dq[b, t], dq_t.addcmul_(span.k, to_itself))
            _put(dk[b, t], dk_t.sub_(read).addcmul_(span.q, to_itself))
            _put(dv[b, t], dU * span.beta)
            _put(dbeta[b, t, :, None], dbeta_t[..., None])
        dstate[b] = dS.view_as(dstate[b])
    ddecay.masked_fill_(decay < NOTHING, 0.0)
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay, "beta": dbeta, "state": dstate}


def _span(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, work: torch.dtype) -> _Span:
    """Of the steps of a span, (b, S, G or H, ...) each."""
    H = v.shape[2]
    q, k, v, beta = (_chunks(x, H, work) for x in (q, k, v, beta[..., None]))
    total = _chunks(decay[..., None], H, torch.float64).clamp_(min=NOTHING).cumsum_(2)  # differences of sums count
    between = (total - total.mT).to(work).exp_().tril_()
    so_far, to_end = total.exp().to(work), (total[:, :, -1:] - total).exp_().to(work)
    system = (k @ k.mT).mul_(between).mul_(beta)
    one = torch.eye(q.shape[2], dtype=work, device=q.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    U, E = inverse @ (v * beta), inverse @ (k * (so_far * beta))
    return _Span(q, k, v, beta, so_far, to_end, so_far[:, :, -1:], between, inverse, U, E)


def _changes(span: _Span, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (R, M, T, P) from the state (R, N, P) before the span, the states before each chunk, and that behind all."""
    W, starts, keys = span.U, S.new_empty(*span.U.shape[:2], *S.shape[1:]), span.k * span.to_end
    for m in range(W.shape[1]):
        starts[:, m] = S
        W[:, m].baddbmm_(span.E[:, m], S, alpha=-1)
        S = torch.baddbmm(S * span.over_all[:, m], keys[:, m].mT, W[:, m])
    return W, starts, S


def _parts(v: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the batch that a core's cache holds, all of it on other devices; and spans of time."""
    B, L, H, _ = v.shape
    rows = max(1, ROWS // H) if v.device.type == "cpu" else B
    for start in range(0, B, rows):
        yield slice(start, min(start + rows, B)), [slice(t, min(t + SPAN, L)) for t in range(0, L, SPAN)]


def _chunks(x: Tensor, H: int, work: torch.dtype) -> Tensor:
    """(b, S, G, N) as (b H, M, T, N), every group as its H/G heads; zeros behind, which change and decay nothing."""
    (b, S, G, N), T = x.shape, min(x.shape[1], CHUNK)
    x = F.pad(x.to(work), (0, 0, 0, 0, 0, -S % T)).unflatten(1, (-1, T)).permute(0, 3, 1, 2, 4)
    return x[:, :, None].expand(b, G, H // G, -1, T, N).reshape(b * H, -1, T, N).contiguous()


def _put(target: Tensor, x: Tensor) -> None:
    """The transpose of _chunks, into target (b, S, G, N): heads of a group add up."""
    b, S, G, N = target.shape
    target.copy_(x.reshape(b, G, x.shape[0] // (b * G), -1, N)[..., :S, :].sum(2).transpose(1, 2))
