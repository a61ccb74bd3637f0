"""Checkpoints that are whole or not there: written beside, hashed, then renamed into place.

A checkpoint is the folder of a saved model (model.safetensors, config.json) with optimizer.safetensors, trainer.json
(step and best result) and manifest.json (size and SHA-256 of each file). Tensors are stored whole, whatever number of
processes wrote them, so any number of processes reads them.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from longwave.models import ClassifierSpec, LMSpec, weights
from longwave.models.storage import WEIGHTS, whole, write

OPTIMIZER, TRAINER, MANIFEST = "optimizer.safetensors", "trainer.json", "manifest.json"


@dataclass
class Best:
    """The step whose checkpoint is the best so far, and its metric."""

    step: int
    value: float


def name_of(step: int) -> str:
    """Folder of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run, ascending. Unfinished ones have another name and do not count."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimiser state, whole and on the CPU. Every rank must call."""
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = whole(value)
    return weights(model), moments


def save_checkpoint(
    run: Path,
    step: int,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    spec: LMSpec | ClassifierSpec,
    best: Best | None,
    keep: int,
) -> Path:
    """Write the checkpoint after ``step`` steps, then forget all but the last ``keep`` and the best.

    Raises:
        OSError: where it cannot be written; nothing half-written stays, and no older checkpoint is touched.
    """
    folder = run / "checkpoints" / name_of(step)
    part = folder.with_name("." + folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part, tensors[0], spec)
        save_file(tensors[1], part / OPTIMIZER)
        trainer = {"step": step, "best": None if best is None else vars(best)}
        (part / TRAINER).write_text(json.dumps(trainer) + "\n")
        manifest = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in part.iterdir():
            _sync(file)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run to the same step, from before a resume
    os.rename(part, folder)
    _sync(folder.parent)
    for old in saved_steps(run)[:-keep]:
        if best is None or old != best.step:
            shutil.rmtree(run / "checkpoints" / name_of(old))
    return folder


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
    if path.name.startswith("step-"):
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
    if latest == path or best is None:
        return latest
    return find(latest.with_name(name_of(best["step"])))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Best | None]:
    """Fill model and optimiser, sharded or not, from a checkpoint; returns the step to go on from, and the best."""
    stored, moments = load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    if set(stored) != set(own):
        odd = sorted(set(stored) ^ set(own))[0]
        raise ValueError(f"{folder / WEIGHTS} is of another model: {odd!r} is in one of them only")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != stored[name].shape:
                raise ValueError(
                    f"{folder / WEIGHTS} is of another model: {name} has shape {tuple(stored[name].shape)} there and "
                    f"{tuple(tensor.shape)} here"
                )
            tensor.copy_(_like(stored[name], tensor))
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = _like(value, parameter) if value.ndim else value
    trainer = _trainer(folder)
    return trainer["step"], None if trainer["best"] is None else Best(**trainer["best"])


def _like(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _trainer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER).read_text())


def _broken(file: Path, what: str) -> str:
    return f"{file} {what}{_choice(file.parent.parent.parent, int(file.parent.name.removeprefix('step-')))}"


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
