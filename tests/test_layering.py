"""Imports point downwards only, optional packages stay where they belong, and importing longwave is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "longwave"
# Each imports those to its left. Errors and specs know no tensor's meaning, and tasks stand on them alone: a task needs
# no model, while a model's score leaves out the targets that a task marks.
LAYERS = ["errors", "own", "spec", "machine", "tokenizer", "tasks", "ops", "nn", "mixers", "models", "official"]
LAYERS += ["inspection", "plots", "train", "results", "contract", "recipes", "bench", "hf"]
NEEDLESS = {"inspection", "plots", "results", "contract", "recipes", "bench", "hf"}  # know nothing of official models
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in LAYERS)
ONLY_IN = {"triton": {"_triton"}, "numba": {"_numba"}, "transformers": {"hf.py", "bench"}, "mambapy": {"bench"}}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    below = [name for name in LAYERS[: LAYERS.index(layer)] if name != "official" or layer not in NEEDLESS]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "longwave" and len(parts) > 1:
            assert parts[1] in (layer, *below), f"{layer} imports {name}"
        if parts[0] in ONLY_IN:
            assert ONLY_IN[parts[0]] & set(path.parts), f"{path} imports {name}"


def test_no_import_is_tried():
    """A missing package is an error that says so, not a silent None."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name):
                assert node.type.id not in ("ImportError", "ModuleNotFoundError"), path


def test_import_is_cheap():
    """Everything a library user imports costs under 1 s beyond torch, and pulls in no optional package."""
    code = (
        "import time, torch; start = time.process_time(); import longwave.mixers, longwave.ops, longwave.nn;"
        "import sys; print(time.process_time() - start);"
        "print([m for m in ('numba', 'triton', 'transformers', 'lightning_fabric', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = run.stdout.strip().splitlines()
    assert float(seconds) < 1.0
    assert loaded == "[]"
