"""Models on disk: a folder with model.safetensors, config.json and maybe tokenizer.json. Never a pickle."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longwave.models.runs import model_at
from longwave.models.size import on_meta
from longwave.models.spec import AnyModel, ModelSpec
from longwave.nn import WeightOnlyLinear, weight_only
from longwave.nn.module import whole
from longwave.spec import explain
from longwave.tokenizer import FILE as TOKENIZER
from longwave.tokenizer import Tokenizer, find, plain_bytes

WEIGHTS, CONFIG, ORIGIN = "model.safetensors", "config.json", "origin.json"
TYPE = {"model_type": "longwave"}  # by which ``transformers`` knows the folder


def stored_spec(config: Any) -> Any:
    """The spec that stands in a config.json, of :func:`save` or of ``longwave.hf``."""
    if not isinstance(config, dict):
        return config
    return config.get("spec", {name: value for name, value in config.items() if name not in TYPE})


def _own(config: Any) -> Any:
    if isinstance(config, dict) and config.get("model_type", "longwave") != "longwave":
        raise ValueError(f"it is of model_type {config['model_type']!r}: longwave import makes an ordinary model of it")
    return stored_spec(config)


STORED: TypeAdapter[AnyModel] = TypeAdapter(Annotated[ModelSpec, BeforeValidator(_own)])


def read_spec(config: bytes | dict[str, Any], what: str) -> ModelSpec:
    """The spec of a config.json, or of what it holds.

    Raises:
        ValueError: where it describes no model, naming ``what`` and the field.
    """
    try:
        return STORED.validate_json(config) if isinstance(config, bytes) else STORED.validate_python(config)
    except ValidationError as error:
        raise ValueError(f"{what} does not describe a model: {explain(error, 'model')}") from error


def weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name, on the CPU and whole; see :func:`gathered`."""
    return gathered([*model.named_parameters(), *model.named_buffers()], keep)


