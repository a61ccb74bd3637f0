"""What an op says of its tensors, once: their axes, their kinds of numbers, and what comes out of them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "real": "floating point",
    "complex": "complex",
    "any": "floating point or complex",
    "wide": "floating point",
    "stored": "floating point or int8",
    "bool": "bool",
    "whole": "int64",
}


class Declaration:
    """The tensors that go into an op, and those that come out.

    Args:
        op: name, for errors.
        arguments: the axes of every tensor argument and, behind a colon, its kind: real, complex, any, stored (real or
            int8), wide (real, and float64 where it likes), bool or whole; real where nothing is said. ``"B K-1 C"``
            names the axes; a letter that occurs twice has one size, which is at least 1, or 0 where it is marked:
            ``"C M?"``. ``|`` stands between alternatives, ``...`` for any axes.
        returns: the same for the results, with an axis's size as in ``"S*M"`` and the dtype behind the colon, as the
            dtypes and arguments that it is promoted from: ``"B C N : float32+u+A"``, or ``"B C length : c.real"``.
    """

    def __init__(self, op: str, arguments: Mapping[str, str], returns: Mapping[str, str]):
        self.op = op
        self.arguments: dict[str, tuple[list[list[str]], str]] = {}
        for name, text in arguments.items():
            layouts, _, kind = text.partition(":")
            self.arguments[name] = [axes.split() for axes in layouts.split("|")], kind.strip() or "real"
        self.returns = {name: (axes.split(), dtype.strip()) for name, (axes, _, dtype) in _partitioned(returns)}

    def check(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], torch.device]:
        """Size of every axis, and the device, of tensors that are as declared; else ValueError."""
        sizes: dict[str, Any] = {}
        owners: dict[str, str] = {}
        first, device = "", torch.device("cpu")
        for name, (layouts, kind) in self.arguments.items():
            tensor = given[name]
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{self.op}: {name} must be a tensor; got {type(tensor).__name__}")
            if not _is_of(kind, tensor.dtype):
                apart = tensor.is_complex() and tensor.dtype != torch.complex32
                fix = "take its real and imaginary part apart" if apart else "convert it"
                raise ValueError(f"{self.op}: {name} must be {KINDS[kind]}; got {tensor.dtype}; {fix}")
            if first and tensor.device != device:
                raise ValueError(f"{self.op}: {name} is on {tensor.device} and {first} on {device}; move one of them")
            first, device = first or name, tensor.device
            shape = tuple(tensor.shape)
            axes = next((axes for axes in layouts if _fits(axes, shape)), None)
            if axes is None:
                raise ValueError(f"{self.op}: {name} must be {_written(layouts)}; got shape {shape}")
            if axes[0] == "...":
                front = len(shape) - len(axes) + 1
                if 0 in shape[:front]:
                    raise ValueError(f"{self.op}: {name} has shape {shape}, a size = 0; at least 1 is needed")
                sizes["..."], axes, shape = shape[:front], axes[1:], shape[front:]
            for axis, size in zip(axes, shape):
                letter, _, less = axis.rstrip("?").partition("-")
                size += int(less or 0)
                if size == 0 and not axis.endswith("?"):
                    raise ValueError(f"{self.op}: {name} has {letter} = 0; at least 1 is needed")
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(
                        f"{self.op}: {name} must be {_written(layouts)} with {letter} = {sizes[letter]} as in "
                        f"{owners[letter]}; got shape {tuple(tensor.shape)}"
                    )
                owners.setdefault(letter, name)
        return sizes, device

    def samples(self, device: torch.device | str) -> dict[str, Tensor]:
        """A small tensor for each argument, in float32 or what goes with it."""
        dtypes = {"complex": torch.complex64, "bool": torch.bool, "whole": torch.int64}
        samples = {}
        for name, (layouts, kind) in self.arguments.items():
            sizes = [axis.partition("-") for axis in layouts[0] if axis != "..."]
            shape = [int(axis) if axis.isdigit() else 4 - int(less or 0) for axis, _, less in sizes]
            samples[name] = torch.ones(shape, dtype=dtypes.get(kind, torch.float32), device=device)
        return samples

    def results(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Tensors like those that the op returns, their contents undefined."""
        sizes, device = self.check(given)
        sizes = {**given, **sizes}
        return [
            torch.empty([n for axis in axes for n in _sizes(axis, sizes)], dtype=_dtype(dtype, given), device=device)
            for axes, dtype in self.returns.values()
        ]


def _partitioned(texts: Mapping[str, str]) -> list[tuple[str, tuple[str, str, str]]]:
    return [(name, text.partition(":")) for name, text in texts.items()]


def _is_of(kind: str, dtype: torch.dtype) -> bool:
    if dtype == torch.complex32:  # half of torch cannot compute in it
        return False
    if kind in ("bool", "whole"):
        return dtype == (torch.bool if kind == "bool" else torch.int64)
    if kind == "stored":
        return dtype.is_floating_point or dtype == torch.int8
    return (dtype.is_complex and kind in ("complex", "any")) or (dtype.is_floating_point and kind != "complex")


def _fits(axes: list[str], shape: tuple) -> bool:
    if axes[0] == "...":
        return len(shape) >= len(axes) - 1
    return len(shape) == len(axes) and all(not axis.isdigit() or n == int(axis) for axis, n in zip(axes, shape))


def _written(layouts: list[list[str]]) -> str:
    return " or ".join(f"({', '.join(axis.rstrip('?') for axis in axes)})" for axes in layouts)


def _sizes(axis: str, sizes: Mapping[str, Any]) -> Sequence[int]:
    """The sizes that ``B``, ``K-1``, ``S*M`` or ``...`` stand for."""
    if axis == "...":
        return sizes["..."]
    parts = (factor.partition("-") for factor in axis.split("*"))
    return [math.prod(int(n) if n.isdigit() else sizes[n] - int(less or 0) for n, _, less in parts)]


def _dtype(text: str, given: Mapping[str, Any]) -> torch.dtype:
    """What the dtypes in ``float32+u+A`` promote to, without those of arguments that are not there."""
    found = []
    for term in text.split("+"):
        name, _, real = term.partition(".")
        dtype = getattr(given[name], "dtype", None) if name in given else getattr(torch, name)
        if dtype is not None:
            found.append(dtype.to_real() if real else dtype)
    return functools.reduce(torch.promote_types, found)
