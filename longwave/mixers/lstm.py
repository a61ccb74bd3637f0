"""LSTM: the recurrent baseline, through torch's own kernels.

Source: Hochreiter & Schmidhuber (1997); gates and parameter names as in torch.nn.LSTM.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from longwave.mixers.base import Mixer
from longwave.nn.module import widened
from longwave.nn.padding import is_real, last_steps
from longwave.ops import opaque, without_autocast

SHUT = 1e9  # a gate is sigmoid of that: 1, or 0 of its opposite


class LSTMState(NamedTuple):
    h: Tensor  # (B, D)
    c: Tensor  # (B, D)


def step_of_lstm(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """h and c (B, D) after one step x (B, E)."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, dim=1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * c.tanh(), c


@opaque(like=lambda u, h, *weights: u.new_empty(u.shape[0], u.shape[1] + 1, h.shape[1]))
def steps_of_lstm(u: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """h (B, L, D) after every step of u (B, L, E), behind h and c (B, D), and behind them the last c."""
    if forward_ad._current_level >= 0:  # of which torch.lstm knows nothing in float32
        after = []
        for x in u.unbind(1):
            h, c = step_of_lstm(x, h, c, w_ih, w_hh, b_ih, b_hh)
            after.append(h)
        return torch.stack([*after, c], dim=1)
    biases, layers, dropout, training, both_ways, batch_first = True, 1, 0.0, False, False, True
    options = biases, layers, dropout, training, both_ways, batch_first
    y, _, end = torch.lstm(u, (h[None], c[None]), [w_ih, w_hh, b_ih, b_hh], *options)
    return torch.cat([y, end.transpose(0, 1)], dim=1)


class LSTM(Mixer, name="lstm"):
    """One layer of D cells:  c = sigma(f) c + sigma(i) tanh(g),  h = sigma(o) tanh(c).

    Args:
        d_model: D.
    """

    without_filter = "its gates decide at every step how much of a cell stays; at the start about a half"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * d_model, d_model))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * d_model, d_model))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * d_model))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-(self.d_model**-0.5), self.d_model**-0.5)

    def init_state(self, batch: int) -> LSTMState:
        (weight,) = widened(self.weight_hh_l0)
        zero = weight.new_zeros(batch, self.d_model)
        return LSTMState(zero, zero)

    def mix(self, x: Tensor, state: LSTMState | None, padding: Tensor | None):
        u, w_ih, w_hh, b_ih, b_hh = widened(x, self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        h, c = (t.to(u.dtype) for t in (self.init_state(x.shape[0]) if state is None else state))
        if x.shape[1] == 1 and state is not None:  # torch.lstm takes ten times as long to begin
            with without_autocast(x.device):
                out, memory = step_of_lstm(u[:, 0], h, c, w_ih, w_hh, b_ih, b_hh)
            if padding is not None:
                idle = padding[:, None] == 1
                return out[:, None].to(x.dtype), LSTMState(torch.where(idle, h, out), torch.where(idle, c, memory))
            return out[:, None].to(x.dtype), LSTMState(out, memory)
        if padding is not None:  # one input more says that a step is padding: then c = 1 c + 0 tanh(g), exactly
            idle = ~is_real(x.shape[1], padding)[..., None]
            gates = w_ih.new_tensor([-SHUT, SHUT, 0, 0]).repeat_interleave(self.d_model)  # i, f, g, o
            u, w_ih = torch.cat([u, idle.to(u.dtype)], dim=2), torch.cat([w_ih, gates[:, None]], dim=1)
        run = steps_of_lstm(u, h, c, w_ih, w_hh, b_ih, b_hh)
        y, end = run[:, :-1], run[:, -1].clone()  # of the states, which go on without the memory of the run
        if state is None:
            return y.to(x.dtype), None
        last = last_steps(torch.cat([h[:, None], y], dim=1), padding, 1)[:, 0].clone()
        return y.to(x.dtype), LSTMState(last, end)
