"""What follows from parameters alone is derived once, while the caller promises that they stand still."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from longwave.nn.module import checksums

Method = TypeVar("Method", bound=Callable[..., Any])

Kept = dict[nn.Module, dict[Any, Any]]


class _Entry(NamedTuple):
    kept: Kept
    outer: "_Entry | None"


_entered: ContextVar[_Entry | None] = ContextVar("longwave_frozen", default=None)


def _kept_of(module: nn.Module) -> dict[Any, Any] | None:
    """Where results are kept now that are derived from the module."""
    if torch.compiler.is_compiling() or (entry := _entered.get()) is None or torch.is_grad_enabled():
        return None
    return entry.kept.get(module)


def stands_still(module: nn.Module) -> bool:
    """Whether what is derived from the module is kept, so that deriving more than this call needs pays."""
    return _kept_of(module) is not None


def derived(method: Method) -> Method:
    """A method of a module that depends on its parameters and buffers, and on hashable arguments, alone.

    Within :class:`frozen`, where no gradient is recorded, its result is kept and returned again: it must not be
    changed. Anywhere else the method runs each time.
    """

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any) -> Any:
        if (own := _kept_of(self)) is None:
            return method(self, *args)
        key = (method, args)
        if key not in own:
            own[key] = method(self, *args)
        return own[key]

    return run  # type: ignore[return-value]


class frozen:
    """``with frozen(model):`` promises that no weight of the model changes: what is :func:`derived` is derived once.

    What is kept belongs to this object and counts in the threads that entered it: other threads, copies of the model,
    other models and calls that record gradients derive anew, and it is gone with the object. It may be entered again,
    by any number of threads at once, then with what it has kept, and within another one of the same model, whose
    results it shares.

    Args:
        model: any module.
        check: for debugging: compare a checksum of every parameter and buffer with the first entry's, at every later
            entry and exit. It reads all weights each time.
    Raises:
        RuntimeError: with ``check``, where a tensor has changed, naming it.
    """

    def __init__(self, model: nn.Module, *, check: bool = False):
        self.model, self.check = model, check
        self._own: Kept = {module: {} for module in model.modules()}
        self._sums: dict[str, str] | None = None

    def __enter__(self) -> "frozen":
        self._compare()
        outer = _entered.get()
        _entered.set(_Entry(self._own if outer is None else {**self._own, **outer.kept}, outer))
        return self

    def __exit__(self, *error: Any) -> None:
        entry = _entered.get()
        assert entry is not None
        _entered.set(entry.outer)
        if error[0] is None:
            self._compare()

    def _compare(self) -> None:
        if not self.check:
            return
        sums = checksums(self.model)
        self._sums = self._sums or sums
        changed = [name for name, value in sums.items() if self._sums.get(name) != value]
        if changed:
            raise RuntimeError(f"{changed[0]} was changed within frozen(model); change weights outside it")
