"""Byte-level language modelling of whatever files there are."""

import functools
import lzma
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from longwave.errors import choose, shown
from longwave.tasks.base import EVAL, HIDE, TRAIN, Errors, Score, Task, random_stream
from longwave.tasks.forms import CHARACTERS, IGNORE, Row, Tokens, next_token

BOOKS = Path(__file__).with_name("books")
_CHUNK = 2**20  # bytes given to a compressor at a time
_HISTORY = 2**26  # bytes of training text a compressor is shown at most: the reach of xz -9


class Corpus:
    """Files laid end to end as one array of bytes, mapped into memory, so only what is read is loaded.

    Raises:
        ValueError: where a file is missing, unreadable, empty, or no regular file.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self.paths = [Path(path) for path in paths]
        self.ends = np.cumsum([_size(path) for path in self.paths], dtype=np.int64)
        self._map = functools.lru_cache(maxsize=64)(self._open)  # each map holds a file descriptor

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _open(self, file: int) -> np.ndarray:
        return np.memmap(self.paths[file], np.uint8, mode="r")

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the bytes from start up to stop, (stop - start,) uint8; 0 <= start <= stop <= len."""
        assert 0 <= start <= stop <= len(self), f"[{start}, {stop}) of {len(self)} bytes"
        out = np.empty(stop - start, np.uint8)
        file, position = int(np.searchsorted(self.ends, start, side="right")), start
        while position < stop:
            end = int(self.ends[file])
            begin = int(self.ends[file - 1]) if file else 0
            until = min(end, stop)
            out[position - start : until - start] = self._map(file)[position - begin : until - begin]
            file, position = file + 1, until
        return out


def _size(path: Path) -> int:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(
                f"{shown(str(path))} is neither a regular file nor a folder; copy what it holds into a file"
            )
        path.open("rb").close()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {shown(str(path))}; correct its name, or give book:NAME") from error
    except OSError as error:
        raise _unreadable(error) from error
    if info.st_size == 0:
        raise ValueError(f"{str(path)!r} is empty (0 bytes, at least 1 needed); leave it out of `files`")
    return info.st_size


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{str(error.filename)!r} cannot be read ({error.strerror}); change its permissions")


def _book(name: str) -> Path:
    books = {f"book:{path.stem}": path for path in sorted(BOOKS.glob("*.txt"))}
    return choose("book", name, books)


def _regular_files(folder: Path) -> list[Path]:
    """The files below a folder, by relative path, but hidden and empty ones."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse)
    inside = sorted((Path(where, name).relative_to(folder) for where, _, names in walk for name in names), key=str)
    shown = (folder / path for path in inside if not any(part.startswith(".") for part in path.parts))
    found = [path for path in shown if path.is_file() and path.stat().st_size]
    if not found:
        raise ValueError(f"the folder {str(folder)!r} holds no file that is neither hidden nor empty; put text in it")
    return found


@functools.lru_cache(maxsize=8)
def _open(files: tuple[str, ...]) -> Corpus:
    paths: list[Path] = []
    for name in files:
        path = _book(name) if name.startswith("book:") else Path(name).expanduser()
        try:
            paths += _regular_files(path) if path.is_dir() else [path]
        except OSError as error:
            raise _unreadable(error) from error
    return Corpus(paths)


Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Text(Task, name="text"):
    """Predict the next byte of any files, text or not; the last part of them is kept for evaluation.

    The files, in the order given, make one corpus of bytes. Training windows start anywhere in the part before the
    held-out one. Evaluation windows all lie inside the held-out part and overlap, so that every held-out byte but the
    first, which has nothing before it, is scored exactly once: the first window scores all its targets, each later
    one only those that no window before it scored, the last `stride`. The last window ends with the corpus, and so
    starts less than `stride` after the one before. A held-out part too short for a window is one shorter window.
    """

    files: Files = Field(["book:emma"], min_length=1)
    """One or several: files, folders (all files below, by relative path, but hidden and empty ones), `book:NAME`."""
    length: int = Field(512, ge=1)
    """Tokens in a window."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """The fraction of the corpus, at its end, that is evaluated and never trained on."""
    stride: int | None = Field(None, ge=1)
    """Bytes from one evaluation window to the next; None is half a window. Smaller is more context and slower."""

    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False
    asks_next: ClassVar[bool] = True

    @model_validator(mode="after")
    def _stride_leaves_no_gap(self) -> "Text":
        if self._stride > self.length:
            raise ValueError(
                f"stride {self.stride} is above length {self.length}, so bytes between windows would not be scored; "
                f"set stride to {self.length} or less"
            )
        return self

    @property
    def sources(self) -> list[str]:
        """The files, without the books that come with longwave."""
        return [name for name in self.files if not name.startswith("book:")]

    @property
    def _stride(self) -> int:
        return self.stride or max(1, self.length // 2)

    @property
    def inputs(self) -> Tokens:
        """One id a byte value."""
        return Tokens(256)

    @property
    def names(self) -> list[str]:
        """The characters of ASCII."""
        return CHARACTERS

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @property
    def corpus(self) -> Corpus:
        """The files as one array of bytes; opened when first asked for, and again by prepare()."""
        return _open(tuple(self.files))

    @property
    def train_bytes(self) -> int:
        """Where the held-out part begins.

        Raises:
            ValueError: where a file or folder is missing, empty or unreadable, or a part is too short for a window.
        """
        total = len(self.corpus)
        train = total - int(total * self.held_out)
        if train < self.length + 1:
            raise ValueError(
                f"the training part has {train} of {total} bytes, and length {self.length} needs {self.length + 1}; "
                "give more files, or set length or held_out lower"
            )
        if total - train < 2:
            raise ValueError(
                f"the held-out part has {total - train} of {total} bytes, and at least 2 are needed; "
                f"give more files, or set held_out above {self.held_out}"
            )
        return train

    def prepare(self) -> None:
        """Open the files anew and check all that train_bytes checks.

        Raises:
            ValueError: as train_bytes.
        """
        _open.cache_clear()
        _ = self.train_bytes

    def train_row(self, seed: int, number: int) -> Row:
        """A window that starts at a random position of the training part."""
        return next_token(self.train_window(seed, number))

    def train_window(self, seed: int, number: int) -> np.ndarray:
        """The bytes of training window ``number``, (length + 1,) uint8."""
        start = int(random_stream(seed, TRAIN, number).integers(self.train_bytes - self.length))
        return self.corpus.read(start, start + self.length + 1)

    def _eval_plan(self) -> tuple[int, int, int]:
        """(bytes to score, tokens in a window, windows)."""
        scored = len(self.corpus) - self.train_bytes - 1
        length = min(self.length, scored)
        return scored, length, 1 + math.ceil((scored - length) / self._stride)

    @property
    def eval_rows(self) -> int:
        """How many windows it takes to score the held-out part."""
        return self._eval_plan()[2]

    def eval_row(self, number: int) -> Row:
        """Window ``number`` over the held-out part."""
        scored, length, _ = self._eval_plan()
        start = min(number * self._stride, scored - length)
        begin = self.train_bytes + start
        inputs, targets = next_token(self.corpus.read(begin, begin + length + 1).astype(np.int64))
        if number > 0:
            targets = targets.copy()
            targets[: (number - 1) * self._stride + length - start] = IGNORE
        return Row(inputs, targets)

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Loss in nats a byte, the same in bits, and accuracy."""
        named = super().metrics(score)
        return {**named, "bits_per_byte": named["loss"] / math.log(2)}

    def baselines(self) -> dict[str, float]:
        """Bits per held-out byte of gzip and xz, alone and as what the held-out part adds to the training text.

        Of the training text at most the last 64 MiB are shown. xz -9 takes about 700 MB of memory.
        """
        total, train = len(self.corpus), self.train_bytes
        history = max(0, train - _HISTORY)
        bits = {}
        for name, compressor in _COMPRESSORS.items():
            added = self._compressed(compressor, history, total) - self._compressed(compressor, history, train)
            bits[name] = 8 * self._compressed(compressor, train, total) / (total - train)
            bits[f"{name} given the training text"] = 8 * added / (total - train)
        return bits

    def _compressed(self, compressor: Callable[[], Any], start: int, stop: int) -> int:
        """Bytes that the corpus from start to stop takes when compressed."""
        encode = compressor()
        chunks = (self.corpus.read(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK))
        return sum(len(encode.compress(chunk.tobytes())) for chunk in chunks) + len(encode.flush())


