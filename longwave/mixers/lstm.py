"""LSTM: the recurrent baseline, through torch's own kernels.

Source: Hochreiter & Schmidhuber (1997); gates and parameter names as in torch.nn.LSTM.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from longwave.mixers.base import Mixer


class LSTMState(NamedTuple):
    h: Tensor  # (B, D)
    c: Tensor  # (B, D)


class LSTM(Mixer, name="lstm"):
    """One layer of D cells:  c = sigma(f) c + sigma(i) tanh(g),  h = sigma(o) tanh(c).

    Args:
        d_model: D.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        # Parameters of our own: torch.compile traces torch.lstm, but not a module of type nn.LSTM.
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
        zero = self.weight_hh_l0.new_zeros(batch, self.d_model)
        return LSTMState(zero, zero)

    def forward(self, x: Tensor, state: LSTMState | None = None, *, mask: Tensor | None = None):
        start = self.init_state(len(x)) if state is None else state
        carry = (start.h[None].to(x.dtype), start.c[None].to(x.dtype))
        weights: list[Tensor] = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        options = (True, 1, 0.0, False, False)  # biases, one layer, no dropout, not training it, one direction
        if mask is None:
            y, h, c = torch.lstm(x, carry, weights, *options, True)
        else:
            # Padding would drive the gates through the biases: the real tokens run alone, moved to the front.
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
            lengths = mask.sum(1)
            packed = pack_padded_sequence(
                x.gather(1, order), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
            )
            by_length = packed.sorted_indices
            carry = (carry[0][:, by_length], carry[1][:, by_length])
            data, h, c = torch.lstm(packed.data, packed.batch_sizes, carry, weights, *options)
            h, c = h[:, packed.unsorted_indices], c[:, packed.unsorted_indices]
            run, _ = pad_packed_sequence(packed._replace(data=data), batch_first=True, total_length=x.shape[1])
            y = torch.zeros_like(run).scatter(1, order, run)
            idle = (lengths == 0)[:, None]  # nothing but padding: the state stays
            h, c = torch.where(idle, start.h, h), torch.where(idle, start.c, c)
        return y, None if state is None else LSTMState(h[0], c[0])
