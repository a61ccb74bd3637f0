"""Long convolution along time by FFT, with the skip connection and the gates of H3 and Hyena fused in."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, at_least_float32


@Op(
    u="B L C", k="C K", skip="C", gate_in="B L C", gate_out="B L C", k_future="C M?", returns={"y": "B L C : u"}
)  # fmt: skip
def causal_conv(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    k_future: Tensor | None = None,
) -> Tensor:
    """Convolve every channel along time:  y[t] = gate_out[t] (sum_{s<=t} k[s] x[t-s] + skip x[t]),  x = gate_in u.

    Source: Fu et al. (2023) "FlashConv", arXiv:2212.14052, sec. 4; Poli et al. (2023), arXiv:2302.10866, eq. 4.

    Args:
        u: (B, L, C) input, float; bf16 and fp16 are convolved in float32.
        k: (C, K) causal taps, k[:, 0] weighs the present. K < L is a finite filter; taps beyond L do not matter.
        skip: (C,) weight of the present input, added to tap 0.
        gate_in, gate_out: (B, L, C) pointwise factors of the input and of the output.
        k_future: (C, M) taps of a two-sided filter; k_future[:, s] weighs x[t + 1 + s], so no tap is counted twice.
    Returns:
        y: (B, L, C) in the dtype of u.
    Raises:
        ValueError: where sizes or devices disagree.
    Cost: O(L log L) time a channel, O(L) memory.
    """
    work = at_least_float32(torch.promote_types(u.dtype, k.dtype))
    x = u if gate_in is None else u * gate_in
    L, K = u.shape[1], min(k.shape[1], u.shape[1])
    taps = k[:, :K].flip(1)
    right = 0
    if k_future is not None:
        right = min(k_future.shape[1], L - 1)
        taps = torch.cat([taps, k_future[:, :right]], dim=1)
    windows = F.pad(x.to(work).transpose(1, 2), (K - 1, right)).unfold(-1, K + right, 1)  # (B, C, L, K + right)
    y = torch.einsum("bclk,ck->blc", windows, taps.to(work))
    y = y if skip is None else y + skip.to(work) * x.to(work)
    y = y if gate_out is None else y * gate_out.to(work)
    return y.to(u.dtype)
