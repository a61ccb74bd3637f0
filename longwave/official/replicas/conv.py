"""Convolutions of github.com/HazyResearch/safari, state-spaces/s4 and ag1988/dss: on circles, late, and cut."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import Filter, StateSpaceFilter, long_conv
from longwave.ops import causal_conv

Transform = Callable[[Tensor, int], Tensor]


def circular_conv(u: Tensor, k: Tensor, n: int, skip: Tensor) -> Tensor:
    """u (B, L, C) on a circle of n >= L steps, where tap p of k (C, taps) weighs u[t - p] and u[t - p + n].

    Taps behind the length are not dropped: they wrap around and look ahead, as far as the circle holds them.
    """
    L = u.shape[1]
    if k.shape[1] <= n - L + 1 and k.shape[1] <= L:
        return causal_conv(u, k, skip=skip)
    circle = F.pad(k, (0, max(0, n - k.shape[1])))[:, :n]
    return causal_conv(u, circle[:, :L], skip=skip, k_future=circle[:, n - L + 1 :].flip(1))


class Conv(nn.Module):
    """A convolution on a circle of L + min(L, support) steps.

    Args:
        filter: one row a channel; where bidirectional as many again, which look ahead.
        support: how many taps of a kernel there is room for, or None for L.
        bidirectional: whether half of the rows look ahead: from the end of the circle, or of all the taps, backwards.
        whole: all taps of the filter are used, rather than as many as there is room for.
        adjacent: those that look ahead end where both halves together do: where there is more room they look behind.
    """

    def __init__(
        self,
        filter: Filter,
        support: int | None = None,
        bidirectional: bool = False,
        *,
        whole: bool = False,
        adjacent: bool = False,
    ):
        super().__init__()
        self.filter, self.support, self.bidirectional = filter, support, bidirectional
        self.whole, self.adjacent = whole, adjacent

    def kernel(self, length: int) -> Tensor:
        """The rows of the filter that a sequence of this length meets."""
        return self.filter(self.filter.max_len if self.whole else min(length, self.support or length))

    def taps(self, length: int) -> Tensor:
        """The taps around the circle."""
        k = self.kernel(length)
        if not self.bidirectional:
            return k
        behind, ahead = k.chunk(2)
        room = k.shape[1] if self.adjacent else length
        return F.pad(behind, (0, room)) + F.pad(ahead.flip(1), (room, 0))

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, C, N); the official layer has no state, ours has one where the kernel is a recurrence."""
        return self._recurrent().realize().rest(batch)

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """u (B, L, C), state (B, C, N) from :meth:`init_state` -> y (B, L, C) and the state, or None without one."""
        if state is not None:
            return long_conv(u, self._recurrent(), state, skip=skip)
        L = u.shape[1]
        return circular_conv(u, self.taps(L), L + min(L, self.support or L), skip), None

    def _recurrent(self) -> StateSpaceFilter:
        if self.bidirectional:
            raise ValueError("bidirectional = True has no state: it looks ahead")
        if self.support is not None or not isinstance(self.filter, StateSpaceFilter):
            raise ValueError(
                "there is no state for a kernel of fixed length, or over the length: neither is a recurrence"
            )
        return self.filter


class BlockConv(nn.Module):
    """The convolution of the authors' LongConv with ``block_fft_conv``:  y = Re ifft(U(x) K(k)), U and K in blocks.

    As the official one does, it cuts the product of the two transforms, whose length is a power of two, to the circle
    before the inverse: where that is no power of two, y is no convolution even if U and K are Fourier transforms, and
    it looks ahead.

    Args:
        conv: gives the taps and the circle.
        channels: rows of the filter a feature of the input, behind the halving.
        block_fft_u, block_fft_k: (x (..., H, T), length) -> (..., H, length rounded up to a power of two).
    """

    def __init__(self, conv: Conv, channels: int, block_fft_u: Transform, block_fft_k: Transform):
        super().__init__()
        self.conv, self.channels = conv, channels
        self.block_fft_u, self.block_fft_k = block_fft_u, block_fft_k

    @property
    def filter(self) -> Filter:
        """That of the convolution."""
        return self.conv.filter

    def forward(self, u: Tensor, skip: Tensor, state: None = None) -> tuple[Tensor, None]:
        """u (B, L, C), the same H features for every channel -> y (B, L, C); there is no state."""
        if state is not None:
            raise ValueError("a LongConv has no official state")
        L = u.shape[1]
        n = L + min(L, self.conv.support or L)
        k = self.conv.taps(L).unflatten(0, (self.channels, -1))  # (channels, H, taps)
        x = u[:, :, : k.shape[1]].transpose(1, 2)
        spectrum = self.block_fft_u(x, n)[:, None] * self.block_fft_k(k, n)  # (B, channels, H, n or more)
        y = torch.fft.ifft(spectrum, n=n).real[..., :L].flatten(1, 2).transpose(1, 2)
        return y.to(u.dtype) + skip * u, None


class SpectrumSmoothing(nn.Module):
    """The authors' ``smooth_freq``: bins j of the taps' spectrum weighted by exp(-(j - w // 2)^2 / 2) over w of them.

    Unlike :class:`longwave.nn.filters.SmoothFrequencies` it loses the last of an odd number of taps, takes an even
    width, and rounds its weights to float32, as the official one does.

    Args:
        width: w, >= 1.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, k: Tensor) -> Tensor:
        offset = torch.arange(self.width, dtype=torch.float32, device=k.device) - self.width // 2
        weight = torch.exp(-0.5 * offset**2).to(k.dtype).expand(len(k), 1, -1)
        spectrum = torch.fft.rfft(k)
        left = (self.width - 1) // 2
        parts = [F.pad(part, (left, self.width - 1 - left)) for part in (spectrum.real, spectrum.imag)]
        return torch.fft.irfft(torch.complex(*(F.conv1d(part, weight, groups=len(k)) for part in parts)))
