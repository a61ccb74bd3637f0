"""What a task is: rows that depend on nothing but their number, and the names of the numbers that judge a model."""

import functools
import hashlib
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict, field_validator
from torch import Tensor

from longwave.own import Table
from longwave.spec import Spec
from longwave.tasks.forms import Batch, Future, Inputs, Label, Pair, Row, Signal, Targets, Tokens, Values, collate
from longwave.tokenizer import Tokenizer

TRAIN, EVAL, EPOCH, HIDE, TEST = range(5)  # the streams of random numbers, which share nothing
_ROUNDS = 6  # of the shuffle
_END = 2**16  # bytes
INDICES = (".fai", ".gzi")  # which are written beside data

T = TypeVar("T")


def random_stream(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers that belong to one (seed, stream, index), each in [0, 2^64); no two triples share any of them.

    Source: Salmon et al. (2011) "Parallel random numbers: as easy as 1, 2, 3": Philox maps (key, counter) one to one,
    and here the seed and the stream are the key and the index is the highest word of the counter.
    """
    return np.random.Generator(np.random.Philox(key=seed | stream << 64, counter=index << 192))


def shuffled(seed: int, visit: int, count: int) -> int:
    """Which of ``count`` examples is visited as number ``visit``, when all are gone through in a new order every epoch.

    No order is kept in memory: each is a Feistel network over the least even number of bits that holds ``count``, whose
    keys belong to (seed, epoch), and what lies beyond ``count`` is sent through it again.

    Source: Black & Rogaway (2002) "Ciphers with arbitrary finite domains", the cycle-walking of sec. 3.
    """
    epoch, place = divmod(visit, count)
    half = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    while True:
        left, right = place >> half, place & (1 << half) - 1
        for key in _keys(seed, epoch):
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 2**64 - 1
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 2**64 - 1
            left, right = right, left ^ mixed >> 64 - half
        place = left << half | right
        if place < count:
            return place


@functools.lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> list[int]:
    return random_stream(seed, EPOCH, epoch).integers(2**64, size=_ROUNDS, dtype=np.uint64).tolist()


class Score(NamedTuple):
    """Sums over the scored targets of tokens and labels: of tensors in a model, of numbers in :meth:`Task.metrics`."""

    loss: Any  # - sum ln p(target)
    correct: Any  # how often the target was the most probable
    total: Any  # how many targets there were


class Errors(NamedTuple):
    """Sums over the scored targets that are real numbers, as :class:`Score`."""

    loss: Any  # of squared errors
    absolute: Any  # of their absolute values
    total: Any


TASKS: Table["Task"] = Table("task")


def fingerprint(sources: Iterable[str]) -> str:
    """A SHA-256 over the names and sizes of files, and those of folders, and over the two ends of each.

    What is written over in the middle of a file of more than 128 kB, leaving its size, is not seen.
    """
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source).expanduser()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in INDICES:
                size = file.stat().st_size
                digest.update(f"{file.relative_to(path)} {size}\n".encode())
                with file.open("rb") as opened_file:
                    digest.update(opened_file.read(_END))
                    opened_file.seek(max(_END, size - _END))
                    digest.update(opened_file.read(_END))
    return digest.hexdigest()


class opened(Generic[T]):
    """A property of a task that is found on disk: once for all tasks of the same options, and no part of any.

    Args:
        find: takes the task.
    """

    MOST = 8  # that are kept, of the latest

    def __init__(self, find: Callable[[Any], T]):
        self.find, self._kept = find, OrderedDict[str, T]()

    def __get__(self, task: Any, owner: type | None = None) -> T:
        if task is None:
            return self  # type: ignore[return-value]
        key = task.model_dump_json()
        if key not in self._kept:
            found = self.find(task)
            while len(self._kept) >= self.MOST:
                self._kept.popitem(last=False)
            self._kept[key] = found
        return self._kept[key]

    def forget(self, task: Any) -> None:
        """Find it again when it is next asked for."""
        self._kept.pop(task.model_dump_json(), None)


class Task(Spec):
    """A problem stated as sequences: training rows, evaluation rows, and how they are scored.

    ``class Foo(Task, name="foo")`` is entered in TASKS, and its ``kind`` is its name. Rows are pure
    functions of their arguments and of the options, so an interrupted run goes on with exactly those it missed, and
    the same rows make a step however they are shared out over processes. What a subclass must say: `inputs`,
    `longest`, `train_row`, `eval_row` and `eval_rows`; `targets` where they are not an id at every step.
    """

    model_config = ConfigDict(
        use_attribute_docstrings=True, ignored_types=(Tokens, Signal, Pair, Label, Values, Future, opened)
    )

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # small options, each put through longwave/contract/tasks.py
    metric: ClassVar[str] = "loss"  # the name, among metrics(), of the number that says which checkpoint is best
    higher_is_better: ClassVar[bool] = False
    asks_next: ClassVar[bool] = False  # targets are the inputs one step on, which a model that looks ahead would see

    name: ClassVar[str] = ""
    kind: str = ""

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or ""
        if name is not None:
            if name in TASKS:
                raise ValueError(f"two tasks are called {name!r}: {TASKS[name].__name__} and {cls.__name__}")
            TASKS[name] = cls

    @field_validator("kind")
    @classmethod
    def _its_own(cls, kind: str) -> str:
        if TASKS.get(kind or cls.name, cls) is not cls:
            raise ValueError(f"{cls.__name__} is not the task {kind!r}")
        return kind or cls.name or cls.__name__

    @classmethod
    def title(cls) -> str:
        """What it is called in an error."""
        return repr(cls.name or cls.__name__)

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What a model is given."""

    @property
    def targets(self) -> Targets:
        """What it is asked for; default a token at every step, as it is given them."""
        if not isinstance(self.inputs, Tokens):
            raise NotImplementedError(f"{type(self).__name__} does not say its targets")
        return self.inputs

    @property
    @abstractmethod
    def longest(self) -> int:
        """Steps in the longest inputs there are, of training or of evaluation."""

    @property
    def sources(self) -> list[str]:
        """Files and folders that it reads; a run is not resumed when they have changed."""
        return []

    @property
    def steps_per_second(self) -> float | None:
        """Where steps are taken in time: a model that was trained at others has its rate set to hear them."""
        return None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What made token ids of text, for the folder of a model that is trained on them; None where they are none."""
        return None

    @property
    def names(self) -> Sequence[str] | None:
        """What token ids stand for, where a person reads them; None shows numbers."""
        return None

    def image(self, inputs: Tensor) -> Tensor | None:
        """The picture (H, W, channels) that the inputs of a row are, to be looked at; None where they are none."""
        return None

    def prepare(self) -> None:
        """Check, once before a run, everything that can only be known by looking, such as files on disk.

        Raises:
            ValueError: where the task cannot be run.
        """
        for kind in type(self).__mro__:
            for found in vars(kind).values():
                if isinstance(found, opened):
                    found.forget(self)

    @abstractmethod
    def train_row(self, seed: int, number: int) -> Row:
        """Training row ``number`` of an endless sequence of them; both in [0, 2^63)."""

    @property
    @abstractmethod
    def eval_rows(self) -> int:
        """How many rows are evaluated, at least 1."""

    @abstractmethod
    def eval_row(self, number: int) -> Row:
        """Row ``number`` of those evaluated: the same for every seed."""

    def goes_on(self, number: int) -> bool:
        """Whether evaluation row ``number`` >= 1 goes on where the one before ended, behind its targets that are not
        scored: so that a model that carries its state sees all of a document."""
        return False

    def train_batch(self, size: int, seed: int, index: int) -> Batch:
        """Training rows size * index and the ``size`` - 1 that follow."""
        rows = [self.train_row(seed, number) for number in range(size * index, size * (index + 1))]
        return collate(rows, self.inputs, self.targets)

    def eval_batches(self, size: int) -> int:
        """The number of evaluation batches of ``size`` rows."""
        return math.ceil(self.eval_rows / size)

    def eval_batch(self, size: int, index: int) -> Batch:
        """Evaluation rows size * index and following; of the last batch there may be fewer than ``size``."""
        rows = [self.eval_row(number) for number in range(size * index, min(size * (index + 1), self.eval_rows))]
        return collate(rows, self.inputs, self.targets)

    def blank(self, rows: int) -> Batch:
        """So many of the longest rows, all zeros: to see whether a model takes them."""
        forms = (self.inputs, self.targets)
        return Batch(*(torch.zeros(form.shape(rows, self.longest), dtype=form.dtype) for form in forms))

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Named numbers from sums over all scored evaluation targets, of which there is at least one.

        Among them is ``loss``, what is trained on. Tokens and labels have an accuracy; real numbers have the mean
        squared error, which is the loss, and the mean absolute one.
        """
        loss = score.loss / score.total
        if isinstance(score, Score):
            return {"loss": loss, "accuracy": score.correct / score.total}
        return {"loss": loss, "mse": loss, "mae": score.absolute / score.total}


TASKS.of = Task
