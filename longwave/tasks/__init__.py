"""Data and how it is scored: each task is named by its `kind` and listed in TASKS."""

from longwave.tasks.base import IGNORE, TASKS, Batch, Task
from longwave.tasks.synthetic import AssociativeRecall, InductionHeads, SelectiveCopying
from longwave.tasks.text import Corpus, MaskedText, Text

__all__ = [
    "IGNORE",
    "TASKS",
    "AssociativeRecall",
    "Batch",
    "Corpus",
    "InductionHeads",
    "MaskedText",
    "SelectiveCopying",
    "Task",
    "Text",
]
