"""Linear attention in chunks of time, as matrix products; the states between them are made again for the gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.linear_attention import prepare

CHUNK = 64
NOTHING = -1000.0  # exp of it is 0 in float64 too: the least exponent that is summed, so that -inf is allowed


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    decay, state = prepare(q, v, decay, state)
    y, last, work = v.new_empty(v.shape), state.new_empty(state.shape), state.dtype
    for b in _rows(v):
        S = state[b].flatten(0, 1)  # (R, N, P), R = rows times heads
        for t in _spans(q.shape[1]):
            q_t, k_t, v_t, decay_t = (_heads(x[b, t], work) for x in (q, k, v, decay[..., None]))
            total = _total(decay_t)
            scores = torch.bmm(q_t, k_t.transpose(1, 2)).mul_(_between(total, work))
            _put(y[b, t], torch.bmm(scores, v_t).baddbmm_(q_t * total.exp().to(work), S))
            S = _next_state(S, k_t, v_t, *_ends(total, work))
        last[b] = S.view_as(last[b])
    return y, last


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
    state: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Chunks from the last to the first, after a pass over the states alone.

    The gradient of the summed decays follows from the others, as exp(sum up to t) multiplies whatever q[t] does and
    divides whatever k[t] does:  q dq - k dk,  and  S dS  at the end of the chunk.
    """
    decay, state = prepare(q, v, decay, state)
    dy = torch.zeros_like(v) if dy is None else dy
    dlast = torch.zeros_like(state) if dlast is None else dlast
    dq, dk, dv, ddecay = (x.new_empty(x.shape) for x in (q, k, v, decay))
    dstate, work, spans = state.new_empty(state.shape), state.dtype, _spans(q.shape[1])
    for b in _rows(v):
        S = state[b].flatten(0, 1)
        states = S.new_empty(len(spans) + 1, *S.shape)
        states[0] = S
        for i, t in enumerate(spans):
            k_t, v_t, decay_t = (_heads(x[b, t], work) for x in (k, v, decay[..., None]))
            states[i + 1] = _next_state(states[i], k_t, v_t, *_ends(_total(decay_t), work))
        dS = dlast[b].flatten(0, 1).to(work)
        for i, t in reversed(list(enumerate(spans))):
            q_t, k_t, v_t, decay_t, dy_t = (_heads(x[b, t], work) for x in (q, k, v, decay[..., None], dy))
            total = _total(decay_t)
            between, (to_end, over_all) = _between(total, work), _ends(total, work)
            scores = torch.bmm(q_t, k_t.transpose(1, 2)).mul_(between)
            dscores = torch.bmm(dy_t, v_t.transpose(1, 2)).mul_(between)
            dy_so_far = dy_t * total.exp().to(work)
            dv_t = torch.bmm(scores.transpose(1, 2), dy_t).baddbmm_(k_t * to_end, dS)
            dq_t = torch.bmm(dscores, k_t).baddbmm_(dy_so_far, states[i].transpose(1, 2))
            dk_t = torch.bmm(dscores.transpose(1, 2), q_t).baddbmm_(v_t * to_end, dS.transpose(1, 2))
            for target, x in ((dq, dq_t), (dk, dk_t), (dv, dv_t)):
                _put(target[b, t], x)
            if "decay" in needed:
                dtotal = (q_t * dq_t).sum(2, dtype=torch.float64) - (k_t * dk_t).sum(2, dtype=torch.float64)
                dtotal[:, -1] += (states[i + 1] * dS).sum((1, 2), dtype=torch.float64)
                ddecay_t = dtotal.flip(1).cumsum(1).flip(1)[..., None].masked_fill_(decay_t < NOTHING, 0.0)
                _put(ddecay[..., None][b, t], ddecay_t)
            dS = torch.baddbmm(dS * over_all, q_t.transpose(1, 2), dy_so_far)
        dstate[b] = dS.view_as(dstate[b])
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay, "state": dstate}


def _total(decay: Tensor) -> Tensor:
    """(R, T, 1) sums of the decays of a chunk, float64: the differences of large sums are what counts."""
    return decay.to(torch.float64).clamp(min=NOTHING).cumsum(1)


def _between(total: Tensor, work: torch.dtype) -> Tensor:
    """(R, T, T) decay after step s up to step t, for s <= t, else 0."""
    return (total - total.transpose(1, 2)).to(work).exp_().tril_()


def _ends(total: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """(R, T, 1) decay after step t up to the end of the chunk, and (R, 1, 1) over all of the chunk."""
    last = total[:, -1:]
    return (last - total).exp().to(work), last.exp().to(work)


def _rows(v: Tensor) -> Iterator[slice]:
    """Slices of the batch whose (rows H, T, T) scores stay in a core's cache; all of it on other devices."""
    B, _, H, _ = v.shape
    width = max(1, 2**18 // (H * CHUNK**2)) if v.device.type == "cpu" else B
    for start in range(0, B, width):
        yield slice(start, min(start + width, B))


def _spans(L: int) -> list[slice]:
    return [slice(t, min(t + CHUNK, L)) for t in range(0, L, CHUNK)]


def _heads(x: Tensor, work: torch.dtype) -> Tensor:
    """(b, T, H, N) as (b H, T, N): a view of one batch row, for which a GEMM needs no copy."""
    return x.transpose(1, 2).flatten(0, 1).to(work)


def _put(target: Tensor, x: Tensor) -> None:
    """The inverse of _heads, into target (b, T, H, N)."""
    target.copy_(x.unflatten(0, (target.shape[0], target.shape[2])).transpose(1, 2))


def _next_state(S: Tensor, k: Tensor, v: Tensor, to_end: Tensor, over_all: Tensor) -> Tensor:
    return torch.baddbmm(S * over_all, (k * to_end).transpose(1, 2), v)
