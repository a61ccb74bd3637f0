"""One step of a diagonal state space in every channel: what a token costs S4D and its kin."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(
    x="B C", a="C N : complex", b="C N : complex", c="C N : complex", h="B C N : complex", skip="C",
    returns={"y": "B C : x", "next": "B C N : h+a"},
)  # fmt: skip
def state_space_step(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h' = a h + b x,   y = 2 Re sum_n c h' + skip x,   for every channel.

    Source: Gu et al. (2022) "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv:2206.11893, eq. 3, discretised; of each conjugate pair of modes one is given.

    Args:
        x: (B, C) input.
        a, b, c: (C, N) complex decays, input and output maps.
        h: (B, C, N) complex state before the step.
        skip: (C,) weight of the input.
    Returns:
        y: (B, C) in the dtype of x.
        h': (B, C, N) complex.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(C N).
    """
    dtype = torch.promote_types(h.dtype, a.dtype)
    new = torch.addcmul(b.to(dtype) * x[..., None], a.to(dtype), h.to(dtype))
    y = 2 * (c * new).sum(-1).real
    y = y if skip is None else y + skip * x
    return y.to(x.dtype), new
