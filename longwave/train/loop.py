"""The training loop: a function of a recipe, with nothing hidden and nothing to subclass."""

import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from longwave.models import LM, Classifier, Score
from longwave.models.backbone import Block
from longwave.tasks.base import Batch
from longwave.train.checkpoint import Best, find, gather, load_checkpoint, save_checkpoint, saved_steps
from longwave.train.config import Recipe, load_recipe
from longwave.train.evaluate import evaluate
from longwave.train.monitor import Monitor, plot_loss
from longwave.train.optim import build_optimizer, set_lr

CONFIG = "config.yaml"
MAY_DIFFER = {
    "steps", "eval_every", "checkpoint_every", "log_every", "eval_batch", "keep",
    "accelerator", "devices", "nodes", "strategy", "accumulate",
}  # fmt: skip


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run is saved. ``step`` says how far it came."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"interrupted after step {step}; saved as {folder}")
        self.step, self.folder = step, folder


class Objective(nn.Module):
    """What is trained: (inputs, targets) -> Score. One forward, as DDP and FSDP2 want it."""

    def __init__(self, model: LM | Classifier):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Score:
        return self.model.score(inputs, targets)


class StopFlag:
    """Turns SIGINT and SIGTERM into a flag while it is entered; a second one acts as it would have without."""

    raised = False

    def __enter__(self) -> "StopFlag":
        self.before = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        signal.signal(number, self.before[signal.Signals(number)])


def make_fabric(recipe: Recipe) -> Fabric:
    """A launched lightning-fabric for the recipe's devices; several nodes under torchrun or SLURM."""
    strategy: Any = recipe.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            parallelize_fn=_shard, data_parallel_size=recipe.devices * recipe.nodes, tensor_parallel_size=1
        )
    elif strategy == "auto":
        strategy = "ddp" if recipe.devices * recipe.nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=recipe.accelerator,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=strategy,
        precision=recipe.precision,
    )
    fabric.launch()
    return fabric


def _shard(objective: nn.Module, mesh: Any) -> nn.Module:
    for module in objective.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(objective, mesh=mesh["data_parallel"])
    return objective


def train(recipe: Recipe, run: str | Path, *, resume: str | Path | None = None) -> dict[str, float]:
    """Train, in a new run folder or going on in one; a run that was interrupted ends as if it had not been.

    Args:
        recipe: what to do.
        run: folder for config.yaml, metrics.jsonl, TensorBoard events, checkpoints/ and loss.png.
        resume: the run, or one of its checkpoints, to go on from; ``run`` then is that run.
    Returns:
        the metrics of the last evaluation.
    Raises:
        ValueError: where the run exists (or, to resume, does not), the checkpoint is broken or of another config, or
            the task cannot be prepared.
        FloatingPointError: where the loss or the gradient is not finite, naming the step; the last checkpoint stays.
        OSError: where a checkpoint cannot be written; the last one stays.
        Interrupted: after SIGINT or SIGTERM, when everything is saved.
    """
    run = Path(run)
    fabric = make_fabric(recipe)
    checkpoint = _open_run(fabric, recipe, run, resume)
    recipe.task.prepare()
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    objective = fabric.setup(Objective(model))
    optimizer = build_optimizer(model, recipe)
    wrapped = fabric.setup_optimizers(optimizer)
    start, best = (0, None) if checkpoint is None else load_checkpoint(checkpoint, model, optimizer)
    world, parameters = fabric.world_size, [p for p in model.parameters() if p.requires_grad]
    rows = recipe.batch // (world * recipe.accumulate)
    metrics: dict[str, float] = {}

    def batches(step: int) -> list[Batch]:
        first = step * recipe.accumulate
        numbers = [(first + part) * world + fabric.global_rank for part in range(recipe.accumulate)]
        return [fabric.to_device(recipe.task.train_batch(rows, recipe.seed, number)) for number in numbers]

    def save(step: int) -> None:
        nonlocal saved
        tensors = gather(model, optimizer)
        trouble = None
        if fabric.is_global_zero:
            try:
                save_checkpoint(run, step, tensors, recipe.model, best, recipe.keep)
            except OSError as error:
                trouble = error
        if fabric.broadcast(trouble is not None):
            kept = saved_steps(run)
            stays = f"; the checkpoint of step {kept[-1]} stays" if kept else ""
            raise OSError(f"checkpoint of step {step} cannot be written to {run}: {trouble}{stays}")
        saved = step

    def assess(step: int) -> dict[str, float]:
        nonlocal best
        result = evaluate(fabric, objective, recipe.task, recipe.eval_batch or recipe.batch)
        value = result[recipe.task.metric]
        if best is None or (value > best.value) == recipe.task.higher_is_better and value != best.value:
            best = Best(step, value)
        if monitor is not None:
            monitor.evaluation(step, result)
        return result

    saved = start if checkpoint is not None else -1
    monitor = None
    if fabric.is_global_zero:
        tokens = rows * world * recipe.accumulate * recipe.task.train_batch(1, 0, 0).inputs.shape[1]
        monitor = Monitor(run, recipe.steps, start, tokens, recipe.task.metric)
    try:
        with StopFlag() as stop, monitor or StopFlag():
            for step in range(start, recipe.steps):
                lr = set_lr(optimizer, step, recipe)
                torch.manual_seed(_step_seed(recipe.seed, step, fabric.global_rank))
                loss, norm = _step(fabric, objective, wrapped, parameters, batches(step), recipe)
                done = step + 1
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    kept = saved_steps(run)
                    raise FloatingPointError(
                        f"the {'loss' if not math.isfinite(loss) else 'gradient'} is not finite at step {done}; "
                        + (f"the checkpoint of step {kept[-1]} stays" if kept else "there is no checkpoint yet")
                        + "; try a lower lr or a longer warmup"
                    )
                if monitor is not None and (done % recipe.log_every == 0 or done == recipe.steps):
                    monitor.train(done, loss, lr, norm)
                if done % recipe.eval_every == 0 or done == recipe.steps:
                    metrics = assess(done)
                    if best is not None and best.step == done:
                        save(done)
                if saved != done and (done % recipe.checkpoint_every == 0 or done == recipe.steps):
                    save(done)
                if done < recipe.steps and _any_rank(fabric, stop.raised):
                    if saved != done:
                        save(done)
                    raise Interrupted(done, run)
            if not metrics:  # nothing was left to do
                metrics = assess(recipe.steps)
    finally:
        if fabric.is_global_zero:
            plot_loss(run, recipe.task.metric)
    return metrics


