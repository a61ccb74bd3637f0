"""Root mean square normalisation: what stands before every part of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check_groups(x: Tensor, weight: Tensor, eps: float) -> None:
    if weight.ndim == 2 and (x.ndim < 2 or x.shape[-2] != len(weight)):
        raise ValueError(
            f"rms_norm: weight (G, D) = {tuple(weight.shape)} takes x (..., G, D); got shape {tuple(x.shape)}"
        )


@Op(x="... D", weight="D | G D", check=_check_groups, returns={"y": "... D : x"})
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = weight x / sqrt(mean(x^2) + eps),  the mean over the last axis.

    Source: Zhang & Sennrich (2019) "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.

    Args:
        x: (..., D).
        weight: (D,), or (G, D) where x is (..., G, D).
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
    if weight.ndim == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape[1:], None, eps) * weight
