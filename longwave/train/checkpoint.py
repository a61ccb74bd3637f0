"""Checkpoints that are whole or not there: written beside, hashed, then renamed into place.

A checkpoint is the folder of a saved model (model.safetensors, config.json) with optimizer.safetensors, trainer.json
(step and best result) and manifest.json (size and SHA-256 of each file). Tensors are stored whole, whatever number of
processes wrote them, so any number of processes reads them.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longwave.models import ModelSpec, weights
from longwave.models.storage import WEIGHTS, fill, read_tensors, whole, write, write_tensors

OPTIMIZER, TRAINER, MANIFEST = "optimizer.safetensors", "trainer.json", "manifest.json"


@dataclass
class Best:
    """The step whose checkpoint is the best so far, and its metric."""

    step: int
    value: float


def name_of(step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named as :func:`name_of` names checkpoints."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The inverse of :func:`name_of`."""
    return int(checkpoint.name.removeprefix("step-"))


def run_of(path: Path) -> Path:
    """The run of a checkpoint; a run itself."""
    return path.parent.parent if is_checkpoint(path) else path


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run, ascending. Unfinished ones have another name and do not count."""
    return sorted(step_of(path) for path in (run / "checkpoints").glob("step-*") if is_checkpoint(path))


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


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimiser state, whole and on the CPU. Every rank must call."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(parameter in names for parameter in optimizer.state), "the optimiser holds what is not in the model"
    moments = {
        f"{name}/{key}": whole(value)
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return weights(model), moments


def save_checkpoint(
    run: Path,
    step: int,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    spec: ModelSpec,
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
        write(part, tensors[0], spec)
        write_tensors(tensors[1], part / OPTIMIZER)
        trainer = {"step": step, "best": None if best is None else vars(best)}
        (part / TRAINER).write_text(json.dumps(trainer) + "\n")
        manifest = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(part.iterdir())}
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


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ValueError: naming the file that is missing, truncated or corrupt, and the checkpoint before it.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(_broken(folder / MANIFEST, "is missing or corrupt")) from None
    for name, (size, digest) in manifest.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(_broken(file, "is missing"))
        if file.stat().st_size != size:
            raise ValueError(_broken(file, f"has {file.stat().st_size} bytes instead of {size}"))
        if _sha256(file) != digest:
            raise ValueError(_broken(file, "is corrupt: its SHA-256 differs from the manifest"))


def find(path: Path) -> Path:
    """The checkpoint to take: the folder itself, or the latest of a run; checked against its manifest.

    Raises:
        ValueError: where there is none, or it is broken.
    """
    if is_checkpoint(path):
        if not path.is_dir():
            raise ValueError(f"there is no checkpoint {path}{_choice(path.parent.parent)}")
        folder = path
    else:
        if not path.is_dir():
            raise ValueError(f"there is no run {path}")
        steps = saved_steps(path)
        if not steps:
            raise ValueError(f"run {path} has no checkpoint yet")
        folder = path / "checkpoints" / name_of(steps[-1])
    verify(folder)
    return folder


def find_best(path: Path) -> Path:
    """As :func:`find`, but of a run the best checkpoint."""
    latest = find(path)
    best = _trainer(latest)["best"]
    if latest == path or best is None or not (folder := latest.with_name(name_of(best["step"]))).is_dir():
        return latest
    return find(folder)


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
    trainer = _trainer(folder)
    best = None if trainer["best"] is None else Best(**trainer["best"])
    return trainer["step"], best if best is not None and folder.with_name(name_of(best.step)).is_dir() else None


def _like(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _trainer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER).read_text())


def _broken(file: Path, what: str) -> str:
    return f"{file} {what}{_choice(file.parent.parent.parent, step_of(file.parent))}"


def _choice(run: Path, below: int | None = None) -> str:
    """'; the one before it is ...' for a checkpoint that cannot be used."""
    steps = [step for step in saved_steps(run) if below is None or step < below]
    if not steps:
        return "; there is no other checkpoint before it"
    return f"; the one before it is {run / 'checkpoints' / name_of(steps[-1])}: name it to go on from there"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