def gathered(named: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """The tensors, on the CPU and whole; where they are sharded, every rank must call.

    Args:
        keep: without it nothing is: a rank that only helps another to gather holds one tensor at a time.
    """
    held = {}
    for name, tensor in named:
        value = whole(tensor)
        if keep:
            held[name] = value
    return held


def save(folder: str | Path, model: nn.Module, spec: ModelSpec, tokenizer: Tokenizer | None = None) -> None:
    """Write a model that :func:`load` reads back; an older one in the folder is replaced file by file, never half.

    Args:
        folder: made where it is not there.
        model: what ``spec.build()`` made.
        spec: its description.
        tokenizer: what made its ids, see :func:`tokenizer`; None leaves the one that is there.
    Raises:
        ValueError: where the weights are kept in fewer bits: the float model is what is saved; or the tokenizer has
            more ids than the model.
    """
    for module in model.modules():
        if isinstance(module, WeightOnlyLinear):
            raise ValueError(f"weights kept in {module.form} are not saved: save the float model, "
                             f"and load it with weights={module.form!r}")  # fmt: skip
    save_tensors(Path(folder), weights(model), spec, tokenizer)


def save_tensors(folder: Path, tensors: dict[str, Tensor], spec: ModelSpec, tokenizer: Tokenizer | None = None) -> None:
    """:func:`save` of tensors by the names that :func:`weights` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, tensors, spec, tokenizer, suffix=".part")
    for name in (WEIGHTS, CONFIG, *([] if tokenizer is None else [TOKENIZER])):
        os.replace(folder / (name + ".part"), folder / name)


def write(
    folder: Path, tensors: dict[str, Tensor], spec: ModelSpec, tokenizer: Tokenizer | None, suffix: str = ""
) -> None:
    """The files, under their names and a suffix.

    Raises:
        OSError: where they cannot be written.
        ValueError: where the tokenizer has more ids than the model.
    """
    if tokenizer is not None:
        tokenizer.check_fits(getattr(spec, "vocab", None), "the model")
        (folder / (TOKENIZER + suffix)).write_text(tokenizer.text, encoding="utf-8")
    write_tensors(tensors, folder / (WEIGHTS + suffix))
    (folder / (CONFIG + suffix)).write_text(json.dumps(TYPE | spec.model_dump(), indent=2) + "\n")


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


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's folder, as :func:`weights` names them."""
    return {name.removeprefix("model."): t for name, t in read_tensors(folder / WEIGHTS).items()}  # of longwave.hf


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
    own = _fitting(model, stored, file)
    for name, tensor in own.items():
        tensor.copy_(like(stored[name], tensor))


def _fitting(model: nn.Module, stored: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of the model that the stored ones are for, by name; else ValueError."""
    own = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if t.numel()}
    stored = {name: t for name, t in stored.items() if t.numel()}  # what holds nothing need not be there
    for name in [*stored, *own]:
        if name not in own or name not in stored:
            here, there = ("the file", "the config") if name in stored else ("the config", "the file")
            raise ValueError(f"{file} is of another model: {name} is in {here} but not in {there}")
        if own[name].shape != stored[name].shape:
            raise ValueError(
                f"{file} is of another model: {name} has shape {tuple(stored[name].shape)} there, and "
                f"{tuple(own[name].shape)} by the config"
            )
    return own


@torch.no_grad()
def _fill_weight_only(model: nn.Module, form: str, stored: dict[str, Tensor], file: Path) -> nn.Module:
    """A model from the meta device with its weights kept in fewer bits: rounded one by one, as they are read."""
    firsts = {id(tensor): name for name, tensor in _fitting(model, stored, file).items()}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {name: firsts[id(t)] for name, t in every if t.numel()}  # those that are tied are stored once
    model = weight_only(model, form).to_empty(device="cpu")
    for name, first in places.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if own == "weight" and isinstance(module, WeightOnlyLinear):
            module.store(stored[first])
        else:
            getattr(module, own).copy_(stored[first])
    return model


def spec_at(path: str | Path) -> tuple[Path, ModelSpec]:
    """The folder of a model, by a path as of :func:`load`, and its spec.

    Raises:
        ValueError: where a file is missing, differs from the checkpoint's manifest or describes no model.
    """
    folder = model_at(Path(path))
    config = folder / CONFIG
    spec = read_spec(config.read_bytes(), str(config)) if config.is_file() else None
    if spec is None or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} is no run and no saved model: it has no {CONFIG if spec is None else WEIGHTS}")
    return folder, spec


def load(path: str | Path, *, weights: str | None = None) -> tuple[nn.Module, ModelSpec]:
    """A model and its spec, in evaluation mode and in the dtypes it was saved in.

    Args:
        path: a folder that :func:`save` or ``longwave.hf`` wrote, a run (its best checkpoint is taken) or one of its
            checkpoints.
        weights: "int8" or "bf16" keeps the weights of its linear maps in so many bits (see
            :func:`longwave.nn.weight_only`); the float model never exists whole.
    Raises:
        ValueError: where a file is missing or corrupt or differs from the checkpoint's manifest, the weights do not
            fit the config, or there is no such form of weights.
    """
    folder, spec = spec_at(path)
    ghost = on_meta(spec, copies=1 if weights is None else None)
    model = spec.build() if weights is None else ghost
    stored = stored_weights(folder)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    if weights is not None:
        return _fill_weight_only(model, weights, stored, folder / WEIGHTS), spec
    fill(model, stored, folder / WEIGHTS)
    return model.eval(), spec


def origin(path: str | Path) -> dict[str, str]:
    """What an imported model's folder says of where it came from: its format, the tokenizer it expects."""
    file = model_at(Path(path), check=False) / ORIGIN
    return json.loads(file.read_bytes()) if file.is_file() else {}


def tokenizer(path: str | Path) -> Tokenizer | None:
    """What made the ids that a model was trained on, from the tokenizer.json in its folder.

    Args:
        path: as of :func:`load`; or any other folder with that file.
    Returns:
        None where it is not known; bytes for a model of 256 ids without the file, as once there was none.
    Raises:
        ValueError: where the file is none, or has more ids than the model.
    """
    folder = model_at(Path(path), check=False)
    config = folder / CONFIG
    about = stored_spec(json.loads(config.read_bytes())) if config.is_file() else {}
    if about.get("vocab") == 256 and not (folder / TOKENIZER).is_file():
        return plain_bytes()
    if about and not (folder / TOKENIZER).is_file():
        return None
    found = find(folder)
    if "vocab" in about:  # else it is no model of ours
        found.check_fits(about["vocab"], str(path))
    return found
