"""The training loop: a function of a recipe, with nothing hidden and nothing to subclass."""

import atexit
import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longwave.machine import setting
from longwave.models.backbone import Branches
from longwave.models.runs import CONFIG, RECORD, find, read_record, saved_steps, step_of
from longwave.models.storage import spec_at
from longwave.nn.module import whole
from longwave.tasks.base import Errors, Score, fingerprint
from longwave.tasks.forms import Batch, scored
from longwave.train.ahead import batches
from longwave.train.checkpoint import Best, gather, load_checkpoint, save_checkpoint, start_with, write_text
from longwave.train.config import Recipe, load_recipe
from longwave.train.evaluate import evaluate
from longwave.train.monitor import Monitor, plot_loss, read_metrics
from longwave.train.optim import build_optimizer, set_lr
from longwave.train.ranks import Ranks
from longwave.train.size import check_size

if TYPE_CHECKING:  # takes long to import, and only training needs it
    from lightning_fabric import Fabric

DATA = "data.sha256"  # in a run: of what its task reads
MAY_DIFFER = {
    "steps", "eval_every", "checkpoint_every", "log_every", "eval_batch", "keep", "paper",
    "threads", "workers", "keep_memory", "accelerator", "devices", "nodes", "strategy", "accumulate",
}  # fmt: skip
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or a hangup: the run is saved. ``step`` says how far it came, ``number`` which signal it was."""

    def __init__(self, step: int, folder: Path, number: int):
        super().__init__(f"interrupted after step {step}; saved as {folder}")
        self.step, self.folder, self.number = step, folder, number


class Objective(nn.Module):
    """What is trained: a batch's parts -> sums over it. One forward, as DDP and FSDP2 want it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Score | Errors:
        return self.model.score(inputs, targets, mask)


class StopFlag:
    """Turns the signals that stop a run into a ``number`` while it is entered; a second one acts as it would without.

    One that was ignored before stays so, as under nohup. Outside the main thread, where Python allows no handlers, no
    signal is turned into anything.
    """

    def __init__(self, tell: bool):
        self.number, self.tell = 0, tell
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            self.before = {
                n: signal.getsignal(n) for n in STOPPING if signal.getsignal(n) not in (signal.SIG_IGN, None)
            }
        for number in self.before:
            signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.tell:
            with contextlib.suppress(OSError):  # the terminal is gone
                # not print: the signal may come while another print is at work
                os.write(2, b"\nstopping: this step is finished and saved first; once more to stop at once\n")
        signal.signal(number, self.before[number])


