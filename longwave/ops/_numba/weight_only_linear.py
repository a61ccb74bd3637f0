"""Few rows through weights that are read as they are stored; see rows.py."""

import torch
from torch import Tensor

from longwave.ops._numba import rows
from longwave.ops._torch.weight_only_linear import backward as backward

MOST = 32  # rows; of more, torch's product of float matrices is as fast
AT_ONCE = 64  # rows whose integers stay in the second-level cache beside the weights that meet them


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> str | None:
    """What the kernels have no form for."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"weights are {weight.dtype}; the kernels read float32, bfloat16 and int8"
    if weight.dtype is not torch.int8 and (B := x.shape[:-1].numel()) > MOST:
        return f"x has {B} rows; the kernels of float weights are for at most {MOST}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """y (..., M)."""
    bias, scale = (None if t is None else t.float().contiguous() for t in (bias, scale))
    weights, inputs = rows.Weights(weight.contiguous(), bias, scale), x.float().contiguous()
    if x.shape[:-1].numel() <= AT_ONCE:
        return rows.linear(inputs, weights).to(x.dtype)
    parts = [rows.linear(part, weights) for part in inputs.flatten(0, -2).split(AT_ONCE)]
    return torch.cat(parts).view(*x.shape[:-1], -1).to(x.dtype)
