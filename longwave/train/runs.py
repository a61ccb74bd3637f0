"""A finished or unfinished run, as evaluation, generation and inspection take it."""

import shlex
from pathlib import Path
from typing import Any

from longwave.models import load, tokenizer
from longwave.models.runs import CONFIG, model_at, run_of
from longwave.models.storage import CONFIG as MODEL
from longwave.models.storage import origin
from longwave.nn import set_rate
from longwave.tasks import Task, Text
from longwave.tokenizer import FILE, HYENADNA, PLAIN, Tokenizer, dna
from longwave.train.config import Recipe, load_recipe, make_recipe
from longwave.train.loop import first_difference


def load_run(path: Path, changes: list[str], weights: str | None = None) -> tuple[Recipe | None, Any]:
    """The recipe of a run and its best model, or that of the checkpoint named; or a saved model.

    Args:
        path: the run, the checkpoint or the saved model.
        changes: to the recipe, see :func:`longwave.train.load_recipe`; none of the model. A saved model has no recipe:
            it gets one where they say a task. Where they change a run's steps a second, its model is set to hear them.
        weights: how the model's weights are kept, see :func:`longwave.models.load`.
    Raises:
        ValueError: where there is none, it is broken, or the changes ask for another model.
    """
    config = run_of(path) / CONFIG
    if not config.is_file() and not (path / MODEL).is_file():
        raise ValueError(f"{run_of(path)} is no run: it has no {CONFIG}; nor a saved model: it has no {MODEL}")
    model, spec = load(path, weights=weights)
    if config.is_file():
        recipe = load_recipe(config, changes)
    elif any(change.startswith("task") for change in changes):
        recipe = make_recipe({"model": spec.model_dump(), "steps": 1, "batch": 32, "lr": 1.0}, changes)
    else:
        return None, model
    if spec != recipe.model:
        change = first_difference("model", spec.model_dump(), recipe.model.model_dump())
        raise ValueError(f"{path} holds another model: {change}")
    if changes and config.is_file():
        trained, heard = load_recipe(config).task.steps_per_second, recipe.task.steps_per_second
        if trained is not None and heard is not None and trained != heard:
            set_rate(model, trained / heard)
    return recipe, model


def tokenizer_of(path: Path) -> Tokenizer | None:
    """What made the ids of a model, see :func:`longwave.models.tokenizer`; of a run without the file, its task's."""
    config = run_of(path) / CONFIG
    if config.is_file() and not (model_at(path, check=False) / FILE).is_file():
        return load_recipe(config).task.tokenizer
    return tokenizer(path)


def without_tokenizer(path: Path, task: Task | None = None) -> str:
    """The words that what made the ids of a model is not known, with what its folder, or its task, says of it."""
    by = origin(path).get("tokenizer") if task is None else f"the task {task.kind}"
    known = "" if by is None else f", and was trained with {by}"
    return (
        f"{path} has no {FILE}{known}: copy one into it, or say what its ids stand for by --tokenizer: "
        f"{', '.join(PLAIN)}, a {FILE}, a folder with one or OWNER/NAME on the Hub"
    )


def check_tokenizer(path: Path, own: Tokenizer | None, task: Task) -> None:
    """Refuse a task whose ids mean something else than those that a model was trained on.

    Args:
        path: of the model.
        own: what made its ids, None where it is not known.
        task: prepared.
    Raises:
        ValueError: with what to do.
    """
    asked = task.tokenizer
    if asked is None or (own is not None and asked.agrees(own)):
        return
    if own is None:
        raise ValueError(f"{without_tokenizer(path)}; the task {task.kind} has ids of {asked}")
    how = "evaluate it on a task that has those"
    if asked.letters is not None and own.agrees(dna(HYENADNA)):
        how = "evaluate it with task.ids=hyenadna"
    if isinstance(task, Text):
        files = shlex.join(task.sources) or "FILES"
        corpus = f"longwave tokenize {files} --out corpus --tokenizer {shlex.quote(str(path))}"
        how = f"{corpus}, and 'task={{kind: tokens, folders: [corpus]}}'"
    raise ValueError(f"{path} was trained on {own}, and the task {task.kind} has {asked}; {how}")
