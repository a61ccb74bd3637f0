"""Models on disk: a folder with model.safetensors and config.json. Never a pickle."""

import json
import os
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longwave.models.spec import MODEL_SPEC, ClassifierSpec, LMSpec

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from all ranks where it is sharded (then every rank must call)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name, on the CPU and whole."""
    return {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def save(folder: str | Path, model: nn.Module, spec: LMSpec | ClassifierSpec) -> None:
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


def write(folder: Path, tensors: dict[str, Tensor], spec: LMSpec | ClassifierSpec, suffix: str = "") -> None:
    """The two files, under their names and a suffix."""
    save_file(tensors, folder / (WEIGHTS + suffix))
    (folder / (CONFIG + suffix)).write_text(json.dumps(spec.model_dump(), indent=2) + "\n")


def load(folder: str | Path) -> tuple[nn.Module, LMSpec | ClassifierSpec]:
    """The model and its spec that :func:`save` wrote, in evaluation mode.

    Raises:
        ValueError: where a file is missing or corrupt, or the weights do not fit the config.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no saved model: it has no {name}")
    try:
        spec = MODEL_SPEC.validate_json((folder / CONFIG).read_text())
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error
    model = spec.build()
    try:
        load_model(model, str(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not hold the model of {CONFIG}: {error}") from error
    return model.eval(), spec
