"""The training loop: a function of a recipe, with nothing hidden and nothing to subclass."""

import atexit
import contextlib
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longwave.models import LM, Classifier, MaskedLM, Score
from longwave.models.backbone import Block
from longwave.models.runs import CONFIG, find, saved_steps, step_of
from longwave.models.storage import whole
from longwave.tasks.base import Batch
from longwave.train.checkpoint import Best, gather, load_checkpoint, save_checkpoint, write_text
from longwave.train.config import Recipe, load_recipe
from longwave.train.evaluate import evaluate
from longwave.train.memory import keep_freed_memory
from longwave.train.monitor import Monitor, plot_loss, read_metrics
from longwave.train.optim import build_optimizer, set_lr
from longwave.train.size import check_size

if TYPE_CHECKING:  # takes long to import, and only training needs it
    from lightning_fabric import Fabric

MAY_DIFFER = {
    "steps", "eval_every", "checkpoint_every", "log_every", "eval_batch", "keep",
    "threads", "keep_memory", "accelerator", "devices", "nodes", "strategy", "accumulate",
}  # fmt: skip


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run is saved. ``step`` says how far it came."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"interrupted after step {step}; saved as {folder}")
        self.step, self.folder = step, folder


class Objective(nn.Module):
    """What is trained: (inputs, targets) -> Score. One forward, as DDP and FSDP2 want it."""

    def __init__(self, model: LM | MaskedLM | Classifier):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Score:
        return self.model.score(inputs, targets)


class StopFlag:
    """Turns SIGINT and SIGTERM into a flag while it is entered; a second one acts as it would have without."""

    def __init__(self, tell: bool):
        self.raised, self.tell = False, tell

    def __enter__(self) -> "StopFlag":
        self.before = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        if self.tell:  # not print: the signal may come while another print is at work
            os.write(2, b"\nstopping: this step is finished and saved first; once more to stop at once\n")
        signal.signal(number, self.before[signal.Signals(number)])


