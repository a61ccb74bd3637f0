"""The Long Range Arena: two of its tasks are drawn here, the others read what the world keeps.

Source: Tay et al. (2020) "Long Range Arena", arXiv:2011.04006, with the preprocessing of github.com/state-spaces/s4.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from longwave.tasks import shards
from longwave.tasks.base import EVAL, TEST, TRAIN, Task, opened, random_stream, shuffled
from longwave.tasks.forms import Inputs, Label, Row, Signal, Tokens
from longwave.tasks.labelled import HeldOut
from longwave.tasks.shards import Example, Shards

SYMBOLS = (*map(str, range(10)), "X", "[MAX", "[MED", "[MIN", "[SM")  # X closes a list
CLOSE, MAX, MED, MIN, SUM = range(10, 15)
DEPTH, ARGUMENTS, LEAF = 10, 10, 0.25  # nested at most, in a list at most, and above what number a node is a digit
SHORTEST, LONGEST = 501, 1999  # symbols of an example

STREAMS = {"train": TRAIN, "validation": EVAL, "test": TEST}


class Drawn(Task):
    """Labelled sequences that a program draws: fresh for ever, or those that `longwave data` has written.

    Example i of a split depends on the split and on i alone, whether it is drawn or read.
    """

    train_examples: int | None = Field(None, ge=1)
    """The size of the training set; None is fresh examples for ever, or all that the folder has."""
    eval_examples: int = Field(500, ge=1)
    """How many examples of the held-out set are evaluated."""
    held_out: HeldOut = "validation"
    """What is evaluated."""
    folder: str | None = None
    """What longwave data has written; None draws every example when it is asked for."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"eval_examples": 50},
        {"train_examples": 30, "eval_examples": 20, "held_out": "test"},
    )
    runs: ClassVar[tuple[str, ...]] = ("train_examples", "eval_examples", "held_out", "folder")  # not of an example

    @abstractmethod
    def draw(self, random: np.random.Generator) -> Example:
        """One example."""

    @abstractmethod
    def row(self, example: Example) -> Row:
        """What a model is given of it."""

    @property
    def sources(self) -> list[str]:
        """The folder."""
        return [] if self.folder is None else [self.folder]

    def about(self) -> dict[str, Any]:
        """What its examples are."""
        return self.model_dump(mode="json", exclude=set(self.runs))

    def example(self, split: str, number: int) -> Example:
        """Draw an example of the train, validation or test set."""
        return self.draw(random_stream(0, STREAMS[split], number))

    def write(
        self, folder: Path, counts: dict[str, int], jobs: int = 1, progress: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Write examples that a task with this `folder` reads, see :func:`longwave.tasks.shards.write`.

        Args:
            counts: examples of the train, validation and test set.
        """
        shards.write(folder, self.about(), counts, self.example, jobs, progress)

    def prepare(self) -> None:
        """Look through the folder.

        Raises:
            ValueError: where it is none of this task, has too few examples, or a shard is not whole.
        """
        super().prepare()
        if self._shards is None:
            return
        self._shards.check()
        for split, asked in (("train", self.train_examples or 1), (self.held_out, self.eval_examples)):
            found = self._shards.counts.get(split, 0)
            if found < asked:
                raise ValueError(
                    f"{self.folder} has {found} examples of the {split} set and the task asks for {asked}; "
                    "write more with longwave data, or ask for fewer"
                )

    def train_row(self, seed: int, number: int) -> Row:
        """An example of the training set in the order of the epoch, or a fresh one."""
        count = self.train_examples or (self._shards.counts["train"] if self._shards else None)
        if count is None:
            return self.row(self.draw(random_stream(seed, TRAIN, number)))
        return self.row(self._example("train", shuffled(seed, number, count)))

    @property
    def eval_rows(self) -> int:
        """How many examples are evaluated."""
        return self.eval_examples

    def eval_row(self, number: int) -> Row:
        """An example of the held-out set."""
        return self.row(self._example(self.held_out, number))

    @opened
    def _shards(self) -> Shards | None:
        return None if self.folder is None else Shards(Path(self.folder), self.about())

    def _example(self, split: str, number: int) -> Example:
        return self.example(split, number) if self._shards is None else self._shards[split, number]


class ListOps(Drawn, name="listops"):
    """Nested lists such as [MAX 2 9 [MIN 4 7 X 0 X: what do they come to?

    Source: Nangia & Bowman (2018), arXiv:1804.06028; Long Range Arena, sec. 2.2.1: trees of at most ten levels and ten
    arguments, of 501 to 1,999 symbols, brackets without parentheses, as all who compare use them.

    Ids are 0 to 9 for the digits, then the end of a list and MAX, MED, MIN, SM (the sum modulo 10). The label is the
    value. Examples differ in length; with `eval_examples=2000` the held-out sets have the official size.
    """

    @property
    def inputs(self) -> Inputs:
        """Symbols."""
        return Tokens(len(SYMBOLS))

    @property
    def names(self) -> tuple[str, ...]:
        """The symbols."""
        return SYMBOLS

    @property
    def targets(self) -> Label:
        """The value."""
        return Label(10)

    @property
    def longest(self) -> int:
        """Symbols of the longest tree."""
        return LONGEST

    def draw(self, random: np.random.Generator) -> Example:
        """A tree."""
        from longwave.tasks._numba import listops

        symbols = np.zeros(LONGEST, np.uint8)
        length, value = listops.draw(random, symbols)
        return Example(symbols[:length], value)

    def row(self, example: Example) -> Row:
        """Its symbols and its value."""
        return Row(example.sequence, example.label)


class Pathfinder(Drawn, name="pathfinder"):
    """Two dashed snakes among shorter ones, and two discs: are they on the ends of one snake?

    Source: Linsley et al. (2018), arXiv:1805.08315; Kim et al. (2020), arXiv:1906.01558; Long Range Arena, sec. 2.2.5.
    Size 32 is its Pathfinder and size 128 its Path-X; `paddles` 14 is its hard set, which all who compare use.

    A picture is read pixel by pixel, row by row, as grey in [-1, 1]; the label is 1 where the discs are connected.
    """

    size: Literal[32, 64, 128, 256] = 32
    """Pixels along a side; a sequence has the square."""
    paddles: Literal[6, 9, 14] = 14
    """Dashes of a snake: 6 is easy, 9 intermediate, 14 hard."""

    @property
    def inputs(self) -> Inputs:
        """Grey."""
        return Signal(1)

    def image(self, inputs: Tensor) -> Tensor:
        """Its pixels."""
        return inputs.view(self.size, self.size, 1)

    @property
    def targets(self) -> Label:
        """Apart or connected."""
        return Label(2)

    @property
    def longest(self) -> int:
        """Pixels."""
        return self.size**2

    def draw(self, random: np.random.Generator) -> Example:
        """A picture."""
        from longwave.tasks._numba import pathfinder

        picture = pathfinder.draw(random, self.size, self.paddles)
        return Example(picture.image.reshape(-1), int(picture.connected))

    def row(self, example: Example) -> Row:
        """Its pixels, and whether the discs are connected."""
        return Row(example.sequence[:, None].astype(np.float32) / 127.5 - 1, example.label)
