"""Correlations of github.com/dwromero/ckconv and rjbruin/flexconv by FFT, as wrong as theirs where lengths are odd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.nn.module import widened


def correlate(x: Tensor, kernel: Tensor, bias: Tensor | None, fft: bool) -> Tensor:
    """The authors' causal correlation of x (B, D, L), by FFT or not, in the dtype of the kernel or of x if better."""
    (wide,) = widened(x)
    run = causal_fft_correlation if fft else causal_correlation
    return run(wide, padded_to_odd(kernel), None if bias is None else bias.to(kernel.dtype)).to(x.dtype)


def padded_to_odd(kernel: Tensor) -> Tensor:
    """A kernel (E, D, K) with a zero in front where K is even, as the authors have it."""
    return F.pad(kernel, (1, 0)) if kernel.shape[2] % 2 == 0 else kernel


def causal_correlation(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """y[t] = sum_s kernel[:, :, K - 1 - s] x[t - s] + bias, x (B, D, L) -> (B, E, L)."""
    return F.conv1d(F.pad(x, (kernel.shape[2] - 1, 0)), kernel, bias)


def causal_fft_correlation(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The authors' causal_fftconv of x (B, D, L) with a kernel of odd length, bug for bug.

    Their inverse transform does not know the length, so it makes an even one: where L + K - 1 is odd, the result is
    resampled and is not the correlation.
    """
    L, n = x.shape[2], x.shape[2] + kernel.shape[2] - 1
    spectrum = torch.einsum(
        "bi...,oi...->bo...", torch.fft.rfft(F.pad(x, (n - L, 0))), torch.fft.rfft(kernel, n).conj()
    )
    y = torch.fft.irfft(spectrum, n // 2 * 2)[..., :L]
    return y if bias is None else y + bias[:, None]


def centred_fft(x: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The authors' fftconv, which pads both axes by half the kernel's last one, and so is wrong where they differ."""
    half, axes = k.shape[-1] // 2, (2, 3)
    padded = F.pad(x, [half] * 4)
    sizes = [padded.shape[2], padded.shape[3] + padded.shape[3] % 2]
    spectrum = torch.einsum(
        "bi...,oi...->bo...", torch.fft.rfftn(padded, sizes, axes), torch.fft.rfftn(k, sizes, axes).conj()
    )
    y = torch.fft.irfftn(spectrum, sizes, axes)[:, :, : x.shape[2], : x.shape[3]]
    return y if bias is None else y + bias[:, None, None]
