"""mLSTM: an LSTM cell whose memory is a matrix, with an exponential input gate and gates that see the input alone.

Source: Beck et al. (2024) "xLSTM", arXiv:2405.04517, eq. 19-27; layer and names as in Hugging Face transformers.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import Response, slowest_modes
from longwave.nn.module import widened
from longwave.nn.padding import silence
from longwave.ops import linear_attention


class MLSTMState(NamedTuple):
    memory: Tensor  # (B, H, N, P + 1) memory and, in the last column, the sum of keys, both divided by exp(m)
    m: Tensor  # (B, H) the largest exponent so far, decayed


class MLSTM(Mixer, name="mlstm"):
    """y = W_o (sigmoid(o) . norm(C^T q / max(|n . q|, 1))),  C' = sigmoid(f) C + exp(i) k v^T,  n as C without v.

    Args:
        d_model: D.
        heads, key_width, value_width: H, and H N and H P of all queries and all values, by default D / 2 and D.
        bias: on the projections and the norm; the gates i and f always have one.
        gate_cap: i and f are cap tanh(. / cap); None for no cap.
        norm_eps, eps: of the norm of each head, and of the denominator, in units of the largest exponent so far.
    Raises:
        ValueError: where heads does not divide a width, or for sizes below 1 or gate_cap <= 0.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"heads": 2, "norm_eps": 0.1},  # a norm without eps cancels the scale that the gates' biases set
        {"heads": 3, "key_width": 6, "value_width": 9, "bias": True, "gate_cap": None, "norm_eps": 0.1},
    )

    def __init__(
        self, d_model: int, heads: int = 4, key_width: int | None = None, value_width: int | None = None,
        bias: bool = False, gate_cap: float | None = 15.0, norm_eps: float = 1e-6, eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        keys = d_model // 2 if key_width is None else key_width
        values = d_model if value_width is None else value_width
        if min(heads, keys, values) < 1 or keys % heads or values % heads:
            raise ValueError(
                f"mlstm: heads = {heads} does not divide key_width = {keys} and value_width = {values}, >= 1"
            )
        if gate_cap is not None and not gate_cap > 0:
            raise ValueError(f"mlstm: gate_cap > 0, or None for no cap; got {gate_cap}")
        self.d_model, self.heads, self.gate_cap, self.eps = d_model, heads, gate_cap, eps
        self.widths = keys, keys, values, values
        self.qkv_opreact = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.ifgate_preact = nn.Linear(d_model, 2 * heads)
        self.multihead_norm = nn.LayerNorm(values, norm_eps, bias=bias)  # of every head by itself
        self.out_proj = nn.Linear(values, d_model, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        i, f = self.ifgate_preact.bias.chunk(2)
        self.ifgate_preact.weight.zero_()
        i.normal_(std=0.1)
        f.copy_(torch.linspace(3.0, 6.0, self.heads))

    def responses(self) -> list[Response]:
        """Its gates depend on the input: those of a silent one."""
        return [slowest_modes(self._capped(self.ifgate_preact.bias)[self.heads :, None].sigmoid())]

    def init_state(self, batch: int) -> MLSTMState:
        (like,), H, (keys, *_, values) = widened(self.ifgate_preact.bias), self.heads, self.widths
        return MLSTMState(like.new_zeros(batch, H, keys // H, values // H + 1), like.new_zeros(batch, H))

    def mix(self, x: Tensor, state: MLSTMState | None, padding: Tensor | None):
        memory, before = self.init_state(x.shape[0]) if state is None else state
        q, k, v, o = self.qkv_opreact(x).split(self.widths, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in widened(q, k, v))
        i, f = self._capped(self.ifgate_preact(x)).chunk(2, dim=-1)
        i, log_f = silence(i, padding, -torch.inf), silence(F.logsigmoid(f), padding)
        total = log_f.double().cumsum(1)
        exact = torch.maximum((i - total).cummax(1).values, before[:, None]) + total  # m[t] = max(f + m[t-1], i)
        m = exact.detach()  # the output depends on it by eps alone
        decay = log_f + (torch.cat([before[:, None], m[:, :-1]], dim=1) - m).to(log_f.dtype)
        q, k, v = q * q.shape[3] ** -0.5, k * (i - m).exp().to(k.dtype)[..., None], F.pad(v, (0, 1), value=1.0)
        y, memory = linear_attention(q, k, v, decay, memory)
        below = torch.maximum(y[..., -1].abs(), (-m).exp()) + self.eps * (exact - m).exp()  # 1, with a derivative
        h = (y[..., :-1] / below.to(y.dtype)[..., None]).flatten(0, 1).flatten(1).to(x.dtype)
        h = F.group_norm(h, self.heads, self.multihead_norm.weight, self.multihead_norm.bias, self.multihead_norm.eps)
        y, end = self.out_proj(h.view_as(o) * o.sigmoid()), exact[:, -1].to(k.dtype, copy=True)
        rest = (m[:, -1] - end).exp().to(k.dtype)[..., None, None]
        return y, None if state is None else MLSTMState(memory * rest, end)

    def _capped(self, x: Tensor) -> Tensor:
        """Gates in float32 or better, within the cap."""
        (x,) = widened(x)
        return x if self.gate_cap is None else self.gate_cap * torch.tanh(x / self.gate_cap)