class MaskedText(Task, name="masked_text"):
    """Tell hidden bytes of any files from what stands on both sides; the last part of the files is for evaluation.

    Windows are those of `text`. In each, a share of the bytes is asked for; of these 80 % appear as the token 256, 10 %
    as a random byte, and 10 % as they are. Evaluation windows follow each other without overlap but for the last one,
    and which of their bytes are hidden depends on the window alone.

    Source: Devlin et al. (2018) "BERT", arXiv:1810.04805, sec. 3.1.
    """

    files: Files = Field(["book:emma"], min_length=1)
    """As in `text`."""
    length: int = Field(512, ge=1)
    """Tokens in a window."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """The fraction of the corpus, at its end, that is evaluated and never trained on."""
    share: float = Field(0.15, gt=0, le=1)
    """Of the bytes of a window, that are asked for; at least one is."""

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    @property
    def sources(self) -> list[str]:
        """The files, without the books that come with longwave."""
        return [name for name in self.files if not name.startswith("book:")]

    @property
    def inputs(self) -> Tokens:
        """One id a byte value, and one that hides."""
        return Tokens(257)

    @property
    def names(self) -> list[str]:
        """The characters of ASCII."""
        return CHARACTERS

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @property
    def _text(self) -> Text:
        return Text(files=self.files, length=self.length, held_out=self.held_out, stride=self.length)

    def prepare(self) -> None:
        """As :meth:`Text.prepare`."""
        self._text.prepare()

    def train_row(self, seed: int, number: int) -> Row:
        """A window that starts at a random position of the training part."""
        window = self._text.train_window(seed, number)[:-1]
        return self._hide(window, random_stream(seed, HIDE, number))

    @property
    def eval_rows(self) -> int:
        """How many windows there are over the held-out part."""
        return self._text.eval_rows

    def eval_row(self, number: int) -> Row:
        """Window ``number`` over the held-out part."""
        return self._hide(self._text.eval_row(number).inputs, random_stream(0, EVAL, number))

    def _hide(self, ids: np.ndarray, random: np.random.Generator) -> Row:
        asked = np.zeros(len(ids), bool)
        asked[random.permutation(len(ids))[: max(1, round(self.share * len(ids)))]] = True
        fate, noise = random.random(len(ids)), random.integers(256, size=len(ids))
        shown = np.where(fate < 0.8, 256, np.where(fate < 0.9, noise, ids))
        return Row(np.where(asked, shown, ids), np.where(asked, ids.astype(np.int64), IGNORE))


_COMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip -9": lambda: zlib.compressobj(9, wbits=31),  # 31: with the header and the trailer of a gzip file
    "xz -9": lambda: lzma.LZMACompressor(preset=9),
}
