"""Sound: what is heard in a clip, and what sample comes next."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from longwave.errors import shown
from longwave.machine import required
from longwave.tasks.base import TRAIN, Errors, Score, Task, opened, random_stream
from longwave.tasks.forms import Inputs, Row, Signal, Tokens
from longwave.tasks.labelled import Labelled, Sets, by_class, existing_folder, visible
from longwave.tasks.mu_law import mu_law_decode, mu_law_encode
from longwave.tasks.stretches import spread

ENDINGS = (".wav", ".flac", ".ogg", ".aiff", ".aif", ".w64")
FORMATS = "WAV, FLAC, OGG or AIFF"


def read(file: Path, start: int = 0, count: int = -1) -> tuple[np.ndarray, int]:
    """Samples of a file in [-1, 1], channels averaged, (L,) float32, and how many a second.

    Args:
        start, count: which; all by default.
    Raises:
        ValueError: where it is no sound file, or is cut short.
    """
    soundfile = required("soundfile", "data")
    try:
        x, rate = soundfile.read(file, start=start, frames=count, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} is not a whole {FORMATS} file: {error}; mend it or take it out") from error
    if count >= 0 and len(x) < count:
        raise ValueError(f"{file} ends at sample {start + len(x)} and says that it has {start + count}; get it again")
    return x.mean(axis=1), rate


def write(file: Path, x: np.ndarray, rate: int) -> None:
    """Write samples in [-1, 1], (L,), as 16 bits each.

    Raises:
        ValueError: for a name whose ending is no format of sound.
        OSError: where it cannot be written.
    """
    check_name(file)
    try:
        required("soundfile", "data").write(file, x, rate, subtype=None if file.suffix == ".ogg" else "PCM_16")
    except RuntimeError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def check_name(file: Path) -> None:
    """Raises ValueError for a name whose ending is no format of sound, or that is in no folder."""
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"{file} must end in one of {', '.join(ENDINGS)}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")


def _length(file: Path) -> tuple[int, int]:
    """Samples of a file, and how many a second, by its header."""
    soundfile = required("soundfile", "data")
    try:
        info = soundfile.info(file)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} is not a whole {FORMATS} file: {error}; mend it or take it out") from error
    return info.frames, info.samplerate


def _at(rate: int, x: np.ndarray, found: int) -> np.ndarray:
    """Samples taken at one rate as at another, what lies above its half filtered out."""
    return x if rate == found else required("soxr", "data").resample(x, found, rate).astype(np.float32)


class Audio(Labelled, name="audio"):
    """What is heard in a clip? One of several classes, from its samples.

    Source: raw speech classification as in Gu et al. (2021), arXiv:2111.00396, sec. 4.3, with its test at half the
    sampling rate: `longwave eval RUN task.rate=4000`, for which the model hears half as many steps a second.

    The folder has a folder of sound files a class, or such below `train` and `test`; or `labels.csv` with the columns
    file, label and, where there is a test set, split (train or test). Channels are averaged. Samples lie in [-1, 1].

    Raises:
        ValueError: where there is nothing of the kind, for a class without a file, a file that is cut short or of
            another rate than `rate` allows, and a line of labels.csv that names no file (with its number).
    """

    folder: str
    """Where the sound files are."""
    seconds: float = Field(1.0, gt=0)
    """Of a clip at most; what is longer is cut at its end."""
    rate: int | None = Field(None, ge=1)
    """Samples a second, to which files are resampled; None takes them as they are, all alike."""

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.folder]

    @property
    def inputs(self) -> Inputs:
        """One sample a step."""
        return Signal(1)

    @property
    def steps_per_second(self) -> float:
        """Samples."""
        return float(self._rate)

    @property
    def longest(self) -> int:
        """Samples of the longest clip."""
        return max(1, math.floor(self.seconds * self._rate))

    @opened
    def _rate(self) -> int:
        return self.rate or _length(self._sets.train[0][0])[1]

    def look(self) -> Sets:
        """Sound files by class."""
        folder = existing_folder(self.folder)
        table = folder / "labels.csv"
        return _of_table(table) if table.exists() else by_class(folder, ENDINGS)

    def row(self, item: tuple[Path, int]) -> Row:
        """The samples of a file and its class."""
        file, label = item
        x, found = read(file)
        if self.rate is None and found != self._rate:
            raise ValueError(f"{file} has {found} samples a second and others {self._rate}; set rate to resample them")
        x = _at(self._rate, x, found)[: self.longest]
        if not len(x):
            raise ValueError(f"{file} has no samples; take it out")
        return Row(x[:, None], label)


def _of_table(table: Path) -> Sets:
    with table.open(newline="") as opened:
        reader = csv.DictReader(opened)
        if not {"file", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table} has the columns {reader.fieldnames}, and needs file and label, and maybe split")
        lines = [(reader.line_num, line) for line in reader]
    names = sorted({line["label"] for _, line in lines})
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for number, line in lines:
        file, split = table.parent / line["file"], line.get("split") or "train"
        if not file.is_file():
            raise ValueError(f"{table}, line {number}: there is no file {shown(line['file'])}")
        if split not in parts:
            raise ValueError(f"{table}, line {number}: the split {shown(split)} must be train or test")
        parts[split].append((file, names.index(line["label"])))
    return Sets(names, parts["train"], parts["test"])


class AudioTokens(Task, name="audio_tokens"):
    """Predict the next sample of sound, of which each is one of a few hundred mu-law levels.

    Source: Goel et al. (2022) "It's Raw!", arXiv:2202.09729, sec. 5.1: mu-law levels, windows of some seconds,
    bits a sample as the metric.

    Training windows start anywhere in what is trained on of a file; those that are evaluated follow each other without
    overlap. Channels are averaged.

    Raises:
        ValueError: where there is no sound file, one is cut short or of another rate, or all are too short.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    files: list[str] = Field(min_length=1)
    """Sound files, or folders of them."""
    length: int = Field(8000, ge=1)
    """Samples in a window."""
    levels: int = Field(256, ge=2, le=65536)
    """Of mu-law."""
    held_out: Literal["tail", "files"] = "tail"
    """What is evaluated and never trained on: the end of every file, or single files, spread evenly."""
    share: float = Field(0.1, gt=0, lt=1)
    """The fraction that is held out, of every file or of their number."""

    metric: ClassVar[str] = "bits_per_sample"
    asks_next: ClassVar[bool] = True

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return self.files

    @property
    def inputs(self) -> Inputs:
        """Levels."""
        return Tokens(self.levels)

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @opened
    def _parts(self) -> tuple[int, list[tuple[Path, int, int]], list[tuple[Path, int, int]]]:
        """The rate; of each file where windows may start and what they may reach, for training and for evaluation."""
        files: list[Path] = []
        for name in self.files:
            path = Path(name).expanduser()
            files += [p for p in visible(path) if p.suffix.lower() in ENDINGS] if path.is_dir() else [path]
        if not files:
            raise ValueError(f"there is no {FORMATS} file in {', '.join(map(shown, self.files))}")
        rate, train, held = 0, [], []
        for file, out in zip(files, spread(len(files), self.share)):
            if not file.is_file():
                raise ValueError(f"there is no file {shown(str(file))}")
            count, found = _length(file)
            rate = rate or found
            if found != rate:
                raise ValueError(f"{file} has {found} samples a second and {files[0]} has {rate}; resample one of them")
            border = count - int(count * (self.share if self.held_out == "tail" else out))
            train += [(file, start, border) for start in [0] if border > self.length]
            held += [
                (file, start, min(start + self.length + 1, count)) for start in range(border, count - 1, self.length)
            ]
        if not train or not held:
            raise ValueError(
                f"there are no {self.length + 1} samples in a row to train on, or no 2 to evaluate; give longer files "
                "or more, or set length lower"
            )
        return rate, train, held

    @property
    def rate(self) -> int:
        """Samples a second."""
        return self._parts[0]

    def prepare(self) -> None:
        """Look for the files anew."""
        super().prepare()
        _ = self._parts

    def train_row(self, seed: int, number: int) -> Row:
        """A window that starts anywhere in the training parts, each place as likely as another."""
        train = self._parts[1]
        ends = np.cumsum([stop - self.length for _, _, stop in train])
        place = int(random_stream(seed, TRAIN, number).integers(ends[-1]))
        part = int(np.searchsorted(ends, place, side="right"))
        start = place - (int(ends[part - 1]) if part else 0)
        return self._row(train[part][0], start, start + self.length + 1)

    @property
    def eval_rows(self) -> int:
        """Windows over the held-out parts."""
        return len(self._parts[2])

    def eval_row(self, number: int) -> Row:
        """A window of the held-out parts; a file's last one may be shorter."""
        return self._row(*self._parts[2][number])

    def _row(self, file: Path, start: int, stop: int) -> Row:
        x, _ = read(file, start, stop - start)
        ids = mu_law_encode(torch.from_numpy(x).clamp(-1, 1), self.levels)
        return Row(ids[:-1], ids[1:])

    def save(self, ids: Sequence[int], file: Path) -> None:
        """Write tokens as sound."""
        write(file, mu_law_decode(torch.as_tensor(ids), self.levels).numpy(), self.rate)

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Loss in nats a sample, the same in bits, and accuracy."""
        named: dict[str, Any] = super().metrics(score)
        return {**named, "bits_per_sample": named["loss"] / math.log(2)}
