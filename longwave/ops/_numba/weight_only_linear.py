"""Few rows through weights that are read as they are stored; see rows.py."""

import math

import torch
from torch import Tensor

from longwave.ops._numba import rows
from longwave.ops._torch.weight_only_linear import backward as backward

MOST = 32  # rows; of more, torch's product of matrices is as fast


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> str | None:
    """What the kernels have no form for."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"weights are {weight.dtype}; the kernels read float32, bfloat16 and int8"
    if (B := math.prod(x.shape[:-1])) > MOST:
        return f"x has {B} rows; the kernels are for at most {MOST}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """y (..., M)."""
    bias, scale = (None if t is None else t.float().contiguous() for t in (bias, scale))
    y = rows.linear(x.float().contiguous(), rows.Weights(weight.contiguous(), bias, scale))
    return y.to(x.dtype)
