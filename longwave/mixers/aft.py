"""AFT, an attention free transformer: per channel, an average of past values weighed by their keys and positions.

Source: Zhai et al. (2021) "An Attention Free Transformer", arXiv:2105.14103, eq. 2-6, causal, with a running maximum.
Parameter names are those of rish-16/aft-pytorch.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.mixers.positions import positions, rows_at
from longwave.mixers.states import Growing
from longwave.nn import Hint, append_time, like_output
from longwave.nn.channel import hidden_width
from longwave.nn.filters.base import require_max_len
from longwave.nn.module import widened
from longwave.nn.padding import is_real, last_steps
from longwave.ops import linear_scan, opaque, wkv
from longwave.ops.wkv import EMPTY, nothing

BLOCK = 16  # steps whose weights on each other are computed one by one


class AFTLayer(Mixer):
    """What all have in common:  y = W_o (sigmoid(q) . average of v by weights e^(k + w)).

    Args:
        d_model: D.
        expand: E / D, the width of queries, keys and values over that outside.
    """

    def __init__(self, d_model: int, expand: float):
        super().__init__()
        self.d_model, self.E = d_model, hidden_width(expand, d_model)
        self.to_q, self.to_k, self.to_v = (nn.Linear(d_model, self.E, bias=False) for _ in "qkv")
        self.project = nn.Linear(self.E, d_model)

    @abstractmethod
    def average(self, k: Tensor, v: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, Any]:
        """k, v (B, L, E) in float32 or better -> the average up to every step (B, L, E), and the state as of mix."""

    def mix(self, x: Tensor, state: Any, padding: Tensor | None):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        wide_k, wide_v = widened(k, v)
        y, state = self.average(wide_k, wide_v, state, padding)
        return self.project(q.sigmoid() * y.to(v.dtype)), state

    def wide(self, batch: int, *sizes: int) -> Tensor:
        """Zeros for a state, (batch, *sizes, E), float32 or better."""
        return widened(like_output(self.to_k))[0].new_zeros(batch, *sizes, self.E)


class AFTSimpleState(NamedTuple):
    sums: Tensor  # (B, 3, E) as of the op wkv: above, below, their exponent


class AFTSimple(AFTLayer, name="aft_simple"):
    """w = 0: a weight e^k[s] on every past value, whatever its position.

    Args:
        d_model: D.
        expand: E / D, the width of queries, keys and values over that outside.
    Raises:
        ValueError: for expand <= 0.
    """

    without_filter = "weighs every past token by its key alone, near or far"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"expand": 1.5},)

    def __init__(self, d_model: int, expand: float = 1.0):
        super().__init__(d_model, expand)

    def init_state(self, batch: int) -> AFTSimpleState:
        return AFTSimpleState(_no_sums(self.wide(batch, 1)))

    def average(self, k: Tensor, v: Tensor, state: AFTSimpleState | None, padding: Tensor | None):
        """RWKV-4's without decay."""
        still = k.new_zeros(self.E)
        y, sums = wkv(_without(k, padding), v, still, still, None if state is None else state.sums)
        return y, None if state is None else AFTSimpleState(sums)


class AFTFullState(NamedTuple):
    kv: Growing  # (B, t, 2 E) every key and value so far, aligned at the end
    length: Tensor  # (B, 1) how many


class AFTFull(AFTLayer, name="aft_full"):
    """w[t, s] learned for every two positions.

    Weights whose exponents w differ by more than 80 among the past of one step may be lost in float32 (700 in float64).

    Args:
        d_model: D.
        max_len: T, how many positions there are.
        expand: E / D, the width of queries, keys and values over that outside.
    Raises:
        ValueError: for expand <= 0, max_len < 1, or for more than max_len steps, on a CPU: a GPU would have to be
            waited for to know.
    Cost: O(L^2 E) time, O(L^2 E / 32) memory in training; O(t E) a step.
    """

    without_filter = "weighs every past token by its key and both positions"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_len": 32},)
    optim_hints: ClassVar[dict[str, Hint]] = {"wbias": Hint()}

    def __init__(self, d_model: int, max_len: int, expand: float = 1.0):
        super().__init__(d_model, expand)
        require_max_len("aft_full", max_len)
        self.wbias = nn.Parameter(torch.empty(max_len, max_len))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.wbias.normal_(std=0.02)

    def longest(self) -> int:
        """See :func:`longwave.nn.longest`."""
        return len(self.wbias)

    def init_state(self, batch: int) -> AFTFullState:
        like = like_output(self.to_k)
        length = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
        return AFTFullState(like.new_zeros(batch, 0, 2 * self.E), length)

    def average(self, k: Tensor, v: Tensor, state: AFTFullState | None, padding: Tensor | None):
        """Of cached keys, too."""
        L, kv = k.shape[1], torch.cat([k, v], dim=2)
        kv = kv if state is None else append_time(state.kv, kv)
        T, before = kv.shape[1], None if state is None else state.length
        rows = rows_at(self.name, widened(self.wbias)[0], positions(L, k.device, before, padding))
        places = torch.arange(T, device=k.device) - (T - L - (0 if before is None else before))  # < 0 before the first
        places = places.expand(rows.shape[0], -1)
        w = rows.gather(2, places.clamp(0, self.longest() - 1)[:, None].expand(-1, L, -1))
        k, v = kv.to(k.dtype).chunk(2, dim=2)
        y = weighed(k.masked_fill((places < 0)[..., None], EMPTY), v, w)
        if before is None:
            return y, None
        if padding is None:
            return y, AFTFullState(kv, before + L)
        return y, AFTFullState(last_steps(kv, padding, T), before + L - padding[:, None])


