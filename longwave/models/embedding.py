"""Token ids as vectors."""

import torch
from torch import Tensor, nn


class TypedEmbedding(nn.Embedding):
    """word[id] + types[type]: a token is an id, and one of a few types, such as of which of two sentences it is.

    Source: Devlin et al. (2018) "BERT", arXiv:1810.04805, sec. 3 (segments).

    Args:
        vocab: V, number of token ids.
        d_model: D.
        types: how many types there are, >= 1.
    """

    types: nn.Embedding

    def __init__(self, vocab: int, d_model: int, types: int):
        super().__init__(vocab, d_model)
        self.types = nn.Embedding(types, d_model)

    def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
        """ids and types (..., L) int64 -> (..., L, D); without types all are of the first."""
        x = super().forward(ids)
        return x + (self.types.weight[0] if types is None else self.types(types))


def make_embedding(vocab: int, d_model: int, types: int | None) -> nn.Embedding:
    """Of so many ids, and types where there are any."""
    return nn.Embedding(vocab, d_model) if types is None else TypedEmbedding(vocab, d_model, types)


@torch.no_grad()
def draw_tokens(embedding: nn.Embedding, head: nn.Linear, tied: bool) -> None:
    """Logits start with unit variance; so do embeddings where they may, or the blocks would drown the tokens."""
    std = embedding.embedding_dim**-0.5
    if tied:
        head.weight = embedding.weight  # again: leaving the meta device has parted them
    else:
        head.weight.normal_(std=std)
    embedding.weight.normal_(std=std if tied else 1.0)
    if isinstance(embedding, TypedEmbedding):
        embedding.types.weight.normal_(std=std if tied else 1.0)


def embed(embedding: nn.Embedding, ids: Tensor, types: Tensor | None = None) -> Tensor:
    """embedding(ids), (..., L) -> (..., L, D), with the types of tokens where they are given.

    Raises:
        ValueError: for an id outside the vocabulary or a type that there is not, on a CPU; a GPU would have to be
            waited for to know. For types where there are none.
    """
    try:
        if types is None:
            return embedding(ids)
        if not isinstance(embedding, TypedEmbedding):
            raise ValueError("this model has no types of tokens; leave them out, or make it with types = 2")
        return embedding(ids, types)
    except IndexError:
        V = embedding.num_embeddings
        wrong = ids[(ids < 0) | (ids >= V)]
        if not len(wrong):
            raise ValueError("types of tokens are 0 and up, fewer than the model has") from None
        sentence = f"token ids lie in 0..{V - 1}; got {wrong[0].item()}: take a vocab above it, or other ids"
        raise ValueError(sentence) from None
