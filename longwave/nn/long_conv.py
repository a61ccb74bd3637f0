"""A long convolution that can stop and resume: the one place where convolution and recurrence meet."""

from typing import Any

import torch
from torch import Tensor, nn

from longwave.nn.dense_conv import convolve
from longwave.nn.filters import Filter, StateSpaceFilter
from longwave.nn.frozen import stands_still
from longwave.nn.module import append_time
from longwave.nn.online_conv import Taps, online_conv
from longwave.nn.padding import last_steps, padded_short_conv
from longwave.ops import causal_conv
from longwave.ops.kernel import watched

PREPARED = 1 << 24  # taps of all channels that are prepared first; each time they are not enough, four times as many


def init_conv_state(filter: Filter, batch: int) -> Tensor:
    """The state before the first step.

    Returns:
        (B, C, N) zeros for a state space; else the past inputs: (B, support - 1, C) zeros for a filter of finite
        support, whose state so has one size for ever, or (B, 0, C).
    """
    if isinstance(filter, StateSpaceFilter):
        return filter.realized().rest(batch)
    like = next(filter.parameters())
    steps = 0 if filter.support is None else filter.support - 1
    return torch.zeros(batch, steps, filter.channels, dtype=like.dtype, device=like.device)


def online_length(filter: Filter, length: int) -> int | None:
    """How many taps to prepare for a convolution that goes on, where they are kept; None where they are not.

    A filter of finite support needs few of them, and one that is defined at any length has no end.
    """
    longest = filter.longest()
    if longest is None or length > longest or filter.support is not None or not stands_still(filter) or watched():
        return None
    steps = max(256, PREPARED // filter.channels)
    while steps <= length:
        steps *= 4
    return min(steps, longest)


def taps_needed(filter: Filter, past: Tensor, L: int, padding: Tensor | None) -> int:
    """How many taps L more steps need behind past (B, t, C): of a filter that ends, padding and silence need none."""
    length, longest = past.shape[1] + L, filter.longest()
    if padding is None or longest is None or length <= longest or torch.compiler.is_compiling():
        return length
    silent = (past == 0).flatten(2).all(2).cumprod(1).sum(1)  # steps in front
    return max(1, length - int((silent + padding).min()))


def conv_with_past(
    u: Tensor,
    k: Tensor | Taps,
    past: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """A causal convolution that goes on behind past inputs, with taps that are given.

    Args:
        u: (B, L, C) input.
        k: (C, K) taps, at least t + L of them, or all that are not zero; (E, D, K), a matrix for every lag, without
            skip and gates; or either prepared, where no gradient is recorded.
        past: (B, t, C) the inputs before u, after their gate; or None.
        padding: (B,) how many steps at the end of each row of u are padding, and zeros; None is none.
        skip, gate_in, gate_out: as in :func:`longwave.ops.causal_conv`.
    Returns:
        y: (B, L, C).
        past: (B, t + L, C), or None where none came in. Of rows with padding as many zeros stand in front: silence.
    """
    if past is None:
        assert isinstance(k, Tensor)
        return convolve(u, k, skip=skip, gate_in=gate_in, gate_out=gate_out), None
    x = u if gate_in is None else u * gate_in
    if isinstance(k, Taps) and padding is not None:  # the past moves, and what was computed ahead for it is lost
        k = k.first(past.shape[1] + u.shape[1])
    if isinstance(k, Taps):
        y, past = online_conv(x, past, k)
        y = y if skip is None else torch.addcmul(y, x, skip.to(y.dtype))
    else:
        past = append_time(past, x)
        y = convolve(past, k, skip=skip)[:, past.shape[1] - u.shape[1] :].to(u.dtype)
    return y if gate_out is None else y * gate_out, last_steps(past, padding, past.shape[1])


def long_conv(
    u: Tensor,
    filter: Filter,
    state: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """y[t] = gate_out[t] (sum_s k[s] x[t-s] + skip x[t]),  x = gate_in u, the x before the first being the state's.

    Args:
        u: (B, L, C) input, L >= 1.
        filter: gives k.
        state: None, or what :func:`init_conv_state` or an earlier call returned: the hidden vector (B, C, N) of a
            state space, the past x (B, t, C) of any other filter.
        padding: (B,) how many steps at the end of each row are padding, where x is zero; None is none. They take no
            time: the state is that after the last real step.
        skip: (C,) weight of the present x.
        gate_in, gate_out: (B, L, C) factors.
    Returns:
        y: (B, L, C).
        state: after the last step, or None where none came in.
    Raises:
        ValueError: where the filter is not defined at the length.
    Cost: O(L log L) time, O(L) memory; a state space adds O(N) a step. A filter without one starts over with all of the
        past, in O((t + L) log (t + L)), but within :class:`longwave.nn.frozen`, where no gradient is recorded, goes on
        in O(log^2 t) a step: longwave/nn/online_conv.py.
    """
    L, gates = u.shape[1], {"gate_in": gate_in, "gate_out": gate_out}
    if state is None:
        return causal_conv(u, filter(L), skip=skip, **gates), None
    if filter.support is not None and L == 1:
        x = u if gate_in is None else u * gate_in
        y, past = padded_short_conv(x, filter.oldest_first(), None, state, padding)
        y = y if skip is None else torch.addcmul(y, x, skip.to(y.dtype))
        return y if gate_out is None else y * gate_out, past
    if not isinstance(filter, StateSpaceFilter):
        length = taps_needed(filter, state, L, padding)
        steps = online_length(filter, length)
        k = filter(length) if steps is None else filter.prepared(steps)
        y, past = conv_with_past(u, k, state, padding, skip=skip, **gates)
        if filter.support is not None:  # a copy: without the rest of the past
            past = past[:, max(0, past.shape[1] - (filter.support - 1)) :].clone()
        return y, past
    x = u if gate_in is None else u * gate_in
    y, after = go_on(x, filter, state, padding, skip=skip)
    return y if gate_out is None else y * gate_out, after


def go_on(
    x: Tensor, filter: Any, state: Tensor, padding: Tensor | None = None, *, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What x (B, L, C) and the state (B, C, N) of a state space make together, and the state behind x.

    Args:
        x, state, padding, skip: as in :func:`long_conv`.
        filter: has ``realized()``, a system for many steps, and ``stepper()``, for one: that costs less as a recurrence
            than as a convolution.
    """
    L = x.shape[1]
    if L > 1:
        system = filter.realized()
        y = causal_conv(x, system.taps(L), skip=skip)
        return (y + system.response(state, L).transpose(1, 2)).to(x.dtype), system.advance(state, x, padding)
    y, after = filter.stepper().step(x[:, 0], state, skip)
    if padding is not None:
        after = torch.where(padding[:, None, None] == 0, after, state.to(after.dtype))
    return y[:, None], after


def two_sided_conv(
    u: Tensor,
    filter: Filter,
    ahead: Filter,
    *,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
) -> Tensor:
    """y[t] = gate_out[t] (sum_s k[s] x[t-s] + sum_s f[s] x[t+1+s] + skip x[t]),  x = gate_in u: no tap counts twice.

    Source: the bidirectional convolution of github.com/state-spaces/s4.

    Args:
        u: (B, L, C) input.
        filter, ahead: give k and f.
        skip, gate_in, gate_out: as in :func:`long_conv`.
    Returns:
        y: (B, L, C).
    Raises:
        ValueError: where a filter is not defined at the length.
    """
    L = u.shape[1]
    return causal_conv(u, filter(L), skip=skip, gate_in=gate_in, gate_out=gate_out, k_future=ahead(L))


class LongConv(nn.Module):
    """A filter and its skip connection:  y = k * u + D u, with state.

    Args:
        filter: what to convolve with; ``LongConv(S4DFilter(64))`` has 64 channels.
    """

    def __init__(self, filter: Filter):
        super().__init__()
        self.filter = filter
        self.D = nn.Parameter(torch.empty(filter.channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> Tensor:
        """See :func:`init_conv_state`."""
        return init_conv_state(self.filter, batch)

    def forward(
        self, u: Tensor, state: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`long_conv`: u (B, L, C) -> y (B, L, C) and the state, or None where none came in."""
        return long_conv(u, self.filter, state, padding, skip=self.D)