@opaque(like=lambda k, v, w: k.new_empty(k.shape[0], w.shape[1], k.shape[2]))
def weighed(k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """sum_{s<=t} e^(w[t, s] + k[s]) v[s] / sum_{s<=t} e^(w[t, s] + k[s]) at the last L steps.

    What is before a block of steps is two products of matrices, under the largest key and the largest w; within the
    block, where the largest key may be yet to come, every weight is computed.

    Args:
        k, v: (B, T, E).
        w: (B or 1, L, T).
    Returns:
        (B, L, E).
    """
    L, T = w.shape[1:]
    ys = []
    for i in range(0, L, BLOCK):
        n, ws = T - L + i, w[:, i : i + BLOCK]
        b = ws.shape[1]
        own = ws[:, :, n : n + b, None] + k[:, None, n : n + b]  # (B, b, b, E)
        ahead = torch.ones(b, b, dtype=torch.bool, device=k.device).triu(1)
        own = own.masked_fill(ahead[..., None], -torch.inf)
        top = own.amax(2)
        if n:
            largest, most = k[:, :n].amax(1, keepdim=True), ws[..., :n].amax(2, keepdim=True)
            keys, weights = torch.exp(k[:, :n] - largest), torch.exp(ws[..., :n] - most)
            past = most + largest  # (B, b, E)
            top = torch.maximum(top, past)
        share = torch.exp(own - top[:, :, None])
        above, below = torch.einsum("btse,bse->bte", share, v[:, n : n + b]), share.sum(2)
        if n:
            share = torch.exp(past - top)
            above, below = above + share * (weights @ (keys * v[:, :n])), below + share * (weights @ keys)
        ys.append(above / below)
    return torch.cat(ys, dim=1)


class AFTConvState(NamedTuple):
    k: Tensor  # (B, S-1, E) the last keys
    v: Tensor  # (B, S-1, E)
    sums: Tensor  # (B, 3, E) of what is older than these


class AFTConv(AFTLayer, name="aft_conv"):
    """w[h, t - s] learned for the last S steps and every head h, and 0 before them: the causal form in one dimension.

    Args:
        d_model: D.
        window: S, how many steps back w reaches, the present one included.
        heads: groups of channels with a w each; divides E.
        expand: E / D, the width of queries, keys and values over that outside.
    Raises:
        ValueError: for expand <= 0, window < 1, or heads that do not divide E.
    Cost: O(L S E) time and memory in training; O(S E) a step.
    """

    without_filter = "weighs every past token by its key, and of the last ones by how far back they are"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"window": 3, "heads": 2},)
    optim_hints: ClassVar[dict[str, Hint]] = {"w": Hint()}

    def __init__(self, d_model: int, window: int = 32, heads: int = 8, expand: float = 1.0):
        super().__init__(d_model, expand)
        _require_window("aft_conv", window)
        if heads < 1 or self.E % heads:
            raise ValueError(f"aft_conv: heads = {heads} does not divide expand * d_model = {self.E}")
        self.w = nn.Parameter(torch.empty(heads, window))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.w.normal_(std=0.02)

    def init_state(self, batch: int) -> AFTConvState:
        past = self.wide(batch, self.w.shape[1] - 1)
        return AFTConvState(torch.full_like(past, EMPTY), past, _no_sums(self.wide(batch, 1)))

    def average(self, k: Tensor, v: Tensor, state: AFTConvState | None, padding: Tensor | None):
        """Of the window step by step, and of what is older by running sums."""
        (w,) = widened(self.w)
        bias = w.flip(1).repeat_interleave(self.E // len(w), dim=0)  # (E, S), the oldest first
        y, after = _windowed(k, v, bias, self.init_state(k.shape[0]) if state is None else state, padding)
        return y, None if state is None else AFTConvState(*after)


class AFTLocalState(NamedTuple):
    k: Tensor  # (B, S-1, E) the last keys
    v: Tensor  # (B, S-1, E)
    sums: Tensor  # (B, 3, E) of what is older than these
    length: Tensor  # (B, 1) how many steps there were


class AFTLocal(AFTLayer, name="aft_local"):
    """w[t, s] learned for every position t and the last S before it, and 0 before these.

    Args:
        d_model: D.
        max_len: T, how many positions there are.
        window: S, how many steps back w reaches, the present one included.
        expand: E / D, the width of queries, keys and values over that outside.
    Raises:
        ValueError: for expand <= 0, max_len < 1, window < 1, or for more than max_len steps, on a CPU: a GPU would
            have to be waited for to know.
    Cost: O(L S E) time and memory in training; O(S E) a step.
    """

    without_filter = "weighs every past token by its key, and the last ones by their positions, too"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_len": 32, "window": 3},)
    optim_hints: ClassVar[dict[str, Hint]] = {"wbias": Hint()}

    def __init__(self, d_model: int, max_len: int, window: int = 32, expand: float = 1.0):
        super().__init__(d_model, expand)
        require_max_len("aft_local", max_len)
        _require_window("aft_local", window)
        self.wbias = nn.Parameter(torch.empty(max_len, window))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.wbias.normal_(std=0.02)

    def longest(self) -> int:
        """See :func:`longwave.nn.longest`."""
        return len(self.wbias)

    def init_state(self, batch: int) -> AFTLocalState:
        past = self.wide(batch, self.wbias.shape[1] - 1)
        length = torch.zeros(batch, 1, dtype=torch.int64, device=past.device)
        return AFTLocalState(torch.full_like(past, EMPTY), past, _no_sums(self.wide(batch, 1)), length)

    def average(self, k: Tensor, v: Tensor, state: AFTLocalState | None, padding: Tensor | None):
        """Of the window step by step, and of what is older by running sums."""
        *window, length = self.init_state(k.shape[0]) if state is None else state
        place = positions(k.shape[1], k.device, None if state is None else length, padding)
        bias = rows_at(self.name, widened(self.wbias)[0], place).flip(-1)[:, :, None]  # (B or 1, L, 1, S), oldest first
        y, after = _windowed(k, v, bias, window, padding)
        if state is None:
            return y, None
        return y, AFTLocalState(*after, length + (k.shape[1] if padding is None else k.shape[1] - padding[:, None]))


def _require_window(what: str, window: int) -> None:
    if window < 1:
        raise ValueError(f"{what} needs window >= 1, steps back to which w reaches; got {window}")


def _no_sums(step: Tensor) -> Tensor:
    return nothing(step, step.dtype)


def _without(k: Tensor, padding: Tensor | None) -> Tensor:
    """Keys (B, L, E) that weigh nothing at padding beside any other."""
    return k if padding is None else k.masked_fill(~is_real(k.shape[1], padding)[..., None], EMPTY)


def _windowed(
    k: Tensor, v: Tensor, bias: Tensor, before: Any, padding: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The average over the last S steps under bias (..., L, E, S), the oldest first, and all that is older under 0.

    ``before`` and what is returned are the keys and values of the last S - 1 steps, and the sums of what is older.
    """
    L, S = k.shape[1], bias.shape[-1]
    past_k, past_v, sums = (t.to(k.dtype) for t in before[:3])
    keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)  # (B, S-1 + L, E)
    above, below, exponent = _sums_before(_without(keys[:, :L], padding), values[:, :L], sums)
    weights = keys.unfold(1, S, 1) + bias  # (B, L, E, S)
    top = torch.maximum(weights.amax(-1), exponent[:, :L])
    weights, older = torch.exp(weights - top[..., None]), torch.exp(exponent[:, :L] - top)
    y = torch.einsum("bles,bles->ble", weights, values.unfold(1, S, 1)) + older * above[:, :L]
    y = y / (weights.sum(-1) + older * below[:, :L])
    last_k, last_v = (last_steps(t, padding, S - 1).clone() for t in (keys, values))
    return y, (last_k, last_v, torch.stack([above[:, L], below[:, L], exponent[:, L]], dim=1))


def _sums_before(k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is above and below the average of all steps before each of k, v (B, L, E), and before one that follows, each
    (B, L + 1, E) and divided by e to the exponent, which is the largest key so far."""
    a, b, p = (t[:, None] for t in sums.unbind(1))
    exponent = torch.cat([p, k], dim=1).cummax(1).values
    past, now = torch.exp(exponent[:, :-1] - exponent[:, 1:]), torch.exp(k - exponent[:, 1:])
    above, below = (torch.cat([h, linear_scan(past, x, h[:, 0])], dim=1) for h, x in ((a, now * v), (b, now)))
    return above, below, exponent
