"""The linear recurrence  h[t] = a[t] h[t-1] + b[t]  that diagonal state spaces, EMAs and gated linear RNNs share."""

import torch
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(a="B L C : any", b="B L C : any", h0="B C : any", returns={"h": "B L C : a+b+h0"})
def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t],  h[-1] = h0.

    Source: Blelloch (1990) sec. 1.4; the gradient is a scan reversed: Martin & Cundy (2018), arXiv:1709.04057, eq. 4-6.

    Args:
        a, b: (B, L, C) decay and input, real or complex.
        h0: (B, C) the state before the first step.
    Returns:
        h: (B, L, C); h[:, -1] is the state to resume from.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L) time and memory, 2 sqrt(L) steps one after another in the portable form.
    """
    h, hs = h0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)
