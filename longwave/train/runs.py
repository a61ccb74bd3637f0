"""A finished or unfinished run, as evaluation, generation and inspection take it."""

from pathlib import Path
from typing import Any

from longwave.models import load
from longwave.models.runs import CONFIG, run_of
from longwave.train.config import Recipe, load_recipe
from longwave.train.loop import first_difference


def load_run(path: Path, changes: list[str], weights: str | None = None) -> tuple[Recipe, Any]:
    """The recipe of a run and its best model, or that of the checkpoint named.

    Args:
        path: the run or the checkpoint.
        changes: to the recipe, see :func:`longwave.train.load_recipe`; none of the model.
        weights: how the model's weights are kept, see :func:`longwave.models.load`.
    Raises:
        ValueError: where there is none, it is broken, or the changes ask for another model.
    """
    config = run_of(path) / CONFIG
    if not config.is_file():
        raise ValueError(f"{run_of(path)} is no run: it has no {CONFIG}")
    recipe = load_recipe(config, changes)
    model, spec = load(path, weights=weights)
    if spec != recipe.model:
        change = first_difference("model", spec.model_dump(), recipe.model.model_dump())
        raise ValueError(f"{path} holds another model: {change}")
    return recipe, model