def make_fabric(recipe: Recipe) -> "Fabric":
    """A launched lightning-fabric for the recipe's devices; several nodes under torchrun or SLURM.

    Raises:
        ValueError: where the machine does not have them, or torchrun started another number of processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

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
    if torch.distributed.is_initialized():
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Or gloo's threads outlive the interpreter now and then, and the process ends with abort()."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shard(objective: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    blocks = [module for module in objective.modules() if isinstance(module, Branches)]
    for module in [*blocks, objective]:
        # also the outermost: else its parameters stay whole after an evaluation, and are not those of the optimiser
        fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return objective


def train(
    recipe: Recipe, run: str | Path, *, resume: str | Path | None = None, command: str | None = None
) -> dict[str, float]:
    """Train, in a new run folder or going on in one; a run that was interrupted ends as if it had not been.

    Args:
        recipe: what to do.
        run: folder for config.yaml, run.json, metrics.jsonl, TensorBoard events, checkpoints/ and loss.png.
        resume: the run, or one of its checkpoints, to go on from; ``run`` then is that run.
        command: that started it, as run.json is to say it.
    Returns:
        the metrics of the last evaluation.
    Raises:
        ValueError: where the run exists (or, to resume, does not), the checkpoint is broken or of another config, or
            the task cannot be prepared.
        FloatingPointError: where the loss or the gradient is not finite, naming the step; the last checkpoint stays.
        OSError: where a checkpoint cannot be written; the last one stays.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, when everything is saved; in the main thread alone.
        RankError: where another of the run's processes has ended, naming its rank; the last checkpoint stays.
    """
    run = Path(run)
    recipe.task.prepare()
    check_size(recipe)  # what the model objects to is said before any process is started
    if resume is None:
        check_start(recipe)
    with threads(recipe.threads), Ranks(make_fabric(recipe)) as ranks:
        return _train(ranks, recipe, run, resume, command)


def _train(ranks: Ranks, recipe: Recipe, run: Path, resume: str | Path | None, command: str | None) -> dict[str, float]:
    fabric = ranks.fabric
    checkpoint = fabric.broadcast(ranks.on_main(_open_run, recipe, run, resume))
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
    about = {"command": command, "parameters": sum(p.numel() for p in model.parameters())}
    if checkpoint is None and recipe.start is not None:
        about["start"] = start_with(model, recipe.start, read_record(run).get("start"))
    monitor = ranks.on_main(_start_monitor, recipe, run, start, about)

    parts_left = range(start * recipe.accumulate, recipe.steps * recipe.accumulate)
    numbers = (part * world + fabric.global_rank for part in parts_left)
    drawn = batches(recipe.task, rows, recipe.seed, numbers, recipe.workers)

    def save(step: int) -> None:
        nonlocal saved
        ranks.on_main(_save, run, step, gather(model, optimizer, keep=ranks.main), recipe, best)
        saved = step

    def assess(step: int) -> None:
        nonlocal best, metrics
        metrics = evaluate(fabric, objective, recipe.task, recipe.eval_batch or recipe.batch)
        if not math.isfinite(metrics["loss"]):
            raise ranks.together(_diverged(run, "the held-out loss", step))
        ranks.on_main(Monitor.evaluation, monitor, step, metrics)
        value = metrics[recipe.task.metric]
        if best is None or (value > best.value if recipe.task.higher_is_better else value < best.value):
            best = Best(step, value)
            save(step)

    try:
        with contextlib.closing(drawn), StopFlag(tell=ranks.main) as stop, monitor or contextlib.nullcontext():
            if monitor is not None and resume is not None and checkpoint is None:
                monitor.say(f"{run} has no checkpoint yet; it starts again at its first step")
            if start == recipe.steps:
                assess(start)
                if monitor is not None:
                    monitor.say(f"all {start} steps are done already; set steps higher to train on")
            for step in range(start, recipe.steps):
                lr = set_lr(optimizer, step, recipe)
                torch.manual_seed(_step_seed(recipe.seed, step, fabric.global_rank))
                parts = [fabric.to_device(batch) for batch in islice(drawn, recipe.accumulate)]
                tokens += sum(part.steps for part in parts) * world
                loss, norm = _step(ranks, objective, wrapped, parameters, parts, recipe)
                done = step + 1
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    what = "the gradient" if math.isfinite(loss) else "the loss"
                    raise ranks.together(_diverged(run, what, done))
                if monitor is not None:
                    monitor.step(done)
                if done % recipe.log_every == 0 or done == recipe.steps:
                    ranks.on_main(Monitor.train, monitor, done, loss, lr, norm, tokens)
                    tokens = 0
                if done % recipe.eval_every == 0 or done == recipe.steps:
                    assess(done)
                if saved != done and (done % recipe.checkpoint_every == 0 or done == recipe.steps):
                    save(done)
                if done < recipe.steps and (number := ranks.max(stop.number)):
                    if saved != done:
                        save(done)
                    raise ranks.together(Interrupted(done, run, number))
    except (Interrupted, FloatingPointError):
        if ranks.main:
            plot_loss(run, recipe.task.metric)
        raise
    if ranks.main:
        plot_loss(run, recipe.task.metric)
    return metrics


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for torch; afterwards as many as before, whoever else has changed them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _rehearse(fabric: "Fabric", objective: nn.Module, recipe: Recipe) -> None:
    """Run a row of the longest there will be, so that what it is too long for is told before the run begins."""
    objective.eval()
    objective(*fabric.to_device(recipe.task.blank(1)))
    objective.train()


def _start_monitor(recipe: Recipe, run: Path, start: int, about: dict[str, Any]) -> Monitor:
    """Only now, when nothing objects, the run has a folder, and in it one for checkpoints: without it they are gone."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, recipe.to_yaml())
    _write_record(run, about)
    if recipe.task.sources:
        write_text(run / DATA, fingerprint(recipe.task.sources) + "\n")
    return Monitor(run, recipe.steps, start, recipe.task.metric)


