"""Data and how it is scored: each task is named by its `kind` and listed in TASKS."""

from longwave.tasks.audio import Audio, AudioTokens
from longwave.tasks.base import EVAL, TASKS, TRAIN, Errors, Score, Task, random_stream
from longwave.tasks.dna import DNA, DNALabels, Species
from longwave.tasks.documents import DocumentPairs, Documents
from longwave.tasks.forms import IGNORE, Batch, Future, Label, Pair, Recovered, Row, Signal, Tokens, Values
from longwave.tasks.images import Images
from longwave.tasks.lra import ListOps, Pathfinder
from longwave.tasks.mad import (
    Compression,
    Copying,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    MultiQueryRecall,
    SpreadCopying,
)
from longwave.tasks.mu_law import mu_law_decode, mu_law_encode
from longwave.tasks.series import Forecast, SeriesLabels
from longwave.tasks.synthetic import AssociativeRecall, InductionHeads, SelectiveCopying
from longwave.tasks.text import Corpus, MaskedText, Text
from longwave.tasks.tokens import TokenizedText

__all__ = [
    "DNA",
    "EVAL",
    "IGNORE",
    "TASKS",
    "TRAIN",
    "AssociativeRecall",
    "Audio",
    "AudioTokens",
    "Batch",
    "Compression",
    "Copying",
    "Corpus",
    "DNALabels",
    "DocumentPairs",
    "Documents",
    "Errors",
    "Forecast",
    "Future",
    "FuzzyRecall",
    "Images",
    "InContextRecall",
    "InductionHeads",
    "Label",
    "ListOps",
    "MaskedText",
    "Memorization",
    "MultiQueryRecall",
    "Pair",
    "Pathfinder",
    "Recovered",
    "Row",
    "Score",
    "SelectiveCopying",
    "SeriesLabels",
    "Signal",
    "Species",
    "SpreadCopying",
    "Task",
    "Text",
    "TokenizedText",
    "Tokens",
    "Values",
    "mu_law_decode",
    "mu_law_encode",
    "random_stream",
]
