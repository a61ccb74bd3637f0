"""Rotary positions: pairs of numbers turned by angles that grow with the position."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


def _check(x: Tensor, start: Tensor | None, frequency: Tensor, heads: int) -> None:
    if 2 * len(frequency) > x.shape[3] or not 1 <= heads <= x.shape[2]:
        raise ValueError(
            f"rotary: {len(frequency)} pairs in each of heads = {heads} heads are to be turned; x has {x.shape[2]} "
            f"heads of width {x.shape[3]}"
        )


@Op(
    x="B L H P", start="B : whole", frequency="R : wide", check=_check, returns={"y": "B L H P : x"}
)  # fmt: skip
def rotary(x: Tensor, start: Tensor | None, frequency: Tensor, heads: int) -> Tensor:
    """Turn the pairs (i, i + R) of the first heads, i < R, at step t by the angle (start + t) frequency[i].

    Source: Su et al. (2021) "RoFormer", arXiv:2104.09864, eq. 34. Angles are in float64: at position 1e6 an angle in
    float32 is off by 0.04 rad.

    Args:
        x: (B, L, H, P); what is behind the 2 R first numbers of a head, and other heads, stays as it is.
        start: (B,) int64, the position of x[:, 0] in each row, in tokens; None is 0.
        frequency: (R,) radians a token, float64 where it is to be exact far out.
        heads: how many are turned.
    Returns:
        y: (B, L, H, P) in the dtype of x.
    Raises:
        ValueError: where sizes or devices disagree, or 2 R > P.
    Cost: O(L H P).
    """
    work, R = at_least_float32(x.dtype), len(frequency)
    steps = torch.arange(x.shape[1], device=x.device)
    position = steps[None] if start is None else start[:, None] + steps
    angle = position[:, :, None, None] * frequency.double()  # (B or 1, L, 1, R)
    cos, sin = angle.cos().to(work), angle.sin().to(work)
    turned, others = x[:, :, :heads].to(work), x[:, :, heads:]
    left, right, rest = turned[..., :R], turned[..., R : 2 * R], turned[..., 2 * R :]
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1).to(x.dtype)
    return torch.cat([turned, others], dim=2)
