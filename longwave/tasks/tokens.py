"""Language modelling of tokenized corpora."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from longwave.tasks.base import TRAIN, Errors, Score, Task, opened, random_stream, shuffled
from longwave.tasks.corpus import TokenFiles
from longwave.tasks.forms import Inputs, Row, Tokens

_GOLDEN = 0.6180339887498949  # of the numbers of documents, so that those held out are spread evenly


class _Windows:
    """Windows over some stretches of a corpus, one behind the other, each with the token that follows it.

    Args:
        corpus: the tokens.
        starts, stops: of the stretches.
        length: tokens of a window at most; each stretch's last one may be shorter.
    """

    def __init__(self, corpus: TokenFiles, starts: np.ndarray, stops: np.ndarray, length: int):
        kept = stops - starts > 1
        self.corpus, self.starts, self.stops, self.length = corpus, starts[kept], stops[kept], length
        self._ends = np.cumsum(-(-(self.stops - self.starts - 1) // length))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> np.ndarray:
        stretch = int(np.searchsorted(self._ends, number, side="right"))
        window = number - (int(self._ends[stretch - 1]) if stretch else 0)
        start = int(self.starts[stretch]) + window * self.length
        return self.corpus.read(start, min(start + self.length + 1, int(self.stops[stretch])))


class TokenizedText(Task, name="tokens"):
    """Predict the next token of corpora that `longwave tokenize` has written.

    Documents lie one behind the other, each with an end token. `joined` windows run on from one document into the next;
    with `apart` none holds two, and what is left of a row is padding. Training windows are gone through in a new
    random order every epoch, which no memory holds; of several corpora each row draws one by its weight. Held out is
    the end of each corpus (`tail`), or documents spread over it (`documents`).

    Raises:
        ValueError: where a folder holds no whole corpus, tokenizers differ, or a part has no window.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files
    folders: list[str] = Field(min_length=1)
    """One corpus or several, of the same tokenizer."""
    weights: list[float] | None = None
    """How often each corpus is drawn, over their sum; None is by their tokens."""
    length: int = Field(1024, ge=1)
    """Tokens in a window."""
    documents: Literal["joined", "apart"] = "joined"
    """Whether a window runs on into the next document."""
    held_out: Literal["tail", "documents"] = "tail"
    """What is evaluated and never trained on: the end of each corpus, or single documents."""
    share: float = Field(0.05, gt=0, lt=1)
    """Of tokens or of documents, that are held out."""

    metric: ClassVar[str] = "bits_per_byte"
    asks_next: ClassVar[bool] = True

    @model_validator(mode="after")
    def _weights_fit(self) -> "TokenizedText":
        if self.weights is not None and (len(self.weights) != len(self.folders) or min(self.weights) <= 0):
            raise ValueError(f"weights = {self.weights} must be {len(self.folders)} numbers above 0, one a folder")
        return self

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return self.folders

    @property
    def inputs(self) -> Inputs:
        """All ids, the end of a document among them."""
        return Tokens(self._corpora[0][0].vocab)

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @opened
    def _corpora(self) -> list[tuple[TokenFiles, _Windows, _Windows]]:
        """Of each its files, and its windows for training and for evaluation."""
        found = []
        for name in self.folders:
            corpus = TokenFiles(Path(name).expanduser())
            train, held = self._parts(corpus)
            for part, windows in (("training", train), ("held-out", held)):
                if not len(windows):
                    raise ValueError(f"{name} has no window in its {part} part; give more text, or another share")
            found.append((corpus, train, held))
        if len({corpus.vocab for corpus, _, _ in found}) > 1:
            sizes = ", ".join(f"{name}: {corpus.vocab}" for name, (corpus, _, _) in zip(self.folders, found))
            raise ValueError(f"corpora must be of one tokenizer; these have other numbers of ids ({sizes})")
        return found

    def _parts(self, corpus: TokenFiles) -> tuple[_Windows, _Windows]:
        starts = np.concatenate([[0], corpus.ends[:-1]])
        if self.held_out == "tail":
            border = len(corpus) - int(len(corpus) * self.share)
            early, late = np.minimum(corpus.ends, border), np.maximum(starts, border)
            train, held = (starts[starts < border], early[starts < border]), (late, corpus.ends)
            held = tuple(one[corpus.ends > border] for one in held)  # type: ignore[assignment]
        else:
            out = (np.arange(len(starts)) * _GOLDEN + self.share) % 1 < self.share
            train, held = (starts[~out], corpus.ends[~out]), (starts[out], corpus.ends[out])
        return tuple(self._windows(corpus, *part) for part in (train, held))  # type: ignore[return-value]

    def _windows(self, corpus: TokenFiles, starts: np.ndarray, stops: np.ndarray) -> _Windows:
        if self.documents == "joined" and len(starts):  # stretches that touch are one
            apart = np.flatnonzero(starts[1:] != stops[:-1]) + 1
            starts, stops = starts[np.concatenate([[0], apart])], stops[np.concatenate([apart - 1, [len(stops) - 1]])]
        return _Windows(corpus, starts, stops, self.length)

    def prepare(self) -> None:
        """Open the corpora anew."""
        super().prepare()
        _ = self._corpora

    def train_row(self, seed: int, number: int) -> Row:
        """A window of a corpus that is drawn by its weight."""
        corpora = self._corpora
        chosen = 0
        if len(corpora) > 1:
            weights = np.cumsum(self.weights or [len(train) for _, train, _ in corpora])
            chosen = int(np.searchsorted(weights / weights[-1], random_stream(seed, TRAIN, number).random(), "right"))
        train = corpora[chosen][1]
        ids = train[shuffled(seed, number, len(train))]
        return Row(ids[:-1], ids[1:])

    @property
    def eval_rows(self) -> int:
        """Windows over what is held out of all corpora."""
        return sum(len(held) for _, _, held in self._corpora)

    def eval_row(self, number: int) -> Row:
        """A window of what is held out."""
        for _, _, held in self._corpora:
            if number < len(held):
                break
            number -= len(held)
        ids = held[number]
        return Row(ids[:-1], ids[1:])

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Loss in nats a token, perplexity, accuracy, and bits a byte by the bytes that a token of the corpora has."""
        named: dict[str, Any] = super().metrics(score)
        size = sum(corpus.bytes.sum() for corpus, _, _ in self._corpora) / sum(len(c) for c, _, _ in self._corpora)
        loss = named["loss"]
        return {**named, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) / float(size)}
