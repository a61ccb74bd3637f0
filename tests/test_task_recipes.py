"""Every recipe trains and evaluates; those that read files, on such as their users have."""

import math
from importlib import resources

import pytest
import test_labelled as files
import yaml
from test_corpus import as_files

from longwave.tasks import TASKS, corpus
from longwave.train import load_recipe
from longwave.train.config import Yaml
from longwave.train.loop import train

MAKERS = {
    "audio": files.clips,
    "audio_tokens": files.recordings,
    "dna": files.bases,
    "dna_labels": files.junctions,
    "document_pairs": files.document_pairs,
    "documents": files.documents,
    "forecast": files.forecast,
    "series_labels": files.ucr,
    "species": files.species,
}
SMALL = {"length": 48, "context": 20, "horizon": 5, "eval_examples": 6, "test": "null"}
SMALL |= {"columns": "[a]", "parts": "[0.5,0.2,0.3]"}
QUICK = ["model.layers=1", "steps=2", "batch=2", "eval_batch=20", "warmup=1", "eval_every=2", "checkpoint_every=2"]


def small(kind, folder):
    """Changes of a task that make it small, and name files in a folder where it reads some."""
    changes = {name: value for name, value in SMALL.items() if name in TASKS[kind].model_fields}
    if kind == "tokens":
        as_files(folder / "in")
        corpus.tokenize([str(folder / "in")], folder / "out")
        changes |= {"folders": [str(folder / "out")], "share": 0.3}
    elif kind in MAKERS:
        task = MAKERS[kind](folder)
        named = [name for name in ("folder", "file", "files", "table", "series") if hasattr(task, name)]
        changes |= {name: getattr(task, name) for name in named} | ({"share": 0.3} if hasattr(task, "share") else {})
    elif "files" in TASKS[kind].model_fields:
        changes |= {"share": 0.0005}
    return [f"task.{name}={value}" for name, value in changes.items()]


def for_this_machine():
    """Recipes, by name, that say how many threads they take: those of a minute or of some."""
    for file in resources.files("longwave.recipes").iterdir():
        if file.name.endswith(".yaml"):
            tree = yaml.load(file.read_text(), Yaml)
            trees = tree.get("recipes", {file.name.removesuffix(".yaml"): tree})
            yield from ((name, recipe["task"]["kind"]) for name, recipe in trees.items() if "threads" in recipe)


@pytest.mark.parametrize(("name", "kind"), sorted(for_this_machine()))
def test_recipes_run_end_to_end(name, kind, tmp_path):
    recipe = load_recipe(name, [*QUICK, *small(kind, tmp_path / "of")])
    metrics = train(recipe, tmp_path / "run")
    assert math.isfinite(metrics["loss"])
    assert recipe.task.metric in metrics


def test_every_task_has_a_recipe():
    assert {kind for _, kind in for_this_machine()} == set(TASKS)
