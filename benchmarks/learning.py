"""Trains causal mixers, all or those that are named, by the recipes recall, induction and selective_copying.

Results that are missing are added to benchmarks/results/learning.jsonl, and `longwave table --write` shows them.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from longwave.mixers import MIXERS
from longwave.mixers.base import WholeMixer
from longwave.train import load_recipe, train
from longwave.train.monitor import read_metrics

RESULTS = Path(__file__).parent / "results/learning.jsonl"
RECIPES = ("recall", "induction", "selective_copying")
LONGEST = 256  # of a filter that has a length
OPTIONS = {"attention": {"heads": 4}}  # besides the defaults
PARTS = {"learned_positions", "sinusoidal_positions", "rwkv4_channel"}  # of models, which mix nothing alone


def layer(name: str) -> str:
    """A mixer as the recipes are told of it, with its defaults but for what has none."""
    needs = MIXERS.spec(name).model_fields
    length = {"max_len": LONGEST} if "max_len" in needs and needs["max_len"].is_required() else {}
    options = length | OPTIONS.get(name, {})
    return (
        name if not options else yaml.safe_dump({"kind": name, **options}, default_flow_style=True, width=1000).strip()
    )


def learn(recipe: str, name: str) -> dict:
    """One training."""
    change = f"model.pattern.0={layer(name)}"
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(load_recipe(recipe, [change]), Path(folder) / "run")
        accuracy = [row["eval_accuracy"] for row in read_metrics(Path(folder) / "run") if "eval_accuracy" in row]
    return {
        "recipe": recipe,
        "mixer": name,
        "change": change,
        "accuracy": accuracy[-1],
        "minutes": round((time.process_time() - begun) / 60, 2),
        "torch": torch.__version__,
    }


def main() -> None:
    """Every mixer that looks back alone, or those that are named."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["recipe"], row["mixer"]) for row in found}
    causal = [name for name, mixer in MIXERS.items() if name not in PARTS and not issubclass(mixer, WholeMixer)]
    for name in sys.argv[1:] or causal:
        for recipe in RECIPES:
            if (recipe, name) not in done:
                row = learn(recipe, name)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{recipe:18} {name:16} {row['accuracy']:.3f}  {row['minutes']:.1f} min", flush=True)


if __name__ == "__main__":
    main()
