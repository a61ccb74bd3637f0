"""Linear attention in chunks of time, as matrix products; the states between them are made again for the gradient.

In a chunk, scores are what decays between two steps, which is never the quotient of two decays: exponents are sums of
decays, none is above zero. Where every key channel has decays of its own, it is a head of one key there.

Letters: R rows times heads, T steps of a chunk, W decays of a head: 1 or N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longwave.ops.linear_attention import prepare

CHUNK, CHUNK_OF_CHANNELS = 64, 16  # steps; with N decays a head, scores of a chunk are N matrices
NOTHING = -1000.0  # exp of it is 0 in float64 too: the least exponent that is summed, so that -inf is allowed


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the last state (B, H, N, P)."""
    decay, state = prepare(q, v, decay, state)
    y, last, H, work = v.new_empty(v.shape), state.new_empty(state.shape), v.shape[2], state.dtype
    for b, spans in _parts(v, decay):
        S = state[b].flatten(0, 1)  # (R, N, P)
        for t in spans:
            q_t, k_t, v_t, decay_t = (_heads(x[b, t], H, work) for x in (q, k, v, decay))
            total = _total(decay_t)
            scores = _scores(q_t, k_t, _between(total, work))
            _put(y[b, t], torch.bmm(scores, v_t).baddbmm_(q_t * total.exp().to(work), S))
            S = _next_state(S, k_t, v_t, *_ends(total, work))
        last[b] = S.view_as(last[b])
    return y, last


def backward(
    needed: set[str], dy: Tensor | None, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
    state: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Chunks from the last to the first, after a pass over the states alone.

    The gradient of a decay follows from the others: it is S dS at the start of a chunk, and from each step to the next
    it grows by k dk - q dq. What a step does to itself decays by nothing and cancels there, so it is left out before.
    """
    axes = 3 if decay is None else decay.ndim
    decay, state = prepare(q, v, decay, state)
    dy = torch.zeros_like(v) if dy is None else dy
    dlast = torch.zeros_like(state) if dlast is None else dlast
    dq, dk, dv, ddecay = (x.new_empty(x.shape) for x in (q, k, v, decay))
    dstate, H, work = state.new_empty(state.shape), v.shape[2], state.dtype
    for b, spans in _parts(v, decay):
        S = state[b].flatten(0, 1)
        states = S.new_empty(len(spans) + 1, *S.shape)
        states[0] = S
        for i, t in enumerate(spans):
            k_t, v_t, decay_t = (_heads(x[b, t], H, work) for x in (k, v, decay))
            states[i + 1] = _next_state(states[i], k_t, v_t, *_ends(_total(decay_t), work))
        dS = dlast[b].flatten(0, 1).to(work)
        for i, t in reversed(list(enumerate(spans))):
            q_t, k_t, v_t, decay_t, dy_t = (_heads(x[b, t], H, work) for x in (q, k, v, decay, dy))
            total = _total(decay_t)
            between, (to_end, over_all) = _between(total, work), _ends(total, work)
            scores, W = _scores(q_t, k_t, between), between.shape[1]
            to_itself = (v_t * dy_t).sum(2, keepdim=True)
            dscores = torch.bmm(dy_t, v_t.mT)[:, None] * between.tril_(-1)  # (R, W, T, T)
            so_far, before = total.exp().to(work), dS
            dS = torch.baddbmm(dS * over_all, (q_t * so_far).mT, dy_t)
            dv_t = torch.bmm(scores.mT, dy_t).baddbmm_(k_t * to_end, before)
            dq_t = _together(dscores @ _apart(k_t, W)) + torch.bmm(dy_t, states[i].mT) * so_far
            dk_t = _together(dscores.mT @ _apart(q_t, W)) + torch.bmm(v_t, before.mT) * to_end
            if "decay" in needed:
                ddecay_t = (k_t.double() * dk_t - q_t.double() * dq_t).roll(1, 1)
                ddecay_t[:, 0] = (states[i].double() * dS).sum(2)
                ddecay_t = (ddecay_t.sum(2, keepdim=True) if W == 1 else ddecay_t).cumsum(1)
                _put(ddecay[b, t], ddecay_t.masked_fill_(decay_t < NOTHING, 0.0))
            dq_t, dk_t = dq_t.addcmul_(k_t, to_itself), dk_t.addcmul_(q_t, to_itself)
            for target, x in ((dq, dq_t), (dk, dk_t), (dv, dv_t)):
                _put(target[b, t], x)
        dstate[b] = dS.view_as(dstate[b])
    ddecay = ddecay if axes == 4 else ddecay[..., 0]
    return {"q": dq, "k": dk, "v": dv, "decay": ddecay.sum((0, 1)) if axes == 1 else ddecay, "state": dstate}


def _total(decay: Tensor) -> Tensor:
    """(R, T, W) sums of the decays of a chunk, float64: the differences of large sums are what counts."""
    return decay.to(torch.float64).clamp(min=NOTHING).cumsum(1)


def _between(total: Tensor, work: torch.dtype) -> Tensor:
    """(R, W, T, T) decay after step s up to step t, for s <= t, else 0."""
    total = total.mT
    return (total[..., None] - total[..., None, :]).to(work).exp_().tril_()


def _ends(total: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """(R, T, W) decay after step t up to the end of the chunk, and (R, W, 1) over all of the chunk."""
    last = total[:, -1:]
    return (last - total).exp().to(work), last.exp().to(work).mT


def _scores(q: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """(R, T, T) weights of the values at steps s in the result at steps t."""
    W = between.shape[1]
    return (_apart(q, W) @ _apart(k, W).mT).mul_(between).sum(1)


def _apart(x: Tensor, W: int) -> Tensor:
    """x (R, T, N) as W heads of N/W keys, (R, W, T, N/W), where W is 1 or N."""
    return x[:, None] if W == 1 else x.mT[..., None]


def _together(x: Tensor) -> Tensor:
    """The inverse of _apart."""
    return x[:, 0] if x.shape[1] == 1 else x[..., 0].mT


def _parts(v: Tensor, decay: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the batch whose (R, W, T, T) scores stay in a core's cache, all of it on other devices; and of time."""
    (B, L, H, _), W = v.shape, decay.shape[3]
    chunk = CHUNK if W == 1 else CHUNK_OF_CHANNELS
    width = max(1, 2**18 // (H * W * chunk**2)) if v.device.type == "cpu" else B
    for start in range(0, B, width):
        yield slice(start, min(start + width, B)), [slice(t, min(t + chunk, L)) for t in range(0, L, chunk)]


def _heads(x: Tensor, H: int, work: torch.dtype) -> Tensor:
    """(b, T, G, N) as (b H, T, N), every group as its H/G heads; where G is H, a view of one batch row."""
    b, T, G, N = x.shape
    return x.transpose(1, 2)[:, :, None].expand(b, G, H // G, T, N).reshape(b * H, T, N).to(work)


def _put(target: Tensor, x: Tensor) -> None:
    """The transpose of _heads, into target (b, T, G, N): heads of a group add up."""
    b, T, G, N = target.shape
    target.copy_(x.reshape(b, G, -1, T, N).sum(2).transpose(1, 2))


def _next_state(S: Tensor, k: Tensor, v: Tensor, to_end: Tensor, over_all: Tensor) -> Tensor:
    return torch.baddbmm(S * over_all, (k * to_end).mT, v)
