"""States on disk, for the weights alone that they were made with."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longwave.models.sashimi import SashimiRows
from longwave.nn import derived
from longwave.nn.module import checksums, whole


class Held(NamedTuple):
    """What generation goes on from: the model's state behind all tokens of each row but the last, that token, and what
    else generation knows of the row's text."""

    state: Any
    last: Tensor  # (B, 1) int64
    seen: Tensor  # (B, V) bool, whether a token is in the text
    length: Tensor  # (B,) int64, of the text, the last token included
    weights: Tensor  # (B, 32) uint8, the fingerprint of the model


FORMAT = "2"  # of the files; it changes when a state of before can no longer be read
PAIRS = ":complex"  # behind the name of a complex tensor, stored as real and imaginary parts


@derived
def fingerprint(model: nn.Module) -> bytes:
    """A SHA-256 over the names, shapes, dtypes and values of all parameters and buffers."""
    return hashlib.sha256(json.dumps(checksums(model)).encode()).digest()


def check_weights(held: Held, model: nn.Module) -> None:
    """Refuse to go on with other weights than those that the state was made with.

    Raises:
        ValueError: where they are others.
    """
    if bool((held.weights.cpu() != torch.frombuffer(bytearray(fingerprint(model)), dtype=torch.uint8)).any()):
        raise ValueError("the state is one of other weights than this model's; read the text again with this one")


def save_state(file: str | Path, state: Any, model: nn.Module, **notes: str) -> None:
    """Write a state that :func:`load_state` reads back, for the same weights alone.

    Args:
        file: a safetensors file; an older one is replaced.
        state: what the model returned.
        model: with whose weights it was made.
        notes: short texts that :func:`load_state` returns too.
    Raises:
        OSError: where it cannot be written.
        ValueError: for a Held of other weights than the model's.
    """
    if isinstance(state, Held):
        check_weights(state, model)
    tensors = {path: whole(t).clone() for path, t in leaves(state)}
    pairs = {path + PAIRS: torch.view_as_real(t) for path, t in tensors.items() if t.is_complex()}
    tensors = {path: t for path, t in tensors.items() if not t.is_complex()} | pairs
    about = {"longwave_state": FORMAT, "model": fingerprint(model).hex(), "notes": json.dumps(notes)}
    try:
        save_file(tensors, file, metadata=about)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def load_state(file: str | Path, model: nn.Module) -> tuple[Any, dict[str, str]]:
    """The state and the notes of a file that :func:`save_state` wrote, on the device of the model.

    Raises:
        ValueError: where the file is no state, of another version, or of other weights than the model's.
    """
    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            for name in [name for name in tensors if name.endswith(PAIRS)]:
                tensors[name.removesuffix(PAIRS)] = torch.view_as_complex(tensors.pop(name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    if about.get("longwave_state") != FORMAT:
        found = about.get("longwave_state")
        what = "holds no state" if found is None else f"has format {found} and this longwave reads {FORMAT}"
        raise ValueError(f"{file} {what}; make it again with --save-state or save_state()")
    if about["model"] != fingerprint(model).hex():
        raise ValueError(f"{file} is the state of other weights than this model's; read the text again with this one")
    template: Any = model.init_state(1)  # type: ignore[operator]
    if rows := {int(row[1]) for name in tensors if (row := re.fullmatch(r"(?:state\.)?rows\.(\d+)\..*", name))}:
        template = SashimiRows((template,) * len(rows))
    if "last" in tensors:
        template = Held(template, *(tensors[name] for name in Held._fields[1:]))
    device = next(model.parameters()).device
    return filled(template, {name: t.to(device) for name, t in tensors.items()}, ""), json.loads(about["notes"])


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and where it stands, such as layers.0.k."""
    if isinstance(state, Tensor):
        yield path, state
    elif state is not None:
        for name, part in zip(getattr(state, "_fields", range(len(state))), state):
            yield from leaves(part, f"{path}.{name}".lstrip("."))


def filled(template: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The tree of ``template`` with the tensors at their places; what a place holds, the file decides."""
    if path in tensors:
        return tensors[path]
    if template is None or isinstance(template, Tensor):
        return None
    names = getattr(template, "_fields", range(len(template)))
    parts = [filled(part, tensors, f"{path}.{name}".lstrip(".")) for name, part in zip(names, template)]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
