"""DNA: what base comes next, and what a stretch of it is."""

import csv
import functools
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from longwave.errors import shown
from longwave.machine import require_memory, required
from longwave.tasks.base import EVAL, TRAIN, Task, opened, random_stream
from longwave.tasks.forms import IGNORE, Inputs, Label, Row, Tokens
from longwave.tasks.labelled import HeldOut, Labelled, Sets, visible
from longwave.tokenizer import HYENADNA, LETTERS, SAME, Tokenizer, dna

UNKNOWN = LETTERS.index("N")
COMPLEMENT = np.array([3, 2, 1, 0, 4], np.uint8)  # of A C G T N
FASTA = (".fa", ".fasta", ".fna", ".ffn")
_REFUSED = 255
_IDS = np.full(256, _REFUSED, np.uint8)
for _letter, _others in SAME.items():
    _IDS[np.frombuffer((_letter + _others).encode(), np.uint8)] = LETTERS.index(_letter)


def encode(text: bytes, where: str) -> np.ndarray:
    """Ids of bases, (L,) uint8: A C G T are 0 to 3, U is T, and N with all codes for several bases is 4; lower case,
    by which repeats are marked, is as upper case.

    Raises:
        ValueError: for any other letter, with its place.
    """
    raw = np.frombuffer(text, np.uint8)
    ids = _IDS[raw]
    if (ids == _REFUSED).any():
        place = int(np.flatnonzero(ids == _REFUSED)[0])
        raise ValueError(f"{where} has {shown(chr(raw[place]))} at base {place + 1}, and DNA is written in A C G T N")
    return ids


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """The other strand of bases, read in its direction."""
    return COMPLEMENT[ids[::-1]]


class Genome:
    """The records of a FASTA file, read where they are asked for; of a gzip file, all in memory.

    Args:
        file: FASTA, plain (an index, .fai, is written beside it) or gzip.
    Raises:
        ValueError: where it is none.
    """

    def __init__(self, file: Path):
        self.file = file
        self.lengths: dict[str, int] = {}
        self._texts: dict[str, bytes] = {}
        if not file.is_file():
            raise ValueError(f"there is no file {shown(str(file))}; give FASTA files ({', '.join(FASTA)}, or .gz)")
        if file.suffix == ".gz":
            self._unpack()
        else:
            self._index()
        if not sum(self.lengths.values()):
            raise ValueError(f"{file} has no record of a FASTA file, which begins with >")

    def _index(self) -> None:
        pyfaidx = required("pyfaidx", "data")
        try:
            self._fasta = pyfaidx.Faidx(str(self.file), rebuild=True)
        except (pyfaidx.FastaIndexingError, pyfaidx.FastaNotFoundError, OSError, ValueError) as error:
            raise ValueError(f"{self.file} is not a FASTA file that can be indexed: {error}") from error
        self.lengths = {name: record.rlen for name, record in self._fasta.index.items()}

    def _unpack(self) -> None:
        try:
            with gzip.open(self.file) as opened:
                text = opened.read()
        except (OSError, EOFError) as error:
            raise ValueError(f"{self.file} is not a whole gzip file: {error}") from error
        for record in text.split(b">")[1:]:
            name, _, bases = record.partition(b"\n")
            key = (name.split() or [b""])[0].decode(errors="replace")
            self._texts[key] = bases.translate(None, b"\r\n \t")
        self.lengths = {name: len(bases) for name, bases in self._texts.items()}

    def read(self, record: str, start: int, stop: int) -> np.ndarray:
        """Ids of the bases start (from 0) up to stop of a record."""
        if self._texts:
            text = self._texts[record][start:stop]
        else:
            text = self._fasta.fetch(record, start + 1, stop).seq.encode()
        return encode(text, f"{self.file}, {record} from base {start + 1}")


@functools.lru_cache(maxsize=64)
def _genome(file: Path, changed: int, size: int) -> Genome:
    return Genome(file)


