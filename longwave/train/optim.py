"""AdamW with a group of parameters for each way of treating them, and its learning rate at every step."""

import math

import torch
from torch import nn

from longwave.nn import Hint, optim_hints
from longwave.train.config import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Groups by (highest learning rate, weight decay): matrices decay; vectors and parameters with a hint do not.

    Every group carries ``max_lr``, the highest rate that :func:`set_lr` gives it, or None.
    """
    hints = optim_hints(model)
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        hint = hints.get(name, Hint(decay=parameter.ndim >= 2))
        key = (hint.max_lr, recipe.weight_decay if hint.decay else 0.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "max_lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()],
        lr=recipe.lr,
        betas=recipe.betas,
        fused=True,  # one pass over the memory of a parameter
    )


def schedule(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a fraction of ``recipe.lr``: a linear warm-up, then the schedule."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    done = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    shape = 1 - done if recipe.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return recipe.final_lr + (1 - recipe.final_lr) * shape


def set_lr(optimizer: torch.optim.Optimizer, step: int, recipe: Recipe) -> float:
    """Give every group its learning rate at ``step``; returns that of a group without a limit of its own."""
    factor = schedule(step, recipe)
    for group in optimizer.param_groups:
        group["lr"] = factor * (recipe.lr if group["max_lr"] is None else min(group["max_lr"], recipe.lr))
    return factor * recipe.lr
