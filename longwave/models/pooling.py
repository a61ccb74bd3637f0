"""What heads of whole sequences share: ids or real numbers in, one vector a row out."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers.base import as_mask, zero_padding
from longwave.models.backbone import Backbone
from longwave.models.lm import embed
from longwave.models.sashimi import Sashimi
from longwave.nn.padding import last_real, take_steps

Pooling = Literal["mean", "last", "first"]


def make_encoder(what: str, d_model: int, vocab: int | None, features: int | None) -> nn.Embedding | nn.Linear:
    """An embedding of so many ids, or a linear map of real inputs of so many features.

    Raises:
        ValueError: unless exactly one of them is given.
    """
    if (vocab is None) == (features is None):
        raise ValueError(f"{what} takes either vocab or features; got vocab = {vocab}, features = {features}")
    return nn.Embedding(vocab, d_model) if vocab is not None else nn.Linear(features or 0, d_model)


def encode(encoder: nn.Module, backbone: Backbone | Sashimi, x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L) int64 ids or (B, L, features), mask (B, L) or None -> (B, L, D)."""
    if isinstance(encoder, nn.Embedding):
        u = embed(encoder, x)
    else:
        u = encoder(zero_padding(x, None if mask is None else as_mask(mask, x)))
    return backbone(u, mask=mask)[0]


def check_pooling(pooling: str) -> None:
    """Raises ValueError for one that there is not."""
    choose("pooling", pooling, dict.fromkeys(get_args(Pooling)))


def pool(y: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """y (B, L, D) -> (B, D): the mean over the real steps, the last of them, or the first."""
    if mask is None:
        return y.mean(1) if pooling == "mean" else y[:, -1 if pooling == "last" else 0]
    mask = as_mask(mask, y)
    if pooling == "mean":
        return (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).to(y.dtype)
    place = last_real(mask) if pooling == "last" else mask.int().argmax(1)
    return take_steps(y, place[:, None])[:, 0]


def mask_of(lengths: Tensor, length: int) -> Tensor:
    """The mask (B, length) of rows that are real for so many steps from their start, lengths (B,) int64.

    Raises:
        ValueError: where they are not in 1..length.
    """
    if lengths.min() < 1 or lengths.max() > length:
        raise ValueError(
            f"lengths must lie in 1..{length}, the padded length; got {lengths.min().item()}..{lengths.max().item()}"
        )
    return torch.arange(length, device=lengths.device) < lengths[:, None]
