"""A short depthwise convolution that carries its own past: the local filter of H3, Hyena and Mamba."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(u="B L C", weight="C K", bias="C", state="B K-1 C")
def short_conv(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum_{j<K} weight[K-1-j] u[t-j],  where the inputs before the first are those of the state.

    Args:
        u: (B, L, C) input.
        weight: (C, K) taps as in torch's conv1d, the last one weighs the present.
        bias: (C,) or None.
        state: (B, K-1, C) the inputs before u, oldest first; None is silence.
    Returns:
        y: (B, L, C) in the dtype of u.
        state: (B, K-1, C) the last K-1 inputs.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L K) time, O(L) memory.
    """
    K = weight.shape[1]
    full = _with_past(u, state, K)
    windows = full.unfold(1, K, 1)  # (B, L, C, K)
    y = torch.einsum("blck,ck->blc", windows, weight.to(u.dtype))
    return y if bias is None else y + bias.to(u.dtype), full[:, full.shape[1] - (K - 1) :].clone()


def _with_past(u: Tensor, state: Tensor | None, K: int) -> Tensor:
    if state is None:
        return F.pad(u, (0, 0, K - 1, 0))
    return torch.cat([state.to(u.dtype), u], dim=1)


@short_conv.backend("torch")
def _shifted_sum(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K multiply-adds over shifted views: torch's depthwise conv1d transposes twice and is slower on a CPU."""
    K, L = weight.shape[1], u.shape[1]
    full, taps = _with_past(u, state, K), weight.to(u.dtype)
    y = full[:, K - 1 :] * taps[:, K - 1]
    for j in range(K - 1):
        y = torch.addcmul(y, full[:, j : j + L], taps[:, j])
    return y if bias is None else y + bias.to(u.dtype), full[:, full.shape[1] - (K - 1) :].clone()