def genome(file: Path) -> Genome:
    """The file's records, opened once for as long as it does not change."""
    info = file.stat() if file.is_file() else None
    return _genome(file, *((info.st_mtime_ns, info.st_size) if info else (0, 0)))


def _fasta_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [p for p in visible(path) if p.suffix in FASTA or (p.suffix == ".gz" and Path(p.stem).suffix in FASTA)]


class Stretch:
    """A part of a record: bases start up to stop."""

    __slots__ = ("file", "record", "start", "stop")

    def __init__(self, file: Path, record: str, start: int, stop: int):
        self.file, self.record, self.start, self.stop = file, record, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its bases start up to stop, counted within it."""
        return genome(self.file).read(self.record, self.start + start, self.start + stop)


class Places:
    """Windows of one length in stretches, each start as likely as another.

    Raises:
        ValueError: where all stretches are shorter.
    """

    def __init__(self, stretches: list[Stretch], length: int):
        self.stretches = [stretch for stretch in stretches if len(stretch) >= length]
        if not self.stretches:
            longest = max(map(len, stretches), default=0)
            raise ValueError(
                f"the longest stretch to train on has {longest} bases, and {length} are needed; set length lower"
            )
        self.length = length
        self._ends = np.cumsum([len(stretch) - length + 1 for stretch in self.stretches])

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """The bases of a window, (length,) uint8."""
        place = int(random.integers(self._ends[-1]))
        number = int(np.searchsorted(self._ends, place, side="right"))
        start = place - (int(self._ends[number - 1]) if number else 0)
        return self.stretches[number].read(start, start + self.length)


class Bases(Task):
    """What is given a base a step."""

    ids: Literal["plain", "hyenadna"] = "plain"
    """Of A C G T N: 0 to 4; or 7 to 11, behind special ones, as published HyenaDNA has them."""

    @property
    def names(self) -> Sequence[str]:
        """The letters, and special ones."""
        return LETTERS if self.ids == "plain" else HYENADNA

    @property
    def first(self) -> int:
        """The id of A."""
        return self.names.index("A")

    @property
    def inputs(self) -> Inputs:
        """All ids."""
        return Tokens(len(self.names))

    @property
    def tokenizer(self) -> Tokenizer:
        """Of bases."""
        return dna(self.names)


class DNA(Bases, name="dna"):
    """Predict the next base of genomes, one token a base.

    Source: Nguyen et al. (2023) "HyenaDNA", arXiv:2306.15794, sec. 3: single nucleotides, windows up to a million.

    Training windows start anywhere in what is trained on, and with `both_strands` half of them are read from the other
    strand. Held out is the end of every record; or, with `intervals`, what that BED file says: lines of record, start,
    end and split (train, valid or test), of which `held_out` says which is evaluated. Windows that are evaluated follow
    each other without overlap. U is T, lower case is as upper case, codes for several bases are N, which is never a
    target.

    Raises:
        ValueError: where a file is no FASTA or no BED file, an interval is not in it, a letter is no base, or all is
            too short for a window.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    files: list[str] = Field(min_length=1)
    """FASTA files, plain or gzip, or folders of them."""
    length: int = Field(1024, ge=1)
    """Bases in a window."""
    both_strands: bool = True
    """Whether half of the training windows are of the other strand."""
    tail: float = Field(0.1, gt=0, lt=1)
    """The fraction of every record, at its end, that is held out; not used with intervals."""
    intervals: str | None = None
    """A BED file with a fourth column train, valid or test."""
    held_out: HeldOut = "validation"
    """Of the intervals, what is evaluated."""

    asks_next: ClassVar[bool] = True

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [*self.files, *([self.intervals] if self.intervals else [])]

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @opened
    def _parts(self) -> tuple[Places, list[tuple[Stretch, int, int]]]:
        files = [file for name in self.files for file in _fasta_files(Path(name).expanduser())]
        if not files:
            raise ValueError(f"there is no FASTA file in {', '.join(map(shown, self.files))}")
        train, held = self._of_intervals(files) if self.intervals is not None else self._of_tails(files)
        windows = [
            (stretch, start, min(start + self.length + 1, len(stretch)))
            for stretch in held
            for start in range(0, len(stretch) - 1, self.length)
        ]
        if not windows:
            raise ValueError("what is held out has fewer than 2 bases; set tail higher, or give intervals")
        return Places(train, self.length + 1), windows

    def _of_tails(self, files: list[Path]) -> tuple[list[Stretch], list[Stretch]]:
        train, held = [], []
        for file in files:
            for record, length in genome(file).lengths.items():
                border = length - int(length * self.tail)
                train.append(Stretch(file, record, 0, border))
                held.append(Stretch(file, record, border, length))
        return train, held

    def _of_intervals(self, files: list[Path]) -> tuple[list[Stretch], list[Stretch]]:
        owner = {record: file for file in files for record in genome(file).lengths}
        table = Path(self.intervals or "").expanduser()
        if not table.is_file():
            raise ValueError(f"there is no file {shown(self.intervals)}; intervals is a BED file")
        parts: dict[str, list[Stretch]] = {"train": [], "valid": [], "test": []}
        for number, line in enumerate(table.read_text().splitlines(), 1):
            columns = line.split("\t")
            if not line.strip() or line.startswith(("#", "track", "browser")):
                continue
            where = f"{table}, line {number}"
            if len(columns) < 4 or not (columns[1].isdigit() and columns[2].isdigit()) or columns[3] not in parts:
                raise ValueError(f"{where} must be record, start, end and train, valid or test, with tabs between")
            record, start, stop = columns[0], int(columns[1]), int(columns[2])
            if record not in owner:
                raise ValueError(f"{where}: no file has a record {shown(record)}")
            if not start < stop <= genome(owner[record]).lengths[record]:
                length = genome(owner[record]).lengths[record]
                raise ValueError(f"{where}: {start} to {stop} is no part of {record}, which has {length} bases")
            parts[columns[3]].append(Stretch(owner[record], record, start, stop))
        return parts["train"], parts["valid" if self.held_out == "validation" else "test"]

    def prepare(self) -> None:
        """Open the files anew, and check that the memory holds a window."""
        super().prepare()
        require_memory(24 * self.length, f"a sequence of {self.length:,} bases", "set length lower")
        _ = self._parts

    def train_row(self, seed: int, number: int) -> Row:
        """A window of what is trained on."""
        random = random_stream(seed, TRAIN, number)
        ids = self._parts[0].draw(random)
        return self._next(reverse_complement(ids) if self.both_strands and random.integers(2) else ids)

    @property
    def eval_rows(self) -> int:
        """Windows over what is held out."""
        return len(self._parts[1])

    def eval_row(self, number: int) -> Row:
        """A window of what is held out; a stretch's last one may be shorter."""
        stretch, start, stop = self._parts[1][number]
        return self._next(stretch.read(start, stop))

    def _next(self, bases: np.ndarray) -> Row:
        targets = bases[1:].astype(np.int64)
        return Row(bases[:-1] + self.first, np.where(targets == UNKNOWN, IGNORE, targets + self.first))


