"""Language modelling of tokenized corpora."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from longwave.tasks.base import TRAIN, Errors, Score, Task, opened, random_stream, shuffled
from longwave.tasks.corpus import TokenFiles
from longwave.tasks.forms import Inputs, Row, Tokens, next_token
from longwave.tasks.stretches import Windows, split
from longwave.tokenizer import Tokenizer


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
    def tokenizer(self) -> Tokenizer:
        """That of the corpora."""
        return self._corpora[0][0].tokenizer

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @opened
    def _corpora(self) -> list[tuple[TokenFiles, Windows, Windows]]:
        """Of each its files, and its windows for training and for evaluation."""
        found = []
        for name in self.folders:
            corpus = TokenFiles(Path(name).expanduser())
            train, held = self._parts(corpus)
            for part, windows in (("training", train), ("held-out", held)):
                if not len(windows):
                    raise ValueError(f"{name} has no window in its {part} part; give more text, or another share")
            found.append((corpus, train, held))
        for name, (corpus, _, _) in zip(self.folders, found):
            first = found[0][0]
            if not corpus.tokenizer.agrees(first.tokenizer) or (corpus.vocab, corpus.end) != (first.vocab, first.end):
                both = f"{self.folders[0]}: {first.tokenizer}, {name}: {corpus.tokenizer}"
                raise ValueError(f"corpora must be of one tokenizer, and these are of others ({both})")
        return found

    def _parts(self, corpus: TokenFiles) -> list[Windows]:
        tail, whole = np.array([len(corpus)]), self.held_out == "documents"
        return [
            Windows(part, part.borders(corpus.ends) if self.documents == "apart" else part.ends[-1:], self.length)
            for part in split(corpus, corpus.ends if whole else tail, whole, self.share)
        ]

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
        return next_token(train[shuffled(seed, number, len(train))])

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
        return next_token(held[number])

    def goes_on(self, number: int) -> bool:
        """Within a document where they are apart, else within what is held out of a corpus."""
        for _, _, held in self._corpora:
            if number < len(held):
                return held.goes_on(number)
            number -= len(held)
        raise IndexError(number)

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Loss in nats a token, perplexity, accuracy, and bits a byte by the bytes of a token in what is held out;
        where a document is held out in part, by those of one in the document."""
        named: dict[str, Any] = super().metrics(score)
        held = [(corpus, windows.stretches) for corpus, _, windows in self._corpora]
        size = sum(corpus.bytes_in(part.starts, part.stops) for corpus, part in held) / sum(
            len(part) for _, part in held
        )
        loss = named["loss"]
        return {**named, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) / float(size)}
