"""Labelled text: documents by class, and pairs of documents that belong together or not."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from longwave.errors import shown
from longwave.tasks.base import opened, shuffled
from longwave.tasks.forms import Inputs, Label, Pair, Row, Tokens
from longwave.tasks.labelled import HeldOut, Labelled, Sets, by_class, existing_folder
from longwave.tasks.text import ByByte

IMDB = "the Long Range Arena's are the reviews of aclImdb_v1.tar.gz, at ai.stanford.edu/~amaas/data/sentiment"
AAN = "the Long Range Arena's are new_aan_pairs.*.tsv of lra_release.gz, at github.com/google-research/long-range-arena"
_CHUNK = 2**24


class Lines:
    """The lines of a file, found once and read when asked for.

    Raises:
        ValueError: where the file cannot be read or is empty.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._bytes = np.memmap(file, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read, or is empty") from error
        found = [
            np.flatnonzero(self._bytes[at : at + _CHUNK] == ord("\n")) + at for at in range(0, len(self._bytes), _CHUNK)
        ]
        ends = np.concatenate(found)
        self._ends = ends if len(ends) and ends[-1] == len(self._bytes) - 1 else np.append(ends, len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, line: int) -> bytes:
        start = self._ends[line - 1] + 1 if line else 0
        return self._bytes[start : self._ends[line]].tobytes().rstrip(b"\r")


def record(lines: Lines, line: int) -> dict[str, Any]:
    """A line of JSON with a text and a label, or a ValueError that names the line."""
    where = f"{lines.file}, line {line + 1}"
    try:
        record = json.loads(lines[line])
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "label" not in record:
        raise ValueError(f'{where} must be {{"text": "...", "label": ...}}; got {shown(record)}')
    return record


class Documents(ByByte, Labelled, name="documents"):
    """What is a text about: one of several classes, from its bytes.

    Source: the Text task of the Long Range Arena, Tay et al. (2020), arXiv:2011.04006, sec. 2.2.2, is this on the
    film reviews of Maas et al. (2011), with length 4,096 as in github.com/state-spaces/s4.

    The folder has a folder of texts a class, or below `train` and `test`; or `train.jsonl`, and maybe `test.jsonl`,
    with lines {"text": "...", "label": ...}. Classes are the names of the folders, or the labels, in alphabetical
    order. Texts without a class, such as `unsup` of aclImdb, go elsewhere first.

    Raises:
        ValueError: where there is nothing of the kind, a class without text, a label of the test set that training
            has not, or a line that is not such JSON (with its number).
    """

    folder: str
    """Where the texts are."""
    length: int = Field(4096, ge=1)
    """Bytes of a text at most; what is longer is cut at its end."""

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.folder]

    @property
    def longest(self) -> int:
        """A text of the full length."""
        return self.length

    def look(self) -> Sets:
        """Texts by class."""
        folder = existing_folder(self.folder, IMDB)
        train, test = folder / "train.jsonl", folder / "test.jsonl"
        if not train.exists():
            return by_class(folder, hint=IMDB)
        records = Lines(train)
        names = sorted({str(record(records, line)["label"]) for line in range(len(records))})
        return Sets(names, _labels(records, names), _labels(Lines(test), names) if test.exists() else [])

    def row(self, item: tuple[Path | tuple[Lines, int], int]) -> Row:
        """The bytes of a text and its class."""
        source, label = item
        text = source.read_bytes() if isinstance(source, Path) else record(*source)["text"].encode()
        return Row(as_bytes(text, self.length), label)


def _labels(records: Lines, names: list[str]) -> list[tuple[tuple[Lines, int], int]]:
    found = []
    for line in range(len(records)):
        label = str(record(records, line)["label"])
        if label not in names:
            raise ValueError(
                f"{records.file}, line {line + 1}: the training set has no label {shown(label)}; it has {names}"
            )
        found.append(((records, line), names.index(label)))
    return found


def as_bytes(text: bytes, most: int) -> np.ndarray:
    """The first bytes of a text, (L,) uint8; of none, a blank."""
    return np.frombuffer(text[:most] or b" ", np.uint8).copy()


class DocumentPairs(ByByte, name="document_pairs"):
    """Do two texts belong together, such as papers of which one cites the other?

    Source: the Retrieval task of the Long Range Arena, Tay et al. (2020), arXiv:2011.04006, sec. 2.2.3, on the ACL
    anthology network of Radev et al. (2009), with length 4,000.

    The folder has three tables, `*train.tsv`, `*eval.tsv` and `*test.tsv`, without a header, whose columns are
    label (0 or 1), the two names, and the two texts. `held_out: validation` is `*eval.tsv`.

    Raises:
        ValueError: where a table is missing or there are several, or a line has other columns (with its number).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    folder: str
    """Where the tables are."""
    length: int = Field(4000, ge=1)
    """Bytes of a text at most; what is longer is cut at its end."""
    held_out: HeldOut = "validation"
    """What is evaluated."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.folder]

    @property
    def inputs(self) -> Inputs:
        """Two texts of bytes."""
        return Pair(Tokens(256))

    @property
    def targets(self) -> Label:
        """Whether they belong together."""
        return Label(2)

    @property
    def longest(self) -> int:
        """A text of the full length."""
        return self.length

    def prepare(self) -> None:
        """Look for the tables anew, and at the first line of each."""
        super().prepare()
        for table in ("train", self._held):
            self._row(table, 0)

    @property
    def _held(self) -> str:
        return "eval" if self.held_out == "validation" else "test"

    @opened
    def _tables(self) -> dict[str, Lines]:
        found = {}
        for split in ("train", "eval", "test"):
            files = sorted(Path(self.folder).expanduser().glob(f"*{split}.tsv"))
            if len(files) != 1:
                names = ", ".join(file.name for file in files) or "none"
                raise ValueError(f"{shown(self.folder)} must have one *{split}.tsv, and has {names}; {AAN}")
            found[split] = Lines(files[0])
        return found

    def train_row(self, seed: int, number: int) -> Row:
        """A pair of the training table in the order of the epoch."""
        return self._row("train", shuffled(seed, number, len(self._tables["train"])))

    @property
    def eval_rows(self) -> int:
        """All that is held out."""
        return len(self._tables[self._held])

    def eval_row(self, number: int) -> Row:
        """A pair that is held out."""
        return self._row(self._held, number)

    def _row(self, split: str, line: int) -> Row:
        lines = self._tables[split]
        columns = lines[line].split(b"\t")
        labels = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
        if len(columns) != 5 or columns[0] not in labels:
            raise ValueError(
                f"{lines.file}, line {line + 1} must be label 0 or 1, two names and two texts, with tabs between; "
                f"got {len(columns)} columns, the first {shown(columns[0].decode(errors='replace'))}"
            )
        return Row([as_bytes(text, self.length) for text in columns[3:]], labels[columns[0]])
