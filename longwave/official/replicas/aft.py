"""AFT as github.com/rish-16/aft-pytorch has it: two-sided, and without a running maximum, which changes no number."""

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import require_max_len


class TwoSidedAFT(nn.Module):
    """y[t] = W_o (sigmoid(q[t]) . sum_s e^(w[t, s] + k[s]) v[s] / sum_s e^(w[t, s] + k[s])), over all s.

    Args:
        d_model: D.
        hidden: width of queries, keys and values.
        max_len: how many positions w has; None for w = 0.
        window: w is 0, which is not nothing, from so many steps on either side; None for everywhere learned.
    """

    def __init__(self, d_model: int, hidden: int, max_len: int | None, window: int | None):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(d_model, hidden) for _ in "qkv")
        self.project = nn.Linear(hidden, d_model)
        self.wbias = None if max_len is None else nn.Parameter(torch.zeros(max_len, max_len))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D).

        Raises:
            ValueError: for more steps than max_len.
        """
        k, v, w = self.to_k(x), self.to_v(x), self._bias(x.shape[1], x)
        keys, weights = torch.exp(k - k.amax(1, keepdim=True)), torch.exp(w - w.amax(1, keepdim=True))
        return self.project(self.to_q(x).sigmoid() * (weights @ (keys * v)) / (weights @ keys))

    def _bias(self, L: int, x: Tensor) -> Tensor:
        if self.wbias is None:
            return x.new_zeros(1, L)  # one row for all
        require_max_len("a two-sided AFT", len(self.wbias), L)
        w = self.wbias[:L, :L]
        if self.window is None:
            return w
        steps = torch.arange(L, device=x.device)
        return torch.where((steps[:, None] - steps).abs() < self.window, w, 0)
