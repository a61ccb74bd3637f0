"""Diagonal plus low rank state spaces: S4."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import StateSpaceFilter, shared_systems
from longwave.nn.hippo import low_rank, nplr
from longwave.nn.module import Hint, positive_rate, step_range, widened
from longwave.nn.padding import last_steps
from longwave.ops import dplr_step, opaque, without_autocast
from longwave.ops.vandermonde import near_root


def _exact(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a system as it is without autocast, whose bfloat16 matrix products would be noise in a filter."""

    @functools.wraps(method)
    def run(system: Any, *args: Any) -> Any:
        with without_autocast(system.c.device):
            return method(system, *args)

    return run


class DenseStateSpace(NamedTuple):
    """A real discrete system  h[t] = a h[t-1] + b u[t],  y[t] = <c, h[t]>  with a dense matrix.

    All but single steps use  l = i + m j  with m ~ sqrt(L): two tables, made by repeated squaring of a, joined by a
    batched GEMM. No (C, N, L) tensor exists, and no result depends on the length it was asked for.

    Attributes:
        a: (G, N, N) float64.
        b: (G, N) float64.
        c: (C, N), C a multiple of G: channels g, g + G, ... share system g. Its dtype is that of all results.
    Cost: O(C N L + G N^3 log L) multiply-adds as GEMM, O(G N (sqrt(L) + N log L)) memory besides the result.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, C, N)."""
        return self.c.detach().new_zeros(batch, *self.c.shape)

    def stepper(self) -> "DenseStateSpace":
        """What takes single steps."""
        return self

    @_exact
    def step(self, x: Tensor, state: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`longwave.nn.StateSpace.step`."""
        (G, _), dtype = self.b.shape, self.c.dtype
        u, h = x.to(dtype).unflatten(1, (-1, G))[..., None], state.to(dtype).unflatten(1, (-1, G))
        h = (torch.einsum("gnm,bkgm->bkgn", self.a.to(dtype), h) + self.b.to(dtype) * u).flatten(1, 2)
        y = (self.c * h).sum(2)
        return (y if skip is None else y + skip * x).to(x.dtype), h

    def taps(self, length: int) -> Tensor:
        """The impulse response (C, length)."""
        return dense_taps(self.a, self.b, self.c, length)

    def response(self, state: Tensor, length: int) -> Tensor:
        """What the state (B, C, N) adds to the next ``length`` outputs, (B, C, length)."""
        return dense_response(self.a, self.c, state.to(self.c.dtype), length)

    def advance(self, state: Tensor, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """The state after the inputs x (B, L, C), of which the last padding (B,) of each row are zeros and take no
        time."""
        return dense_advance(self.a, self.b, state.to(self.c.dtype), x, padding)


@opaque(like=lambda a, b, c, length: c.new_empty(c.shape[0], length))
def dense_taps(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """k[i + m j] = (c a^(m j)) (a^i b), of a :class:`DenseStateSpace`: (C, length)."""
    m, J = near_root(length)
    powers = _squares(a, m, J)
    fine = _table(powers, b[:, :, None], m).squeeze(3)  # (G, N, m)
    rows = c.unflatten(0, (-1, len(a))).permute(1, 2, 0).to(a.dtype)  # (G, N, K)
    coarse = _table([p.mT for p in powers[_log2(m) :]], rows, J)  # (G, N, J, K)
    k = torch.bmm(coarse.flatten(2).mT.to(c.dtype), fine.to(c.dtype))  # (G, J K, m)
    return k.unflatten(1, (J, -1)).permute(2, 0, 1, 3).reshape(len(c), J * m)[:, :length]


@opaque(like=lambda a, c, state, length: state.new_empty(*state.shape[:2], length))
def dense_response(a: Tensor, c: Tensor, state: Tensor, length: int) -> Tensor:
    """c a^(l+1) h, of states (B, C, N): (B, C, length)."""
    m, J = near_root(length)
    B, G = state.shape[0], len(a)
    powers = _squares(a, m, J)
    rows = c.unflatten(0, (-1, G)).permute(1, 2, 0).to(a.dtype)
    fine = _table([p.mT for p in powers], a.mT @ rows, m).to(c.dtype)  # (G, N, m, K): c a^(i+1)
    coarse = _table([p.to(c.dtype) for p in powers[_log2(m) :]], _systems_first(state, G), J)  # (G, N, J, B K)
    y = torch.einsum("gnik,gnjbk->bkgji", fine, coarse.unflatten(3, (B, -1)))
    return y.reshape(B, len(c), J * m)[..., :length]


@opaque(like=lambda a, b, state, x, padding: torch.empty_like(state, memory_format=torch.contiguous_format))
def dense_advance(a: Tensor, b: Tensor, state: Tensor, x: Tensor, padding: Tensor | None) -> Tensor:
    """a^L h + sum_s a^s b x[L-1-s], L without a row's padding: (B, C, N)."""
    (B, L, C), G, dtype = x.shape, len(a), state.dtype
    m, J = near_root(L)
    powers = _squares(a, m, J)
    fine = _table(powers, b[:, :, None], m).squeeze(3).to(dtype)  # (G, N, m)
    powers = [p.to(dtype) for p in powers]
    newest_first = nn.functional.pad(last_steps(x.to(dtype), padding, L).flip(1), (0, 0, 0, m * J - L))
    blocks = newest_first.reshape(B, J, m, C // G, G).permute(4, 2, 1, 0, 3)  # (G, m, J, B, K)
    sums = (fine @ blocks.flatten(2)).unflatten(2, (J, -1))  # (G, N, J, B K): what each block leaves behind
    for power in powers[_log2(m) :]:  # neighbours become one, until one is left
        if sums.shape[2] > 1:
            newer, older = sums[:, :, ::2], sums[:, :, 1::2]
            older = (power @ older.flatten(2)).unflatten(2, older.shape[2:])
            sums = torch.cat([newer[:, :, : older.shape[2]] + older, newer[:, :, older.shape[2] :]], dim=2)
    carried = _systems_first(state, G)
    steps = None if padding is None else (L - padding).repeat_interleave(C // G)  # (B K,)
    for bit, power in enumerate(powers):
        if steps is not None:
            carried = torch.where((steps >> bit & 1).bool(), power @ carried, carried)
        elif L >> bit & 1:
            carried = power @ carried
    return (sums.squeeze(2) + carried).unflatten(2, (B, -1)).permute(2, 3, 0, 1).reshape(B, C, -1)


def _log2(m: int) -> int:
    return m.bit_length() - 1


def _squares(a: Tensor, m: int, J: int) -> list[Tensor]:
    """a, a^2, a^4, ... below and at a^m, and on while below a^(m J)."""
    powers, reach = [a], 1
    while reach < m * J:
        powers.append(powers[-1] @ powers[-1])
        reach *= 2
    return powers


def _table(powers: list[Tensor], v: Tensor, count: int) -> Tensor:
    """a^i v for i < count as (G, N, count, X), of powers a, a^2, a^4, ... and v (G, N, X)."""
    table = v[:, :, None]
    for power in powers:
        more = table[:, :, : count - table.shape[2]]
        if more.shape[2]:
            table = torch.cat([table, (power @ more.flatten(2)).unflatten(2, more.shape[2:])], dim=2)
    return table


def _systems_first(state: Tensor, systems: int) -> Tensor:
    """(B, K G, N) as (G, N, B K)."""
    return state.unflatten(1, (-1, systems)).permute(2, 3, 0, 1).flatten(2)


class DPLRStepper(NamedTuple):
    """A :class:`DPLRStateSpace` as :func:`longwave.ops.dplr_step` takes it, in the dtype of c."""

    re: Tensor  # (G, N/2)
    im: Tensor  # (G, N/2)
    left: Tensor  # (G, R, N)
    right: Tensor  # (G, R, N)
    b: Tensor  # (G, N)
    c: Tensor  # (C, N)

    def step(self, x: Tensor, state: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`longwave.nn.StateSpace.step`."""
        return dplr_step(x, *self, state, skip)


class DPLRStateSpace(NamedTuple):
    """A real discrete system  h[t] = a h[t-1] + b u[t],  y[t] = <c, h[t]>  with  a = diag - left right.

    One step is taken in this form; a longer stretch multiplies the matrix out, see :class:`DenseStateSpace`. The other
    way to the taps, by :func:`longwave.ops.cauchy` in the frequency domain, would need c a^L first, that is the same
    squares of a, and its sums besides.

    Attributes:
        diag: (G, N/2) complex128, on complex coordinates h[:N/2] + i h[N/2:].
        left, right: (G, N, R) and (G, R, N) float64.
        b: (G, N) float64.
        c: (C, N), C a multiple of G: channels g, g + G, ... share system g. Its dtype is that of all results.
    Cost: O(R N) a channel for one step.
    """

    diag: Tensor
    left: Tensor
    right: Tensor
    b: Tensor
    c: Tensor

    def matrix(self) -> Tensor:
        """a (G, N, N) float64."""
        real, imag = torch.diag_embed(self.diag.real), torch.diag_embed(self.diag.imag)
        rotation = torch.cat([torch.cat([real, -imag], dim=2), torch.cat([imag, real], dim=2)], dim=1)
        return rotation - self.left @ self.right

    def dense(self) -> DenseStateSpace:
        """The same system with its matrix multiplied out."""
        return DenseStateSpace(self.matrix(), self.b, self.c)

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, C, N)."""
        return self.c.detach().new_zeros(batch, *self.c.shape)

    def stepper(self) -> DPLRStepper:
        """What takes single steps."""
        parts = self.diag.real, self.diag.imag, self.left.mT, self.right, self.b, self.c
        return DPLRStepper(*(part.to(self.c.dtype).contiguous() for part in parts))

    @_exact
    def taps(self, length: int) -> Tensor:
        """The impulse response (C, length)."""
        if length > 1:
            return self.dense().taps(length)
        return (self.c * self._every_channel(self.b)).sum(1, keepdim=True)

    @_exact
    def response(self, state: Tensor, length: int) -> Tensor:
        """What the state (B, C, N) adds to the next ``length`` outputs, (B, C, length)."""
        if length > 1:
            return self.dense().response(state, length)
        return (self.c * self._step(state)).sum(2, keepdim=True)

    @_exact
    def advance(self, state: Tensor, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """The state after the inputs x (B, L, C), see :class:`DenseStateSpace`."""
        if x.shape[1] > 1:
            return self.dense().advance(state, x, padding)
        h = self._step(state) + self._every_channel(self.b) * x[:, 0, :, None].to(self.c.dtype)
        return h if padding is None else torch.where(padding[:, None, None] == 0, h, state.to(h.dtype))

    def _every_channel(self, t: Tensor) -> Tensor:
        return t.to(self.c.dtype).repeat(len(self.c) // len(t), 1)

    def _step(self, h: Tensor) -> Tensor:
        """a h."""
        G, dtype = len(self.diag), self.c.dtype
        h = h.to(dtype).unflatten(1, (-1, G))  # (B, K, G, N)
        turned = real_coordinates(self.diag.to(dtype.to_complex()) * torch.complex(*h.chunk(2, dim=3)))
        inner = torch.einsum("grn,bkgn->bkgr", self.right.to(dtype), h)
        return (turned - torch.einsum("gnr,bkgr->bkgn", self.left.to(dtype), inner)).flatten(1, 2)


def real_coordinates(z: Tensor) -> Tensor:
    """(..., N/2) complex as (..., N) real: the real parts, then the imaginary ones."""
    return torch.cat([z.real, z.imag], dim=-1)


def discretize(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> DPLRStateSpace:
    """Tustin's rule for a diagonal matrix minus one of low rank, by Woodbury's identity, in real coordinates.

    Source: Gu et al. (2021) "S4", arXiv:2111.00396, eq. 3 and app. C.2. The system is
    h' = A h - sum_r P_r <P_r, h> + B u,  y = 2 Re C h,  where <., .> runs over N/2 modes and their conjugates.

    Args:
        A: (G, N/2) complex.
        P: (R, G, N/2) complex.
        B: (G, N/2) complex.
        C: (C, N/2) complex.
        dt: (G, 1), or (G, N/2) for steps that differ from mode to mode.
    Returns:
        a = (1 - dt/2 A)^-1 (1 + dt/2 A) = 2 (1 - dt/2 A)^-1 - 1,  b = (1 - dt/2 A)^-1 dt B,  and c.
    """
    c = 2 * real_coordinates(C.conj())
    A, P, B, dt = A.to(torch.complex128), P.to(torch.complex128), B.to(torch.complex128), dt.double()
    D = 1 / (1 - dt * A / 2)
    columns = real_coordinates(D * dt * P).permute(1, 2, 0)  # (G, N, R)
    rows = real_coordinates(D.conj() * P).transpose(0, 1)  # (G, R, N)
    small = torch.eye(len(P), dtype=rows.dtype, device=rows.device) + real_coordinates(P).transpose(0, 1) @ columns
    right = torch.linalg.solve(small, rows)  # (1 - dt/2 A)^-1 = D - columns right
    b = real_coordinates(D * dt * B)[..., None] - columns @ (right @ real_coordinates(dt * B)[..., None])
    return DPLRStateSpace(2 * D - 1, 2 * columns, right, b.squeeze(2), c)


class DPLRFilter(StateSpaceFilter):
    """A state space whose matrix is diagonal minus low rank, with a learned step size:  k[l] = 2 Re C a^l b.

    Source: Gu, Goel & Re (2021) "Efficiently Modeling Long Sequences with Structured State Spaces" (S4),
    arXiv:2111.00396, sec. 3, with P = Q as in Goel et al. (2022), arXiv:2202.09729, sec. 4.1;
    A = diag(-exp(log_A_real) + i A_imag) - P P^*, dt = exp(log_dt), bilinear discretisation.

    Args:
        channels: C.
        d_state: N, real state size, even; N/2 conjugate pairs are kept.
        init: legs | legt | lagt | fourier | ..., the HiPPO measure of A and B, see :func:`longwave.nn.nplr`.
        rank: R, columns of P; at least that of the measure (2 for legt, else 1), which is the default. Others start
            at zero.
        dt_min, dt_max: step sizes are drawn log-uniformly between them; 1 / dt is the memory in steps.
        systems: S, how many different (A, P, B) there are; channels c, c + S, ... share one. Default C.
        rate: > 0, factor on every step size: 2 reads a signal sampled half as often, see
            :func:`longwave.nn.set_rate`.
    Raises:
        ValueError: for an unknown init, a rank below that of the measure, an odd d_state, 0 < dt_min <= dt_max
            violated, S not dividing C.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag", "P", "B"), Hint(max_lr=1e-3)
    )

    def __init__(
        self,
        channels: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        systems: int | None = None,
        rate: float = 1.0,
    ):
        super().__init__()
        systems = shared_systems(channels, d_state, systems)
        least = len(low_rank(init, 2))
        rank = least if rank is None else rank
        if rank < least:
            raise ValueError(f"init = {init!r} needs rank >= {least}; got rank = {rank}")
        self.init, self.channels = init, channels
        self.log_dt_range, self.rate = step_range(dt_min, dt_max), positive_rate(rate)
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(systems, pairs))
        self.A_imag = nn.Parameter(torch.empty(systems, pairs))
        self.P = nn.Parameter(torch.empty(rank, systems, pairs, 2))
        self.B = nn.Parameter(torch.empty(systems, pairs, 2))
        self.C = nn.Parameter(torch.empty(channels, pairs, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
            A, P, B, _ = nplr(self.init, 2 * self.A_imag.shape[1])
        A, P, B = (z.conj().resolve_conj() for z in (A, P, B))  # the other half of each pair: positive frequencies
        self.log_dt.uniform_(*self.log_dt_range)
        self.log_A_real.copy_((-A.real).clamp(min=1e-4).log().expand_as(self.log_A_real))  # 0 but in legs
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.P.zero_()[: len(P)].copy_(torch.view_as_real(P)[:, None].expand_as(self.P[: len(P)]))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        self.C.normal_(std=0.5**0.5)

    def realize(self) -> DPLRStateSpace:
        log_dt, log_A_real, A_imag, P, B, C = widened(self.log_dt, self.log_A_real, self.A_imag, self.P, self.B, self.C)
        copies = self.channels // len(A_imag)
        A = torch.complex(-log_A_real.exp(), A_imag).repeat(copies, 1)  # (C, N/2)
        P, B = torch.view_as_complex(P).repeat(1, copies, 1), torch.view_as_complex(B).repeat(copies, 1)
        return discretize(A, P, B, torch.view_as_complex(C), self.rate * log_dt.exp()[:, None])
