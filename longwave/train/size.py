"""Whether a recipe fits into this machine, asked before anything is allocated."""

import torch

from longwave.machine import require_memory
from longwave.models.size import on_meta
from longwave.train.config import Recipe


def check_size(recipe: Recipe) -> None:
    """Build the model where it takes no memory, and refuse what cannot be held by far: it is no promise that all fits.

    Raises:
        ValueError: where the weights with what training keeps beside them, or one row of the longest sequences with
            what every layer keeps of it, exceed this machine's memory; or what the model objects to; or its task's
            tokenizer has more ids than the model.
    """
    spec, elsewhere = recipe.model, recipe.accelerator != "cpu" and torch.cuda.is_available()
    on_meta(spec, copies=1 if elsewhere or recipe.strategy == "fsdp2" else 4)
    if recipe.task.tokenizer is not None:
        recipe.task.tokenizer.check_fits(getattr(spec, "vocab", None), "the model")
    if not elsewhere:
        assert spec.layers is not None
        require_memory(
            recipe.task.longest * (16 + 4 * spec.d_model * spec.layers),
            f"to train on one sequence of {recipe.task.longest:,} tokens",
            "set its length, or the model's sizes, lower",
        )
