"""GLA: linear attention whose state forgets every key channel at a rate of its own, read off the input.

Source: Yang et al. (2024) "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635,
sec. 4.1-4.4. Parameter names, and the norm, are those of the authors' fla-org/flash-linear-attention.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Response, RMSNorm, like_output, slowest_modes
from longwave.nn.module import widened
from longwave.nn.padding import silence
from longwave.ops import at_least_float32, linear_attention


class GLAState(NamedTuple):
    kv: Tensor  # (B, H, N, P)


class GLA(Mixer, name="gla"):
    """y = W_o (silu(W_g x) * norm(S q)),  S[t] = diag(a) S[t-1] + k v^T,  log a = logsigmoid(W_2 W_1 x + b) / tau.

    Args:
        d_model: D.
        heads: H, divides both widths.
        expand_k: H N / D, the width of queries and keys over that outside.
        expand_v: H P / D, that of the values.
        gate_rank: R, rows of W_1.
        gate_logit_normalizer: tau > 0; the larger, the slower it forgets.
        norm_eps: > 0, of the norm of every head, which has one weight (P,) for all.
    Raises:
        ValueError: where heads does not divide as it must, or an option is out of range.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 1, "expand_k": 0.375, "expand_v": 0.5, "gate_rank": 2, "gate_logit_normalizer": 1.0},
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        K, V = round(expand_k * d_model), round(expand_v * d_model)
        for option, width in {"expand_k": K, "expand_v": V}.items():
            if heads < 1 or width < 1 or width % heads:
                raise ValueError(f"gla: heads = {heads} does not divide {option} * d_model = {width}")
        if gate_rank < 1 or not (gate_logit_normalizer > 0 and norm_eps > 0):
            raise ValueError(
                f"gla needs gate_rank >= 1, gate_logit_normalizer > 0 and norm_eps > 0; got {gate_rank}, "
                f"{gate_logit_normalizer} and {norm_eps}"
            )
        self.d_model, self.heads, self.gate_logit_normalizer = d_model, heads, gate_logit_normalizer
        self.q_proj, self.k_proj = (nn.Linear(d_model, K, bias=False) for _ in "qk")
        self.v_proj, self.g_proj = (nn.Linear(d_model, V, bias=False) for _ in "vg")
        self.gk_proj = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, K))
        self.g_norm = RMSNorm(V // heads, norm_eps)
        self.o_proj = nn.Linear(V, d_model, bias=False)

    def responses(self) -> list[Response]:
        """Of every key channel, while x = 0."""
        bias: Any = self.gk_proj[1].bias
        return [slowest_modes(torch.exp(F.logsigmoid(*widened(bias)) / self.gate_logit_normalizer)[:, None])]

    def init_state(self, batch: int) -> GLAState:
        like, heads = like_output(self.q_proj), self.heads
        sizes = (batch, heads, self.q_proj.out_features // heads, self.v_proj.out_features // heads)
        return GLAState(like.new_zeros(sizes, dtype=at_least_float32(like.dtype)))

    def mix(self, x: Tensor, state: GLAState | None, padding: Tensor | None):
        (decay,) = widened(self.gk_proj(x))
        decay = F.logsigmoid(decay) / self.gate_logit_normalizer
        parts = self.q_proj(x) * (self.q_proj.out_features // self.heads) ** -0.5, self.k_proj(x), self.v_proj(x)
        q, k, v, decay = (t.unflatten(-1, (self.heads, -1)) for t in (*parts, silence(decay, padding)))
        y, kv = linear_attention(q, k, v, decay, None if state is None else state.kv)  # at padding keys are zero, as x
        y = F.silu(self.g_proj(x)) * self.g_norm(y).flatten(2)
        return self.o_proj(y), None if state is None else GLAState(kv)
