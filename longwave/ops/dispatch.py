"""One rule for choosing an implementation: the first backend that has nothing against these inputs."""

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

OPS: dict[str, "Op"] = {}  # every op by name; the op contract tests walk this table

WhyNot = Callable[..., str | None]

_FORCED = os.environ.get("LONGWAVE_BACKEND", "auto")
_HAS_NUMBA = importlib.util.find_spec("numba") is not None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, every op that has the backend takes it, as LONGWAVE_BACKEND does for a whole process."""
    global _FORCED
    before, _FORCED = _FORCED, name
    try:
        yield
    finally:
        _FORCED = before


def without_autocast(device: torch.device | None) -> contextlib.AbstractContextManager:
    """Within it autocast changes no dtype on the device: powers, filters and scans in bfloat16 would be noise."""
    if device is None or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Op:
    """A pure tensor function: a reference that defines it, and faster twins with the same signature.

    Used as a decorator on the reference. ``shapes`` names the axes of each tensor argument; a letter that occurs
    twice must have one size, so every backend may rely on the shapes and the caller gets his own numbers in the error:

        @Op(u="B L C", k="C K")
        def causal_conv(u, k): ...

    Calling the op takes the first backend whose ``why_not`` is None, in the order of registration, latest first, and
    the reference last. ``backend="name"`` takes that one, or raises ValueError with the reason why it cannot run.
    The environment variable LONGWAVE_BACKEND names a backend for every op that has it. An op computes in the dtypes of
    its inputs, or wider ones: autocast does not reach into it.
    """

    __name__: str

    def __init__(self, **shapes: str):
        self.shapes = {
            argument: [layout.split() for layout in layouts.split("|")] for argument, layouts in shapes.items()
        }
        self.backends: dict[str, tuple[Callable[..., Any], WhyNot]] = {}
        self.arguments: list[str] = []

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        if not self.backends:
            return self._define(args[0])
        with without_autocast(self._check(args, kwargs)):
            return self._run(backend, args, kwargs)

    def _run(self, backend: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if backend == "auto" and _FORCED in self.backends:
            backend = _FORCED
        if backend == "auto":
            run = next(run for run, why_not in self.backends.values() if why_not(*args, **kwargs) is None)
            return run(*args, **kwargs)
        if backend not in self.backends:
            raise ValueError(f"{self.__name__} has no backend {backend!r}; it has {', '.join(self.backends)}")
        run, why_not = self.backends[backend]
        if reason := why_not(*args, **kwargs):
            raise ValueError(f"{self.__name__}: backend {backend!r} cannot run this call: {reason}")
        return run(*args, **kwargs)

    def backend(self, name: str, why_not: WhyNot = lambda *args, **kwargs: None) -> Callable:
        """Register a twin. ``why_not(*inputs)`` returns the reason why it cannot run them, or None."""

        def register(run: Callable) -> Callable:
            self.backends = {name: (run, why_not), **self.backends}
            return run

        return register

    def why_not(self, name: str, *args: Any, **kwargs: Any) -> str | None:
        """The reason why backend ``name`` cannot run these inputs, or None if it can."""
        return self.backends[name][1](*args, **kwargs)

    def _define(self, reference: Callable) -> "Op":
        functools.update_wrapper(self, reference)
        self.arguments = list(inspect.signature(reference).parameters)
        self.backends["reference"] = (reference, lambda *args, **kwargs: None)
        OPS[self.__name__] = self
        return self

    def _check(self, args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
        """The device of the tensors, where they are as ``shapes`` says."""
        if len(args) > len(self.arguments):
            raise TypeError(f"{self.__name__} takes {', '.join(self.arguments)}; got {len(args)} positional arguments")
        given = {**dict(zip(self.arguments, args)), **kwargs}
        sizes: dict[str, tuple[int, str]] = {}
        first = None
        for argument, layouts in self.shapes.items():
            tensor = given.get(argument)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{self.__name__}: {argument} must be a tensor; got {type(tensor).__name__}")
            if not (tensor.is_floating_point() or tensor.is_complex() or argument == "mask"):
                raise ValueError(
                    f"{self.__name__}: {argument} must be floating point or complex; got {tensor.dtype}; convert it"
                )
            first = first or (tensor.device, argument)
            if tensor.device != first[0]:
                raise ValueError(
                    f"{self.__name__}: {argument} is on {tensor.device} and {first[1]} on {first[0]}; move one of them"
                )
            axes = next((layout for layout in layouts if len(layout) == tensor.ndim), None)
            wanted = " or ".join(f"({', '.join(layout)})" for layout in layouts)
            if axes is None:
                raise ValueError(f"{self.__name__}: {argument} must be {wanted}; got shape {tuple(tensor.shape)}")
            for axis, size in zip(axes, tensor.shape):
                letter, _, less = axis.partition("-")
                size += int(less or 0)
                known, owner = sizes.setdefault(letter, (size, argument))
                if known != size:
                    raise ValueError(
                        f"{self.__name__}: {argument} must be {wanted} with {letter} = {known} as in {owner}; "
                        f"got shape {tuple(tensor.shape)}"
                    )
        for letter, (size, owner) in sizes.items():
            if size == 0 and letter != "M":  # there may be no taps that look ahead
                raise ValueError(f"{self.__name__}: {owner} has {letter} = 0; at least 1 is needed")
        return None if first is None else first[0]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which filters, FFTs and scans are computed: bf16 and fp16 are widened, float64 is kept."""
    return torch.promote_types(dtype, torch.float32)


def numba_why_not(*tensors: Tensor | None) -> str | None:
    """Why the CPU kernels cannot take these tensors: the part of ``why_not`` that every numba backend shares."""
    if not _HAS_NUMBA:
        return "numba is not installed; pip install numba"
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor is not None and tensor.dtype in (torch.float64, torch.complex128):
            return f"a tensor is {tensor.dtype}; the kernels compute in float32"
    return None