def _step(
    fabric: Fabric,
    objective: Any,
    optimizer: Any,
    parameters: list[nn.Parameter],
    batches: list[Batch],
    recipe: Recipe,
) -> tuple[float, float]:
    """One step on this process's share of its batches; loss (nats a scored token, over all processes) and norm.

    Where either is not finite, nothing is changed.
    """
    count = fabric.all_reduce(torch.stack([(b.targets >= 0).sum() for b in batches]).sum(), reduce_op="sum")
    total = torch.zeros((), device=fabric.device)
    optimizer.zero_grad()
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(objective, enabled=i + 1 < len(batches)):
            score = objective(*batch)
            fabric.backward(score.loss * (fabric.world_size / count))  # gradients are averaged over processes
        total += score.loss.detach().float()
    loss = (fabric.all_reduce(total, reduce_op="sum") / count).item()  # type: ignore[operator, union-attr]
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of a step is a function of (seed, step, rank), so a resumed run draws what it would have drawn."""
    return int(torch.tensor([seed, step, rank]).mul(torch.tensor([1, 1_000_003, 7_919])).sum()) % 2**63


def _any_rank(fabric: Fabric, flag: bool) -> bool:
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum") > 0)


def _open_run(fabric: Fabric, recipe: Recipe, run: Path, resume: str | Path | None) -> Path | None:
    """Make the folder of a new run, or find the checkpoint to go on from; the same answer or error on every rank."""
    trouble, checkpoint = None, None
    if fabric.is_global_zero:
        try:
            checkpoint = _new_run(recipe, run) if resume is None else _old_run(recipe, run, Path(resume))
        except (ValueError, OSError) as error:
            trouble = str(error)
    trouble = fabric.broadcast(trouble)
    if trouble is not None:
        raise ValueError(trouble)
    return fabric.broadcast(checkpoint)


def _new_run(recipe: Recipe, run: Path) -> None:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} exists already: go on with it by --resume {run}, or choose another folder by --out")
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(recipe.to_yaml())


def _old_run(recipe: Recipe, run: Path, resume: Path) -> Path:
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run: it has no {CONFIG}")
    old, new = load_recipe(run / CONFIG).model_dump(), recipe.model_dump()
    for field, value in new.items():
        if field not in MAY_DIFFER and value != old[field]:
            raise ValueError(
                f"{run} was made with another config: {_first_difference(field, old[field], value)}; "
                "resume it without that change"
            )
    checkpoint = find(resume)
    if (step := int(checkpoint.name.removeprefix("step-"))) > recipe.steps:
        raise ValueError(f"{checkpoint} is beyond steps = {recipe.steps}; set steps to at least {step}")
    (run / CONFIG).write_text(recipe.to_yaml())
    return checkpoint


def _first_difference(path: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return _first_difference(f"{path}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return _first_difference(f"{path}.{i}", a, b)
    return f"{path} was {old!r} and is now {new!r}"
