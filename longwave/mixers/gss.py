"""GSS: a wide gate around a narrow state space, for language.

Source: Mehta, Gupta, Cutkosky & Neyshabur (2022) "Long Range Language Modeling via Gated State Spaces",
arXiv:2206.13947, sec. 3.2 and fig. 2. Parameter names are mostly those of lucidrains' gated-state-spaces-pytorch.
"""

from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import GSSFilter, LongConv
from longwave.nn.padding import silence


class GSSState(NamedTuple):
    h: Tensor  # (B, C, N) complex


class GSS(Mixer, name="gss"):
    """y = W_out(W_gate (k * v + D v) . gelu(W_u x)),  v = norm(gelu(W_v x)).

    Args:
        d_model: D.
        d_state: N, complex modes, each counted once, shared by all channels.
        channels: C, width of the state space; default D / 4, at least 1.
        expand: width of the gate over D.
        eigenvalues, rate: of the filter, see :class:`longwave.nn.GSSFilter`.
    Raises:
        ValueError: where expand D or channels is below 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 6},
        {"d_state": 4, "channels": 5, "expand": 1.5, "eigenvalues": "exp"},
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 512,
        channels: int | None = None,
        expand: float = 4.0,
        eigenvalues: str = "exp_re_im",
        rate: float = 1.0,
    ):
        super().__init__()
        E, C = int(expand * d_model), max(1, d_model // 4) if channels is None else channels
        if E < 1 or C < 1:
            raise ValueError(f"gss needs expand * d_model >= 1 and channels >= 1; got {expand} * {d_model} and {C}")
        self.d_model = d_model
        self.to_u = nn.Linear(d_model, E, bias=False)
        self.to_v = nn.Linear(d_model, C, bias=False)
        self.norm = nn.LayerNorm(C)
        self.conv = LongConv(GSSFilter(C, d_state, eigenvalues=eigenvalues, rate=rate))
        self.to_gate = nn.Linear(C, E, bias=False)
        self.to_out = nn.Linear(E, d_model)

    def init_state(self, batch: int) -> GSSState:
        return GSSState(self.conv.init_state(batch))

    def mix(self, x: Tensor, state: GSSState | None, padding: Tensor | None):
        v = silence(self.norm(F.gelu(self.to_v(x))), padding)
        y, h = self.conv(v, None if state is None else state.h, padding)
        return self.to_out(self.to_gate(y) * F.gelu(self.to_u(x))), None if h is None else GSSState(h)
