"""Hyena's implicit filter: a small network says what every tap is, from its position."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import Filter, require_max_len
from longwave.nn.module import Hint, StaysWide, widened
from longwave.ops import without_autocast


def evaluate(net: nn.Module, positions: Tensor) -> Tensor:
    """net(positions) in the dtype of its weights, and in float32 where they are 16-bit or autocast would make them so:
    the sine of a rounded angle is noise."""
    weights = dict(net.named_parameters())
    dtype = next(iter(weights.values())).dtype
    with without_autocast(positions.device):
        if dtype.itemsize >= 4:
            return net(positions.to(dtype))
        wide = {name: p.float() for name, p in weights.items()}
        return torch.func.functional_call(net, wide, (positions.float(),))


class Sin(nn.Module):
    """sin(freq x) with one learned frequency a feature, (1, width)."""

    def __init__(self, width: int, frequency: float):
        super().__init__()
        self.frequency = frequency
        self.freq = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.freq.fill_(self.frequency)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class PositionalFeatures(StaysWide):
    """z[t] = (t / (L - 1), Re e^(-i f w), Im e^(-i f w)),  w = 2 pi t / L,  for some frequencies f; (1, L, size).

    bfloat16 would know no more than 256 positions a half.
    """

    z: Tensor
    t: Tensor

    def __init__(self, size: int, max_len: int):
        super().__init__()
        if size < 3 or size % 2 == 0:
            raise ValueError(f"positional features are time, cosines and sines: emb_dim must be odd, >= 3; got {size}")
        self.size, self.max_len = size, max_len
        self.register_buffer("z", torch.empty(1, max_len, size))
        self.register_buffer("t", torch.empty(1, max_len, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bands, device = (self.size - 1) // 2, self.z.device
        t = torch.linspace(0, 1, self.max_len, dtype=torch.float64, device=device)[:, None]
        w = 2 * math.pi * torch.arange(self.max_len, dtype=torch.float64, device=device)[:, None] / self.max_len
        f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device=device)
        self.t.copy_(t)
        self.z.copy_(torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], dim=1))


class Window(nn.Module):
    """exp(-t |delta|) + shift: an exponential decay whose rate grows from channel to channel, t in units of max_len."""

    deltas: Tensor

    def __init__(self, channels: int, target: float, slowest: float, fastest: float, shift: float):
        super().__init__()
        self.target, self.slowest, self.fastest, self.shift = target, slowest, fastest, shift
        self.register_buffer("deltas", torch.empty(1, 1, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        ends = (math.log(self.target) / self.slowest, math.log(self.target) / self.fastest)
        self.deltas.copy_(torch.linspace(*ends, self.deltas.shape[2], dtype=torch.float64))

    def forward(self, t: Tensor) -> Tensor:
        return torch.exp(-t * self.deltas.abs()) + self.shift


class HyenaFilter(Filter):
    """k[t] = Window(t) MLP(z[t]): taps of any length up to max_len from a number of parameters that does not grow.

    Source: Poli et al. (2023) "Hyena Hierarchy", arXiv:2302.10866, sec. 3.3; parameter names of the
    authors' HyenaFilter. The positional features are fixed (the authors' ``lr_pos_emb: 0``).

    Args:
        channels: C.
        max_len: longest sequence; positions are measured in units of it.
        emb_dim: odd size of the positional features.
        width: of the MLP.
        inner_layers: hidden layers besides the first.
        frequency: initial w of the sines; a higher one gives filters that oscillate faster.
        target, slowest, fastest, shift: the window falls to ``target`` within ``slowest`` (first channel) to
            ``fastest`` (last) times max_len; target 1 is no window; ``shift`` is a floor under it.
        skip: it owns ``bias`` (C,) too, as the authors' does: the weight of the present input that the convolution
            around it adds.
    Raises:
        ValueError: for an even emb_dim, an option out of its range, or on a length above max_len.
    """

    optim_hints: ClassVar[dict[str, Hint]] = {"implicit_filter.*": Hint(max_lr=1e-3)}
    bias: Any  # (C,), or None

    def __init__(
        self,
        channels: int,
        max_len: int,
        *,
        emb_dim: int = 33,
        width: int = 64,
        inner_layers: int = 2,
        frequency: float = 14.0,
        target: float = 1e-2,
        slowest: float = 1.5,
        fastest: float = 0.3,
        shift: float = 0.0,
        skip: bool = False,
    ):
        super().__init__()
        require_max_len("an implicit filter", max_len)
        if width < 1 or inner_layers < 0:
            raise ValueError(
                f"an implicit filter needs width >= 1 and inner_layers >= 0; got width = {width}, "
                f"inner_layers = {inner_layers}"
            )
        if not all(0 < value < math.inf for value in (target, slowest, fastest)):
            raise ValueError(
                f"a window needs target, slowest and fastest > 0; got target = {target}, slowest = {slowest}, "
                f"fastest = {fastest}"
            )
        self.channels, self.max_len = channels, max_len
        self.bias = nn.Parameter(torch.empty(channels)) if skip else None
        self.pos_emb = PositionalFeatures(emb_dim, max_len)
        sin = Sin(width, frequency)  # one module for all layers, as in the authors' checkpoints
        layers: list[nn.Module] = [nn.Linear(emb_dim, width), sin]
        for _ in range(inner_layers):
            layers += [nn.Linear(width, width), sin]
        self.implicit_filter = nn.Sequential(*layers, nn.Linear(width, channels, bias=False))
        self.modulation = Window(channels, target, slowest, fastest, shift)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is not None:
            self.bias.normal_()

    def longest(self) -> int:
        return self.max_len

    def forward(self, length: int) -> Tensor:
        require_max_len("an implicit filter", self.max_len, length)
        z, t = widened(self.pos_emb.z[:, :length], self.pos_emb.t[:, :length])
        return (evaluate(self.implicit_filter, z) * self.modulation(t))[0].T
