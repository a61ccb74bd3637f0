"""The processes of a run, which begin and end together."""

import contextlib
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric

E = TypeVar("E", bound=BaseException)
LAST_WORDS = "longwave/last words"  # in the store that all ranks reach: of the first that fails


class RankError(ConnectionError):
    """Another rank has ended; the message says which, and why where it could say so."""


class Ranks:
    """While it is entered, what ends one rank ends all: another's end is a :class:`RankError` here, and soon.

    Args:
        fabric: launched.
    """

    def __init__(self, fabric: "Fabric"):
        self.fabric = fabric
        self.main = fabric.is_global_zero
        self._shared: BaseException | None = None

    def on_main(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call on the main process alone; what it returns is returned there. Where it raises, every process does."""
        result, error, trouble = None, None, None
        if self.main:
            try:
                result = action(*arguments)
            except Exception as caught:
                error = trouble = caught
                if not isinstance(caught, ValueError | OSError | FloatingPointError):
                    trouble = RankError(_words(0, caught))  # of an unknown class, which another process may not have
        trouble = self.fabric.broadcast(trouble)
        if trouble is not None:
            raise self.together(error or trouble)
        return result

    def together(self, error: E) -> E:
        """An error that every rank is about to raise."""
        self._shared = error
        return error

    def sum(self, tensor: Tensor) -> Tensor:
        """Of the tensors of all processes."""
        return self._reduce(tensor, "sum")

    def max(self, number: int) -> int:
        """Of the numbers of all processes."""
        return int(self._reduce(torch.tensor(number, device=self.fabric.device), "max"))

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        total = self.fabric.all_reduce(tensor, reduce_op=how)
        assert isinstance(total, Tensor)
        return total

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or self.fabric.world_size == 1:
            return
        watched: list[Any] = getattr(self.fabric.strategy.launcher, "procs", [])  # by lightning, in main alone
        started = watched.copy()
        watched.clear()  # or lightning, where it sees one of them fail, kills this process before it has spoken
        if error is self._shared:
            return
        lost = None
        if isinstance(error, torch.distributed.DistError) or (kind is RuntimeError and "gloo" in str(error)):
            lost = RankError(self._who_ended(started))
        else:
            with contextlib.suppress(RuntimeError):  # rank 0, which keeps the store, may be gone as well
                _store().compare_set(LAST_WORDS, "", _words(self.fabric.global_rank, error))
        for process in started:  # they wait for this one, and have nothing to save
            process.kill()
        if lost is not None:
            raise lost from error

    def _who_ended(self, started: list[Any]) -> str:
        """By what it said last, or else by what the system says of the processes that this one started."""
        try:
            if _store().check([LAST_WORDS]):
                return _store().get(LAST_WORDS).decode()
        except RuntimeError:
            return "rank 0 was lost: killed, or out of memory"
        end = time.monotonic() + 2  # its connections may be seen to close a little before it is seen to end
        while started and time.monotonic() < end:
            for rank, process in enumerate(started, 1):
                if (code := process.poll()) is not None:
                    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
                    return f"rank {rank} was lost: {how}"
            time.sleep(0.01)
        return "another rank was lost: killed, or out of memory"


def _words(rank: int, error: BaseException) -> str:
    return f"rank {rank} failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
