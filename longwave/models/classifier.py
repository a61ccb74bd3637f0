"""Classifiers of whole sequences: one label a row, of one sequence or of two."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longwave.models.backbone import Backbone
from longwave.models.pooling import Pooled, Pooling, mask_of
from longwave.models.sashimi import Sashimi
from longwave.models.score import score_logits
from longwave.tasks.base import Score
from longwave.tasks.forms import scored


class Classifier(Pooled):
    """encoder -> backbone -> pool over time -> head.

    Args:
        backbone: the blocks.
        classes: number of labels.
        vocab, features, pooling, complement, types: see :class:`longwave.models.pooling.Pooled`.
        head: makes what comes then, of D and classes.
    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        classes: int,
        *,
        vocab: int | None = None,
        features: int | None = None,
        pooling: Pooling = "mean",
        complement: Sequence[int] | None = None,
        types: int | None = None,
        head: Callable[[int, int], nn.Module] = nn.Linear,
    ):
        super().__init__("a classifier", backbone, vocab, features, pooling, complement, types)
        self.head = head(backbone.d_model, classes)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Logits over the labels.

        Args:
            x: (B, L) int64 ids or (B, L, features).
            lengths: (B,) int64 >= 1, how many steps of each row are real, counted from its start.
            mask: (B, L) bool or integers 0 and 1, True = real, instead of lengths; at least one a row.
            types: (B, L) int64, of a model that has types of tokens; None is the first.
        Returns:
            logits: (B, classes).
        Raises:
            ValueError: where lengths are not in 1..L, or both are given.
        """
        if lengths is not None:
            if mask is not None:
                raise ValueError("give either lengths or mask, not both")
            mask = mask_of(lengths, x.shape[1])
        return self.head(self.pooled(x, mask, types))

    def score(self, x: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score:
        """Cross entropy (natural log) summed over the labels targets (B,) that are not -100, with gradient."""
        return _score(self(x, mask=mask), targets)


class PairClassifier(Pooled):
    """Two sequences, each through the same encoder, backbone and pooling, to (B, D) each; then one label of both:

        head(a, b) = out(relu(hidden [a, b, a - b, a * b]))

    Source: Tay et al. (2020) "Long Range Arena", arXiv:2011.04006, sec. 2.2.3, the two towers of its matching task, in
    its authors' code.

    Args:
        backbone, classes, vocab, features, pooling, complement: see :class:`Classifier`.
    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        classes: int,
        *,
        vocab: int | None = None,
        features: int | None = None,
        pooling: Pooling = "mean",
        complement: Sequence[int] | None = None,
    ):
        super().__init__("a pair classifier", backbone, vocab, features, pooling, complement)
        D = backbone.d_model
        self.hidden, self.out = nn.Linear(4 * D, D), nn.Linear(D, classes)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits over the labels.

        Args:
            x: (B, 2, L) int64 ids or (B, 2, L, features).
            mask: (B, 2, L) bool or integers 0 and 1, True = real; at least one a sequence.
        Returns:
            logits: (B, classes).
        """
        mask = None if mask is None else mask.flatten(0, 1)
        a, b = self.pooled(x.flatten(0, 1), mask).unflatten(0, (-1, 2)).unbind(1)
        return self.out(torch.relu(self.hidden(torch.cat([a, b, a - b, a * b], dim=-1))))

    def score(self, x: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score:
        """As :meth:`Classifier.score`."""
        return _score(self(x, mask=mask), targets)


def _score(logits: Tensor, targets: Tensor) -> Score:
    counts = scored(targets)
    return score_logits(logits[counts], targets[counts])
