"""What a task is: batches that depend on nothing but their number, and the names of the numbers that judge a model."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import ConfigDict
from torch import Tensor

from longwave.spec import Spec

IGNORE = -100  # a target that is not scored; the default ignore_index of torch's cross entropy

TRAIN, EVAL, EPOCH, HIDE = range(4)  # the streams of random numbers, which share nothing


class Batch(NamedTuple):
    """Token ids, and beside each the id the model is to predict there, or IGNORE; both (B, L) int64."""

    inputs: Tensor
    targets: Tensor


def next_token(sequences: Tensor) -> Batch:
    """Every token but the last of (B, L + 1) sequences, with the one after it as its target; no memory is shared."""
    return Batch(sequences[:, :-1].clone(), sequences[:, 1:].clone())


def random_stream(seed: int, stream: int, index: int) -> np.random.Generator:
    """Random numbers that belong to one (seed, stream, index), each in [0, 2^64); no two triples share any of them.

    Source: Salmon et al. (2011) "Parallel random numbers: as easy as 1, 2, 3": Philox maps (key, counter) one to one,
    and here the seed and the stream are the key and the index is the highest word of the counter.
    """
    return np.random.Generator(np.random.Philox(key=seed | stream << 64, counter=index << 192))


class Task(Spec):
    """A problem stated as token sequences: training batches, evaluation batches, and how they are scored.

    A subclass with a field `kind: Literal["name"] = "name"` is entered in TASKS under that name. Batches are pure
    functions of their arguments and of the options, so an interrupted run goes on with exactly the batches it missed.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    metric: ClassVar[str]  # the name, among metrics(), of the number that says which checkpoint is best
    higher_is_better: ClassVar[bool]
    asks_next: ClassVar[bool] = False  # targets are the inputs one step on, which a model that looks ahead would see

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "kind" in cls.model_fields:
            kind = cls.model_fields["kind"].default
            assert kind not in TASKS, f"two tasks are called {kind!r}"
            TASKS[kind] = cls

    @property
    @abstractmethod
    def vocab(self) -> int:
        """The number of token ids a model of this task needs."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens in the longest inputs there are, of training or of evaluation."""

    def prepare(self) -> None:
        """Check, once before a run, everything that can only be known by looking, such as files on disk.

        Raises:
            ValueError: where the task cannot be run.
        """

    @abstractmethod
    def train_batch(self, size: int, seed: int, index: int) -> Batch:
        """Training batch number `index` of `size` rows; seed and index in [0, 2^64)."""

    @abstractmethod
    def eval_batches(self, size: int) -> int:
        """The number of evaluation batches of `size` rows."""

    @abstractmethod
    def eval_batch(self, size: int, index: int) -> Batch:
        """Evaluation batch number `index` of `size` rows; the last one may have fewer. The same for every seed."""

    def metrics(self, loss_sum: float, correct: int, tokens: int) -> dict[str, float]:
        """Named numbers from sums over all scored evaluation tokens.

        Args:
            loss_sum: sum of -ln(probability of the target).
            correct: how often the most probable token was the target.
            tokens: how many tokens were scored, at least 1.
        """
        return {"loss": loss_sum / tokens, "accuracy": correct / tokens}


TASKS: dict[str, type[Task]] = {}