class DNALabels(Bases, Labelled, name="dna_labels"):
    """What is a stretch of DNA, such as a splice junction of one kind or another? From a table.

    The table is a CSV or TSV file, plain or gzip, with a header: the columns `sequence` and `label` and, where there
    is a test set, `split` (train or test). Letters are read as in `dna`.

    Raises:
        ValueError: where there is no such table, or for a letter that is no base (with the line).
    """

    table: str
    """The file."""

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.table]

    @opened
    def longest(self) -> int:
        """Bases of the longest sequence."""
        return max(len(ids) for part in (self._sets.train, self._sets.test) for ids, _ in part)

    def look(self) -> Sets:
        """Sequences by label."""
        file = Path(self.table).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no file {shown(self.table)}; table is a CSV or TSV file")
        tab = "tsv" in "".join(file.suffixes)
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", newline="") as opened:
                lines = list(csv.DictReader(opened, delimiter="\t" if tab else ","))
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if not lines or not {"sequence", "label"} <= lines[0].keys():
            found = list(lines[0]) if lines else []
            raise ValueError(f"{file} has the columns {found}, and needs sequence and label, and maybe split")
        names = sorted({line["label"] for line in lines})
        parts: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
        for number, line in enumerate(lines, 2):
            split, text = line.get("split") or "train", (line["sequence"] or "").encode()
            if split not in parts or not text:
                raise ValueError(f"{file}, line {number}: a sequence and a split train or test are needed")
            parts[split].append((encode(text, f"{file}, line {number},"), names.index(line["label"])))
        return Sets(names, parts["train"], parts["test"])

    def row(self, item: tuple[np.ndarray, int]) -> Row:
        """Its bases and its label."""
        bases, label = item
        return Row(bases + self.first, label)


