"""Models on disk: a folder with model.safetensors and config.json. Never a pickle."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longwave.models.runs import model_at
from longwave.models.size import on_meta
from longwave.models.spec import MODEL_SPEC, ModelSpec
from longwave.spec import explain

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from all ranks where it is sharded (then every rank must call)."""
    tensor = tensor.detach()
    sharded: Any = tensor  # a DTensor, known by its method: torch.distributed.tensor takes long to import
    return (sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name, on the CPU and whole."""
    return {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def save(folder: str | Path, model: nn.Module, spec: ModelSpec) -> None:
    """Write a model that :func:`load` reads back; an older one in the folder is replaced file by file, never half.

    Args:
        folder: made where it is not there.
        model: what ``spec.build()`` made.
        spec: its description.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, weights(model), spec, suffix=".part")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / (name + ".part"), folder / name)


def write(folder: Path, tensors: dict[str, Tensor], spec: ModelSpec, suffix: str = "") -> None:
    """The two files, under their names and a suffix.

    Raises:
        OSError: where they cannot be written.
    """
    write_tensors(tensors, folder / (WEIGHTS + suffix))
    (folder / (CONFIG + suffix)).write_text(json.dumps(spec.model_dump(), indent=2) + "\n")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file.

    Raises:
        OSError: where it cannot be written.
    """
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: where it is none, naming it.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


@torch.no_grad()
def fill(
    model: nn.Module,
    stored: dict[str, Tensor],
    file: Path,
    like: Callable[[Tensor, Tensor], Tensor] = lambda value, _: value,
) -> None:
    """Copy stored tensors, as :func:`weights` names them, into a model.

    Args:
        like: (whole tensor, own tensor) -> what to copy into the latter, where that is sharded.
    Raises:
        ValueError: where they are those of another model, naming ``file`` and the first tensor that does not fit.
    """
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for name in [*stored, *own]:
        if name not in own or name not in stored:
            here, there = ("the file", "the config") if name in stored else ("the config", "the file")
            raise ValueError(f"{file} is of another model: {name} is in {here} but not in {there}")
        if own[name].shape != stored[name].shape:
            raise ValueError(
                f"{file} is of another model: {name} has shape {tuple(stored[name].shape)} there, and "
                f"{tuple(own[name].shape)} by the config"
            )
    for name, tensor in own.items():
        tensor.copy_(like(stored[name], tensor))


def load(path: str | Path) -> tuple[nn.Module, ModelSpec]:
    """A model and its spec, in evaluation mode and in the dtypes it was saved in.

    Args:
        path: a folder that :func:`save` wrote, a run (its best checkpoint is taken) or one of its checkpoints.
    Raises:
        ValueError: where a file is missing or corrupt or differs from the checkpoint's manifest, or the weights do not
            fit the config.
    """
    folder = model_at(Path(path))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no run and no saved model: it has no {name}")
    try:
        spec = MODEL_SPEC.validate_json((folder / CONFIG).read_bytes())
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {explain(error, 'model')}") from error
    on_meta(spec, copies=1)
    model, stored = spec.build(), read_tensors(folder / WEIGHTS)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    fill(model, stored, folder / WEIGHTS)
    return model.eval(), spec
