"""Ops as a program without longwave has them: operations of torch alone, of any batch and length.

A kernel of ours is one node of a graph and needs this package. Here every node whose reference loops over a length has
a twin that does not: powers as tables, convolutions as one FFT, recurrences as torch's own ``scan``, which an exported
program holds as a loop. All others are their references.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from longwave.mixers.lstm import step_of_lstm
from longwave.ops import OPS, at_least_float32
from longwave.ops.gated_delta_rule import prepare as prepare_delta_rule
from longwave.ops.kernel import Kernel
from longwave.ops.linear_attention import prepare as prepare_attention
from longwave.ops.opaque import OPAQUE
from longwave.ops.selective_scan import finish
from longwave.ops.selective_scan import prepare as prepare_scan

FINE = 64  # powers of a table; the other has a FINEth of the length


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What becomes of every op of ours that is a node of a graph: operator -> function of its arguments."""
    table: dict[Any, Callable[..., Any]] = {}
    for name, op in OPS.items():
        for backend in op.backends.values():
            if isinstance(backend, Kernel):
                table[backend.op] = _as_kernel(PORTABLE.get(name) or op.backends["reference"])
    for name in OPAQUE:
        if (own := PORTABLE.get(name.partition("::")[2])) is not None:
            table[getattr(torch.ops.longwave, name.partition("::")[2]).default] = own
    return table


def _as_kernel(run: Callable[..., Any]) -> Callable[..., Any]:
    """With the results of a kernel's operator: none is a view, and behind them is what is kept for a gradient."""

    def call(*values: Any) -> tuple[Tensor, ...]:
        results = run(*values[:-1])
        results = results if isinstance(results, tuple) else (results,)
        return *(result.contiguous() for result in results), results[0].new_empty(0)

    return call


