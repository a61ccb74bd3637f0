"""An auto-encoder: token ids in, all of them out again, through one vector a row."""

from collections.abc import Callable

from torch import Tensor, nn

from longwave.mixers import SinusoidalPositions
from longwave.models.backbone import Backbone
from longwave.models.lm import LOGITS_AT_ONCE
from longwave.models.pooling import Pooled, Pooling
from longwave.models.sashimi import Sashimi
from longwave.models.score import score_tokens
from longwave.nn import RMSNorm
from longwave.tasks.base import Score


class Autoencoder(Pooled):
    """encoder -> backbone -> pool over time -> that and where a token stands -> head.

        head(x) = W norm(gelu(linear(norm(gelu(linear(norm(x)))))))

    Source: Poli et al. (2024) "Mechanistic design and scaling of hybrid architectures", arXiv:2403.17844, the model of
    its compression task, in its authors' code.

    Args:
        backbone: the blocks.
        vocab: V, number of token ids.
        pooling: see :class:`longwave.models.Classifier`.
        norm: makes a norm of a width.
    Raises:
        ValueError: for an unknown pooling.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        vocab: int,
        pooling: Pooling = "last",
        norm: Callable[[int], nn.Module] = RMSNorm,
    ):
        super().__init__("an auto-encoder", backbone, vocab, None, pooling)
        D, self.vocab = backbone.d_model, vocab
        self.positions = SinusoidalPositions(D)
        hidden = [layer for _ in range(2) for layer in (norm(D), nn.Linear(D, D), nn.GELU())]
        self.head = nn.Sequential(*hidden, norm(D), nn.Linear(D, vocab))

    def decoded(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Ids x (B, L) and mask (B, L), True = real, or None -> what the head is given at every step, (B, L, D)."""
        y = self.pooled(x, mask)[:, None].expand(-1, x.shape[1], -1)
        return self.positions(y, mask=mask)[0]

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Ids x (B, L) int64, mask (B, L), True = real, at least one a row -> logits (B, L, V)."""
        return self.head(self.decoded(x, mask))

    def score(self, x: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score:
        """Cross entropy (natural log) summed over the targets (B, L) that are not -100, with gradient."""
        return score_tokens(self.decoded(x, mask), targets, self.head, LOGITS_AT_ONCE // self.vocab)
