"""A language model: token ids in, logits over the next token out."""

import torch
from torch import Tensor, nn

from longwave.mixers import Mixer
from longwave.models.backbone import Backbone, BackboneState
from longwave.models.embedding import draw_tokens, embed
from longwave.models.sashimi import Sashimi, SashimiRows, SashimiState
from longwave.models.score import score_tokens
from longwave.nn.padding import last_real, take_steps
from longwave.tasks.base import Score

ModelState = BackboneState | SashimiState | SashimiRows

LOGITS_AT_ONCE = 2**22  # elements; of a long sequence, logits exist for as many tokens as this allows


class LM(nn.Module):
    """embedding -> backbone -> head.

    Args:
        backbone: the blocks.
        vocab: V, number of token ids.
        tied: the head's weight is the embedding.
        embedding_scale: what embeddings are multiplied by.
        head_bias: whether the map to logits has one.
        soft_cap: c, logits z become c tanh(z / c); None leaves them.
    """

    def __init__(
        self,
        backbone: Backbone | Sashimi,
        vocab: int,
        tied: bool = True,
        embedding_scale: float = 1.0,
        head_bias: bool = False,
        soft_cap: float | None = None,
    ):
        super().__init__()
        if vocab < 1:
            raise ValueError(f"a language model needs vocab >= 1; got {vocab}")
        ahead = [m.name for m in backbone.modules() if isinstance(m, Mixer) and not m.causal]
        if ahead:
            raise ValueError(f"a language model predicts the next token, but {ahead[0]} sees it; use causal mixers")
        self.embedding = nn.Embedding(vocab, backbone.d_model)
        self.backbone = backbone
        self.head = nn.Linear(backbone.d_model, vocab, bias=head_bias)
        self.tied, self.embedding_scale, self.soft_cap = tied, embedding_scale, soft_cap
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_tokens(self.embedding, self.head, self.tied)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    @property
    def vocab(self) -> int:
        return self.embedding.num_embeddings

    def init_state(self, batch: int) -> ModelState:
        """The state before the first token of ``batch`` sequences."""
        return self.backbone.init_state(batch)

    def forward(
        self, ids: Tensor, state: ModelState | None = None, *, mask: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, ModelState | None]:
        """Logits over the next token.

        Args:
            ids: (B, L) int64, in [0, V).
            state: None, or what ``init_state`` or an earlier call returned.
            mask: (B, L) bool or integers 0 and 1, True = real token. Padding takes no time, wherever it stands.
            last: logits of each row's last real token alone, (B, 1, V): all that generation needs of a long prompt.
        Returns:
            logits: (B, L, V).
            state: after the last token, or None where none came in.
        """
        x, state = self.hidden(ids, state, mask=mask)
        if last:
            x = x[:, -1:] if mask is None else take_steps(x, last_real(mask)[:, None])
        return self.logits(x), state

    def hidden(
        self, ids: Tensor, state: ModelState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """What :meth:`logits` are made of: (B, L, D), and the state; as ``forward``."""
        x = embed(self.embedding, ids)
        return self.backbone(x if self.embedding_scale == 1 else x * self.embedding_scale, state, mask=mask)

    def logits(self, x: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        logits = self.head(x)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def score(self, ids: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score:
        """Cross entropy (natural log) summed over the targets that are not -100, with gradient.

        The logits of the whole sequence never exist at once: they are made, and in the backward pass made again, for
        a few tokens at a time.

        Args:
            ids, targets: (B, L) int64.
            mask: (B, L) bool, True = real token.
        """
        x, _ = self.hidden(ids, mask=mask)
        return score_tokens(x, targets, self.logits, LOGITS_AT_ONCE // self.vocab)
