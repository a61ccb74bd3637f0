"""RWKV-4: a decaying average of values weighed by their keys, and the channel mix that looks one token back.

Source: Peng et al. (2023) "RWKV", arXiv:2305.13048, eq. 11-19. Parameter names are those of BlinkDL/RWKV-LM.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Hint, Response, derived
from longwave.nn.channel import hidden_width
from longwave.nn.module import widened
from longwave.nn.padding import is_real, padded_short_conv
from longwave.ops import wkv
from longwave.ops.wkv import nothing


class RWKV4State(NamedTuple):
    last: Tensor  # (B, 1, D) the input before
    sums: Tensor  # (B, 3, A) those of the op


class RWKV4ChannelState(NamedTuple):
    last: Tensor  # (B, 1, D) the input before


class TokenShift(Mixer):
    """What the two have in common:  x mu + x[t-1] (1 - mu),  one mu for every map that reads it.

    Args:
        d_model: D.
        depth: where in its model the layer stands, 0 first and 1 last; the later, the less it looks back at the start.
    Raises:
        ValueError: unless 0 <= depth <= 1.
    """

    def __init__(self, d_model: int, depth: float):
        super().__init__()
        if not 0 <= depth <= 1:
            raise ValueError(f"{self.name} needs 0 <= depth <= 1, from the first layer to the last; got {depth}")
        self.d_model, self.depth = d_model, depth

    def initial_mix(self, power: float = 1.0) -> Tensor:
        """(1, 1, D) from 0 to 1, the lower channels the more of the token before."""
        return (torch.arange(self.d_model) / self.d_model)[None, None] ** (power * (1 - self.depth))

    def shifted(
        self, x: Tensor, taps: tuple[Tensor, ...], past: Tensor | None, padding: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """x mixed with what was before it, for the (D, 2) taps of every map; and the last real x (B, 1, D)."""
        found = [padded_short_conv(x, weight, None, past, padding) for weight in taps]
        return [y for y, _ in found], found[0][1]


def _taps(*mixes: Tensor) -> tuple[Tensor, ...]:
    """(D, 2) of every mu (1, 1, D): 1 - mu and mu."""
    return tuple(torch.cat([1 - mu, mu], dim=1)[0].T.contiguous() for mu in widened(*mixes))


class RWKV4(TokenShift, name="rwkv4"):
    """y = W_o (sigmoid(r) . wkv(k, v)), the keys, values and receptances r linear maps of x between two tokens.

    The time mix. With ``rwkv4_channel`` behind it, a block of RWKV-4 is two of ours without a channel mixer:
    ``pattern=["rwkv4", "rwkv4_channel"], channel=None, norm="layer"``.

    Args:
        d_model: D.
        expand: A / D, the width of keys and values over that outside.
        depth: where in its model the layer stands, 0 first and 1 last: what it forgets and how fast, at the start.
    Raises:
        ValueError: for expand <= 0, or unless 0 <= depth <= 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"expand": 1.5, "depth": 0.0})
    optim_hints: ClassVar[dict[str, Hint]] = {"time_*": Hint()}

    def __init__(self, d_model: int, expand: float = 1.0, depth: float = 0.5):
        super().__init__(d_model, depth)
        A = hidden_width(expand, d_model)
        self.time_decay, self.time_first = nn.Parameter(torch.empty(A)), nn.Parameter(torch.empty(A))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, d_model))
        self.key = nn.Linear(d_model, A, bias=False)
        self.value = nn.Linear(d_model, A, bias=False)
        self.receptance = nn.Linear(d_model, A, bias=False)
        self.output = nn.Linear(A, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        channels = torch.arange(len(self.time_decay))
        self.time_decay.copy_(-5 + 8 * (channels / max(1, len(channels) - 1)) ** (0.7 + 1.3 * self.depth))
        self.time_first.copy_(torch.tensor(0.3).log() + 0.5 * ((channels + 1) % 3 - 1))
        self.time_mix_k.copy_(self.initial_mix())
        self.time_mix_v.copy_(self.initial_mix() + 0.3 * self.depth)
        self.time_mix_r.copy_(self.initial_mix(0.5))

    @derived
    def taps(self) -> tuple[Tensor, ...]:
        """(D, 2) those of the token shift, for keys, values and receptances."""
        return _taps(self.time_mix_k, self.time_mix_v, self.time_mix_r)

    @derived
    def w(self) -> Tensor:
        """(A,) logarithm of the decay a step."""
        return -widened(self.time_decay)[0].exp()

    def responses(self) -> list[Response]:
        """What weighs the values while all keys are the same, before it is divided by its sum."""
        w, (u,) = self.w(), widened(self.time_first)

        def taps(length: int) -> Tensor:
            past = w[:, None] * torch.arange(-1, length - 1, device=w.device)
            return torch.cat([u[:, None], past[:, 1:]], dim=1).exp()

        return [Response("weights at equal keys", len(w), taps, torch.complex(w.exp(), torch.zeros_like(w)))]

    def init_state(self, batch: int) -> RWKV4State:
        mix, decay = self.time_mix_k, self.time_decay
        (wide,) = widened(decay)
        return RWKV4State(mix.new_zeros(batch, 1, self.d_model), nothing(wide.expand(batch, 1, -1), wide.dtype))

    def mix(self, x: Tensor, state: RWKV4State | None, padding: Tensor | None):
        past, before = (None, None) if state is None else state
        (k, v, r), last = self.shifted(x, self.taps(), past, padding)
        k, v = self.key(k), self.value(v)
        y, after = wkv(k, v, self.w(), self.time_first, before)
        y = self.output(self.receptance(r).sigmoid() * y)
        if before is None:
            return y, None
        if padding is not None:
            after = _sums_of_real(k, v, self.w(), before, padding).to(after.dtype)
        return y, RWKV4State(last, after)


def _sums_of_real(k: Tensor, v: Tensor, w: Tensor, before: Tensor, padding: Tensor) -> Tensor:
    """The sums (B, 3, A) after the last real step of every row, in float64.

    Those of the op are after the padding. Turning back their decay would not do: so many steps of it, rounded.
    """
    L = k.shape[1]
    real = is_real(L, padding)[..., None]
    ages = (L - 1 - padding)[:, None] - torch.arange(L, device=k.device)  # of a step at the last real one
    k, v, w, (a, b, p) = k.double(), v.double(), w.double(), before.double().unbind(1)
    exponents = torch.where(real, k + ages[..., None] * w, -torch.inf)
    p = p + (L - padding)[:, None] * w
    top = torch.maximum(exponents.amax(1), p)
    weights, kept = torch.exp(exponents - top[:, None]), torch.exp(p - top)
    return torch.stack([(weights * v).sum(1) + kept * a, weights.sum(1) + kept * b, top], dim=1)


class RWKV4Channel(TokenShift, name="rwkv4_channel"):
    """y = sigmoid(W_r x_r) . W_v relu(W_k x_k)^2,  x_r and x_k between two tokens.

    The channel mix of RWKV-4: a mixer, as it looks one token back. It stands behind every ``rwkv4``.

    Args:
        d_model: D.
        expand: width inside over that outside.
        depth: where in its model the layer stands, 0 first and 1 last.
    Raises:
        ValueError: for expand <= 0, or unless 0 <= depth <= 1.
    """

    without_filter = "looks at the token before and the present one"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"expand": 1.5},)
    optim_hints: ClassVar[dict[str, Hint]] = {"time_*": Hint()}

    def __init__(self, d_model: int, expand: float = 4.0, depth: float = 0.5):
        super().__init__(d_model, depth)
        hidden = hidden_width(expand, d_model)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, d_model))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, d_model))
        self.key = nn.Linear(d_model, hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(hidden, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.time_mix_k.copy_(self.initial_mix())
        self.time_mix_r.copy_(self.initial_mix())

    @derived
    def taps(self) -> tuple[Tensor, ...]:
        """(D, 2) those of the token shift, for keys and receptances."""
        return _taps(self.time_mix_k, self.time_mix_r)

    def init_state(self, batch: int) -> RWKV4ChannelState:
        return RWKV4ChannelState(self.time_mix_k.new_zeros(batch, 1, self.d_model))

    def mix(self, x: Tensor, state: RWKV4ChannelState | None, padding: Tensor | None):
        past = None if state is None else state.last
        (k, r), last = self.shifted(x, self.taps(), past, padding)
        y = self.receptance(r).sigmoid() * self.value(self.key(k).relu().square())
        return y, None if state is None else RWKV4ChannelState(last)
