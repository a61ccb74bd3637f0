"""Gated DeltaNet: a matrix memory that forgets by a gate and corrects what it knows of a key, as in Qwen3-Next.

Source: Yang, Kautz & Hatamizadeh (2024) "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464,
eq. 10 and fig. 1. Parameter names are those of Qwen3NextGatedDeltaNet in Hugging Face transformers, which has the rows
of both projections in another order.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Hint, NormGate, Response, like_output, slowest_modes
from longwave.nn.module import draw_steps, step_range, widened
from longwave.nn.padding import padded_short_conv, silence
from longwave.ops import gated_delta_rule, rms_norm

EPS = 1e-6  # added to the squared norm of queries and keys


class GatedDeltaNetState(NamedTuple):
    conv: Tensor  # (B, K-1, 2 G N + H P) the short convolution's past
    memory: Tensor  # (B, H, N, P)


class GatedDeltaNet(Mixer, name="gated_deltanet"):
    """y = W_o (norm(rule(q / |q|, k / |k|, v)) . silu(z)),  [q | k | v] = silu(conv(W x)),  with decays
    exp(-exp(A_log) softplus(a + dt_bias)) and beta = sigmoid(b); see :func:`longwave.ops.gated_delta_rule`.

    Args:
        d_model: D.
        heads, head_dim: H and P, heads of values and their width, by default D / H.
        groups, key_dim: G, heads of queries and keys, divides H, by default H; and N, their width, by default D / H.
        d_conv: K, taps of the short convolution.
        eps: of the norm behind the rule.
        dt_min, dt_max: initial softplus(dt_bias) are log-uniform between them.
    Raises:
        ValueError: for sizes below 1, groups that do not divide heads, or unless 0 < dt_min <= dt_max.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 4, "groups": 2, "key_dim": 3, "head_dim": 5, "d_conv": 2},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"A_log": Hint(), "dt_bias": Hint()}

    def __init__(
        self, d_model: int, heads: int = 4, groups: int | None = None, key_dim: int | None = None,
        head_dim: int | None = None, d_conv: int = 4, eps: float = 1e-6, dt_min: float = 1e-3, dt_max: float = 1e-1,
    ):  # fmt: skip
        super().__init__()
        G, share = heads if groups is None else groups, d_model // max(1, heads)
        N, P = share if key_dim is None else key_dim, share if head_dim is None else head_dim
        for option, value in {"heads": heads, "groups": G, "key_dim": N, "head_dim": P, "d_conv": d_conv}.items():
            if value < 1:
                raise ValueError(f"gated_deltanet needs {option} >= 1; got {value}")
        if heads % G:
            raise ValueError(f"gated_deltanet: groups = {G} does not divide heads = {heads}")
        self.d_model, self.groups, self.log_dt_range = d_model, G, step_range(dt_min, dt_max)
        self.keys, self.values, width = G * N, heads * P, 2 * G * N + heads * P
        self.in_proj_qkvz = nn.Linear(d_model, width + self.values, bias=False)
        self.in_proj_ba = nn.Linear(d_model, 2 * heads, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in "Ad")
        self.norm = NormGate(P, 1, eps)
        self.out_proj = nn.Linear(self.values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.uniform_(1, 16).log_()
        draw_steps(self.dt_bias, *self.log_dt_range)

    def _decay(self, a: Tensor) -> Tensor:
        A_log, bias = widened(self.A_log, self.dt_bias)
        return -A_log.exp() * F.softplus(a + bias)

    def responses(self) -> list[Response]:
        """Its decays depend on the input: those of a silent one."""
        return [slowest_modes(self._decay(torch.zeros_like(self.dt_bias)).exp()[:, None])]

    def init_state(self, batch: int) -> GatedDeltaNetState:
        like, (wide,), (C, _, K) = like_output(self.in_proj_qkvz), widened(self.A_log), self.conv1d.weight.shape
        memory = wide.new_zeros(batch, len(wide), self.keys // self.groups, self.values // len(wide))
        return GatedDeltaNetState(like.new_zeros(batch, K - 1, C), memory)

    def mix(self, x: Tensor, state: GatedDeltaNetState | None, padding: Tensor | None):
        past, memory = (None, None) if state is None else state
        qkv, z = self.in_proj_qkvz(x).split([2 * self.keys + self.values, self.values], dim=-1)
        qkv, past = padded_short_conv(qkv, self.conv1d.weight[:, 0], None, past, padding, silu=True)
        qk, v = qkv.split([2 * self.keys, self.values], dim=-1)
        qk, v, z = qk.unflatten(2, (2 * self.groups, -1)), *(t.unflatten(2, (len(self.A_log), -1)) for t in (v, z))
        N, (b, a) = qk.shape[3], self.in_proj_ba(x).chunk(2, dim=-1)
        q, k = rms_norm(qk, qk.new_full((N,), N**-0.5), EPS / N).chunk(2, dim=2)  # of norm 1
        decay, beta = (silence(t, padding) for t in (self._decay(a), b.sigmoid()))  # padding changes nothing
        y, memory = gated_delta_rule(q * N**-0.5, k, v, decay, beta, memory)
        state = None if state is None else GatedDeltaNetState(past, memory)
        return self.out_proj(self.norm(y, z).flatten(2)), state
