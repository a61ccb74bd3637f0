"""A short depthwise convolution that carries its own past: the local filter of H3, Hyena and Mamba."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op, numba_why_not


@Op(u="B L C", weight="C K", bias="C", state="B K-1 C")
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
    return _finish(y, bias, silu), _last(u, state, K)


def _finish(y: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = y if bias is None else y + bias.to(y.dtype)
    return F.silu(y) if silu else y


def _last(u: Tensor, state: Tensor | None, K: int) -> Tensor:
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
    return _finish(y, bias, silu), _last(u, state, K)


@torch.library.custom_op("longwave::short_conv", mutates_args=())
def _fused(u: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    from longwave.ops._numba import short_conv as kernels

    return kernels.forward(u, weight, bias, past, silu).to(u.dtype)


@_fused.register_fake
def _(u, weight, bias, past, silu):
    return u.new_empty(u.shape)


@torch.library.custom_op("longwave::short_conv_backward", mutates_args=())
def _fused_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, weight, bias and past, also of those that are None."""
    from longwave.ops._numba import short_conv as kernels

    du, *grads = kernels.backward(dy, u, weight, bias, past, silu)
    dtypes = [(weight if t is None else t).dtype for t in (weight, bias, past)]
    dweight, dbias, dpast = (grad.to(dtype) for grad, dtype in zip(grads, dtypes))
    return du.to(u.dtype), dweight, dbias, dpast


@_fused_backward.register_fake
def _(dy, u, weight, bias, past, silu):
    (B, _, C), K = u.shape, weight.shape[1]
    dbias, dpast = (weight.new_empty(()) if t is None else t for t in (bias, past))
    return u.new_empty(u.shape), weight.new_empty(C, K), dbias.new_empty(C), dpast.new_empty(B, K - 1, C)


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    u, weight, bias, past = ctx.saved_tensors
    du, dweight, dbias, dpast = _fused_backward(dy, u, weight, bias, past, ctx.silu)
    return du, dweight, None if bias is None else dbias, None if past is None else dpast, None


torch.library.register_autograd("longwave::short_conv", _backward, setup_context=_save)


@short_conv.backend("numba", why_not=lambda *args, silu=False, **kwargs: numba_why_not(*args, *kwargs.values()))
def _(u, weight, bias=None, state=None, *, silu=False):
    return _fused(u, weight, bias, state, silu), _last(u, state, weight.shape[1])
