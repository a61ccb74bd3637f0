"""Files of published models: their weights, mapped from the file rather than read, and what lies beside them.

Nothing in a file is executed: pickles are opened by ``torch.load(weights_only=True)`` or not at all.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longwave.errors import clipped, few, shown
from longwave.machine import required
from longwave.official.source import State
from longwave.tokenizer import FILE as TOKENIZER

NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
CONTAINERS = ("state", "state_dict", "model", "module")  # of trainers: Composer, Lightning, fairseq, DeepSpeed
OPTIONS = ("hyper_parameters", "args", "config")
WRAPPED = r"^module\.|_orig_mod\."  # in names, where a model was saved within torch's DDP, or compiled
HUB = r"[\w.-]+/[\w.-]+"


class Published(NamedTuple):
    """A model as it was published.

    Attributes:
        path: of its weights, for messages.
        state: its tensors by their names; those of a mapped file take no memory until they are used.
        config: of config.json, or what the trainer put beside the weights; {} where there is nothing.
        tokenizer: its tokenizer.json, or None.
    """

    path: Path
    state: State
    config: Mapping[str, Any]
    tokenizer: Path | None


def open_published(path: str | Path) -> Published:
    """The weights and options of a file, of a folder, or of a repository of the Hugging Face Hub.

    Args:
        path: weights (.safetensors, .pt, .pth, .ckpt, .bin), a shard index (.index.json), a folder with them, or
            OWNER/NAME, which is downloaded or taken from the Hub's cache.
    Raises:
        ValueError: where there are none or several, a file is truncated or a shard missing, or a pickle needs code.
    """
    found = Path(path)
    if not found.exists():
        if not re.fullmatch(HUB, str(path)):
            raise ValueError(f"there is no {path}: name a file of weights, a folder with one, or OWNER/NAME on the Hub")
        found = _from_hub(str(path))
    file = _weights_in(found) if found.is_dir() else found
    if re.search(r"-\d+-of-\d+\.\w+$", file.name):
        raise ValueError(f"{file} is one of several; name their folder, which has them all and a {NAMES[0]}")
    config_file, tokenizer = file.with_name("config.json"), file.with_name(TOKENIZER)
    config = _json(config_file) if config_file.is_file() else {}
    state, beside = _shards(file) if file.name.endswith(".index.json") else _tensors(file)
    if not state:
        raise ValueError(f"{file} holds no tensors")
    state = {re.sub(WRAPPED, "", key): tensor for key, tensor in state.items()}
    return Published(file, state, config or beside, tokenizer if tokenizer.is_file() else None)


def _from_hub(name: str) -> Path:
    """The folder of a repository."""
    hub = required("huggingface_hub", "hf")
    for endings in (ENDINGS[:1], ENDINGS[1:]):  # many repositories have the same weights in both
        try:
            folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", *(f"*{end}" for end in endings)]))
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"there is no file {name}, nor a repository that the Hub or its cache gives: {why}"
            ) from None
        if any(file.suffix in endings for file in folder.iterdir()):
            break
    return folder


def _weights_in(folder: Path) -> Path:
    """The file of weights, or the index of several."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    if len(files) != 1:
        what = f"several files of weights, {few(file.name for file in files)}" if files else "no file of weights"
        raise ValueError(f"{folder} has {what}; name one file")
    return files[0]


def _json(file: Path) -> Any:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found


def _shards(index: Path) -> tuple[State, Mapping[str, Any]]:
    """What several files hold together, by an index of names."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map, which says what tensor is in what file")
    files = {name: index.with_name(Path(name).name) for name in sorted(set(places.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise ValueError(f"{index} names {len(files)} files, of which there is no {few(missing)}")
    parts = {name: _tensors(file)[0] for name, file in files.items()}
    lost = [key for key, name in places.items() if key not in parts[name]]
    if lost:
        raise ValueError(f"{files[places[lost[0]]]} has no {few(lost)}, which {index.name} says it has")
    return {key: parts[name][key] for key, name in places.items()}, {}


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stored:
        return stored.read(40)


def _tensors(file: Path) -> tuple[State, Mapping[str, Any]]:
    """Of one file its tensors, and what options lie beside them."""
    if _beginning(file).startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} only says where the weights are: fetch them by git lfs pull")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}, {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    whole = _unpickled(file)
    if not isinstance(whole, Mapping):
        raise ValueError(f"{file} holds {type(whole).__name__} and not tensors by name")
    state: Any = whole
    for name in CONTAINERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
    beside: Any = next(
        (whole[name] for name in OPTIONS if isinstance(whole.get(name), Mapping | argparse.Namespace)), {}
    )
    options = vars(beside) if isinstance(beside, argparse.Namespace) else beside
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, options


def _unpickled(file: Path) -> Any:
    """What a file of torch.save holds: tensors, numbers, texts and containers of them, and nothing that runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:  # torch's own words advise to run it
            raise ValueError(f"{file} is no file of torch.save; it begins with {shown(_beginning(file))}") from None
        raise ValueError(
            f"{file} needs code to be run ({asked[1]}), which longwave does not do; where you trust it, save its "
            "tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        why = clipped(str(error) or "it is empty")
        raise ValueError(f"{file} is truncated or no file of torch.save: {why}") from None