def recur(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """(y (B, L, ...), the last state) of  y[t], state = step(state, *inputs[t], *constants)  for inputs (B, L, ...)."""
    if inputs[0].shape[1] == 1:  # only where that is known: of a program that takes single steps
        y, state = step(state, *(x[:, 0] for x in inputs), *constants)
        return y[:, None], state

    def body(state: Tensor, *rest: Tensor) -> list[Tensor]:
        y, state = step(state, *rest)
        return [whole(state), whole(y)]

    def whole(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    state, ys = scan_op(body, [whole(state)], [whole(x.movedim(1, 0)) for x in inputs], tuple(constants))
    return ys.movedim(0, 1), state


def _causal_conv(
    u: Tensor, k: Tensor, skip: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None, k_future: Tensor | None
) -> Tensor:
    L, work = u.shape[1], at_least_float32(torch.promote_types(u.dtype, k.dtype))
    x = (u if gate_in is None else u * gate_in).to(work).transpose(1, 2)
    n = L + k.shape[1] + (0 if k_future is None else k_future.shape[1])
    spectrum = torch.fft.rfft(k.to(work), n)
    if k_future is not None:  # tap s of the future is tap -1 - s of a circle: the conjugate of that of the past
        turned = torch.fft.rfft(F.pad(k_future.to(work), (1, 0)), n)
        spectrum = spectrum + torch.complex(turned.real, -turned.imag)
    y = torch.fft.irfft(torch.fft.rfft(x, n) * spectrum, n)[..., :L]
    y = (y if skip is None else y + skip[:, None].to(work) * x).transpose(1, 2)
    return (y if gate_out is None else y * gate_out.to(work)).to(u.dtype)


def _dense_conv(u: Tensor, k: Tensor) -> Tensor:
    L, work = u.shape[1], at_least_float32(torch.promote_types(u.dtype, k.dtype))
    n = L + k.shape[2]
    spectra = torch.fft.rfft(u.to(work), n, dim=1), torch.fft.rfft(k.to(work), n)
    return torch.fft.irfft(torch.einsum("bfd,edf->bfe", *spectra), n, dim=1)[:, :L].to(u.dtype).contiguous()


def _tables(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """x^i (C, N, FINE) and x^(FINE j) (C, N, J) for all i + FINE j < length, of complex x (C, N), in complex128."""
    wide, blocks = x.to(torch.complex128)[..., None], (length + FINE - 1) // FINE
    return wide ** torch.arange(FINE, device=x.device), wide ** (FINE * torch.arange(blocks, device=x.device))


def _vandermonde(x: Tensor, c: Tensor, length: int) -> Tensor:
    fine, coarse = (table.to(x.dtype) for table in _tables(x, length))
    k = torch.einsum("bcnj,cni->bcji", c.to(x.dtype)[..., None] * coarse, fine)
    return 2 * k.real.flatten(2)[..., :length].to(c.real.dtype)


def _vandermonde_transpose(x: Tensor, u: Tensor) -> Tensor:
    L = u.shape[2]
    fine, coarse = (table.to(x.dtype) for table in _tables(x, L))
    blocks = F.pad(u, (0, coarse.shape[2] * FINE - L)).unflatten(2, (-1, FINE)).to(x.dtype)
    return (torch.einsum("bcji,cni->bcnj", blocks, fine) * coarse).sum(3)


def _power(a: Tensor, padding: Tensor | None, length: int) -> Tensor:
    assert padding is None
    return (a.to(torch.complex128) ** torch.arange(length, length + 1, device=a.device)).to(a.dtype)


def _dense_taps(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    steps = b.new_empty(1, length).expand(b.shape[0], -1)
    columns, _ = recur(lambda h, _, a: (h, torch.einsum("gnm,gm->gn", a, h)), b, [steps], [a])
    rows = c.unflatten(0, (-1, len(a)))  # (K, G, N)
    return torch.einsum("kgn,gln->kgl", rows, columns.to(c.dtype)).flatten(0, 1).contiguous()


def _dense_response(a: Tensor, c: Tensor, state: Tensor, length: int) -> Tensor:
    def step(h: Tensor, _: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.einsum("gnm,bkgm->bkgn", a, h.unflatten(1, (-1, len(a)))).flatten(1, 2)
        return (c * h).sum(2), h

    y, _ = recur(step, state, [state.new_empty(1, length).expand(state.shape[0], -1)], [a.to(c.dtype), c])
    return y.transpose(1, 2).contiguous()


def _dense_advance(a: Tensor, b: Tensor, state: Tensor, x: Tensor, padding: Tensor | None) -> Tensor:
    assert padding is None

    def step(h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h, u = h.unflatten(1, (-1, len(a))), x.unflatten(1, (-1, len(a)))[..., None]
        return x, (torch.einsum("gnm,bkgm->bkgn", a, h) + b * u).flatten(1, 2)

    return recur(step, state, [x.to(state.dtype)], [a.to(state.dtype), b.to(state.dtype)])[1].contiguous()


def _linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), h0.dtype)

    def step(h: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = a * h + b
        return h, h

    return recur(step, h0.to(dtype), [a.to(dtype), b.to(dtype)])[0]


def _selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    u_, dt, A, B, C, h = prepare_scan(u, dt, A, B, C, state, dt_bias, softplus)
    width = A.shape[0] // B.shape[2]

    def step(h: Tensor, dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        B, C = B.repeat_interleave(width, dim=1), C.repeat_interleave(width, dim=1)
        h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B
        return (h * C).sum(-1), h

    y, h = recur(step, h, [dt, u_, B, C], [A])
    return finish(y, u, D, z), h


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay, S = prepare_attention(q, v, decay, state)
    H, work = v.shape[2], S.dtype

    def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        q, k, a = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (q, k, a))
        S = a.exp()[..., None] * S + k[..., None] * v[:, :, None]
        return torch.einsum("bhn,bhnp->bhp", q, S), S

    y, S = recur(step, S, [x.to(work) for x in (q, k, v, decay)])
    return y.to(v.dtype), S


def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    S = prepare_delta_rule(q, v, state)
    H, work = v.shape[2], S.dtype

    def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (q, k))
        S = a.exp()[..., None, None] * S
        S = S + k[..., None] * (b[..., None] * (v - torch.einsum("bhn,bhnp->bhp", k, S)))[:, :, None]
        return torch.einsum("bhn,bhnp->bhp", q, S), S

    y, S = recur(step, S, [x.to(work) for x in (q, k, v, decay, beta)])
    return y.to(v.dtype), S


def _steps_of_lstm(u: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    def step(state: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        h, c = step_of_lstm(x, *state.unbind(1), *weights)
        return h, torch.stack([h, c], dim=1)

    y, state = recur(step, torch.stack([h, c], dim=1), [u], [w_ih, w_hh, b_ih, b_hh])
    return torch.cat([y, state[:, 1:]], dim=1)


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: int, window: int) -> Tensor:
    L, T = q.shape[2], k.shape[2]
    query, key = torch.arange(L, device=q.device)[:, None] + (T - L), torch.arange(T, device=q.device)
    allowed = (key <= query if causal else torch.ones_like(key <= query))[None, None]
    allowed = allowed & (key > query - window) if window else allowed
    allowed = allowed if mask is None else allowed & mask[:, None, None] | (key == query)
    return F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=q.shape[1] != k.shape[1]).contiguous()


def _weighed(k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    L, T = w.shape[1:]
    later = torch.arange(T, device=k.device) > torch.arange(L, device=k.device)[:, None] + (T - L)

    def step(state: Tensor, w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.softmax(w[..., None] + k, dim=1) * v).sum(1), state

    rows = w.masked_fill(later, -torch.inf).expand(k.shape[0], -1, -1)
    return recur(step, k.new_empty(1), [rows], [k, v])[0].contiguous()


PORTABLE: dict[str, Callable[..., Any]] = {
    run.__name__.lstrip("_"): run
    for run in (
        _causal_conv, _dense_conv, _vandermonde, _vandermonde_transpose, _power, _dense_taps, _dense_response,
        _dense_advance, _linear_scan, _selective_scan, _linear_attention, _gated_delta_rule, _steps_of_lstm,
        _chunked_attention, _weighed,
    )
}  # fmt: skip
