"""What judges a head: sums over the scored targets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longwave.tasks.base import IGNORE


class Score(NamedTuple):
    """Sums over the scored targets: what a loss, a perplexity and an accuracy are made of. Scalars."""

    loss: Tensor  # - sum ln p(target)
    correct: Tensor  # int64, how often the target was the most probable
    total: Tensor  # int64, how many targets there were


def score_logits(logits: Tensor, targets: Tensor) -> Score:
    """Score logits (n, V) against targets (n,), none of them IGNORE; in float32 or better.

    Raises:
        ValueError: for a target that is no class, on a CPU; a GPU would have to be waited for to know.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    try:
        loss = F.cross_entropy(logits, targets, reduction="sum")
    except IndexError:
        V = logits.shape[1]
        wrong = targets[(targets < 0) | (targets >= V)][0].item()
        raise ValueError(f"targets lie in 0..{V - 1}, or are {IGNORE} where none is scored; got {wrong}") from None
    return Score(loss, (logits.argmax(-1) == targets).sum(), torch.tensor(len(targets), device=logits.device))


def score_tokens(x: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], at_once: int) -> Score:
    """Score the logits head(x) of tokens x (B, L, D) against targets (B, L), of which those that are IGNORE count not.

    No more than ``at_once`` tokens have logits at a time: they are made, and in the backward pass made again.
    """
    scored = targets.flatten() != IGNORE
    x, targets = x.flatten(0, 1)[scored], targets.flatten()[scored]
    chunks = list(zip(x.split(max(1, at_once)), targets.split(max(1, at_once))))
    again = len(chunks) > 1 and torch.is_grad_enabled()

    def score(x: Tensor, targets: Tensor) -> Score:
        return score_logits(head(x), targets)

    parts = [checkpoint(score, *c, use_reentrant=False) if again else score(*c) for c in chunks]
    return Score(*(torch.stack(column).sum() for column in zip(*parts)))
