"""Free taps with the regularisers that make a plain long convolution work: squash and smooth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.filters.base import Filter, require_max_len
from longwave.nn.module import widened
from longwave.ops import without_autocast


def squash(k: Tensor, threshold: float) -> Tensor:
    """Soft threshold  sign(k) max(|k| - threshold, 0).  Source: Fu et al. (2023), arXiv:2302.06646, alg. 1."""
    return torch.sign(k) * F.relu(k.abs() - threshold)


def _odd(width: int) -> int:
    if width < 1 or width % 2 == 0:
        raise ValueError(f"smoothing takes an odd width >= 1; got {width}")
    return width


class Smooth(nn.Module):
    """Moving average over ``width`` (odd) neighbouring taps, zeros outside.  Source: arXiv:2302.06646."""

    def __init__(self, width: int):
        super().__init__()
        self.width = _odd(width)

    def forward(self, k: Tensor) -> Tensor:
        return F.avg_pool1d(k, self.width, stride=1, padding=self.width // 2)


class SmoothFrequencies(nn.Module):
    """The spectrum of the taps smoothed over ``width`` (odd) bins by exp(-(j - w/2)^2 / 2), unnormalised.

    Source: the authors' LongConvKernel with ``smooth_freq`` (github.com/HazyResearch/safari).
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = _odd(width)

    def forward(self, k: Tensor) -> Tensor:
        offset = torch.arange(self.width, dtype=k.dtype, device=k.device) - self.width // 2
        weight = torch.exp(-0.5 * offset**2).expand(len(k), 1, -1)
        spectrum = torch.fft.rfft(k)
        sides = (spectrum.real, spectrum.imag)
        with without_autocast(k.device):
            parts = [F.conv1d(side, weight, padding=self.width // 2, groups=len(k)) for side in sides]
        return torch.fft.irfft(torch.complex(*parts), n=k.shape[1])


class FreeFilter(Filter):
    """One learned tap a step; smoothed, then squashed towards zero.

    Source: Fu et al. (2023) "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646,
    sec. 3 and alg. 1.

    Args:
        channels: C.
        max_len: number of taps and longest sequence.
        squash: soft threshold lambda, >= 0, taken off the magnitude of every tap.
        smooth: a module on taps (C, max_len), or None.
        decay: taps start as .002 randn, or where True as .02 randn exp(-(C // 2)^(c / C) t / max_len) in channel c.
        dropout: probability with which a tap is dropped in training.
    Raises:
        ValueError: for max_len < 1, a negative threshold, or on a length above max_len.
    """

    def __init__(
        self,
        channels: int,
        max_len: int,
        *,
        squash: float = 0.003,
        smooth: nn.Module | None = None,
        decay: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_max_len("a free filter", max_len)
        if not squash >= 0:
            raise ValueError(f"a soft threshold is squash >= 0; got {squash}")
        self.channels, self.max_len, self.threshold, self.decay = channels, max_len, squash, decay
        self.kernel = nn.Parameter(torch.empty(channels, max_len))
        self.smooth = smooth
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.decay:
            self.kernel.normal_(std=0.002)
            return
        t = torch.arange(self.max_len, device=self.kernel.device) / self.max_len
        rate = float(self.channels // 2) ** (torch.arange(self.channels, device=self.kernel.device) / self.channels)
        self.kernel.normal_(std=0.02).mul_(torch.exp(-t * rate[:, None]))

    def longest(self) -> int:
        return self.max_len

    def forward(self, length: int) -> Tensor:
        require_max_len("a free filter", self.max_len, length)
        (k,) = widened(self.kernel)
        k = k if self.smooth is None else self.smooth(k)
        return self.dropout(squash(k, self.threshold))[:, :length]
