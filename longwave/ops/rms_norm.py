"""Root mean square normalisation: what stands before every part of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


@Op(x="... D", weight="D", returns={"y": "... D : x"})
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = weight x / sqrt(mean(x^2) + eps),  the mean over the last axis.

    Source: Zhang & Sennrich (2019) "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.

    Args:
        x: (..., D).
        weight: (D,).
        eps: > 0, added to the mean square.
    Returns:
        y: (..., D) in the dtype of x; computed in float32 or better.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(D) a row.
    """
    work = at_least_float32(torch.promote_types(x.dtype, weight.dtype))
    wide = x.to(work)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(work)).to(x.dtype)


@rms_norm.backend(
    "torch", why_not=lambda x, weight, eps: None if x.dtype == weight.dtype else "x and weight differ in dtype"
)
def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)
