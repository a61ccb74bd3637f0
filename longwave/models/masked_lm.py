"""A masked language model: token ids of which some are hidden in, logits over what stands there out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longwave.errors import choose
from longwave.models.backbone import Backbone
from longwave.models.embedding import draw_tokens, embed, make_embedding
from longwave.models.lm import LOGITS_AT_ONCE
from longwave.models.sashimi import Sashimi
from longwave.models.score import score_tokens
from longwave.nn.channel import ACTIVATIONS
from longwave.tasks.base import Score


class MaskedLMHead(nn.Module):
    """decoder(norm(activation(dense x))).

    Source: Devlin et al. (2018) "BERT", arXiv:1810.04805, the head of the authors' code.

    Args:
        d_model: D.
        vocab: V.
        norm_eps: epsilon of the norm.
        activation: between dense and norm: gelu, gelu_tanh, relu or silu.
    Raises:
        ValueError: for another activation.
    """

    decoder: nn.Linear

    def __init__(self, d_model: int, vocab: int, norm_eps: float = 1e-5, activation: str = "gelu"):
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.activation = choose("activation", activation, ACTIVATIONS)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.decoder = nn.Linear(d_model, vocab)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return self.decoder(self.norm(self.activation(self.dense(x))))


class MaskedLM(nn.Module):
    """embedding -> backbone -> head: every token is told from both sides.

    Which tokens are hidden, and by which id, is the task's affair: targets say what stood there.

    Args:
        backbone: the blocks, of mixers that look ahead; one of causal mixers sees the past alone.
        vocab: V, number of token ids, the one that hides others included.
        tied: the decoder's weight is the embedding.
        types: how many types of tokens there are, see :class:`longwave.models.TypedEmbedding`; None for none.
        head: makes what comes last, of D and V; its last map is called decoder.
    Raises:
        ValueError: for vocab < 1.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        vocab: int,
        tied: bool = True,
        types: int | None = None,
        head: Callable[[int, int], MaskedLMHead] = MaskedLMHead,
    ):
        super().__init__()
        if vocab < 1:
            raise ValueError(f"a masked language model needs vocab >= 1; got {vocab}")
        self.embedding = make_embedding(vocab, backbone.d_model, types)
        self.backbone = backbone
        self.head = head(backbone.d_model, vocab)
        self.tied = tied
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        draw_tokens(self.embedding, self.head.decoder, self.tied)
        self.head.decoder.bias.zero_()

    @property
    def vocab(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, ids: Tensor, *, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits over what stands at every place.

        Args:
            ids: (B, L) int64, in [0, V).
            types: (B, L) int64, of a model that has types of tokens; None is the first.
            mask: (B, L) bool, True = real token, hidden or not; False = padding.
        Returns:
            logits: (B, L, V).
        """
        return self.head(self.backbone(embed(self.embedding, ids, types), mask=mask)[0])

    def score(self, ids: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score:
        """Cross entropy (natural log) summed over the targets that are not -100, with gradient.

        Logits exist for the scored places alone, and for a few of them at a time.

        Args:
            ids, targets: (B, L) int64.
            mask: (B, L) bool, True = real token.
        """
        x, _ = self.backbone(embed(self.embedding, ids), mask=mask)
        return score_tokens(x, targets, self.head, LOGITS_AT_ONCE // self.vocab)
