"""Mega: a moving average of the inputs makes queries, keys and gates; one head of attention, in chunks, looks them up.

Source: Ma et al. (2022) "Mega: Moving Average Equipped Gated Attention", arXiv:2209.10655, sec. 3; for the squared relu
So et al. (2021) "Primer", arXiv:2109.08668. Parameter names are mostly those of github.com/facebookresearch/mega.
"""

import abc
import math
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.mixers.base import Mixer, WholeMixer
from longwave.mixers.conv import ConvPastState, ConvState, conv_state
from longwave.mixers.states import Growing
from longwave.nn import FILTERS, NORMS, AnyFilter, AnyNorm, Filter, LongConv, append_time, like_output, longest
from longwave.nn.filters.base import require_max_len
from longwave.nn.frozen import derived, stands_still
from longwave.nn.module import widened
from longwave.nn.padding import is_real, last_steps, silence, take_steps
from longwave.ops import causal_conv
from longwave.spec import Parts, PartSpec


class Softmax(nn.Module):
    """softmax_s(q . k[s] / sqrt(S) + bias) over the keys that are seen."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """How much a query takes of every key.

        Args:
            q: (..., L, S) queries.
            k: (..., T, S) keys.
            bias: (L, T).
            seen: (..., L or 1, T) bool, at least one in a row.
        Returns:
            (..., L, T).
        """
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        return logits.masked_fill(~seen, float("-inf")).softmax(-1)


class Laplace(nn.Module):
    """0.5 (1 + erf((x - sqrt(1/2)) sqrt(2 pi))) of x = q . k[s] / n + bias, n keys being seen."""

    MEAN, DEVIATION = 0.707107, 0.282095  # as the authors round sqrt(1 / 2) and sqrt(1 / (4 pi))

    def forward(self, q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Softmax`."""
        x = (_per_key(q, k, bias, seen) - self.MEAN) / (self.DEVIATION * math.sqrt(2))
        return 0.5 * (1 + torch.erf(x)) * seen


class Relu2(nn.Module):
    """relu(x)^2 of x = q . k[s] / n + bias, n keys being seen."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Softmax`."""
        return F.relu(_per_key(q, k, bias, seen)).square() * seen


