"""RetNet: linear attention with rotary positions and one constant decay a head, which is a recurrence.

Source: Sun et al. (2023) "Retentive Network: A Successor to Transformer for Large Language Models", arXiv:2307.08621,
sec. 2.1-2.2. Parameter names are those of microsoft/torchscale.
"""

from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.mixers.states import Growing
from longwave.nn import Response, append_time, like_output
from longwave.nn.module import StaysWide
from longwave.nn.padding import is_real
from longwave.ops import at_least_float32, linear_attention, rms_norm, rotary
from longwave.spec import Parts, PartSpec


class Retained(NamedTuple):
    """What a normaliser is told of a chunk.

    Attributes:
        q, k: (B, L, H, N) turned queries, and keys, which are zero at padding.
        start: (B,) tokens before the chunk, or None: none.
        decay: (H,) logarithms.
        at_padding: (B, L, H) the same, and 0 at padding; (H,) where there is none.
        padding: see :meth:`longwave.mixers.Mixer.mix`.
    """

    q: Tensor
    k: Tensor
    start: Tensor | None
    decay: Tensor
    at_padding: Tensor
    padding: Tensor | None

    def position(self) -> Tensor:
        """(B or 1, L) of every step, in tokens."""
        steps = torch.arange(self.q.shape[1], device=self.q.device)
        return steps[None] if self.start is None else self.start[:, None] + steps


class NoScale:
    """Scores as they are: the norm of every head divides their size out."""

    def init_state(self, like: Tensor) -> tuple[()]:
        """Nothing."""
        return ()

    def __call__(self, chunk: Retained, state: Any) -> tuple[None, Any]:
        """Nothing to divide by, and the state as it came."""
        return None, state


