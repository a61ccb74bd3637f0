"""One rule for choosing an implementation: the first backend that has nothing against these inputs."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.errors import unknown
from longwave.ops.declaration import Declaration
from longwave.ops.kernel import Kernel, key, transform, without_autocast

OPS: dict[str, "Op"] = {}  # every op by name; the op contract tests walk this table

FOLDERS = ("triton", "numba", "torch")  # of kernels, as _triton and so on, in the order in which they are tried
KINDS = 1024  # of calls that an op remembers

_FORCED = os.environ.get("LONGWAVE_BACKEND", "auto")
_named: ContextVar[str] = ContextVar("longwave_backend", default=_FORCED)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, and in this thread, every op that has the backend takes it, as LONGWAVE_BACKEND does for a process."""
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def forced() -> str:
    """The backend that LONGWAVE_BACKEND or use_backend names, or auto."""
    known = ["auto", *dict.fromkeys(name for op in OPS.values() for name in op.backends)]
    if (name := _named.get()) not in known:
        raise ValueError(f"LONGWAVE_BACKEND: {unknown('backend of any op', name, known)}")
    return name


vars(forced)["_dynamo_marked_constant"] = True  # as in kernel.py: dynamo does not know context variables


class Composed:
    """A backend that is a function of torch's own differentiable operations, with the op's arguments."""

    def __init__(self, arguments: list[str], run: Callable[..., Any], why_not: Callable[..., str | None] | None):
        self._arguments, self._run, self._why_not = arguments, run, why_not

    def __call__(self, *inputs: Any) -> Any:
        return self._run(**dict(zip(self._arguments, inputs)))

    def why_not(self, *inputs: Any) -> str | None:
        """The reason why it cannot run these inputs, or None."""
        return None if self._why_not is None else self._why_not(**dict(zip(self._arguments, inputs)))


