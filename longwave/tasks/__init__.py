"""Data and how it is scored: each task is named by its `kind` and listed in TASKS."""

from longwave.tasks.base import EVAL, TASKS, TRAIN, Errors, Score, Task, random_stream
from longwave.tasks.forms import IGNORE, Batch, Future, Label, Pair, Row, Signal, Tokens, Values
from longwave.tasks.synthetic import AssociativeRecall, InductionHeads, SelectiveCopying
from longwave.tasks.text import Corpus, MaskedText, Text

__all__ = [
    "EVAL",
    "IGNORE",
    "TASKS",
    "TRAIN",
    "AssociativeRecall",
    "Batch",
    "Corpus",
    "Errors",
    "Future",
    "InductionHeads",
    "Label",
    "MaskedText",
    "Pair",
    "Row",
    "Score",
    "SelectiveCopying",
    "Signal",
    "Task",
    "Text",
    "Tokens",
    "Values",
    "random_stream",
]
