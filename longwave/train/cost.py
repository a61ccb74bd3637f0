"""What a recipe will cost, told before anything is allocated: operations, memory by part, steps, and time."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longwave.inspection import state_growth
from longwave.machine import gigabytes, memory
from longwave.models import LM
from longwave.models.lm import LOGITS_AT_ONCE
from longwave.models.size import on_meta
from longwave.ops import Op
from longwave.ops.flops import fft, flops
from longwave.tasks.base import Task
from longwave.tasks.forms import Batch
from longwave.train.config import Recipe

AT_ONCE = 2e11  # operations of the steps that measure time, each: seconds, on a CPU


class Cost(NamedTuple):
    """What a recipe costs.

    Attributes:
        parameters: of the model.
        flops: floating-point operations of one row's training: forward, and twice as many backward.
        by_op: of these, the share of each of longwave's ops; the rest is matrix products and Fourier transforms.
        row: tokens of a row.
        rows: of a step, on one device at a time.
        weights, gradients, optimiser, activations: bytes on one device; the last are what is kept for the backward pass
            and the logits of the tokens that have them at once, in the dtypes of the recipe's precision.
        state: bytes of a sequence of one row that goes on token by token; None where no model does.
    """

    parameters: int
    flops: float
    by_op: dict[str, float]
    row: int
    rows: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    state: int | None

    @property
    def device(self) -> int:
        """Bytes of all parts together."""
        return self.weights + self.gradients + self.optimiser + self.activations


class _Counted(torch.autograd.Function):
    """An op that only tells what comes out: its inputs and results are what a kernel keeps."""

    @staticmethod
    def forward(ctx: Any, op: Op, *inputs: Any) -> Any:
        results = op.declaration.results(dict(zip(op.arguments, inputs)))
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *results)
        return tuple(results) if len(results) > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("only counted")


@contextlib.contextmanager
def _counting(found: dict[str, float]) -> Iterator[None]:
    """Within it, ops compute nothing, and their operations are added up by name."""
    call = Op.__call__

    def count(op: Op, *args: Any, backend: str = "auto", **options: Any) -> Any:
        inputs = op._bound(args, options)
        found[op.__name__] = found.get(op.__name__, 0) + flops(op.__name__, dict(zip(op.arguments, inputs)))
        return _Counted.apply(op, *inputs)

    Op.__call__ = count  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Op.__call__ = call  # type: ignore[method-assign]


def _transform(real: bool) -> Any:
    def count(x: Any, dim: list[int], *args: Any, out_shape: Any, **_: Any) -> int:
        sizes = [max(x[i], out_shape[i]) for i in dim]
        whole = [max(a, b) for a, b in zip(x, out_shape)]
        return int(math.prod(whole) / math.prod(sizes) * fft(math.prod(sizes), real))

    return count


def cost(recipe: Recipe) -> Cost:
    """Build the recipe's model where it takes no memory, run a step's forward pass there and count.

    Raises:
        ValueError: where the model cannot be built, or the batch does not fit it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    task = _training(recipe.task)
    rows = recipe.batch // (recipe.devices * recipe.nodes * recipe.accumulate)
    model = on_meta(recipe.model)
    state = _state(model, task.longest)
    kept: dict[int, Tensor] = {}
    by_op: dict[str, float] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    aten = torch.ops.aten
    transforms = {aten._fft_r2c: _transform(True), aten._fft_c2r: _transform(True), aten._fft_c2c: _transform(False)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        _on_cpu(model)
        batch = task.blank(rows)
        counter = FlopCounterMode(display=False, custom_mapping=transforms)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16-mixed")
        with counter, _counting(by_op), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mixed:
            model.train()(batch.inputs)
        own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
        activations = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
        weights = sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])
        parameters = sum(x.numel() for x in model.parameters())
        trained = sum(x.numel() * x.element_size() for x in model.parameters())
    if isinstance(model, LM):
        activations += 8 * min(LOGITS_AT_ONCE, batch.steps * model.vocab)  # float32, and their gradients
    parts = recipe.devices * recipe.nodes if recipe.strategy == "fsdp2" else 1
    total = 3 * (counter.get_total_flops() + sum(by_op.values())) / rows
    return Cost(
        parameters=parameters,
        flops=total,
        by_op={name: 3 * count / rows / total for name, count in by_op.items() if count},
        row=batch.steps // rows,
        rows=rows,
        weights=weights // parts,
        gradients=trained // parts,
        optimiser=2 * trained // parts,
        activations=activations,
        state=state,
    )


def _training(task: Task) -> Task:
    """The task as it is trained on, where it evaluates longer sequences than that."""
    return task.model_copy(update={"eval_length": None}) if "eval_length" in type(task).model_fields else task


