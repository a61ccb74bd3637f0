"""What heads of whole sequences share: ids or real numbers in, one vector a row out."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers.base import as_mask, zero_padding
from longwave.models.backbone import Backbone
from longwave.models.embedding import embed, make_embedding
from longwave.models.sashimi import Sashimi
from longwave.nn.padding import last_real, take_steps

Pooling = Literal["mean", "last", "first"]


def make_encoder(
    what: str, d_model: int, vocab: int | None, features: int | None, types: int | None = None
) -> nn.Embedding | nn.Linear:
    """An embedding of so many ids (and types), or a linear map of real inputs of so many features.

    Raises:
        ValueError: unless exactly one of them is given, or for types of real inputs.
    """
    if (vocab is None) == (features is None):
        raise ValueError(f"{what} takes either vocab or features; got vocab = {vocab}, features = {features}")
    if vocab is None and types is not None:
        raise ValueError(f"{what} of real inputs has no types of tokens; got types = {types}")
    return make_embedding(vocab, d_model, types) if vocab is not None else nn.Linear(features or 0, d_model)


def encode(
    encoder: nn.Module, backbone: Backbone | Sashimi, x: Tensor, mask: Tensor | None, types: Tensor | None = None
) -> Tensor:
    """x (B, L) int64 ids, with types of tokens or without, or (B, L, features), mask (B, L) or None -> (B, L, D)."""
    if isinstance(encoder, nn.Embedding):
        u = embed(encoder, x, types)
    else:
        u = encoder(zero_padding(x, None if mask is None else as_mask(mask, x)))
    return backbone(u, mask=mask)[0]


def pool(y: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """y (B, L, D) -> (B, D): the mean over the real steps, the last of them, or the first."""
    if mask is None:
        return y.mean(1) if pooling == "mean" else y[:, -1 if pooling == "last" else 0]
    mask = as_mask(mask, y)
    if pooling == "mean":
        return (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).to(y.dtype)
    place = last_real(mask) if pooling == "last" else mask.int().argmax(1)
    return take_steps(y, place[:, None])[:, 0]


class Pooled(nn.Module):
    """What makes one vector of a sequence: encoder -> backbone -> pool over time. Heads are over it.

    With ``complement`` the vector is the mean of those of a sequence and of its reverse complement, so a head tells the
    same of both strands of DNA. Source: Zhou, Shrikumar & Kundaje (2022) "Towards a better understanding of
    reverse-complement equivariance for deep learning models in genomics", PMLR 165: conjoined models.

    Args:
        what: it is, in an error.
        backbone: the blocks.
        vocab: token ids (B, L) are embedded; None means real inputs (B, L, features) go through a linear map.
        features: width of real inputs, where vocab is None.
        pooling: mean over the real tokens, the last of them, or the first.
        complement: what each id is on the other strand, such as [3, 2, 1, 0, 4] of A C G T N; None reads one strand.
        types: how many types of tokens there are, see :class:`longwave.models.TypedEmbedding`; None for none.
    Raises:
        ValueError: for an unknown pooling, a complement that does not give back each id, or unless exactly one of vocab
            and features is given.
    """

    complement: Tensor | None

    def __init__(
        self,
        what: str,
        backbone: Backbone | Sashimi,
        vocab: int | None,
        features: int | None,
        pooling: Pooling,
        complement: Sequence[int] | None = None,
        types: int | None = None,
    ):
        super().__init__()
        choose("pooling", pooling, dict.fromkeys(get_args(Pooling)))
        self.encoder = make_encoder(what, backbone.d_model, vocab, features, types)
        self.backbone, self.pooling = backbone, pooling
        ids = range(vocab or 0)
        if complement is not None and (
            sorted(complement) != [*ids] or any(complement[complement[i]] != i for i in ids) or not vocab
        ):
            raise ValueError(
                f"a complement has an id for each of vocab = {vocab}, and that one's is the first again; "
                f"got {list(complement)}"
            )
        self.register_buffer("complement", None if complement is None else torch.tensor(complement))

    def pooled(self, x: Tensor, mask: Tensor | None, types: Tensor | None = None) -> Tensor:
        """x (B, L) int64 ids or (B, L, features), mask (B, L), True = real, at least one a row, or None, and types of
        tokens (B, L) int64 where there are any -> (B, D)."""
        if self.complement is None:
            return pool(encode(self.encoder, self.backbone, x, mask, types), mask, self.pooling)
        types = None if types is None else torch.cat([types, types.flip(1)])
        other = self.complement[x.clamp(0, len(self.complement) - 1)].flip(1)  # ids out of range are refused as x
        x, mask = torch.cat([x, other]), None if mask is None else torch.cat([mask, mask.flip(1)])
        both = pool(encode(self.encoder, self.backbone, x, mask, types), mask, self.pooling)
        return both.unflatten(0, (2, -1)).mean(0)


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
