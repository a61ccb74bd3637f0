"""RWKV-4's weighted average of values: attention whose weights are the keys and a decay, so it has a finite state."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32
from longwave.ops.linear_scan import linear_scan

EMPTY = -1e38  # exponent of a state that has seen nothing; finite, as -inf - -inf is NaN


@Op(
    k="B L C", v="B L C", w="C", u="C", state="B 3 C", returns={"y": "B L C : v", "last": "B 3 C : float32+k+v"}
)  # fmt: skip
def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y[t] = (sum_{s<t} e^((t-1-s) w + k[s]) v[s] + e^(u + k[t]) v[t]) / (the same without v),  for every channel.

    Source: Peng et al. (2023) "RWKV", arXiv:2305.13048, eq. 14-16; the running maximum as in the authors' code.

    Args:
        k, v: (B, L, C) keys, which are logarithms of weights, and values.
        w: (C,) logarithm of the decay a step, < 0: -exp(time_decay) of the checkpoints.
        u: (C,) added to the present key: time_first of the checkpoints.
        state: (B, 3, C) before the first step: the sum above, the sum below, both divided by e^p, and p. None is
            nothing seen: 0, 0, -1e38.
    Returns:
        y: (B, L, C) in the dtype of v.
        state: (B, 3, C) after the last step; p is the largest exponent so far, decayed.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L C) time and memory; the CPU kernel keeps inputs and one state in 32 steps for its gradient.
    """
    k_, v_, w, u, (a, b, p) = _prepare(k, v, w, u, state)
    ys = []
    for k_t, v_t in zip(k_.unbind(1), v_.unbind(1)):
        m = torch.maximum(p, k_t + u)
        past, now = torch.exp(p - m), torch.exp(k_t + u - m)
        ys.append((past * a + now * v_t) / (past * b + now))
        m = torch.maximum(p + w, k_t)
        past, now = torch.exp(p + w - m), torch.exp(k_t - m)
        a, b, p = past * a + now * v_t, past * b + now, m
    return torch.stack(ys, dim=1).to(v.dtype), torch.stack([a, b, p], dim=1)


def _prepare(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    work = at_least_float32(torch.promote_types(k.dtype, v.dtype))
    state = nothing(k, work) if state is None else state.to(work)
    return k.to(work), v.to(work), w.to(work), u.to(work), state.unbind(1)


def nothing(k: Tensor, work: torch.dtype) -> Tensor:
    """The state (B, 3, C) before anything is seen."""
    B, _, C = k.shape
    state = k.new_zeros(B, 3, C, dtype=work)
    state[:, 2] = EMPTY
    return state


@wkv.backend("torch")
def _scanned(k, v, w, u, state=None):
    """Exponents first, which are a running maximum; the two sums are then linear scans of numbers that are at most 1.

    The result does not depend on the exponents, so they are constants to the gradient but in the state returned.
    """
    k_, v_, w, u, (a, b, p) = _prepare(k, v, w, u, state)
    exponents = _exponents(k_, w, p)
    m = exponents.detach()
    before = torch.cat([p[:, None], m[:, :-1]], dim=1)
    past, now = torch.exp(before - m + w), torch.exp(k_ - m)  # in this order no digit of w is lost
    above, below = (linear_scan(past, now * x, h, backend="torch") for x, h in ((v_, a), (1.0, b)))
    m = torch.maximum(before, k_ + u).detach()
    past, now = torch.exp(before - m), torch.exp(k_ - m + u)
    a_before, b_before = (torch.cat([h[:, None], hs[:, :-1]], dim=1) for h, hs in ((a, above), (b, below)))
    y = (past * a_before + now * v_) / (past * b_before + now)
    p = exponents[:, -1]
    scale = torch.exp(p.detach() - p)
    return y.to(v.dtype), torch.stack([above[:, -1] * scale, below[:, -1] * scale, p], dim=1)


def _exponents(k: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """p[t] = max(p[t-1] + w, k[t]), in float64, as it adds up t w; any rounding of it cancels."""
    decays = torch.arange(1, k.shape[1] + 1, device=k.device)[:, None] * w.to(torch.float64)
    largest = torch.cummax(k - decays, dim=1).values
    return (torch.maximum(largest, p[:, None]) + decays).to(k.dtype)