class ScoreSums:
    """max(|sum of the scores|, sqrt(sum of the decays)).

    Source: arXiv:2307.08621, sec. 2.2, "Retention Score Normalization". It counts only as far as the epsilon of the
    norm behind it does.

    Args:
        constant: to gradients it is one.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant

    def init_state(self, like: Tensor) -> Tensor:
        """(B, H, N, 1) the decayed sum of all keys, from the heads' states (B, H, N, P)."""
        return torch.zeros_like(like[..., :1])

    def __call__(self, chunk: Retained, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """What y is divided by, (B, L, H, 1), and the next state."""
        one = torch.ones_like(chunk.k[..., :1])
        sums, state = linear_attention(chunk.q, chunk.k, one, chunk.at_padding, state)
        sums = torch.maximum(sums.abs(), sums_of_decays(chunk).sqrt())
        return sums.detach() if self.constant else sums, state


def sums_of_decays(chunk: Retained) -> Tensor:
    """sum_{s <= t} exp((t - s) decay),  (B or 1, L, H, 1)."""
    decay = chunk.decay.double()
    return (torch.expm1((chunk.position()[..., None] + 1) * decay) / torch.expm1(decay)).to(chunk.q.dtype)[..., None]


AT_MOST = 5e4  # of what scores are divided by


class KeysSoFar(NamedTuple):
    k: Growing  # (B, t, H, N)
    position: Growing  # (B, t) int64, of every key, -1 at padding


class AbsoluteScoreSums:
    """sqrt(r) clamp(sum of |scores| / sqrt(r), 1, 5e4),  r the sum of the decays: as torchscale's parallel form has it.

    To gradients it is a constant. No state of one size gives it, so it keeps all keys: O(L^2) time. torchscale's own
    recurrence leaves it out.
    """

    def init_state(self, like: Tensor) -> KeysSoFar:
        """No keys."""
        B, H, N, _ = like.shape
        return KeysSoFar(like.new_zeros(B, 0, H, N), torch.zeros(B, 0, dtype=torch.int64, device=like.device))

    def __call__(self, chunk: Retained, state: KeysSoFar | None) -> tuple[Tensor, KeysSoFar | None]:
        """What y is divided by, (B, L, H, 1), and the next state."""
        B, L = chunk.k.shape[:2]
        k, here = chunk.k, chunk.position()
        position = here.expand(B, L)
        if chunk.padding is not None:
            position = position.masked_fill(~is_real(L, chunk.padding), -1)
        if state is not None:
            state = KeysSoFar(append_time(state.k, k), append_time(state.position, position))
            k, position = state
        lag = here[:, :, None] - position[:, None]  # (B, L, t)
        past = (lag >= 0) & (position >= 0)[:, None]
        decay = torch.where(past[..., None], (lag[..., None] * chunk.decay).exp(), 0)  # (B, L, t, H)
        sums = torch.einsum("blhn,bthn->blth", chunk.q, k.to(chunk.q.dtype)).abs().mul(decay).sum(2)[..., None]
        root = sums_of_decays(chunk).sqrt()
        return (root * (sums / root).clamp(1, AT_MOST)).detach(), state


class NormalizerSpec(PartSpec):
    """A normaliser of retention as data."""

    def build(self) -> Any:
        """It."""
        return self._built()


NORMALIZERS: Parts[Any, NormalizerSpec] = Parts(
    "normalizer",
    NormalizerSpec,
    given=(),
    classes={"none": NoScale, "score_sums": ScoreSums, "absolute_score_sums": AbsoluteScoreSums},
)
AnyNormalizer = Annotated[SerializeAsAny[NormalizerSpec], BeforeValidator(NORMALIZERS.field)]


class RelativePositions(StaysWide):
    """Angles of the rotary positions, base^(-n / (N/2 - 1)) for n < N/2, and log(1 - 2^(-5-h)) of every head."""

    angle: Tensor
    decay: Tensor

    def __init__(self, heads: int, width: int, base: float):
        super().__init__()
        self.base = base
        self.register_buffer("angle", torch.empty(width // 2))
        self.register_buffer("decay", torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.angle.copy_(self.base ** -torch.linspace(0, 1, len(self.angle), dtype=torch.float64))
        self.decay.copy_(torch.log1p(-(2.0 ** (-5 - torch.arange(len(self.decay), dtype=torch.float64)))))


class RetNetState(NamedTuple):
    position: Tensor  # (B,) int64, tokens so far
    kv: Tensor  # (B, H, N, P)
    scale: Any  # of the normaliser


class RetNetPastState(NamedTuple):
    position: Tensor
    kv: Tensor
    scale: tuple[Growing, Growing]  # of a normaliser that keeps all keys


class RetNet(Mixer, name="retnet"):
    """y = W_o (silu(W_g x) * norm(S q)),  S[t] = (1 - 2^(-5-h)) S[t-1] + k v^T in head h; q and k are turned.

    Args:
        d_model: D.
        heads: H, divides D, into an even width N, and H P.
        expand: H P / D, the width of the values over that outside.
        rotary_base: of the slowest pair's angle, 1 / base; the fastest turns by 1.
        normalizer: none; score_sums, the paper's division by the sum of scores; or absolute_score_sums, torchscale's,
            whose state grows.
        norm_eps: > 0, of the norm of every head, which has no weight.
    Raises:
        ValueError: where heads does not divide as it must, or an option is out of range.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 1, "expand": 0.5, "normalizer": "score_sums"},
        {"heads": 1, "normalizer": "absolute_score_sums"},
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand: float = 2,
        rotary_base: float = 10_000.0,
        normalizer: AnyNormalizer = NORMALIZERS.make("none"),  # noqa: B008
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        E = round(expand * d_model)
        if heads < 1 or d_model % (2 * heads):
            raise ValueError(f"retnet: heads = {heads} does not divide d_model = {d_model} into even widths")
        if E < 1 or E % heads:
            raise ValueError(f"retnet: heads = {heads} does not divide expand * d_model = {E}, the width of the values")
        if not (rotary_base > 0 and norm_eps > 0):
            raise ValueError(f"retnet needs rotary_base > 0 and norm_eps > 0; got {rotary_base} and {norm_eps}")
        self.d_model, self.heads, self.norm_eps = d_model, heads, norm_eps
        self.q_proj, self.k_proj = (nn.Linear(d_model, d_model, bias=False) for _ in "qk")
        self.v_proj, self.g_proj = (nn.Linear(d_model, E, bias=False) for _ in "vg")
        self.out_proj = nn.Linear(E, d_model, bias=False)
        self.rel_pos = RelativePositions(heads, d_model // heads, rotary_base)
        self.normalizer: Any = NORMALIZERS.read(normalizer).build()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def responses(self) -> list[Response]:
        """What is left of a key after a time, in every head; the eigenvalues turn with the positions."""
        angle, decay = self.rel_pos.angle, self.rel_pos.decay

        def taps(length: int) -> Tensor:
            return torch.exp(decay[:, None] * torch.arange(length, device=decay.device))

        return [Response("heads", self.heads, taps, torch.polar(decay.exp()[:, None].expand(-1, len(angle)), angle))]

    def init_state(self, batch: int) -> RetNetState | RetNetPastState:
        like, N, P = like_output(self.q_proj), self.d_model // self.heads, self.out_proj.in_features // self.heads
        kv = like.new_zeros(batch, self.heads, N, P, dtype=at_least_float32(like.dtype))
        position = torch.zeros(batch, dtype=torch.int64, device=like.device)
        scale = self.normalizer.init_state(kv)
        return (RetNetPastState if isinstance(scale, KeysSoFar) else RetNetState)(position, kv, scale)

    def mix(self, x: Tensor, state: RetNetState | RetNetPastState | None, padding: Tensor | None):
        L, H, angle, decay = x.shape[1], self.heads, self.rel_pos.angle, self.rel_pos.decay
        start, kv, scale = (None, None, None) if state is None else state
        q, k, v = (proj(x).unflatten(-1, (H, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(q, start, angle, H), rotary(k * k.shape[3] ** -0.5, start, angle, H)
        at_padding = decay
        if padding is not None:  # where keys are zero, as x is
            at_padding = decay.expand(*v.shape[:3]).masked_fill(~is_real(L, padding)[..., None], 0)
        y, kv = linear_attention(q, k, v, at_padding, kv)
        sums, scale = self.normalizer(Retained(q, k, start, decay, at_padding, padding), scale)
        y = y if sums is None else (y / sums).to(v.dtype)
        y = F.silu(self.g_proj(x)) * rms_norm(y, y.new_ones(y.shape[3:]), self.norm_eps).flatten(2)
        if state is not None:
            state = type(state)(state.position + (L if padding is None else L - padding), kv, scale)
        return self.out_proj(y), state