def check_start(recipe: Recipe) -> None:
    """Refuse to start with the weights of another model than the recipe's, or of one whose ids mean something else."""
    from longwave.train.runs import check_tokenizer, tokenizer_of  # which need this module

    if (start := recipe.start) is None:
        return
    spec = spec_at(start)[1].model_copy(update={"dropout": recipe.model.dropout})
    if spec != recipe.model:
        change = first_difference("model", spec.model_dump(), recipe.model.model_dump())
        raise ValueError(f"{start} holds another model than the recipe: {change}; train that one by model=null")
    check_tokenizer(Path(start), tokenizer_of(Path(start)), recipe.task)


def _write_record(run: Path, about: dict[str, Any]) -> None:
    """What a run says of itself to tables; one that goes on keeps its first words, and adds the commit."""
    about |= setting()
    record = read_record(run) or {**about, "commits": []}
    if (commit := about["commit"]) not in record["commits"]:
        record["commits"].append(commit)
    kept = {key: value for key, value in record.items() if key != "commit"}
    write_text(run / RECORD, json.dumps(kept, indent=2) + "\n")


def _save(
    run: Path, step: int, tensors: tuple[dict[str, Tensor], dict[str, Tensor]], recipe: Recipe, best: Best | None
) -> None:
    for name, tensor in tensors[0].items():
        if not tensor.isfinite().all():
            raise _diverged(run, name, step)
    try:
        save_checkpoint(run, step, tensors, recipe.model, recipe.task.tokenizer, best, recipe.keep)
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
    ranks: Ranks,
    objective: Any,
    optimizer: Any,
    parameters: list[nn.Parameter],
    batches: list[Batch],
    recipe: Recipe,
) -> tuple[float, float]:
    """One step on this process's share of its batches; loss (nats a scored token, over all processes) and norm.

    Where either is not finite, nothing is changed.
    """
    fabric = ranks.fabric
    count = ranks.sum(torch.stack([scored(b.targets).sum() for b in batches]).sum())
    total = torch.zeros((), device=fabric.device)
    optimizer.zero_grad()
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(objective, enabled=i + 1 < len(batches)):
            score = objective(*batch)
            fabric.backward(score.loss * (fabric.world_size / count))  # gradients are averaged over processes
        total += score.loss.detach().float()
    loss = (ranks.sum(total) / count).item()
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of a step is a function of (seed, step, rank), so a resumed run draws what it would have drawn."""
    return int(torch.tensor([seed, step, rank]).mul(torch.tensor([1, 1_000_003, 7_919])).sum()) % 2**63


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
    if change := other_config(old, recipe):
        raise ValueError(
            f"{run} was made with another config: {change}; "
            f"go on with its own config, by --resume {run} alone, without that change"
        )
    if (run / DATA).is_file() and (run / DATA).read_text().strip() != fingerprint(recipe.task.sources):
        raise ValueError(
            f"the data of {run} are not what they were when it began ({', '.join(recipe.task.sources)}); "
            "put them back, or start another run by --out"
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


def other_config(old: Recipe, new: Recipe) -> str | None:
    """The first difference of two recipes for which one cannot go on with what the other has begun."""
    before, now = old.model_dump(), new.model_dump()
    differing = (field for field in now if field not in MAY_DIFFER and now[field] != before[field])
    return next((first_difference(field, before[field], now[field]) for field in differing), None)


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
