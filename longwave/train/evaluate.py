"""Metrics of a model on a task's evaluation data."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longwave.nn import frozen
from longwave.tasks.base import Task
from longwave.tasks.forms import Batch

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
