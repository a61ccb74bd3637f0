"""A run on disk as a reader meets it: its checkpoints, their manifests, and which of them to take.

A checkpoint is the folder of a saved model (model.safetensors, config.json, maybe tokenizer.json) with
optimizer.safetensors, trainer.json (step and best result) and manifest.json (size and SHA-256 of each file). It has its
name only when it is whole.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"  # of a run: its recipe
RECORD = "run.json"  # of a run: the command, the commits, the machine, how many parameters, the hash of its start
TRAINER, MANIFEST = "trainer.json", "manifest.json"


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


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ValueError: naming the file that is missing, truncated or corrupt, and the checkpoint before it.
    """
    try:
        manifest = {
            name: (size, digest) for name, (size, digest) in json.loads((folder / MANIFEST).read_text()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError):  # the last two: JSON of another shape
        raise ValueError(_broken(folder / MANIFEST, "is missing or corrupt")) from None
    for name, (size, digest) in manifest.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(_broken(file, "is missing"))
        if file.stat().st_size != size:
            raise ValueError(_broken(file, f"has {file.stat().st_size} bytes instead of {size}"))
        if sha256(file) != digest:
            raise ValueError(_broken(file, "is corrupt: its SHA-256 differs from the manifest"))


def find(path: Path, check: bool = True) -> Path:
    """The checkpoint to take: the folder itself, or the latest of a run.

    Args:
        path: of either.
        check: against its manifest, which takes the time to read all of it.
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
    if check:
        verify(folder)
    return folder


def find_best(path: Path, check: bool = True) -> Path:
    """As :func:`find`, but of a run the best checkpoint."""
    latest = find(path, check)
    best = trainer_of(latest)["best"]
    if latest == path or best is None or not (folder := latest.with_name(name_of(best["step"]))).is_dir():
        return latest
    return find(folder, check)


def model_at(path: Path, check: bool = True) -> Path:
    """The folder of the model that a path stands for: of a run its best checkpoint, else the path itself.

    Raises:
        ValueError: where a run has no checkpoint, or files differ from their manifest.
    """
    if is_checkpoint(path) or (path / CONFIG).is_file():
        return find_best(path, check)
    if check and (path / MANIFEST).is_file():  # a checkpoint under another name
        verify(path)
    return path


def trainer_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint knows of its training: ``step`` and ``best``, itself a step and a value, or None."""
    return json.loads((folder / TRAINER).read_text())


def read_record(run: Path) -> dict[str, Any]:
    """What a run says of itself, or {} before it has begun."""
    return json.loads((run / RECORD).read_text()) if (run / RECORD).is_file() else {}


def _broken(file: Path, what: str) -> str:
    folder = file.parent
    return f"{file} {what}{_choice(run_of(folder), step_of(folder)) if is_checkpoint(folder) else ''}"


def _choice(run: Path, below: int | None = None) -> str:
    """'; the one before it is ...' for a checkpoint that cannot be used."""
    steps = [step for step in saved_steps(run) if below is None or step < below]
    if not steps:
        return "; there is no other checkpoint before it"
    return f"; the one before it is {run / 'checkpoints' / name_of(steps[-1])}: name it to go on from there"


def sha256(file: Path) -> str:
    """In hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
