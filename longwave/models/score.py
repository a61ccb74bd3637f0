"""What judges a head: sums over the scored targets."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longwave.nn.padding import real_first, take_steps
from longwave.tasks.base import Errors, Score
from longwave.tasks.forms import IGNORE, scored


def next_targets(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a language model is asked at each token of ids (B, L): the next real one, whatever padding stands between;
    IGNORE at the last one and at padding, mask (B, L) bool, True = real."""
    if mask is None:
        return F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    order, back, _ = real_first(mask)
    return take_steps(next_targets(take_steps(ids.masked_fill(~mask, IGNORE), order)), back)


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
    counts = scored(targets)
    x, targets = x[counts], targets[counts]
    chunks = list(zip(x.split(max(1, at_once)), targets.split(max(1, at_once))))
    again = len(chunks) > 1 and torch.is_grad_enabled()

    def score(x: Tensor, targets: Tensor) -> Score:
        return score_logits(head(x), targets)

    parts = [checkpoint(score, *c, use_reentrant=False) if again else score(*c) for c in chunks]
    return Score(*(torch.stack(column).sum() for column in zip(*parts)))


def score_values(y: Tensor, targets: Tensor) -> Errors:
    """Score real numbers y against targets of the same shape, of which those that are NaN count not; in float32 or
    better.

    Raises:
        ValueError: where the shapes differ.
    """
    if y.shape != targets.shape:
        raise ValueError(f"targets are {tuple(y.shape)}; got {tuple(targets.shape)}")
    counts = scored(targets)
    error = (y.float() if y.dtype.itemsize < 4 else y)[counts] - targets[counts]
    return Errors(error.square().sum(), error.detach().abs().sum(), counts.sum())
