"""The FFT convolution with its transforms written as Monarch matrices, fixed or learned."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longwave.nn.block_fft import fourier_factors, monarch_fft
from longwave.ops import at_least_float32

Transform = Callable[[Tensor], Tensor]


def monarch_conv(
    u: Tensor,
    k: Tensor,
    sizes: Sequence[int],
    *,
    transform_u: Transform | None = None,
    transform_k: Transform | None = None,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
) -> Tensor:
    """y = gate_out (Re F^-1 (U x . K k) + skip x),  x = gate_in u,  U, K and F^-1 in Monarch factors of given sizes.

    Source: Fu et al. (2023) "FlashFFTConv", arXiv:2311.05908, algorithm 1; with learned U and K: Fu et al. (2023)
    "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646, sec. 3.3, where the inverse
    stays the Fourier one. With Fourier transforms this is the convolution on a circle of n_1 ... n_p steps: for
    n >= L + K - 1 it is :func:`longwave.ops.causal_conv`. With other ones it is linear in x, but no convolution, and
    it looks ahead.

    Args:
        u: (B, L, C) input, float.
        k: (C, T) taps.
        sizes: n_1, ..., n_p, of a product n >= max(L, T).
        transform_u, transform_k: (..., C, T) -> (..., C, n) complex, :class:`longwave.nn.MonarchFFT` for one; by
            default the Fourier transform in factors of the sizes.
        skip: (C,) weight of the present x.
        gate_in, gate_out: (B, L, C) factors.
    Returns:
        y: (B, L, C) in the dtype of u; computed in float32 or better.
    Raises:
        ValueError: where the circle is shorter than u or k.
    Cost: O(n (n_1 + ... + n_p)) multiply-adds a channel, all in matrix products.
    """
    work = at_least_float32(torch.promote_types(u.dtype, k.dtype))
    fourier = fourier_factors(sizes, torch.promote_types(work, torch.complex64), u.device)
    transform_u, transform_k = (t or (lambda x: monarch_fft(x, fourier)) for t in (transform_u, transform_k))
    L, n = u.shape[1], math.prod(sizes)
    if n < max(L, k.shape[1]):
        raise ValueError(f"sizes = {tuple(sizes)} make a circle of {n} steps; L = {L} and {k.shape[1]} taps need more")
    x = (u if gate_in is None else u * gate_in).to(work)
    spectrum = transform_u(x.transpose(1, 2)) * transform_k(k.to(work))
    y = monarch_fft(spectrum.conj(), fourier).real[..., :L].transpose(1, 2) / n  # F^-1 z = conj(F conj(z)) / n
    y = y if skip is None else y + skip.to(work) * x
    y = y if gate_out is None else y * gate_out.to(work)
    return y.to(u.dtype)
