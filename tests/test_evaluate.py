"""Evaluation with the state carried on, against one long window; and at lengths beyond those of training."""

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from longwave.models import LMSpec
from longwave.tasks import Text, TokenizedText
from longwave.tasks.corpus import tokenize
from longwave.tasks.text import BOOKS
from longwave.train.config import make_recipe
from longwave.train.evaluate import evaluate, evaluate_carried, evaluate_lengths
from longwave.train.loop import Objective


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes((BOOKS / "emma.txt").read_bytes()[:20_000])
    return file


def model(vocab, *pattern):
    torch.manual_seed(0)
    return LMSpec(d_model=16, pattern=list(pattern), vocab=vocab, channel=None).build().double()


@pytest.mark.parametrize(("length", "stride"), [(64, None), (64, 64), (50, 7), (399, None)])
def test_windows_of_any_length_make_the_same_text(fabric, text, length, stride):
    """In float64 to the last digits: what one window over all of it says."""
    lm = model(256, "s4d", "mamba", "attention")
    task = Text(files=[str(text)], length=length, stride=stride, share=0.02)
    found = evaluate_carried(fabric, lm, task)
    whole = evaluate(fabric, Objective(lm), Text(files=[str(text)], length=399, share=0.02), 1)
    assert task.eval_rows > 1 or length == 399
    assert found["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-10)
    assert found["perplexity"] == pytest.approx(np.exp(whole["loss"]))


@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_a_document_begins_with_an_empty_state_where_they_are_apart(fabric, tmp_path, documents):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("some words of document " + "abc" * (5 + 4 * i) + str(i))
    tokenize([str(tmp_path / f"{i}.txt") for i in range(6)], tmp_path / "corpus")
    task = TokenizedText(folders=[str(tmp_path / "corpus")], length=16, documents=documents, share=0.5)
    lm = model(task.inputs.vocab, "s4d")
    found = evaluate_carried(fabric, lm, task)
    longer = task.model_copy(update={"length": 1000})
    assert found["bits_per_byte"] == pytest.approx(
        evaluate(fabric, Objective(lm), longer, 1)["bits_per_byte"], rel=1e-10
    )
    assert any(not task.goes_on(number) for number in range(1, task.eval_rows)) == (documents == "apart")


def test_accuracy_against_length_beyond_training(fabric):
    tree = {"task": {"kind": "induction_heads", "vocab_size": 8, "length": 16, "eval_examples": 8}, "steps": 1,
            "model": {"kind": "lm", "d_model": 8, "pattern": ["mamba"]}, "batch": 8, "lr": 1e-3}  # fmt: skip
    recipe = make_recipe(tree, [])
    objective = Objective(recipe.model.build())
    found = dict(evaluate_lengths(fabric, objective, recipe.task, 8, [16, 64]))
    assert list(found) == [16, 64]
    assert found[16] == evaluate(fabric, objective, recipe.task, 8)
    assert found[64] != found[16]


def test_what_has_nothing_to_carry_or_no_length_is_refused(fabric, text):
    task = {"kind": "induction_heads"}
    lm = {"kind": "lm", "d_model": 8, "pattern": ["s4d"]}
    recall = make_recipe({"task": task, "model": lm, "steps": 1, "batch": 1, "lr": 1.0}, [])
    with pytest.raises(ValueError, match="goes on from another"):
        evaluate_carried(fabric, recall.model.build(), recall.task)
    with pytest.raises(ValueError, match="no eval_length"):
        list(evaluate_lengths(fabric, Objective(model(256, "s4d")), Text(files=[str(text)], length=64), 8, [128]))