def make_fabric(recipe: Recipe) -> "Fabric":
    """A launched lightning-fabric for the recipe's devices; several nodes under torchrun or SLURM.

    Raises:
        ValueError: where the machine does not have them, or torchrun started another number of processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    world = recipe.devices * recipe.nodes
    started = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else world
    if started != world:
        raise ValueError(
            f"torchrun started {started} processes, and devices x nodes = {recipe.devices} x {recipe.nodes}; set "
            f"devices to its --nproc-per-node and nodes to its --nnodes"
        )
    strategy: Any = recipe.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(parallelize_fn=_shard, data_parallel_size=world, tensor_parallel_size=1)
    elif strategy == "auto":
        strategy = "ddp" if world > 1 else "auto"
    try:
        fabric = Fabric(
            accelerator=recipe.accelerator,
            devices=recipe.devices,
            num_nodes=recipe.nodes,
            strategy=strategy,
            precision=recipe.precision,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"accelerator = {recipe.accelerator}, devices = {recipe.devices}: {reason}") from error
    fabric.launch()
    if recipe.keep_memory and fabric.device.type == "cpu":
        keep_freed_memory()
    if torch.distributed.is_initialized():
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Or gloo's threads outlive the interpreter now and then, and the process ends with abort()."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shard(objective: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    for module in [*blocks, objective]:
        # also the outermost: else its parameters stay whole after an evaluation, and are not those of the optimiser
        fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)
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
    recipe.task.prepare()
    check_size(recipe)  # what the model objects to is said before any process is started
    fabric = make_fabric(recipe)
    checkpoint = fabric.broadcast(_on_main(fabric, _open_run, recipe, run, resume))
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    objective = fabric.setup(Objective(model))
    optimizer = build_optimizer(model, recipe)
    wrapped = fabric.setup_optimizers(optimizer)
    start, best = (0, None) if checkpoint is None else load_checkpoint(checkpoint, model, optimizer)
    _rehearse(fabric, objective, recipe)
    world, parameters = fabric.world_size, [p for p in model.parameters() if p.requires_grad]
    rows = recipe.batch // (world * recipe.accumulate)
    metrics: dict[str, float] = {}
    tokens = 0  # since the last line of the log
    saved = start if checkpoint is not None else -1
    monitor = _on_main(fabric, _start_monitor, recipe, run, start)

    def batches(step: int) -> list[Batch]:
        first = step * recipe.accumulate
        numbers = [(first + part) * world + fabric.global_rank for part in range(recipe.accumulate)]
        return [fabric.to_device(recipe.task.train_batch(rows, recipe.seed, number)) for number in numbers]

    def say(text: str) -> None:
        _on_main(fabric, Monitor.say, monitor, text)

    def save(step: int) -> None:
        nonlocal saved
        tensors = gather(model, optimizer)
        for name, tensor in tensors[0].items():
            if not tensor.isfinite().all():
                raise _diverged(run, name, step)
        _on_main(fabric, _save, run, step, tensors, recipe, best)
        saved = step

    def assess(step: int) -> None:
        nonlocal best, metrics
        metrics = evaluate(fabric, objective, recipe.task, recipe.eval_batch or recipe.batch)
        if not math.isfinite(metrics["loss"]):
            raise _diverged(run, "the held-out loss", step)
        _on_main(fabric, Monitor.evaluation, monitor, step, metrics)
        value = metrics[recipe.task.metric]
        if best is None or (value > best.value if recipe.task.higher_is_better else value < best.value):
            best = Best(step, value)
            save(step)

    try:
        with StopFlag(tell=fabric.is_global_zero) as stop, monitor or contextlib.nullcontext():
            if resume is not None and checkpoint is None:
                _on_main(
                    fabric, Monitor.say, monitor, f"{run} has no checkpoint yet; it starts again at its first step"
                )
            if start == recipe.steps:
                assess(start)
                done_already = f"all {start} steps are done already; set steps higher to train on"
                _on_main(fabric, Monitor.say, monitor, done_already)
            for step in range(start, recipe.steps):
                lr = set_lr(optimizer, step, recipe)
                torch.manual_seed(_step_seed(recipe.seed, step, fabric.global_rank))
                parts = batches(step)
                tokens += sum(part.inputs.numel() for part in parts) * world
                loss, norm = _step(fabric, objective, wrapped, parameters, parts, recipe)
                done = step + 1
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise _diverged(run, "the gradient" if math.isfinite(loss) else "the loss", done)
                if monitor is not None:
                    monitor.step(done)
                if done % recipe.log_every == 0 or done == recipe.steps:
                    _on_main(fabric, Monitor.train, monitor, done, loss, lr, norm, tokens)
                    tokens = 0
                if done % recipe.eval_every == 0 or done == recipe.steps:
                    assess(done)
                if saved != done and (done % recipe.checkpoint_every == 0 or done == recipe.steps):
                    save(done)
                if done < recipe.steps and _any_rank(fabric, stop.raised):
                    if saved != done:
                        save(done)
                    raise Interrupted(done, run)
    except (Interrupted, FloatingPointError):
        _on_main(fabric, plot_loss, run, recipe.task.metric)
        raise
    _on_main(fabric, plot_loss, run, recipe.task.metric)
    return metrics


def _on_main(fabric: "Fabric", action: Callable[..., Any], *arguments: Any) -> Any:
    """Call on the main process alone. What it returns is returned there, what it raises is raised on every process."""
    result, trouble = None, None
    if fabric.is_global_zero:
        try:
            result = action(*arguments)
        except (ValueError, OSError) as error:
            trouble = error
    trouble = fabric.broadcast(trouble)
    if trouble is not None:
        raise trouble
    return result


@torch.no_grad()
def _rehearse(fabric: "Fabric", objective: nn.Module, recipe: Recipe) -> None:
    """Run a row of the longest there will be, so that what it is too long for is told before the run begins."""
    ids = torch.zeros(1, recipe.task.longest, dtype=torch.long, device=fabric.device)
    objective.eval()
    objective(ids, ids)
    objective.train()


def _start_monitor(recipe: Recipe, run: Path, start: int) -> Monitor:
    """Only now, when nothing objects, the run has a folder, and in it one for checkpoints: without it they are gone."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, recipe.to_yaml())
    return Monitor(run, recipe.steps, start, recipe.task.metric)


