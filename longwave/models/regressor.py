"""Real numbers out: a few for a whole sequence, or some at each of its last steps."""

from collections.abc import Sequence

from torch import Tensor, nn

from longwave.mixers.base import as_mask
from longwave.models.backbone import Backbone
from longwave.models.pooling import Pooled, Pooling, encode, make_encoder
from longwave.models.sashimi import Sashimi
from longwave.models.score import score_values
from longwave.nn.padding import last_steps, real_first, take_steps
from longwave.tasks.base import Errors


class Regressor(Pooled):
    """encoder -> backbone -> pool over time -> head.

    Args:
        backbone: the blocks.
        width: how many numbers are told of a row.
        vocab, features, pooling, complement: see :class:`longwave.models.pooling.Pooled`.
    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        width: int,
        *,
        vocab: int | None = None,
        features: int | None = None,
        pooling: Pooling = "mean",
        complement: Sequence[int] | None = None,
    ):
        super().__init__("a regressor", backbone, vocab, features, pooling, complement)
        self.head = nn.Linear(backbone.d_model, width)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x (B, L) int64 ids or (B, L, features), mask (B, L), True = real, at least one a row -> (B, width)."""
        return self.head(self.pooled(x, mask))

    def score(self, x: Tensor, targets: Tensor, mask: Tensor | None = None) -> Errors:
        """Errors summed over the targets (B, width) that are not NaN; the squared ones with gradient."""
        return score_values(self(x, mask=mask), targets)


class Forecaster(nn.Module):
    """encoder -> backbone -> head at the last steps, at which the inputs hold what is known of the future, or zeros.

    Source: Gu et al. (2021) "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396,
    sec. 4.3 (forecasting as a masked sequence to sequence map).

    Args:
        backbone: the blocks.
        steps: how many steps are told.
        width: how many numbers at each.
        vocab, features: see :class:`longwave.models.Classifier`.
    Raises:
        ValueError: unless exactly one of vocab and features is given.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        steps: int,
        width: int,
        *,
        vocab: int | None = None,
        features: int | None = None,
    ):
        super().__init__()
        self.encoder = make_encoder("a forecaster", backbone.d_model, vocab, features)
        self.backbone, self.steps, self.head = backbone, steps, nn.Linear(backbone.d_model, width)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """What comes at the last real steps.

        Args:
            x: (B, L) int64 ids or (B, L, features).
            mask: (B, L) bool or integers 0 and 1, True = real; at least ``steps`` a row.
        Returns:
            (B, steps, width).
        Raises:
            ValueError: where a row has fewer steps.
        """
        least = x.shape[1] if mask is None else int(mask.sum(1).min())
        if least < self.steps:
            raise ValueError(
                f"a row of {least} steps has no last {self.steps}: make inputs longer, or tell fewer steps"
            )
        y = encode(self.encoder, self.backbone, x, mask)
        padding = None
        if mask is not None:
            order, _, padding = real_first(as_mask(mask, x))
            y = take_steps(y, order)
        return self.head(last_steps(y, padding, self.steps))

    def score(self, x: Tensor, targets: Tensor, mask: Tensor | None = None) -> Errors:
        """Errors summed over the targets (B, steps, width) that are not NaN; the squared ones with gradient."""
        return score_values(self(x, mask=mask), targets)