class Species(Bases, name="species"):
    """Which of several genomes is a stretch of DNA from?

    Source: Nguyen et al. (2023), arXiv:2306.15794, sec. 4.4.3.

    The folder has a folder a species with its FASTA files, or one file a species. A row draws a species, and a window
    of its genomes and strand. Held out is the end of every record; or, with `test`, a folder of the same species whose
    other strains alone are evaluated.

    Raises:
        ValueError: where there are fewer than two species, one of `test` is not trained on, or a genome is too short.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    folder: str
    """Where the genomes are."""
    test: str | None = None
    """A folder of other strains of the same species."""
    length: int = Field(1024, ge=1)
    """Bases in a window."""
    tail: float = Field(0.1, gt=0, lt=1)
    """The fraction of every record, at its end, that is held out; not used with test."""
    eval_examples: int = Field(500, ge=1)
    """Windows that are evaluated."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.folder, *([self.test] if self.test else [])]

    @property
    def targets(self) -> Label:
        """The species."""
        return Label(len(self._parts[0]))

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @opened
    def _parts(self) -> tuple[list[str], list[Places], list[Places]]:
        genomes = _species(self.folder)
        if len(genomes) < 2:
            raise ValueError(f"{shown(self.folder)} has {len(genomes)} species, and at least two are needed")
        others = genomes if self.test is None else _species(self.test)
        if missing := genomes.keys() ^ others.keys():
            raise ValueError(f"both folders need the same species; only one has {', '.join(sorted(missing))}")
        share = self.tail if self.test is None else 0.0
        train = [Places(_stretches(files, 0, 1 - share), self.length) for files in genomes.values()]
        held = [Places(_stretches(files, 1 - share if share else 0, 1), self.length) for files in others.values()]
        return list(genomes), train, held

    @property
    def classes(self) -> list[str]:
        """The names of the species."""
        return self._parts[0]

    def prepare(self) -> None:
        """Open the files anew."""
        super().prepare()
        _ = self._parts

    def _row(self, random: np.random.Generator, places: list[Places]) -> Row:
        label = int(random.integers(len(places)))
        ids = places[label].draw(random)
        return Row((reverse_complement(ids) if random.integers(2) else ids) + self.first, label)

    def train_row(self, seed: int, number: int) -> Row:
        """A window of a species drawn at random."""
        return self._row(random_stream(seed, TRAIN, number), self._parts[1])

    @property
    def eval_rows(self) -> int:
        """Windows that are evaluated."""
        return self.eval_examples

    def eval_row(self, number: int) -> Row:
        """A window of what is held out."""
        return self._row(random_stream(0, EVAL, number), self._parts[2])


def _species(name: str) -> dict[str, list[Path]]:
    """FASTA files by species."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {shown(name)}")
    below = {path.name: _fasta_files(path) for path in visible(folder) if path.is_dir()}
    return below or {file.name.split(".")[0]: [file] for file in _fasta_files(folder)}


def _stretches(files: list[Path], first: float, last: float) -> list[Stretch]:
    """The part of every record between two fractions of its length."""
    return [
        Stretch(file, record, int(length * first), int(length * last))
        for file in files
        for record, length in genome(file).lengths.items()
    ]
