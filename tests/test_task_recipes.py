"""Every recipe trains and evaluates; those that read files, on such as their users have."""

import math
from importlib import resources

import pytest
import test_labelled as files
import yaml
from test_corpus import as_files

from longwave.tasks import TASKS, corpus
from longwave.train import load_recipe, recipe_names
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
SMALL = {"length": 48, "context": 20, "horizon": 5, "eval_examples": 6, "columns": "[a]", "parts": "[0.5,0.2,0.3]"}
QUICK = ["steps=2", "batch=2", "eval_batch=20", "warmup=1", "eval_every=2", "checkpoint_every=2"]


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


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_run_end_to_end(name, tmp_path):
    tree = yaml.safe_load(resources.files("longwave.recipes").joinpath(f"{name}.yaml").read_text())
    recipe = load_recipe(name, [*QUICK, *small(tree["task"]["kind"], tmp_path / "of")])
    metrics = train(recipe, tmp_path / "run")
    assert math.isfinite(metrics["loss"])
    assert recipe.task.metric in metrics
