"""One step of a state space whose matrix is diagonal minus low rank, in every channel: what a token costs S4."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check(x, re, im, left, right, b, c, h, skip) -> None:
    (systems, half), (channels, N) = re.shape, c.shape
    if 2 * half != N or channels % systems:
        raise ValueError(
            f"dplr_step: {systems} systems of {half} modes have states of {2 * half} numbers in a multiple of as many "
            f"channels; c has shape {tuple(c.shape)}"
        )


@Op(
    x="B C", re="S M", im="S M", left="S R N", right="S R N", b="S N", c="C N", h="B C N", skip="C",
    returns={"y": "B C : x", "next": "B C N : float32+h+c"}, check=_check,
)  # fmt: skip
def dplr_step(
    x: Tensor, re: Tensor, im: Tensor, left: Tensor, right: Tensor, b: Tensor, c: Tensor, h: Tensor,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h' = D h - left^T (right h) + b x,   y = <c, h'> + skip x,   for every channel, in real coordinates.

    Source: Gu et al. (2021) "S4", arXiv:2111.00396, app. C.2. h[:M] + i h[M:] are the complex coordinates on which
    D = re + i im is diagonal; channels s, s + S, ... share system s.

    Args:
        x: (B, C) input.
        re, im: (S, M) the diagonal.
        left, right: (S, R, N), N = 2 M, the low rank part.
        b: (S, N) input map.
        c: (C, N) output map.
        h: (B, C, N) state before the step.
        skip: (C,) weight of the input.
    Returns:
        y: (B, C) in the dtype of x.
        h': (B, C, N).
    Raises:
        ValueError: where sizes or devices disagree, N is not 2 M, or S does not divide C.
    Cost: O(C N R).
    """
    dtype = at_least_float32(torch.promote_types(h.dtype, c.dtype))
    one, two = h.to(dtype).unflatten(1, (-1, len(re))).chunk(2, dim=3)  # (B, K, S, M) each
    re, im, left, right, b = (t.to(dtype) for t in (re, im, left, right, b))
    turned = torch.cat([re * one - im * two, re * two + im * one], dim=3)
    inner = torch.einsum("srn,bksn->bksr", right, torch.cat([one, two], dim=3))
    drive = b * x.to(dtype).unflatten(1, (-1, len(re)))[..., None]
    new = (turned - torch.einsum("srn,bksr->bksn", left, inner) + drive).flatten(1, 2)
    y = (c.to(dtype) * new).sum(2)
    y = y if skip is None else y + skip.to(dtype) * x.to(dtype)
    return y.to(x.dtype), new