def _per_key(q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    return q @ k.mT / seen.sum(-1, keepdim=True) + bias


class DistanceBias(nn.Module, abc.ABC):
    """A number for every distance."""

    @abc.abstractmethod
    def row(self, past: int, ahead: int) -> Tensor:
        """(past + 1 + ahead,) for keys from ``past`` steps before a query to ``ahead`` behind it."""

    def forward(self, L: int, T: int, causal: bool) -> Tensor:
        """(L, T) for the last L of T steps and all of them; zero where a causal query does not look."""
        row = self.row(T - 1, 0 if causal else L - 1)
        if L == 1:
            return row[None]
        row = F.pad(row, (0, T + L - row.shape[0]))  # rows of one step less begin one step earlier each time
        return row.repeat(L)[L - 1 : -1].view(L, -1)[:, :T]


class SimpleBias(DistanceBias):
    """A learned number for every distance.

    Args:
        width: S, which does not matter.
        max_len: the longest sequence, or chunk, that it serves.
    Raises:
        ValueError: for max_len < 1; on a longer sequence.
    """

    def __init__(self, width: int, max_len: int):
        super().__init__()
        require_max_len("a simple bias", max_len)
        self.max_len = max_len
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_len - 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.rel_pos_bias.normal_(std=0.02)

    def longest(self) -> int:
        """See :func:`longwave.nn.longest`."""
        return self.max_len

    def row(self, past: int, ahead: int) -> Tensor:
        require_max_len("a simple bias", self.max_len, past + 1)
        return self.rel_pos_bias[self.max_len - 1 - past : self.max_len + ahead]


class RotaryBias(DistanceBias):
    """<R_m alpha, R_n beta>, R turning pairs of features (i, i + S/2) by the position times 10,000^(-2i/S).

    It depends on the distance m - n alone, and serves any.

    Args:
        width: S, even.
    Raises:
        ValueError: for an odd width.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 2:
            raise ValueError(f"a rotary bias turns pairs of features, so d_qk is even; got {width}")
        self.alpha, self.beta = (nn.Parameter(torch.empty(1, width)) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.alpha.normal_(std=0.02)
        self.beta.normal_(std=0.02)

    def row(self, past: int, ahead: int) -> Tensor:
        if stands_still(self):  # what is kept serves many lengths
            longer = 1 << past.bit_length()
            return self.between(longer, ahead)[longer - past :]
        return self.between(past, ahead)

    @derived
    def between(self, past: int, ahead: int) -> Tensor:
        """See :meth:`row`. Angles are in float64."""
        alpha, beta = widened(self.alpha, self.beta)
        (a, b), (c, d) = alpha[0].chunk(2), beta[0].chunk(2)
        rates = 10_000.0 ** (-torch.arange(len(a), device=a.device, dtype=torch.float64) / len(a))
        angles = torch.arange(-past, ahead + 1, device=a.device)[:, None] * rates
        return angles.cos().to(a.dtype) @ (a * c + b * d) + angles.sin().to(a.dtype) @ (b * c - a * d)


class WeightsSpec(PartSpec):
    """How products of queries and keys become weights, as data."""

    def build(self) -> nn.Module:
        """The module."""
        return self._built()


class BiasSpec(PartSpec):
    """A bias by distance as data."""

    def build(self, width: int) -> nn.Module:
        """The module, freshly drawn."""
        return self._built(width)


WEIGHTS: Parts[nn.Module, WeightsSpec] = Parts(
    "attention function", WeightsSpec, given=(), classes={"softmax": Softmax, "laplace": Laplace, "relu2": Relu2}
)
BIASES: Parts[nn.Module, BiasSpec] = Parts(
    "bias", BiasSpec, given=("width",), classes={"rotary": RotaryBias, "simple": SimpleBias}
)
AnyWeights = Annotated[SerializeAsAny[WeightsSpec], BeforeValidator(WEIGHTS.field)]
AnyBias = Annotated[SerializeAsAny[BiasSpec], BeforeValidator(BIASES.field)]


class MegaLayer(Mixer):
    """What both directions have in common: all but the average and what attention sees.

    Args:
        d_model, d_qk, expand, chunk, attention, bias, norm: see :class:`Mega`.
        move: what averages.
    """

    move: Any

    def __init__(
        self,
        d_model: int,
        d_qk: int,
        expand: float,
        chunk: int | None,
        move: nn.Module,
        attention: AnyWeights,
        bias: AnyBias,
        norm: AnyNorm | None,
    ):
        super().__init__()
        S, E = d_qk, round(expand * d_model)
        if S < 1 or E < 1:
            raise ValueError(f"{self.name} needs d_qk >= 1 and expand * d_model >= 1; got {S} and {expand} * {d_model}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"{self.name} needs chunk >= 1 steps, or None for no chunks; got {chunk}")
        self.d_model, self.chunk, self.widths = d_model, chunk, (S, E)
        self.norm = nn.Identity() if norm is None else NORMS.read(norm).build(d_model)
        self.move = move
        self.activation = nn.SiLU()  # of the authors' code; the paper has none
        self.v_proj, self.mx_proj = nn.Linear(d_model, E), nn.Linear(d_model, 2 * d_model + S + E)
        self.h_proj = nn.Linear(E, d_model)
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, S)) for _ in range(2))
        self.attention, self.rel_pos_bias = WEIGHTS.read(attention).build(), BIASES.read(bias).build(S)
        if chunk is not None and isinstance(self.rel_pos_bias, SimpleBias):
            require_max_len("a simple bias", self.rel_pos_bias.max_len, chunk)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.gamma.normal_(std=0.02)
        self.beta.zero_()

    def longest(self) -> int | None:
        """See :func:`longwave.nn.longest`: with chunks a bias has no end."""
        limits = [longest(self.move), longest(self.rel_pos_bias) if self.chunk is None else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def gates(self, averaged: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the average (B, L, D) makes: update gate u, queries q, keys k, reset gate r, and what h is without
        attention."""
        D, (S, E) = self.d_model, self.widths
        u, zr, hx = self.mx_proj(self.activation(averaged)).split([D, S + E, D], dim=-1)
        z, r = F.silu(zr).split([S, E], dim=-1)
        q, k = torch.addcmul(self.beta, z[..., None, :], self.gamma).unbind(-2)
        return u, q, k, r, hx

    def update(self, x: Tensor, u: Tensor, r: Tensor, hx: Tensor, attended: Tensor) -> Tensor:
        """How far x goes towards h = silu(hx + W (r . attended))."""
        return torch.sigmoid(u) * (F.silu(hx + self.h_proj(r * attended)) - x)

    def look_up(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """q (..., L, S), k (..., T, S), v (..., T, E) -> (..., L, E)."""
        return self.attention(q, k, bias, seen).to(v.dtype) @ v

    def in_chunks(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attention of q (B, L, S), k and v within chunks, the first of which begins with the first step."""
        L = q.shape[1]
        seen = is_real(L, q.new_zeros(q.shape[0], dtype=torch.int64) if padding is None else padding)
        if self.chunk is None or self.chunk >= L:
            return self.look_up(q, k, v, self.among(seen), self.rel_pos_bias(L, L, self.causal))
        C, more = self.chunk, -L % self.chunk
        q, k, v = (F.pad(t, (0, 0, 0, more)).unflatten(1, (-1, C)) for t in (q, k, v))
        seen = F.pad(seen, (0, more)).unflatten(1, (-1, C))
        return self.look_up(q, k, v, self.among(seen), self.rel_pos_bias(C, C, self.causal)).flatten(1, 2)[:, :L]

    def among(self, real: Tensor) -> Tensor:
        """What queries see of the same steps, of which some are real, (..., T) -> (..., 1 or T, T); all of a chunk of
        padding, which nobody asks about."""
        T = real.shape[-1]
        return real.new_ones(T, T).tril() if self.causal else (real | ~real.any(-1, keepdim=True))[..., None, :]


class MegaState(NamedTuple):
    move: ConvState | ConvPastState  # the filter's, (B, D, N) of a moving average
    kv: Tensor  # (B, chunk - 1, S + E) the last keys and values
    place: Tensor  # (B,) int64: so many of them are of the current chunk


class MegaPastState(NamedTuple):
    move: ConvState | ConvPastState
    kv: Growing  # (B, t, S + E) all keys and values, where there are no chunks
    place: Tensor  # (B,) int64: so many of them are there; a shorter row's stand at the end


class Mega(MegaLayer, name="mega"):
    """y = u . (silu(W_x m + W_h (r . attention(q, k, v))) - x),  m = silu(filter * n + D n),  n = norm(x).

    The gates u, r and q, k are maps of m, v of n. A block adds x: (1 - u) x + u silu(...). What it norms first is what
    is gated then; the authors gate what came in, so theirs are blocks without a norm around mixers with one (pre-norm),
    or blocks with one behind the sum (post-norm).

    Args:
        d_model: D.
        d_qk: S, width of queries and keys.
        expand: E / D, E being the width of the values.
        chunk: C, attention sees no other chunk of so many steps; None for one chunk of everything.
        filter: what averages: a name in :data:`longwave.nn.FILTERS`, or ``{"kind": name, ...}``.
        attention: softmax, laplace or relu2.
        bias: of logits by distance: rotary, or ``{"kind": "simple", "max_len": n}``.
        norm: of what enters, while x itself is gated; or None.
    Raises:
        ValueError: where a size is below 1, a part is unknown or refuses a value, or a simple bias is shorter than the
            chunk; and on a sequence that is longer than a simple bias without chunks.
    Cost: O(L (C + log L)) time and O(L C) memory; without chunks O(L^2) of both.
    """

    without_filter = "looks at the past by content, within a chunk"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_qk": 4, "chunk": 4, "filter": {"kind": "ema", "d_state": 3}},
        {"d_qk": 3, "chunk": None, "expand": 1.5, "attention": "laplace", "norm": "layer",
         "filter": {"kind": "truncated", "support": 5}, "bias": {"kind": "simple", "max_len": 32}},
    )  # fmt: skip

    def __init__(
        self,
        d_model: int,
        d_qk: int = 64,
        expand: float = 2.0,
        chunk: int | None = 128,
        filter: AnyFilter = FILTERS.make("ema"),  # noqa: B008
        attention: AnyWeights = WEIGHTS.make("softmax"),  # noqa: B008
        bias: AnyBias = BIASES.make("rotary"),  # noqa: B008
        norm: AnyNorm | None = None,
    ):
        move = LongConv(FILTERS.read(filter).build(d_model))
        super().__init__(d_model, d_qk, expand, chunk, move, attention, bias, norm)

    def init_state(self, batch: int) -> MegaState | MegaPastState:
        like = like_output(self.v_proj)
        kv = like.new_zeros(batch, 0 if self.chunk is None else self.chunk - 1, sum(self.widths))
        move = conv_state(self.move.filter)(self.move.init_state(batch))
        kind = MegaPastState if self.chunk is None else MegaState
        return kind(move, kv, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def mix(self, x: Tensor, state: MegaState | MegaPastState | None, padding: Tensor | None):
        n = silence(self.norm(x), padding)
        averaged, past = self.move(n, None if state is None else state.move[0], padding)
        u, q, k, r, hx = self.gates(averaged)
        v = F.silu(self.v_proj(n))
        if state is None:  # padding is behind all real tokens, which do not see it
            return self.update(x, u, r, hx, self.in_chunks(q, k, v)), None
        new = silence(torch.cat([k, v], dim=-1), padding)
        attended, kv, place = self._go_on(q, new, state, padding)
        return self.update(x, u, r, hx, attended), type(state)(type(state.move)(past), kv, place)

    def _go_on(self, q: Tensor, new: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of q (B, L, S) behind a state, with keys and values (B, L, S + E); and what the state becomes."""
        L, t, place = q.shape[1], state.kv.shape[1], state.place
        kv = append_time(state.kv, new)
        T = kv.shape[1]
        if self.chunk is None or L == 1:
            k, v = kv.to(q.dtype).split(self.widths, dim=-1)
            step = torch.arange(T, device=q.device)
            seen = step >= (t - place)[:, None, None]
            if L > 1:
                seen = seen & (step <= step[t:, None])
            attended = self.look_up(q, k, v, seen, self.rel_pos_bias(L, T, True))
        else:  # every row begins with its chunk; what stood before is behind it, where nobody sees it
            step = (torch.arange(T, device=q.device) + (t - place)[:, None]) % T
            k, v = take_steps(kv.to(q.dtype), step).split(self.widths, dim=-1)
            attended = self.in_chunks(take_steps(F.pad(q, (0, 0, t, 0)), step), k, v)
            attended = take_steps(attended, torch.arange(L, device=q.device) + place[:, None])
        kv, place = last_steps(kv, padding, T), place + L if padding is None else place + L - padding
        if self.chunk is None:
            return attended, kv, place
        kept = kv[:, L:]
        if L > 1:  # a copy, without the rest of the past, with the room that steps take
            kept = append_time(kept[:, :0], kept, room=2 * self.chunk)
        return attended, kept, place % self.chunk


class BothWays(nn.Module):
    """y = filter * u + reverse(ahead * reverse(u)) + D u, the present counting in both: a :class:`LongConv` that has no
    state.

    Args:
        filter: of the past.
        ahead: of the future, of as many channels; None for nothing.
    """

    def __init__(self, filter: Filter, ahead: Filter | None):
        super().__init__()
        self.filter, self.ahead = filter, ahead
        self.D = nn.Parameter(torch.empty(filter.channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def forward(self, u: Tensor, state: None = None, padding: Tensor | None = None) -> tuple[Tensor, None]:
        """u (B, L, C) -> (B, L, C), and None; at padding u counts in D u alone."""
        x, L = silence(u, padding), u.shape[1]
        if self.ahead is None:
            y = causal_conv(x, self.filter(L))
        else:
            future = self.ahead(L)
            y = causal_conv(x, self.filter(L), skip=future[:, 0], k_future=future[:, 1:])
        return torch.addcmul(y, self.D.to(y.dtype), u), None


class MegaTwoSided(MegaLayer, WholeMixer, name="mega_two_sided"):
    """As :class:`Mega`, of m = silu(filter * n + reverse(ahead * reverse(n)) + D n), the present counting in both;
    attention sees all of a chunk.

    Args:
        d_model, d_qk, expand, chunk, filter, attention, bias, norm: see :class:`Mega`.
        ahead: what averages the future; None for nothing.
    Raises:
        ValueError: see :class:`Mega`.
    """

    causal = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_qk": 4, "chunk": 4, "attention": "relu2", "norm": "rms", "bias": {"kind": "simple", "max_len": 4},
         "filter": {"kind": "ema", "d_state": 3}, "ahead": {"kind": "ema", "d_state": 2}},
    )  # fmt: skip

    def __init__(
        self,
        d_model: int,
        d_qk: int = 64,
        expand: float = 2.0,
        chunk: int | None = 128,
        filter: AnyFilter = FILTERS.make("ema"),  # noqa: B008
        ahead: AnyFilter | None = FILTERS.make("ema"),  # noqa: B008
        attention: AnyWeights = WEIGHTS.make("softmax"),  # noqa: B008
        bias: AnyBias = BIASES.make("rotary"),  # noqa: B008
        norm: AnyNorm | None = None,
    ):
        past, future = FILTERS.read(filter), None if ahead is None else FILTERS.read(ahead)
        move = BothWays(past.build(d_model), None if future is None else future.build(d_model))
        super().__init__(d_model, d_qk, expand, chunk, move, attention, bias, norm)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        n = self.norm(x)
        u, q, k, r, hx = self.gates(self.move(n, None, padding)[0])
        return self.update(x, u, r, hx, self.in_chunks(q, k, F.silu(self.v_proj(n)), padding))
