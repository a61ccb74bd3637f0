"""What judges a head: sums over the scored targets."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored


class Score(NamedTuple):
    """Sums over the scored targets: what a loss, a perplexity and an accuracy are made of. Scalars."""

    loss: Tensor  # - sum ln p(target)
    correct: Tensor  # int64, how often the target was the most probable
    total: Tensor  # int64, how many targets there were


def score_logits(logits: Tensor, targets: Tensor) -> Score:
    """Score logits (n, V) against targets (n,), none of them IGNORE; in float32 or better."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return Score(loss, (logits.argmax(-1) == targets).sum(), torch.tensor(len(targets), device=logits.device))
