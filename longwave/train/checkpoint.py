"""Checkpoints that are whole or not there: written beside, hashed, then renamed into place.

Tensors are stored whole, whatever number of processes wrote them, so any number of processes reads them.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from longwave.models import ModelSpec, weights
from longwave.models.runs import MANIFEST, TRAINER, name_of, saved_steps, sha256, trainer_of
from longwave.models.storage import WEIGHTS, fill, gathered, read_tensors, spec_at, stored_weights, write, write_tensors
from longwave.tokenizer import Tokenizer

OPTIMIZER = "optimizer.safetensors"


@dataclass
class Best:
    """The step whose checkpoint is the best so far, and its metric."""

    step: int
    value: float


def write_text(file: Path, text: str) -> None:
    """Replace a file as a whole: whenever the process is killed, the old or the new text is there."""
    part = file.with_name("." + file.name + ".part")
    try:
        part.write_text(text)
        _sync(part)
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimiser state, whole and on the CPU, for the ranks that keep them. Every rank must call."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(parameter in names for parameter in optimizer.state), "the optimiser holds what is not in the model"
    moments = [
        (f"{name}/{key}", value)
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    ]
    return weights(model, keep), gathered(moments, keep)


def save_checkpoint(
    run: Path,
    step: int,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    spec: ModelSpec,
    tokenizer: Tokenizer | None,
    best: Best | None,
    keep: int,
) -> Path:
    """Write the checkpoint after ``step`` steps, then forget all but the last ``keep`` and the best.

    Checkpoints of ``step`` and beyond, from before a resume, give way to it.

    Raises:
        OSError: where it cannot be written; nothing half-written stays, and no older checkpoint is touched.
    """
    folder = run / "checkpoints" / name_of(step)
    part = folder.with_name("." + folder.name + ".part")
    for rest in folder.parent.glob(".step-*"):  # of a process that was killed
        shutil.rmtree(rest)
    try:
        part.mkdir(parents=True)
        write(part, tensors[0], spec, tokenizer)
        write_tensors(tensors[1], part / OPTIMIZER)
        trainer = {"step": step, "best": None if best is None else vars(best)}
        (part / TRAINER).write_text(json.dumps(trainer) + "\n")
        manifest = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in part.iterdir():
            _sync(file)
        _sync(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for late in saved_steps(run):
        if late >= step:
            _remove(run, late)
    os.rename(part, folder)
    _sync(folder.parent)
    for old in saved_steps(run)[:-keep]:
        if best is None or old != best.step:
            _remove(run, old)
    return folder


def _remove(run: Path, step: int) -> None:
    """Rename first: a process killed while it deletes leaves nothing that looks like a checkpoint."""
    folder = run / "checkpoints" / name_of(step)
    shutil.rmtree(folder.rename(folder.with_name("." + folder.name + ".old")))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Best | None]:
    """Fill model and optimiser, sharded or not, from a checkpoint; returns the step to go on from, and the best.

    Where the checkpoint of the best is gone, none is the best.
    """
    fill(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS, _like)
    parameters = dict(model.named_parameters())
    for key, value in read_tensors(folder / OPTIMIZER).items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = _like(value, parameter) if value.ndim else value
    trainer = trainer_of(folder)
    best = None if trainer["best"] is None else Best(**trainer["best"])
    return trainer["step"], best if best is not None and folder.with_name(name_of(best.step)).is_dir() else None


def start_with(model: nn.Module, start: str, before: str | None) -> str:
    """Fill a model, sharded or not, with the weights of another.

    Args:
        start: a run, a checkpoint or a saved model.
        before: what an earlier call returned for this run, or None.
    Returns:
        the SHA-256 of the weights.
    Raises:
        ValueError: where they are those of another model, or no longer those of before.
    """
    folder, _ = spec_at(start)
    digest = sha256(folder / WEIGHTS)
    if before not in (None, digest):
        raise ValueError(f"the weights of {start} are not what they were when the run began; start another by --out")
    fill(model, stored_weights(folder), folder / WEIGHTS, _like)
    return digest


def _like(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