class Op:
    """A pure tensor function: a reference that defines it, and faster twins with the same arguments.

    Used as a decorator on the reference. It names the axes of every tensor that goes in, and in ``returns`` of those
    that come out (see :class:`longwave.ops.declaration.Declaration`), so every backend may rely on the shapes and the
    caller gets his own numbers in the error. What sizes must be beside that, ``check(*inputs)`` says by ValueError.
    ``growing`` is an axis of one tensor whose size differs from call to call, as that of a past: no check and no choice
    may depend on it, so that what was found for one size holds for all.

        @Op(u="B L C", k="C K", returns={"y": "B L C : u"})
        def causal_conv(u, k): ...

    A file of the op's name in ``_triton``, ``_numba`` or ``_torch`` is a backend (see
    :class:`longwave.ops.kernel.Kernel`). ``@causal_conv.backend("torch")`` makes one of a function of torch operations.

    Calling the op takes the first backend whose ``why_not`` is None, in this order, and the reference last.
    ``backend="name"`` takes that one, or raises ValueError with the reason why it cannot run. The environment variable
    LONGWAVE_BACKEND names a backend for every op that has it. Where torch.func or forward mode differentiates, the
    reference is taken. An op computes in the dtypes of its inputs, or wider ones: autocast does not reach into it.
    """

    __name__: str

    def __init__(
        self,
        *,
        returns: Mapping[str, str],
        check: Callable[..., None] | None = None,
        growing: str | None = None,
        **tensors: str,
    ):
        self._tensors, self._returns, self._check, self._growing = tensors, returns, check, growing
        self.backends: dict[str, Composed | Kernel] = {}

    def __call__(self, *args: Any, backend: str = "auto", **options: Any) -> Any:
        if not self.backends:
            return self._define(args[0])
        inputs = self._bound(args, options)
        run: Callable[..., Any]
        kind = key(inputs, self._free)
        if kind is None:
            run, device = self._choose(backend, inputs)
        else:
            kind = backend, _named.get(), torch.is_grad_enabled(), *kind
            run, device = self._known.get(kind) or self._remember(kind, inputs)
        if device.type == "meta" or not torch.is_autocast_enabled(device.type):
            return run(*inputs)
        with without_autocast(device):
            return run(*inputs)

    def kernel(self, name: str, module: str) -> None:
        """Take the module of that name as a backend, the first to be tried."""
        self.backends = {name: Kernel(self.declaration, self.signature, name, module), **self.backends}
        self._known.clear()

    def backend(self, name: str, why_not: Callable[..., str | None] | None = None) -> Callable:
        """Take a function of torch operations as a backend, the last to be tried but for the reference.

        ``why_not``, with the same arguments, returns the reason why it cannot run them, or None.
        """

        def register(run: Callable) -> Callable:
            others = {other: self.backends[other] for other in self.backends if other != "reference"}
            self.backends = {**others, name: Composed(self.arguments, run, why_not), **self.backends}
            self._known.clear()
            return run

        return register

    def why_not(self, name: str, *args: Any, **options: Any) -> str | None:
        """The reason why backend ``name`` cannot run these inputs, or None if it can."""
        return self.backends[name].why_not(*self._bound(args, options))

    def refusals(self, device: torch.device | str = "cpu") -> dict[str, str | None]:
        """What each backend has against a small call in float32, or None; in the order in which they are tried."""
        given = {**dict.fromkeys(self._required, 4), **self.declaration.samples(device)}
        return {name: self.why_not(name, **given) for name in self.backends}

    def _define(self, reference: Callable) -> "Op":
        functools.update_wrapper(self, reference)
        self.declaration = Declaration(self.__name__, self._tensors, self._returns)
        self.signature = inspect.signature(reference)
        parameters = self.signature.parameters.values()
        self.arguments = [p.name for p in parameters]
        self._defaults = [p.default for p in parameters]
        self._required = [p.name for p in parameters if p.default is p.empty]
        self._positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        self._forms: dict[tuple, list[tuple[str, Any]]] = {}
        self._known: dict[tuple, tuple[Callable[..., Any], torch.device]] = {}
        places = {name: axes[0].index(self._growing) for name, (axes, _) in self.declaration.arguments.items()
                  if self._growing in axes[0]}  # fmt: skip
        self._free = [places.get(name) for name in self.arguments] if places else None
        self.backend("reference")(reference)
        for folder in reversed(FOLDERS):
            if (Path(__file__).parent / f"_{folder}" / f"{self.__name__}.py").exists():
                self.kernel(folder, f"longwave.ops._{folder}.{self.__name__}")
        OPS[self.__name__] = self
        return self

    def _bound(self, args: tuple, options: dict[str, Any]) -> list[Any]:
        """All arguments in the order of the signature."""
        given = len(args)
        if given == len(self.arguments) == self._positional and not options:
            return list(args)
        if (rest := self._forms.get((given, *options))) is None:
            rest = self._form(args, options)
        return [*args, *(options.get(name, default) for name, default in rest)]

    def _form(self, args: tuple, options: dict[str, Any]) -> list[tuple[str, Any]]:
        """The arguments behind so many positional ones, with their defaults, in calls that name these options."""
        given = len(args)
        fits = given <= self._positional and all(name in options for name in self._required[given:])
        if not (fits and all(name in self.arguments[given:] for name in options)):
            try:
                self.signature.bind(*args, **options)
            except TypeError as error:
                raise TypeError(f"{self.__name__}: {error}") from None
        rest = self._forms[given, *options] = list(zip(self.arguments[given:], self._defaults[given:]))
        return rest

    def _choose(self, name: str, inputs: list[Any]) -> tuple[Composed | Kernel, torch.device]:
        """The backend that is to run, and the device it runs on."""
        _, device = self.declaration.check(dict(zip(self.arguments, inputs)))
        if self._check is not None:
            self._check(*inputs)
        if name == "auto":
            named = forced()
            name = "reference" if transform() == "derivative" else named if named in self.backends else name
        if name == "auto":
            backends = [
                b for n, b in self.backends.items() if (n, device.type) != ("triton", "cpu")
            ]  # interpreted there
            return next(backend for backend in backends if backend.why_not(*inputs) is None), device
        if name not in self.backends:
            raise ValueError(f"{self.__name__} has no backend {name!r}; it has {', '.join(self.backends)}")
        if reason := self.backends[name].why_not(*inputs):
            raise ValueError(f"{self.__name__}: backend {name!r} cannot run this call: {reason}")
        return self.backends[name], device

    def _remember(self, kind: tuple, inputs: list[Any]) -> tuple[Callable[..., Any], torch.device]:
        """What runs calls of this kind: of a kernel, the shortest way that its gradient allows."""
        backend, device = self._choose(kind[0], inputs)
        run: Callable[..., Any] = backend
        if isinstance(backend, Kernel) and device.type != "meta":
            wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            run = backend.recorded if wanted else backend.direct
        if len(self._known) >= KINDS:
            self._known.clear()
        self._known[kind] = run, device
        return run, device


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which filters, FFTs and scans are computed: bf16 and fp16 are widened, float64 is kept."""
    return torch.promote_types(dtype, torch.float32)
