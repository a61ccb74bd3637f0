"""Metrics of a model on a task's evaluation data."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longwave.models import LM
from longwave.models.score import score_logits
from longwave.nn import frozen
from longwave.tasks.base import Score, Task
from longwave.tasks.forms import Batch, scored

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@torch.no_grad()
def evaluate(fabric: "Fabric", objective: nn.Module, task: Task, batch: int) -> dict[str, float]:
    """The task's metrics over all of its evaluation batches, shared out over the processes.

    Args:
        fabric: launched.
        objective: the set-up module that makes sums of a batch's parts; its mode is kept.
        task: prepared.
        batch: rows a batch.
    """
    was_training, world, count = objective.training, fabric.world_size, task.eval_batches(batch)
    objective.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    keep = frozen(objective)
    try:
        for start in range(0, count, world):
            index = start + fabric.global_rank
            with keep:
                score = objective(*fabric.to_device(task.eval_batch(batch, min(index, count - 1))))
            if index < count:  # every process runs as many batches, as sharded layers need; the surplus does not count
                sums += torch.stack([part.double() for part in score])
    finally:
        objective.train(was_training)
    totals: Tensor = fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
    return task.metrics(type(score)(*totals.tolist()))


@torch.no_grad()
def evaluate_carried(fabric: "Fabric", model: nn.Module, task: Task) -> dict[str, float]:
    """The task's metrics, and perplexity, over whole documents: the state goes on from one evaluation row to the next.

    So nothing is read twice, and the length of a row is how much is read at once, no more. Attention without a window
    sees all of a document then, in time that grows with its square.

    Args:
        fabric: launched, of one process.
        model: a language model, where fabric put it.
        task: prepared.
    Raises:
        ValueError: where the model is no language model, or rows of such a task never go on from another.
    """
    if not isinstance(model, LM) or type(task).goes_on is Task.goes_on:
        raise ValueError(
            f"the state of a language model is carried through text or tokens; got {type(model).__name__} and the task "
            f"{task.kind}, no evaluation row of which goes on from another"
        )
    model.eval()
    state, sums = None, torch.zeros(3, dtype=torch.float64, device=fabric.device)
    with frozen(model), fabric.autocast():
        for number in range(task.eval_rows):
            ids, targets, _ = fabric.to_device(task.eval_batch(1, number))
            if number == 0 or not task.goes_on(number):
                state = model.init_state(1)
            seen = int(scored(targets)[0].int().argmax())
            logits, state = model(ids[:, seen:], state)
            score = score_logits(logits[0], targets[0, seen:])
            sums += torch.stack([part.double() for part in score])
    metrics = task.metrics(Score(*sums.tolist()))
    return {**metrics, "perplexity": math.exp(min(metrics["loss"], 700))}


def evaluate_lengths(
    fabric: "Fabric", objective: nn.Module, task: Task, batch: int, lengths: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """The task's metrics at each of some lengths, of tasks with an ``eval_length``; others than it was trained at, too.

    Args:
        batch: rows a batch at the task's own length; of longer ones fewer.
    Raises:
        ValueError: where the task draws no sequences of other lengths, or the model takes none so long.
    """
    if "eval_length" not in type(task).model_fields:
        raise ValueError(f"the task {task.kind} has no eval_length: it is what its data are; leave out --lengths")
    for length in lengths:
        longer = type(task).model_validate({**task.model_dump(), "eval_length": length})
        longer.prepare()
        rows = max(1, min(batch, batch * task.longest // longer.longest))
        yield length, evaluate(fabric, objective, longer, rows)


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, batch: Batch) -> dict[str, float]:
    """How far the outputs of another model are from those of a model, on the same batch.

    Returns:
        error_of_logits: root mean square of the differences over that of the outputs; error_of_outputs, and nothing
            else, where they are no logits.
        same_choice: how often both have their largest logit at the same place.
    """
    outputs = (m(batch.inputs, mask=batch.mask) for m in (model, other))
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in outputs)
    error = (ours - theirs).norm() / ours.norm()
    if batch.targets.is_floating_point():
        return {"error_of_outputs": error.item()}
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return {"error_of_logits": error.item(), "same_choice": same.item()}
