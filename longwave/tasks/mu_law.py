"""Mu-law: audio samples as a few hundred tokens, finer where it is quiet."""

import math

import torch
from torch import Tensor


def mu_law_encode(x: Tensor, levels: int = 256) -> Tensor:
    """The token of every audio sample.

        f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu),  mu = levels - 1;   token = floor(mu (f + 1) / 2 + 1/2)

    Source: van den Oord et al. (2016) "WaveNet", arXiv:1609.03499, sec. 2.2, after ITU-T G.711; rounded to the nearest,
    computed in float64.

    Args:
        x: real, in [-1, 1]; silence is levels // 2.
        levels: number of tokens, >= 2.
    Returns:
        int64 in [0, levels), in the shape of x.
    Raises:
        ValueError: for a sample outside [-1, 1] or not finite, x that is not real, or levels < 2.
    """
    mu = _mu(levels)
    if not x.is_floating_point():
        raise ValueError(f"mu-law encodes real samples in [-1, 1]; got {x.dtype}: divide integers by their full scale")
    x = x.double()
    outside = x[~(x.abs() <= 1)]
    if len(outside):
        raise ValueError(f"mu-law encodes samples in [-1, 1]; got {outside[0].item():g}: scale the signal first")
    f = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return torch.floor(mu * (f + 1) / 2 + 0.5).long()


def mu_law_decode(tokens: Tensor, levels: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """The audio sample of every token: ``mu_law_encode`` of it is the token again.

        x = sign(f) ((1 + mu)^|f| - 1) / mu,  f = 2 token / mu - 1,  mu = levels - 1

    Source: as :func:`mu_law_encode`. |f(x) - f(x')| <= 1 / mu between a sample x and its decoded token x'.

    Args:
        tokens: integers in [0, levels).
        levels: number of tokens, >= 2.
        dtype: of the result; it is computed in float64.
    Returns:
        in [-1, 1], in the shape of tokens.
    Raises:
        ValueError: for a token outside the range, tokens that are not integers, or levels < 2.
    """
    mu = _mu(levels)
    if tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"mu-law decodes integer tokens; got {tokens.dtype}")
    outside = tokens[(tokens < 0) | (tokens >= levels)]
    if len(outside):
        raise ValueError(f"mu-law decodes tokens in 0..{levels - 1}; got {outside[0].item()}")
    f = 2 * tokens.double() / mu - 1
    return (f.sign() * (torch.expm1(f.abs() * math.log1p(mu)) / mu).clamp(max=1)).to(dtype)


def _mu(levels: int) -> int:
    if levels < 2:
        raise ValueError(f"mu-law needs levels >= 2; got {levels}")
    return levels - 1
