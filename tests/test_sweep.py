"""A grid of runs: what it stands for, what it says, that it goes on, and that one that fails ends no other."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from longwave.models.runs import saved_steps
from longwave.results import sweep as grids
from longwave.results.sweep import Outcome, choices, describe, plan

RECIPE = {
    "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d"], "channel": None},
    "task": {"kind": "induction_heads", "vocab_size": 6, "length": 8, "eval_examples": 20},
    "steps": 2, "batch": 2, "lr": 1e-3, "threads": 1, "accelerator": "cpu",
}  # fmt: skip
COMMAND = [sys.executable, "-m", "longwave.cli", "sweep"]


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("lr=1e-3,3e-3", ["lr=0.001", "lr=0.003"]),
        ("seed=0", ["seed=0"]),
        ("model.pattern=[[s4d],[hyena, h3]]", ["model.pattern=[s4d]", "model.pattern=[hyena, h3]"]),
        ("model.pattern=[s4d],[h3]", ["model.pattern=[s4d]", "model.pattern=[h3]"]),
        ("model.pattern=[h3,s4d]", ["model.pattern=[h3, s4d]"]),
        ("model.pattern.0={kind: s4d, d_state: 8},mamba", ["model.pattern.0={kind: s4d, d_state: 8}",
                                                           "model.pattern.0=mamba"]),
        ("clip=null,1.0", ["clip=null", "clip=1.0"]),
    ],
)  # fmt: skip
def test_choices(change, found):
    assert choices(change) == found


@pytest.mark.parametrize("change", ["lr", "lr=", "=3", "lr=[1"])
def test_what_is_no_choice_is_refused(change):
    with pytest.raises(ValueError, match=r"lr|=3"):
        choices(change)


def test_a_plan_is_every_combination_and_is_checked_whole(recipe, tmp_path):
    runs = plan(recipe, ["lr=1e-3,3e-3", "seed=0,1,2", "steps=4"], tmp_path / "out")
    assert [run.folder.name for run in runs][:2] == ["lr=0.001,seed=0", "lr=0.001,seed=1"]
    assert len({run.folder for run in runs}) == 6
    assert {(run.recipe.lr, run.recipe.seed, run.recipe.steps) for run in runs} >= {(3e-3, 2, 4)}
    with pytest.raises(ValueError, match="no mixer"):
        plan(recipe, ["model.pattern=[s4d],[s4x]"], tmp_path / "out")
    with pytest.raises(ValueError, match="twice"):
        plan(recipe, ["lr=1e-3,1e-3"], tmp_path / "out")


def test_description_has_mean_deviation_best_and_failures():
    def outcome(lr, seed, accuracy=None, error=None):
        metrics = None if accuracy is None else {"accuracy": accuracy}
        return Outcome(f"lr={lr},seed={seed}", {"lr": lr, "seed": seed, "steps": "4"}, metrics, error)

    found = [outcome("1", "0", 0.5), outcome("1", "1", 0.7), outcome("2", "0", 0.8), outcome("2", "1", None, "no")]
    said = describe(found, "accuracy", True).splitlines()
    assert said[0].split() == ["lr", "accuracy", "runs"]
    assert said[1].split() == ["2", "0.8000", "1"]
    assert said[2].split() == ["1", "0.6000", "±", "0.1414", "2"]
    assert said[3:] == ["best: lr=2,seed=0, accuracy 0.8000", "failed: lr=2,seed=1: no"]
    assert describe(found, "accuracy", False).splitlines()[1].split()[0] == "1"


def test_a_sweep_trains_keeps_errors_and_is_not_done_twice(recipe, tmp_path):
    out = tmp_path / "out"
    command = [*COMMAND, str(recipe), "lr=1e-3,1e30", "--jobs", "2", "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert first.returncode == 1, first.stderr
    assert "best: lr=0.001, accuracy" in first.stdout
    assert "failed: lr=1.0e+30: the gradient is not finite at step 2" in first.stdout
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert [run["metrics"] is None for run in runs] == [False, True]
    record = json.loads((out / "lr=0.001/run.json").read_text())
    assert record["command"] == f"longwave train {recipe} lr=0.001"
    assert record["parameters"] > 0
    model = out / "lr=0.001/checkpoints/step-00000002/model.safetensors"
    before = model.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "1 of 2 runs are done already" in again.stderr
    assert model.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another grid"):
        plan(recipe, ["lr=1e-3,1e30", "model.d_model=16"], out)


def test_a_signal_saves_what_runs_and_it_goes_on(recipe, tmp_path, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "out/seed=0/metrics.jsonl"
    command = [*COMMAND, str(recipe), "seed=0,1", "steps=1000000", "log_every=1", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (log.is_file() and log.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert "not done: 2 runs" in said
    assert saved_steps(out / "seed=0")
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: begun.append(command))
    for run in plan(recipe, ["seed=0,1", "steps=1000000", "log_every=1"], out):
        grids._start(recipe, run, 1)[2].close()
    assert [command[-2:] for command in begun] == [["--resume", str(out / "seed=0")], ["--out", str(out / "seed=1")]]
