"""Weights are unpacked some rows at a time: their float form never exists whole."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import at_least_float32
from longwave.ops.weight_only_linear import rounded, unpacked

AT_ONCE = 2**22  # weights


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """y (..., M)."""
    dtype = at_least_float32(x.dtype)
    bias, inputs = None if bias is None else bias.to(dtype), rounded(x.to(dtype), weight)
    y = x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)
    for some, w in _unpacked(weight, scale, dtype):
        y[..., some] = F.linear(inputs, w, None if bias is None else bias[some])
    return y.to(x.dtype)


def backward(
    needed: set[str], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> dict[str, Tensor]:
    """Gradients, x as it would be without being rounded."""
    dtype = at_least_float32(x.dtype)
    dy, inputs, grads = dy.to(dtype).flatten(0, -2), rounded(x.to(dtype), weight).flatten(0, -2), {}
    if "x" in needed:
        parts = (dy[:, some] @ w for some, w in _unpacked(weight, scale, dtype))
        grads["x"] = sum(parts, torch.zeros_like(inputs)).view(x.shape)
    if "bias" in needed:
        grads["bias"] = dy.sum(0)
    if "weight" in needed:
        grads["weight"] = dy.T @ inputs
    if "scale" in needed:
        assert scale is not None
        G, K = scale.shape[1], weight.shape[1]
        g = -(-K // G)
        products = F.pad((dy.T @ inputs) * weight, (0, G * g - K))
        grads["scale"] = products.unflatten(1, (G, g)).sum(2)
    return grads


def _unpacked(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weights, and which."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        yield some, unpacked(weight[some], None if scale is None else scale[some], dtype)
