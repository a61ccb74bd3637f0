"""Training that starts with the weights of another model: its model, its weights, its tokens, and exact resume."""

import json

import pytest
import torch

from longwave.models import LMSpec, load, save, weights
from longwave.tasks import Text
from longwave.train import loop
from longwave.train.config import load_recipe, make_recipe

SPEC = LMSpec(d_model=16, pattern=["lstm"], vocab=256)
TREE = {
    "task": {"kind": "text", "length": 16, "share": 0.01}, "steps": 4, "batch": 2, "lr": 1e-3,
    "schedule": "constant", "accelerator": "cpu", "eval_every": 100, "checkpoint_every": 2, "threads": 1,
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """A model with its tokenizer."""
    torch.manual_seed(7)
    save(tmp_path / "start", SPEC.build(), SPEC, Text().tokenizer)
    return tmp_path / "start"


def recipe(start, *changes):
    return make_recipe({**TREE, "start": str(start)}, changes)


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_it_starts_with_these_weights_and_their_model(start, tmp_path):
    """The run stores the whole model, and says what it began with."""
    made = recipe(start, "lr=1e-30", "weight_decay=0", "steps=1", "model.dropout=0.1")
    assert made.model == SPEC.model_copy(update={"dropout": 0.1})
    loop.train(made, tmp_path / "run")
    model, _ = load(tmp_path / "run")
    assert equal(weights(model), weights(load(start)[0]))
    assert load_recipe(tmp_path / "run" / "config.yaml") == made
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["start"]) == 64


def test_resume_is_exact_also_where_the_start_is_gone(start, tmp_path):
    """From a checkpoint the start is not asked for again."""
    loop.train(recipe(start), tmp_path / "whole")
    loop.train(recipe(start, "steps=2"), tmp_path / "parts")
    start.rename(tmp_path / "moved")
    loop.train(
        load_recipe(tmp_path / "parts" / "config.yaml", ["steps=4"]), tmp_path / "parts", resume=tmp_path / "parts"
    )
    assert equal(weights(load(tmp_path / "parts")[0]), weights(load(tmp_path / "whole")[0]))


def test_a_run_that_begins_again_asks_for_the_same_weights(start, tmp_path):
    """One that was killed before its first checkpoint."""
    loop.train(recipe(start, "steps=1"), tmp_path / "run")
    for part in (tmp_path / "run" / "checkpoints").iterdir():
        part.rename(tmp_path / "lost")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    loop.train(recipe(start, "steps=1"), tmp_path / "run", resume=tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000001").rename(tmp_path / "lost2")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    torch.manual_seed(8)
    save(start, SPEC.build(), SPEC)
    with pytest.raises(ValueError, match=r"are not what they were when the run began"):
        loop.train(recipe(start, "steps=1"), tmp_path / "run", resume=tmp_path / "run")


def test_what_does_not_fit_is_refused(start, tmp_path):
    """Another model, ids that mean something else, and no model at all; nothing is left."""
    tree = {**TREE, "start": str(start), "model": {"kind": "lm", "d_model": 32, "pattern": ["lstm"]}}
    with pytest.raises(ValueError, match=r"holds another model than the recipe: model.d_model was 16 and is now 32; "):
        loop.train(make_recipe(tree, []), tmp_path / "run")
    dna = {"kind": "lm", "d_model": 16, "pattern": ["lstm"], "vocab": 256}
    with pytest.raises(ValueError, match=r"is no run and no saved model"):
        make_recipe({**TREE, "start": str(tmp_path / "nowhere")}, [])
    fasta = tmp_path / "a.fa"
    fasta.write_text(">a\n" + "ACGT" * 200 + "\n")
    task = {"kind": "dna", "files": [str(fasta)], "length": 16}
    with pytest.raises(ValueError, match=r"was trained on bytes"):
        loop.train(make_recipe({**TREE, "start": str(start), "model": dna, "task": task}, []), tmp_path / "run")
    spec = LMSpec(d_model=16, pattern=["lstm"], vocab=300)
    save(tmp_path / "unknown", spec.build(), spec)
    with pytest.raises(ValueError, match=r"unknown has no tokenizer.json: copy one into it, or"):
        loop.train(make_recipe({**TREE, "start": str(tmp_path / "unknown")}, []), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(call, start, tmp_path, monkeypatch):
    """--from is the field start; with --resume it is refused."""
    monkeypatch.chdir(tmp_path)
    again = ("task.length=16", "task.share=0.01", "steps=1", "accelerator=cpu", "batch=2")
    code, _, err = call("train", "demo", "model=null", *again, "--from", "start", "--out", "run")
    assert code == 0, err
    assert load_recipe(tmp_path / "run" / "config.yaml").start == str(start)
    code, _, err = call("train", "demo", *again, "--from", "start", "--out", "other")
    assert code == 2
    assert "holds another model than the recipe" in err
    assert "holds another model than the recipe" in call("train", "demo", *again, "--from", "start", "--dry-run")[2]
    code, _, err = call("train", "--resume", "run", "--from", "start")
    assert code == 2
    assert "leave out --from" in err
