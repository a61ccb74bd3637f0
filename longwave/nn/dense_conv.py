"""A causal convolution that mixes all features at every lag."""

import torch
from torch import Tensor

from longwave.ops import at_least_float32, causal_conv, opaque


@opaque(like=lambda u, k: u.new_empty(*u.shape[:2], k.shape[0]))
def dense_conv(u: Tensor, k: Tensor) -> Tensor:
    """y[t] = sum_{s <= t} k[:, :, s] u[t - s]:  a matrix for every lag, by FFT.

    Source: Romero et al. (2022) "CKConv", arXiv:2102.02611, eq. 1.

    Args:
        u: (B, L, D) input, float.
        k: (E, D, K) taps, k[:, :, 0] weighs the present; taps beyond L do not matter.
    Returns:
        y: (B, L, E) in the dtype of u; computed in float32 or better.
    Cost: O(L log L (B D + D E + B E) + L B D E) time, O(L (B D + D E)) memory.
    """
    L = u.shape[1]
    work = at_least_float32(torch.promote_types(u.dtype, k.dtype))
    k = k[..., :L].to(work)
    n = 1 << (L + k.shape[2] - 2).bit_length()  # a power of two, at least as long as the whole result
    spectrum = torch.einsum("bfd,edf->bfe", torch.fft.rfft(u.to(work), n, dim=1), torch.fft.rfft(k, n))
    return torch.fft.irfft(spectrum, n, dim=1)[:, :L].to(u.dtype)


def convolve(u: Tensor, k: Tensor, **fused: Tensor | None) -> Tensor:
    """A causal convolution: with taps (C, K) by ``causal_conv``, and what that fuses; with a matrix for every lag,
    (E, D, K), by :func:`dense_conv`."""
    return causal_conv(u, k, **fused) if k.ndim == 2 else dense_conv(u, k)
