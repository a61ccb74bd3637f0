"""Tasks of real numbers, labels, pairs and futures keep the contract, and are served by the models that tell such."""

import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from longwave.contract.tasks import CONTRACT
from longwave.models import (
    AutoencoderSpec,
    ClassifierSpec,
    ForecasterSpec,
    LMSpec,
    MaskedLMSpec,
    PairClassifierSpec,
    RegressorSpec,
)
from longwave.plots import draw_sample
from longwave.tasks import (
    IGNORE,
    Batch,
    Compression,
    Errors,
    Future,
    Images,
    Label,
    MaskedText,
    Pair,
    Row,
    Signal,
    Task,
    Text,
    Tokens,
    Values,
)
from longwave.tasks.base import EVAL, TRAIN, random_stream, shuffled
from longwave.tasks.forms import collate
from longwave.train.evaluate import compare


class Drawn(Task):
    """Rows from their own random numbers, of lengths that differ."""

    longest: ClassVar[int] = 12
    eval_rows: ClassVar[int] = 23

    def train_row(self, seed, number):
        return self.draw(random_stream(seed, TRAIN, number))

    def eval_row(self, number):
        return self.draw(random_stream(0, EVAL, number))


class Waves(Drawn):
    """Is it fast or slow? Real numbers in, a label out."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar = Signal(2)
    targets: ClassVar = Label(2)

    def draw(self, random):
        fast = int(random.integers(2))
        phase = (1 + 2 * fast) * np.arange(random.integers(5, 13)) + random.uniform(0, 2 * math.pi)
        return Row(np.stack([np.sin(phase), np.cos(phase)], axis=-1), fast)


class Level(Drawn):
    """Ids in, numbers out, of which some are not known."""

    metric: ClassVar[str] = "mae"
    inputs: ClassVar = Tokens(5)
    targets: ClassVar = Values(2)

    def draw(self, random):
        ids = random.integers(5, size=random.integers(5, 13))
        return Row(ids, [ids.mean(), math.nan if ids[0] == 0 else ids.std()])


class Next(Drawn):
    """Real numbers in, the last three out."""

    metric: ClassVar[str] = "mse"
    inputs: ClassVar = Signal(1)
    targets: ClassVar = Future(3, 1)

    def draw(self, random):
        wave = np.sin(np.arange(random.integers(5, 13)) + random.uniform(0, 2 * math.pi))[:, None]
        return Row(np.concatenate([wave[:-3], np.zeros((3, 1))]), wave[-3:])


class Alike(Drawn):
    """Do two sequences begin alike?"""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar = Pair(Tokens(3))
    targets: ClassVar = Label(2)

    def draw(self, random):
        one, other = (random.integers(3, size=random.integers(5, 13)) for _ in range(2))
        return Row((one, other), int(one[0] == other[0]))


class Ragged(Drawn):
    """A token at every step, in rows of several lengths."""

    inputs: ClassVar = Tokens(7)

    def draw(self, random):
        ids = random.integers(7, size=random.integers(5, 13))
        return Row(ids, ids[::-1].copy())


TASKS = [Waves(), Level(), Next(), Alike(), Ragged()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("clause", CONTRACT)
def test_contract(clause, task):
    CONTRACT[clause](task)


@pytest.mark.parametrize("task", [*TASKS, Text(length=50), Images()], ids=lambda task: type(task).__name__)
def test_every_kind_of_rows_is_drawn(task, tmp_path):
    draw_sample(task, tmp_path / "rows.png", rows=3)
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.width == 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    with pytest.raises(ValueError, match=r"rows.bmp: a picture ends in .png, .svg, .pdf"):
        draw_sample(task, tmp_path / "rows.bmp")


class Forgetful(Waves):
    """Breaks what it is told to."""

    fault: str = ""

    def train_row(self, seed, number):
        row = super().train_row(0 if self.fault == "seed" else seed, number)
        if self.fault == "global":
            row = Row(row.inputs + np.random.rand(), row.targets)
        if self.fault == "range":
            row = Row(row.inputs, 2)
        if self.fault == "nan":
            row.inputs[0] = math.nan
        return row

    def train_batch(self, size, seed, index):
        if self.fault == "together":
            random = random_stream(seed, TRAIN, index)
            return collate([self.draw(random) for _ in range(size)], self.inputs, self.targets)
        batch = super().train_batch(size, seed, index)
        return Batch(batch.inputs.double(), *batch[1:]) if self.fault == "dtype" else batch

    def eval_row(self, number):
        return Row(super().eval_row(number).inputs, IGNORE) if self.fault == "ignored" else super().eval_row(number)

    def metrics(self, score):
        return {"loss": 1.0} if self.fault == "metric" else super().metrics(score)


@pytest.mark.parametrize(
    ("fault", "clause", "says"),
    [
        ("seed", "a_batch_depends_on_seed_and_number_alone", "other seeds and numbers are the same"),
        ("global", "a_batch_depends_on_seed_and_number_alone", "another one when it is asked for again"),
        ("range", "batches_have_the_forms_it_says", r"targets hold 2, which is not in Label\(classes=2\)"),
        ("nan", "batches_have_the_forms_it_says", "inputs hold nan"),
        ("dtype", "batches_have_the_forms_it_says", "inputs are .* torch.float64"),
        ("together", "rows_do_not_depend_on_how_they_are_batched", "rows are others in batches of 1 than in one of 6"),
        ("ignored", "batches_have_the_forms_it_says", "no target of a batch is scored"),
        ("metric", "a_metric_says_which_model_is_best", "lack loss or accuracy"),
    ],
)
def test_a_contract_that_is_broken_says_how(fault, clause, says):
    with pytest.raises(AssertionError, match=says):
        CONTRACT[clause](Forgetful(fault=fault))


def test_ragged_rows_are_padded_and_masked():
    batch = collate([Row([1, 2, 3], [3, 2, 1]), Row([4], [4])], Tokens(5), Tokens(5))
    assert batch.inputs.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.targets.tolist() == [[3, 2, 1], [4, IGNORE, IGNORE]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.steps == 6
    pair = collate([Row(([1, 2], [3]), 0)], Pair(Tokens(5)), Label(2))
    assert (pair.inputs.tolist(), pair.mask.tolist()) == ([[[1, 2], [3, 0]]], [[[True, True], [True, False]]])
    real = collate([Row(np.ones((3, 2)), [0.5])], Signal(2), Values(1))
    assert (real.inputs.dtype, real.targets.tolist(), real.mask, real.steps) == (torch.float32, [[0.5]], None, 3)
    with pytest.raises(ValueError, match=r"ids and classes are whole numbers; got torch.float64"):
        collate([Row(np.ones(3), 0)], Tokens(5), Label(2))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_every_example_is_visited_once_an_epoch_in_a_new_order(count):
    epochs = [[shuffled(5, epoch * count + place, count) for place in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert [shuffled(6, place, count) for place in range(count)] != epochs[0]


def test_a_shuffle_is_as_good_as_any():
    """Of five examples, every one is at every place as often; pairs of neighbours too. And 10^11 take no memory."""
    orders = [[shuffled(0, epoch * 5 + place, 5) for place in range(5)] for epoch in range(4000)]
    places = np.array([[order.index(example) for example in range(5)] for order in orders])
    for example in range(5):
        assert np.abs(np.bincount(places[:, example], minlength=5) - 800).max() < 5 * math.sqrt(800)
    following = np.zeros((5, 5))
    for order in orders:
        for one, other in pairwise(order):
            following[one, other] += 1
    assert np.abs(following[~np.eye(5, dtype=bool)] - 800).max() < 5 * math.sqrt(800)
    far = [shuffled(1, 10**12 + place, 10**11) for place in range(1000)]
    assert len(set(far)) == 1000
    assert np.mean(far) == pytest.approx(5e10, rel=0.1)


OPEN = {"d_model": 4, "pattern": ["s4d"]}


@pytest.mark.parametrize(
    ("spec", "task", "sizes"),
    [
        (ClassifierSpec(**OPEN), Waves(), {"features": 2, "vocab": None, "classes": 2}),
        (RegressorSpec(**OPEN), Level(), {"features": None, "vocab": 5, "width": 2}),
        (ForecasterSpec(**OPEN), Next(), {"features": 1, "steps": 3, "width": 1}),
        (PairClassifierSpec(**OPEN), Alike(), {"vocab": 3, "classes": 2}),
        (LMSpec(**OPEN, vocab=300), Text(), {"vocab": 300}),
        (AutoencoderSpec(**OPEN), Compression(), {"vocab": 16}),
    ],
)
def test_a_model_takes_open_sizes_from_its_task(spec, task, sizes):
    assert sizes.items() <= spec.serving(task).model_dump().items()
    spec.serving(task).build()
    if spec.kind != "lm":
        with pytest.raises(ValueError, match=f"model {spec.kind} needs "):
            spec.build()


@pytest.mark.parametrize(
    ("spec", "task", "says"),
    [
        (
            LMSpec(**OPEN),
            Waves(),
            "model lm gives tokens, and the task Waves asks for one label a row; take .* class",
        ),
        (LMSpec(**OPEN, vocab=255), Text(), "model.vocab = 255 does not fit: the task has 256 token ids"),
        (MaskedLMSpec(**OPEN), Text(), "masked_lm sees the next token, .* text asks for; take the model lm, or"),
        (
            ClassifierSpec(**OPEN),
            Text(),
            "gives one label a row, and the task text asks for tokens; take the model lm",
        ),
        (ClassifierSpec(**OPEN), MaskedText(), "masked_text asks for tokens; take the model lm or masked_lm"),
        (ClassifierSpec(**OPEN), Alike(), "asks for one label a row of pairs; take the model pair_classifier"),
        (ClassifierSpec(**OPEN, classes=1), Waves(), "model.classes = 1 does not fit: the task has 2 classes"),
        (
            ClassifierSpec(**OPEN, features=3),
            Waves(),
            "model.features = 3 does not fit: the task has 2 features a step",
        ),
        (ForecasterSpec(**OPEN, steps=4), Next(), "model.steps = 4 does not fit: the task has 3 steps"),
        (LMSpec(**OPEN), Compression(), "asks for its tokens from one vector; take the model autoencoder"),
        (RegressorSpec(**OPEN), Next(), "asks for real numbers at the last steps; take the model forecaster"),
    ],
)
def test_a_model_that_does_not_serve_a_task_is_refused(spec, task, says):
    with pytest.raises(ValueError, match=says):
        spec.serving(task)


def test_metrics_of_numbers():
    assert Next().metrics(Errors(8.0, 6.0, 4)) == {"loss": 2.0, "mse": 2.0, "mae": 1.5}


@pytest.mark.parametrize(("spec", "task"), [(ClassifierSpec(**OPEN), Waves()), (RegressorSpec(**OPEN), Level())])
def test_a_choice_is_compared_where_there_is_one(spec, task):
    model = spec.serving(task).build()
    compared = compare(model, model, task.eval_batch(7, 0))
    logits = {"error_of_logits": 0.0, "same_choice": 1.0}
    assert compared == (logits if spec.kind == "classifier" else {"error_of_outputs": 0.0})
