"""A classifier of whole sequences: one label a row."""

from typing import Literal

import torch
from torch import Tensor, nn

from longwave.mixers.base import as_mask, zero_padding
from longwave.models.backbone import Backbone
from longwave.models.lm import embed
from longwave.models.sashimi import Sashimi
from longwave.models.score import Score, score_logits
from longwave.tasks.base import IGNORE

POOLINGS = ("mean", "last", "first")


class Classifier(nn.Module):
    """encoder -> backbone -> pool over time -> head.

    Args:
        backbone: the blocks.
        classes: number of labels.
        vocab: token ids (B, L) are embedded; None means real inputs (B, L, features) go through a linear map.
        features: width of real inputs, where vocab is None.
        pooling: mean over the real tokens, the last of them, or the first.
    Raises:
        ValueError: for an unknown pooling, or unless exactly one of vocab and features is given.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        classes: int,
        *,
        vocab: int | None = None,
        features: int | None = None,
        pooling: Literal["mean", "last", "first"] = "mean",
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"no pooling is called {pooling!r}; there are {', '.join(POOLINGS)}")
        if (vocab is None) == (features is None):
            raise ValueError(f"a classifier takes either vocab or features; got vocab = {vocab}, features = {features}")
        D = backbone.d_model
        self.encoder = nn.Embedding(vocab, D) if vocab is not None else nn.Linear(features or 0, D)
        self.backbone, self.pooling, self.head = backbone, pooling, nn.Linear(D, classes)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits over the labels.

        Args:
            x: (B, L) int64 ids or (B, L, features).
            lengths: (B,) int64 >= 1, how many steps of each row are real, counted from its start.
            mask: (B, L) bool or integers 0 and 1, True = real, instead of lengths; at least one a row.
        Returns:
            logits: (B, classes).
        Raises:
            ValueError: where lengths are not in 1..L, or both are given.
        """
        L = x.shape[1]
        if lengths is not None:
            if mask is not None:
                raise ValueError("give either lengths or mask, not both")
            if lengths.min() < 1 or lengths.max() > L:
                raise ValueError(
                    f"lengths must lie in 1..{L}, the padded length; got {lengths.min().item()}..{lengths.max().item()}"
                )
            mask = torch.arange(L, device=x.device) < lengths[:, None]
        if mask is not None:
            mask = as_mask(mask, x)
            x = zero_padding(x, mask) if x.is_floating_point() else x
        u = embed(self.encoder, x) if isinstance(self.encoder, nn.Embedding) else self.encoder(x)
        y, _ = self.backbone(u, mask=mask)  # (B, L, D)
        return self.head(self._pool(y, mask))

    def score(self, x: Tensor, targets: Tensor, *, lengths: Tensor | None = None) -> Score:
        """Cross entropy (natural log) summed over the labels targets (B,) that are not -100, with gradient."""
        scored = targets != IGNORE
        return score_logits(self(x, lengths=lengths)[scored], targets[scored])

    def _pool(self, y: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
        if self.pooling == "mean":
            return (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).to(y.dtype)
        place = torch.arange(y.shape[1], device=y.device)
        if self.pooling == "last":
            where = torch.where(mask, place, -1).amax(1)
        else:
            where = torch.where(mask, place, y.shape[1]).amin(1)
        return y[torch.arange(len(y), device=y.device), where]
