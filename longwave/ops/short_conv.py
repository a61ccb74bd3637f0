"""A short depthwise convolution that carries its own past: the local filter of H3, Hyena and Mamba."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(
    u="B L C", weight="C K", bias="C", state="B K-1 C", returns={"y": "B L C : u", "last": "B K-1 C : u"}
)  # fmt: skip
def short_conv(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum_{j<K} weight[K-1-j] u[t-j],  where the inputs before the first are those of the state.

    Source: Fu et al. (2022) "H3", arXiv:2212.14052, sec. 3; with the activation behind it, Gu & Dao (2023) "Mamba",
    arXiv:2312.00752, fig. 3.

    Args:
        u: (B, L, C) input.
        weight: (C, K) taps as in torch's conv1d, the last one weighs the present.
        bias: (C,) or None.
        state: (B, K-1, C) the inputs before u, oldest first; None is silence.
        silu: y becomes y sigmoid(y).
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
    return _finish(y, bias, silu), last_inputs(u, state, K)


def _finish(y: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = y if bias is None else y + bias.to(y.dtype)
    return F.silu(y) if silu else y


def last_inputs(u: Tensor, state: Tensor | None, K: int) -> Tensor:
    """The last K-1 inputs."""
    L = u.shape[1]
    return u[:, L - (K - 1) :].clone() if L >= K - 1 else _with_past(u, state, K)[:, L:].clone()


def _with_past(u: Tensor, state: Tensor | None, K: int) -> Tensor:
    if state is None:
        return F.pad(u, (0, 0, K - 1, 0))
    return torch.cat([state.to(u.dtype), u], dim=1)


@short_conv.backend("torch")
def _shifted_sum(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """K multiply-adds over shifted views: torch's depthwise conv1d transposes twice and is slower on a CPU."""
    K, L = weight.shape[1], u.shape[1]
    full, taps = _with_past(u, state, K), weight.to(u.dtype)
    y = full[:, K - 1 :] * taps[:, K - 1]
    for j in range(K - 1):
        y = torch.addcmul(y, full[:, j : j + L], taps[:, j])
    return _finish(y, bias, silu), last_inputs(u, state, K)