def _on_cpu(model: nn.Module) -> None:
    """From the meta device, where autocast does nothing, to a CPU; within FakeTensorMode at no memory either."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:
                    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
                    made[id(x)] = nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like
                tensors[name] = made[id(x)]  # type: ignore[assignment]


def _state(model: nn.Module, tokens: int) -> int | None:
    if not isinstance(model, LM) or not hasattr(model.backbone, "mixers"):
        return None
    return sum(state_growth(layer, tokens)[2] for layer in model.backbone.mixers)


def measure(recipe: Recipe, cost: Cost, steps: int = 3) -> float | str:
    """Seconds of a step of the recipe on this machine, by some steps after a first one; or why they were not taken.

    A step of fewer rows is measured where all of them would take too long, and data that are not there are zeros.
    """
    from longwave.train import loop
    from longwave.train.optim import build_optimizer
    from longwave.train.ranks import Ranks

    fixed = cost.weights + cost.gradients + cost.optimiser
    need = fixed + cost.activations // cost.rows
    if recipe.accelerator == "cpu" or not torch.cuda.is_available():
        if need > 0.8 * memory():
            return f"the model and one row take {gigabytes(need)}, and this machine has {gigabytes(memory())}"
        if cost.flops > AT_ONCE:
            return f"a step of one row is {cost.flops:.1e} operations, which would take this machine more than seconds"
    fits = int((0.8 * memory() - fixed) // max(1, cost.activations // cost.rows))
    rows = max(1, min(cost.rows, fits, int(AT_ONCE // max(1, cost.flops))))
    one = recipe.model_copy(update={"devices": 1, "nodes": 1, "strategy": "auto", "accumulate": 1, "batch": rows})
    with loop.threads(recipe.threads), Ranks(loop.make_fabric(one)) as ranks:
        model = one.model.build()
        objective = ranks.fabric.setup(loop.Objective(model))
        optimizer = ranks.fabric.setup_optimizers(build_optimizer(model, one))
        batches = [ranks.fabric.to_device(batch) for batch in _batches(one, rows, steps + 1)]
        begun = 0.0
        for i, batch in enumerate(batches):
            begun = time.perf_counter() if i == 1 else begun
            loop._step(ranks, objective, optimizer, list(model.parameters()), [batch], one)
    return (time.perf_counter() - begun) / steps * recipe.batch / rows / (recipe.devices * recipe.nodes)


def _batches(recipe: Recipe, rows: int, count: int) -> list[Batch]:
    if all(Path(source).expanduser().exists() for source in recipe.task.sources):
        recipe.task.prepare()
        return [recipe.task.train_batch(rows, 0, index) for index in range(count)]
    return [_training(recipe.task).blank(rows)] * count


def describe(recipe: Recipe, cost: Cost, seconds: float | str | None) -> str:
    """The cost as a page of text.

    Args:
        seconds: of a step, what :func:`measure` returned, or None where it was not asked.
    """
    from longwave.train.monitor import duration

    tokens = recipe.batch * cost.row
    devices = recipe.devices * recipe.nodes
    ops = ", ".join(f"{name} {share:.1%}" for name, share in sorted(cost.by_op.items(), key=lambda item: -item[1]))
    rows = [
        ("parameters", f"{cost.parameters:,}"),
        ("operations a token", f"{cost.flops / cost.row:.3g} in training, a third of it forward; {ops or 'no ops'}"),
        ("a step", f"{recipe.batch:,} rows of {cost.row:,} tokens: {tokens:,} tokens, {recipe.batch * cost.flops:.3g} "
                   "operations"),
        ("all", f"{recipe.steps:,} steps, {recipe.steps * tokens:.3g} tokens, "
                f"{recipe.steps * recipe.batch * cost.flops:.3g} operations"),
        ("memory", f"of a device{f', {devices} of them' if devices > 1 else ''}, {cost.rows:,} rows at a time"),
        ("  weights", gigabytes(cost.weights)),
        ("  gradients", gigabytes(cost.gradients)),
        ("  optimiser", gigabytes(cost.optimiser)),
        ("  activations", gigabytes(cost.activations)),
        ("  together", gigabytes(cost.device)),
    ]  # fmt: skip
    if cost.state is not None:
        rows.append(("state", f"{cost.state:,} bytes of a sequence, after {cost.row:,} tokens"))
    if isinstance(seconds, float):
        total = duration(seconds * recipe.steps)
        rows.append(("time", f"about {total} on this machine, by three steps ({seconds:.3g} s a step), no evaluations"))
    elif seconds is not None:
        rows.append(("time", f"not measured: {seconds}"))
    return "\n".join(f"{name:20}{text}" for name, text in rows)
