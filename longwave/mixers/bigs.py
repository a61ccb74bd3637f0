"""BiGS: one state space read forwards, one backwards, multiplied, inside a gated unit: pretraining without attention.

Source: Wang, Yan, Gu & Rush (2022) "Pretraining Without Attention", arXiv:2212.10544, sec. 4 and fig. 1. Parameter
names are mostly those of github.com/jxiw/BiGS.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import WholeMixer
from longwave.nn import LongConv, S4DFilter
from longwave.nn.padding import silence
from longwave.ops import causal_conv


def shared_conv(u: Tensor, conv: LongConv) -> Tensor:
    """u (B, L, C) convolved with the one filter and the one skip weight of ``conv``, the same for all channels."""
    width = u.shape[2]
    return causal_conv(u, conv.filter(u.shape[1]).expand(width, -1), skip=conv.D.expand(width))


class BiGS(WholeMixer, name="bigs"):
    """y = W_o(gelu(W (W_f ssm_f(f) . reverse(W_b ssm_b(reverse(b))))) . v),  v, f, b = gelu of linear maps of x.

    Both state spaces are S4D's, each one filter for all channels.

    Args:
        d_model: D.
        d_state: N, real state size of a filter, even; N/2 conjugate pairs are kept, twice what the authors count.
        expand: width of v over D.
        dt_min, dt_max, rate: of the filters, see :class:`longwave.nn.S4DFilter`.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"d_state": 8}, {"d_state": 4, "expand": 1.75, "dt_max": 0.1})

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 4.0,
        dt_min: float = 1e-2,
        dt_max: float = 1.0,
        rate: float = 1.0,
    ):
        super().__init__()
        E = round(expand * d_model)
        if E < 1:
            raise ValueError(f"bigs needs expand * d_model >= 1; got {expand} * {d_model}")
        self.d_model = d_model
        self.dv = nn.Linear(d_model, E)
        self.du_forward, self.du_backward = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.fs4, self.bs4 = (
            LongConv(S4DFilter(1, d_state, dt_min=dt_min, dt_max=dt_max, rate=rate)) for _ in range(2)
        )
        self.duc_forward, self.duc_backward = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.dol = nn.Linear(d_model, E)
        self.do = nn.Linear(E, d_model)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        past = silence(F.gelu(self.du_forward(x)), padding)
        future = silence(F.gelu(self.du_backward(x)), padding)
        past = self.duc_forward(shared_conv(past, self.fs4))
        future = self.duc_backward(shared_conv(future.flip(1), self.bs4).flip(1))
        return self.do(F.gelu(self.dol(past * future)) * F.gelu(self.dv(x)))
