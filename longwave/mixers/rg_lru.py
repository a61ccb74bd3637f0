"""RG-LRU: a linear recurrence whose decays are gated by the input, behind a short convolution and beside a gate.

Source: De et al. (2024) "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
arXiv:2402.19427, eq. 1-4 and fig. 2. Parameter names are mostly those of RecurrentGemma in Hugging Face transformers.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import BlockdiagLinear, Hint, Response, like_output, slowest_modes
from longwave.nn.module import widened
from longwave.nn.padding import is_real, padded_short_conv, silence
from longwave.ops import linear_scan

C = 8.0  # power of the decays where the gate is open


class RGLRUState(NamedTuple):
    conv: Tensor  # (B, K-1, E) the short convolution's past
    h: Tensor  # (B, E)
    begun: Tensor  # (B, 1) bool: False before the first token, which is not scaled


class RGLRU(Mixer, name="rg_lru"):
    """y = W_o (h . gelu(W_y x)),  h[t] = a[t] h[t-1] + sqrt(1 - a[t]^2) sigmoid(i[t]) u[t],  a[t] = exp(-8 softplus(l)
    sigmoid(r[t])),  where u = conv(W_x x), and i and r are block-diagonal maps of u.

    Args:
        d_model: D.
        width: E, inside; default D.
        heads: blocks of the two maps, divides E.
        d_conv: K, taps of the short convolution.
    Raises:
        ValueError: for width or d_conv < 1, or where heads does not divide the width.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"heads": 2}, {"width": 12, "heads": 4, "d_conv": 2})
    optim_hints: ClassVar[dict[str, Hint]] = {"recurrent_param": Hint()}

    def __init__(self, d_model: int, width: int | None = None, heads: int = 8, d_conv: int = 4):
        super().__init__()
        E = d_model if width is None else width
        if E < 1 or d_conv < 1:
            raise ValueError(f"rg_lru needs width >= 1 and d_conv >= 1; got {E} and {d_conv}")
        if heads < 1 or E % heads:
            raise ValueError(f"rg_lru: heads = {heads} does not divide width = {E}")
        self.d_model, self.heads = d_model, heads
        self.linear_y, self.linear_x = (nn.Linear(d_model, E) for _ in "yx")
        self.conv_1d = nn.Conv1d(E, E, d_conv, groups=E)
        self.gates = BlockdiagLinear(E, 2 * E, heads)
        self.recurrent_param = nn.Parameter(torch.empty(E))
        self.linear_out = nn.Linear(E, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays with open gates between 0.9 and 0.999, as in the paper."""
        log_a = torch.empty_like(self.recurrent_param).uniform_(0.9, 0.999).log()
        self.recurrent_param.copy_(torch.log(torch.expm1(-log_a / C)))  # inverse of softplus

    def responses(self) -> list[Response]:
        """Its decays depend on the input: those of a silent one."""
        log_a, _ = self._decays_and_gates(self.recurrent_param.new_zeros(1, len(self.recurrent_param)))
        return [slowest_modes(log_a.exp().mT)]

    def _decays_and_gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the decays, and the input gates (..., E), in float32 or better."""
        rate, gates = widened(self.recurrent_param, self.gates(u))
        i, r = gates.sigmoid().unflatten(-1, (self.heads, 2, -1)).unbind(-2)
        return -C * F.softplus(rate) * r.flatten(-2), i.flatten(-2)

    def init_state(self, batch: int) -> RGLRUState:
        like, (wide,), (E, _, K) = like_output(self.linear_x), widened(self.recurrent_param), self.conv_1d.weight.shape
        begun = torch.zeros(batch, 1, dtype=torch.bool, device=wide.device)
        return RGLRUState(like.new_zeros(batch, K - 1, E), wide.new_zeros(batch, E), begun)

    def mix(self, x: Tensor, state: RGLRUState | None, padding: Tensor | None):
        past, h, begun = (None, *self.init_state(x.shape[0])[1:]) if state is None else state
        taps, bias = self.conv_1d.weight[:, 0], self.conv_1d.bias
        u, past = padded_short_conv(silence(self.linear_x(x), padding), taps, bias, past, padding)
        log_a, i = self._decays_and_gates(u)
        log_a = silence(log_a, padding)  # padding leaves the state as it was
        first = F.pad(~begun, (0, x.shape[1] - 1))[..., None]  # (B, L, 1)
        scale = torch.where(first, 1.0, _root(-torch.expm1(2 * log_a)))
        hs = linear_scan(log_a.exp(), silence(scale * i * u, padding), h.to(log_a.dtype))
        y = self.linear_out(hs.to(x.dtype) * F.gelu(self.linear_y(x), approximate="tanh"))
        if state is None:
            return y, None
        real = torch.ones_like(begun) if padding is None else is_real(x.shape[1], padding)[:, :1]
        return y, RGLRUState(past, hs[:, -1].clone(), begun | real)


def _root(x: Tensor) -> Tensor:
    """sqrt(x), with a derivative of at most 1000 as the authors have it: it has none at 0, where a gate is shut."""
    root = x.detach().sqrt()
    return root + (x - x.detach()) * (0.5 / root.clamp(min=5e-4))