def _save(
    run: Path, step: int, tensors: tuple[dict[str, Tensor], dict[str, Tensor]], recipe: Recipe, best: Best | None
) -> None:
    try:
        save_checkpoint(run, step, tensors, recipe.model, best, recipe.keep)
    except OSError as error:
        raise OSError(f"the checkpoint of step {step} cannot be written: {error}; {_what_stays(run)}") from error


def _diverged(run: Path, what: str, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"{what} is not finite at step {step}; {_what_stays(run)}; start another run with a lower lr or longer warmup"
    )


def _what_stays(run: Path) -> str:
    kept = saved_steps(run)
    return f"the checkpoint of step {kept[-1]} stays" if kept else "there is no checkpoint yet"


def _step(
    fabric: "Fabric",
    objective: Any,
    optimizer: Any,
    parameters: list[nn.Parameter],
    batches: list[Batch],
    recipe: Recipe,
) -> tuple[float, float]:
    """One step on this process's share of its batches; loss (nats a scored token, over all processes) and norm.

    Where either is not finite, nothing is changed.
    """
    count = _sum(fabric, torch.stack([(b.targets >= 0).sum() for b in batches]).sum())
    total = torch.zeros((), device=fabric.device)
    optimizer.zero_grad()
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(objective, enabled=i + 1 < len(batches)):
            score = objective(*batch)
            fabric.backward(score.loss * (fabric.world_size / count))  # gradients are averaged over processes
        total += score.loss.detach().float()
    loss = (_sum(fabric, total) / count).item()
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of a step is a function of (seed, step, rank), so a resumed run draws what it would have drawn."""
    return int(torch.tensor([seed, step, rank]).mul(torch.tensor([1, 1_000_003, 7_919])).sum()) % 2**63


def _any_rank(fabric: "Fabric", flag: bool) -> bool:
    return bool(_sum(fabric, torch.tensor(float(flag), device=fabric.device)) > 0)


def _sum(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """Of the tensors of all processes."""
    total = fabric.all_reduce(tensor, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def _open_run(recipe: Recipe, run: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from, or None to start: a new run, or one that was killed before it had a checkpoint."""
    if resume is None:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(
                f"{run} exists already: go on with it by --resume {run}, or choose another folder by --out"
            )
        return None
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run: it has no {CONFIG}")
    old = load_recipe(run / CONFIG)
    before, now = old.model_dump(), recipe.model_dump()
    for field, value in now.items():
        if field not in MAY_DIFFER and value != before[field]:
            raise ValueError(
                f"{run} was made with another config: {first_difference(field, before[field], value)}; "
                "resume it without that change"
            )
    if Path(resume) == run and not saved_steps(run):
        came, due = (
            max((line["step"] for line in read_metrics(run)), default=0),
            min(old.eval_every, old.checkpoint_every),
        )
        if came > due or not (run / "checkpoints").is_dir():
            raise ValueError(
                f"{run} came to step {came}, and its checkpoints are gone: put them back, or start another run by --out"
            )
        return None
    checkpoint = find(Path(resume))
    if (step := step_of(checkpoint)) > recipe.steps:
        raise ValueError(f"{checkpoint} is beyond steps = {recipe.steps}; set steps to at least {step}")
    return checkpoint


def first_difference(path: str, old: Any, new: Any) -> str:
    """The first place where two trees differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return first_difference(f"{path}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return first_difference(f"{path}.{i}", a, b)
    return f"{path} was {old!r} and is now {new!r}"
