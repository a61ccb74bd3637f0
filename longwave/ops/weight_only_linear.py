"""A linear map whose weights are kept, and read, in fewer bits than they are computed in."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32

LONGEST = 4096  # weights that may share a scale: sums of as many products fit 32 bits
WEIGHT_STEPS, INPUT_STEPS = 127, 32767


def _check_scale(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """Refuse int8 weights without a scale, others with one, and parts that are too long."""
    if (weight.dtype is torch.int8) != (scale is not None):
        raise ValueError(f"weight_only_linear: a scale belongs to int8 weights, and to no others; got {weight.dtype} "
                         f"and {'no scale' if scale is None else 'a scale'}")  # fmt: skip
    if scale is not None and not -(-weight.shape[1] // LONGEST) <= scale.shape[1] <= weight.shape[1]:
        raise ValueError(f"weight_only_linear: rows of {weight.shape[1]} weights have a scale for {LONGEST} of them at "
                         f"least, and for each at most; got scale (M, G) with G = {scale.shape[1]}")  # fmt: skip


@Op(x="... K", weight="M K : stored", bias="M", scale="M G", check=_check_scale, returns={"y": "... M : x"})
def weight_only_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """y[m] = sum_k W[m, k] x[k] + bias[m],  W = weight, or of int8  W[m, k] = scale[m, k // g] weight[m, k].

    int8 weights meet inputs that are rounded too, to 16 bits: x = s round(x / s),  s = max |x| / 32767 for every row,
    to the nearest, halves to even. So both can be multiplied and summed as integers, exactly; next to the rounding of
    the weights it does not count. Elsewhere x is taken as it is. Sums are in float32, or float64 where x is.

    Source: of weights by rows or groups in 8 bits, Dettmers et al. (2022), arXiv:2208.07339, sec. 2.1.

    Args:
        x: (..., K) float. A row that holds anything that is not finite has a result of NaN with int8 weights.
        weight: (M, K) float, or int8 in -127..127.
        bias: (M,) or None.
        scale: (M, G) for int8, else None: of G equal parts of a row, each of g = ceil(K / G) <= 4096 weights.
    Returns:
        y: (..., M) in the dtype of x.
    Raises:
        ValueError: for int8 weights without a scale, others with one, or parts that are too long.
    Cost: O(M K) time a row; of few rows, the time in which memory gives the weights.
    """
    dtype = at_least_float32(x.dtype)
    y = F.linear(rounded(x.to(dtype), weight), unpacked(weight, scale, dtype))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def packed(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 weights and their scales: W = s round(W / s),  s = max |W| / 127 of every part of a row, halves to even.

    Args:
        weight: (M, K) float.
        group: weights that share a scale, 1..4096; None for a whole row, up to 4096.
    Returns:
        weight: (M, K) int8.
        scale: (M, G) in the dtype of the weights, at least float32; G = ceil(K / group), of parts as equal as can be.
    Raises:
        ValueError: for a group outside 1..4096, or weights that are not finite.
    """
    M, K = weight.shape
    group = min(K, LONGEST) if group is None else group
    if not 1 <= group <= LONGEST:
        raise ValueError(f"1..{LONGEST} weights share a scale; got group = {group}")
    G = -(-K // group)
    g = -(-K // G)
    parts = F.pad(weight.to(at_least_float32(weight.dtype)), (0, G * g - K)).view(M, G, g)
    most = parts.abs().amax(2, keepdim=True)
    if weight.device.type != "meta" and not bool(torch.isfinite(most).all()):
        raise ValueError("weights hold infinity or NaN, which int8 cannot; is the model sound?")
    steps = (parts * _inverse(most, WEIGHT_STEPS)).round().to(torch.int8)
    return steps.view(M, G * g)[:, :K].contiguous(), most[..., 0] / WEIGHT_STEPS


def unpacked(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights that are stored, (M, K), in a dtype of floats."""
    weight = weight.to(dtype)
    if scale is None:
        return weight
    K, G = weight.shape[1], scale.shape[1]
    return weight * scale.to(dtype).repeat_interleave(-(-K // G), dim=1)[:, :K]


def rounded(x: Tensor, weight: Tensor) -> Tensor:
    """x as weights of that dtype meet it; its gradient is that of x."""
    if weight.dtype is not torch.int8:
        return x
    most = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    steps = (x.detach() * _inverse(most, INPUT_STEPS)).round()
    return x + (steps * (most / INPUT_STEPS) - x).detach()


def _inverse(most: Tensor, steps: int) -> Tensor:
    """steps / most, in one rounding, as kernels do it; 0 has no steps."""
    return torch.where(most == 0, 0.0, torch.full_like(most, steps) / most)
