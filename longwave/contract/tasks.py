"""The contract that every task keeps: clauses that take a prepared task."""

import pickle
import random

import numpy as np
import torch
from torch import Tensor

from longwave.contract.clauses import Contract
from longwave.models.spec import MODELS
from longwave.tasks.base import Errors, Score, Task
from longwave.tasks.forms import IGNORE, Batch, Future, Pair, Values, scored

CONTRACT = Contract()
SEEN = 40  # evaluation rows that are looked at, at most
ROWS = 6  # of a training batch

Row = tuple[Tensor, ...]


def unpadded(batch: Batch) -> list[Row]:
    """Of each row the inputs at real steps, of both sequences of a pair, and the targets but for those at padding."""
    rows: list[Row] = []
    for i, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets)):
        if batch.mask is None:
            rows.append((inputs.flatten(), targets))
            continue
        mask = batch.mask[i]
        rows.append((inputs[mask].flatten(), targets[mask] if targets.shape == mask.shape else targets))
    return rows


def same(one: list[Row], other: list[Row]) -> bool:
    """Whether rows are equal, NaN to NaN."""
    parts = [(a, b) for x, y in zip(one, other) for a, b in zip(x, y, strict=True)]
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in parts
    )


def seen(task: Task, size: int) -> list[Batch]:
    """The first SEEN rows of the evaluation, in whole batches."""
    return [task.eval_batch(size, index) for index in range(min(task.eval_batches(size), -(-SEEN // size)))]


def rows_of(*batches: Batch) -> list[Row]:
    """Their rows, without padding."""
    return [row for batch in batches for row in unpadded(batch)]


def disturb() -> None:
    """Give the random numbers of Python, NumPy and torch, none of which is a task to use, another state."""
    random.seed()
    np.random.seed()
    torch.seed()


@CONTRACT.clause
def batches_have_the_forms_it_says(task: Task) -> None:
    """Shapes, dtypes and ranges of inputs, targets and masks; one target at least is scored; none is too long."""
    if task.tokenizer is not None:
        task.tokenizer.check_fits(task.inputs.below, "the task")
    for batch in (task.train_batch(ROWS, 1, 2), task.train_batch(1, 0, 0), *seen(task, 7)):
        rows, length = len(batch.inputs), batch.inputs.shape[2 if isinstance(task.inputs, Pair) else 1]
        for name, tensor, form in (("inputs", batch.inputs, task.inputs), ("targets", batch.targets, task.targets)):
            due = form.shape(rows, length), form.dtype
            assert (tensor.shape, tensor.dtype) == due, f"{name} are {tuple(tensor.shape)} {tensor.dtype}; due is {due}"
            assert tensor.is_contiguous(), f"{name} are not contiguous"
            if form.below is None:
                bad = tensor.isinf() if name == "targets" else ~tensor.isfinite()
            else:
                ignored = tensor == IGNORE if name == "targets" else torch.zeros_like(tensor, dtype=torch.bool)
                bad = ((tensor < 0) | (tensor >= form.below)) & ~ignored
            assert not bad.any(), f"{name} hold {tensor[bad][0].item()}, which is not in {form}"
        assert scored(batch.targets).any(), "no target of a batch is scored"
        assert length <= task.longest, f"a batch has {length} steps, and longest is {task.longest}"
        if batch.mask is not None:
            steps = (*task.inputs.shape(rows, length)[: 3 if isinstance(task.inputs, Pair) else 2],)
            assert (batch.mask.shape, batch.mask.dtype) == (steps, torch.bool), "a mask is bool, of the steps of inputs"
            assert batch.mask.any(-1).all(), "a row is padding alone"


@CONTRACT.clause
def batches_have_the_sizes_that_are_asked_for(task: Task) -> None:
    """Training batches have all rows; those of the evaluation have all together, the last one the rest."""
    assert [len(task.train_batch(size, 0, 3).inputs) for size in (1, ROWS)] == [1, ROWS], "a batch lacks rows"
    assert task.eval_rows >= 1, "there is nothing to evaluate"
    assert task.eval_batches(task.eval_rows) == 1, "the evaluation in one batch has several"
    for size in (1, 7, max(1, task.eval_rows - 1)):
        count = task.eval_batches(size)
        last = len(task.eval_batch(size, count - 1).inputs)
        assert (count - 1) * size + last == task.eval_rows, f"{count} batches of {size} hold not {task.eval_rows} rows"


@CONTRACT.clause
def a_batch_depends_on_seed_and_number_alone(task: Task) -> None:
    """Not on what was asked for before, on the state of any other random numbers, or on the object that is asked."""
    batch, evaluated = rows_of(task.train_batch(ROWS, 3, 5)), rows_of(*seen(task, 7))
    others = [rows_of(task.train_batch(ROWS, *numbers)) for numbers in ((3, 6), (4, 5), (5, 3))]
    assert not any(same(batch, other) for other in others), "batches of other seeds and numbers are the same"
    for again in (task, type(task).model_validate_json(task.model_dump_json()), pickle.loads(pickle.dumps(task))):
        disturb()
        assert same(rows_of(task.train_batch(ROWS, 3, 5)), batch), "a batch is another one when it is asked for again"
        assert same(rows_of(*seen(again, 7)), evaluated), "the evaluation is another one when it is asked for again"


@CONTRACT.clause
def rows_do_not_depend_on_how_they_are_batched(task: Task) -> None:
    """So that a step has the same rows on any number of processes, and the evaluation with any eval_batch."""
    whole = rows_of(task.train_batch(ROWS, 1, 4))
    for size in (1, 2, 3):
        first = 4 * ROWS // size
        parts = rows_of(*(task.train_batch(size, 1, first + part) for part in range(ROWS // size)))
        assert same(parts, whole), f"rows are others in batches of {size} than in one of {ROWS}"
    evaluated = rows_of(*seen(task, SEEN))
    for size in (1, 7):
        assert same(rows_of(*seen(task, size))[: len(evaluated)], evaluated), f"evaluation rows are others by {size}"


@CONTRACT.clause
def the_evaluation_is_the_same_for_every_seed(task: Task) -> None:
    """Training with one seed or another leaves no trace in it."""
    rows = []
    for seed in (0, 2**63 - 1):
        task.train_batch(ROWS, seed, 0)
        rows.append(rows_of(*seen(task, 7)))
    assert same(*rows), "the evaluation depends on the seed"


@CONTRACT.clause
def a_run_that_is_resumed_goes_on_with_the_rows_it_missed(task: Task) -> None:
    """Also far into a run, from the options alone, and at once."""
    far = 10**9
    before = [rows_of(task.train_batch(2, 0, number)) for number in range(far, far + 3)]
    again = type(task).model_validate_json(task.model_dump_json())
    again.prepare()
    for number in (2, 0, 1):
        assert same(rows_of(again.train_batch(2, 0, far + number)), before[number]), f"batch {far + number} is another"


@CONTRACT.clause
def inputs_and_targets_share_no_memory(task: Task) -> None:
    """Writing in one of them changes nothing else, nor a batch that comes later."""
    for make in (lambda: task.train_batch(1, 0, 0), lambda: task.train_batch(3, 0, 0), lambda: task.eval_batch(2, 0)):
        batch = make()
        inputs = batch.inputs.clone()
        batch.targets.zero_()
        assert batch.inputs.equal(inputs), "inputs are in the memory of targets"
        batch.inputs.zero_()
        assert make().inputs.equal(inputs), "inputs are in the memory of the data"


@CONTRACT.clause
def it_is_only_its_options(task: Task) -> None:
    """After it was used, it is equal to one that is made of its options, and is pickled small."""
    task.train_batch(1, 0, 0)
    assert type(task)(**task.model_dump()) == task, "it is not made anew by its options"
    assert len(pickle.dumps(task)) < 10_000, "data are kept in it: open them in a function with a cache"


@CONTRACT.clause
def a_metric_says_which_model_is_best(task: Task) -> None:
    """Perfect sums are no worse by it than bad ones."""
    kind = Errors if isinstance(task.targets, Values | Future) else Score
    good, bad = task.metrics(kind(0.1, 0.1 if kind is Errors else 9.0, 9.0)), task.metrics(kind(9.0, 1.0, 9.0))
    assert {"loss", task.metric} <= good.keys(), f"metrics are {', '.join(good)}, and lack loss or {task.metric}"
    better = good[task.metric] > bad[task.metric] if task.higher_is_better else good[task.metric] < bad[task.metric]
    assert better, f"higher_is_better is {task.higher_is_better}, and {task.metric} is worse where all is right"


@CONTRACT.clause
def a_model_learns_it(task: Task) -> None:
    """Some model takes its batches, with finite sums and gradients, and its evaluation."""
    spec = next((spec for spec in MODELS.values() if spec.serves(task)), None)
    assert spec is not None, f"no model tells {task.targets.words} of {task.inputs.words}"
    torch.manual_seed(0)
    model = spec(d_model=4, pattern=["s4d"], layers=1).serving(task).build()
    for batch in (task.train_batch(2, 0, 0), task.eval_batch(2, 0)):
        score = model.score(*batch)
        assert score.total == scored(batch.targets).sum(), (
            "a model scores other targets than those that are not ignored"
        )
        score.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), "gradients are not finite"
