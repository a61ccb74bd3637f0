"""Byte-level language modelling of whatever files there are."""

import functools
import lzma
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from longwave.errors import choose, shown
from longwave.tasks.base import EVAL, HIDE, TRAIN, Errors, Score, Task, opened, random_stream
from longwave.tasks.forms import CHARACTERS, IGNORE, Inputs, Row, Tokens, next_token
from longwave.tasks.stretches import Stretches, split
from longwave.tokenizer import MASK, Tokenizer, plain_bytes

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
        return np.asarray(np.memmap(self.paths[file], np.uint8, mode="r"))

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the bytes from start up to stop, (stop - start,) uint8; 0 <= start <= stop <= len."""
        assert 0 <= start <= stop <= len(self), f"[{start}, {stop}) of {len(self)} bytes"
        out = np.empty(stop - start, np.uint8)
        file, position = int(self.ends.searchsorted(start, side="right")), start
        while position < stop:
            end = int(self.ends[file])
            begin = int(self.ends[file - 1]) if file else 0
            until = min(end, stop)
            out[position - start : until - start] = self._map(file)[position - begin : until - begin]
            file, position = file + 1, until
        return out

    def documents(self, separator: str) -> np.ndarray:
        """Where each ends, (n,) int64: behind a separator, and with its file."""
        found = [
            match.end() + int(end) - size
            for number, (end, size) in enumerate(zip(self.ends, np.diff(self.ends, prepend=0)))
            for match in re.finditer(re.escape(separator.encode()), self._map(number).data)
        ]
        return np.union1d(np.array(found, np.int64), self.ends)


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


def _open(files: list[str]) -> Corpus:
    paths: list[Path] = []
    for name in files:
        path = _book(name) if name.startswith("book:") else Path(name).expanduser()
        try:
            paths += _regular_files(path) if path.is_dir() else [path]
        except OSError as error:
            raise _unreadable(error) from error
    return Corpus(paths)


class ByByte(Task):
    """What is given a byte a step."""

    @property
    def inputs(self) -> Inputs:
        """One id a byte value."""
        return Tokens(256)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of bytes."""
        return plain_bytes()

    @property
    def names(self) -> list[str]:
        """The characters of ASCII."""
        return CHARACTERS


class AnyFiles(ByByte):
    """Windows of bytes of any files, text or not.

    What is trained on, of all files in the order given, is laid end to end as one, and so is what is held out. Training
    windows start anywhere. Evaluation windows overlap where `_stride` is below the length, and the last one ends with
    the held-out part, so that it starts less than `_stride` after the one before. A held-out part too short for a
    window is one shorter window.
    """

    files: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        ["book:emma"], min_length=1
    )
    """One or several: files, folders (all files below, by relative path, but hidden and empty ones), `book:NAME`."""
    length: int = Field(512, ge=1)
    """Tokens in a window."""
    held_out: Literal["tail", "files", "documents"] = "tail"
    """What is evaluated and never trained on: the end of every file, or single files or documents, spread evenly."""
    share: float = Field(0.1, gt=0, lt=1)
    """The fraction that is held out: of every file, or of the number of files or documents."""
    separator: str = Field("\n\n", min_length=1)
    """What ends a document, where documents are held out; as the file does."""

    @property
    def sources(self) -> list[str]:
        """The files, without the books that come with longwave."""
        return [name for name in self.files if not name.startswith("book:")]

    @property
    def longest(self) -> int:
        """A window."""
        return self.length

    @property
    def _stride(self) -> int:
        """Steps from one evaluation window to the next."""
        return self.length

    @opened
    def parts(self) -> tuple[Stretches, Stretches]:
        """What is trained on and what is held out.

        Raises:
            ValueError: where a file or folder is missing, empty or unreadable, or a part is too short for a window.
        """
        corpus = _open(self.files)
        ends = corpus.documents(self.separator) if self.held_out == "documents" else corpus.ends
        train, held = split(corpus, ends, self.held_out != "tail", self.share)
        if len(train) < self.length + 1:
            raise ValueError(
                f"the training part has {len(train)} of {len(corpus)} bytes, and length {self.length} needs "
                f"{self.length + 1}; give more files, or set length or share lower"
            )
        if len(held) < 2:
            raise ValueError(
                f"the held-out part has {len(held)} of {len(corpus)} bytes, and at least 2 are needed; "
                f"give more files, or set share above {self.share}"
            )
        return train, held

    def prepare(self) -> None:
        """Open the files anew and check all that :meth:`parts` checks.

        Raises:
            ValueError: as there.
        """
        super().prepare()
        _ = self.parts

    def train_window(self, seed: int, number: int) -> np.ndarray:
        """The bytes of training window ``number``, (length + 1,) uint8."""
        train, _ = self.parts
        start = int(random_stream(seed, TRAIN, number).integers(len(train) - self.length))
        return train.read(start, start + self.length + 1)

    @property
    def eval_rows(self) -> int:
        """How many windows it takes to reach all that is held out."""
        scored = len(self.parts[1]) - 1
        return 1 + max(0, math.ceil((scored - self.length) / self._stride))

    def eval_window(self, number: int) -> tuple[np.ndarray, int]:
        """The bytes of window ``number`` over what is held out, (up to length + 1,) int64, and how many of its targets
        a window before it has."""
        _, held = self.parts
        length = min(self.length, len(held) - 1)
        start = min(number * self._stride, len(held) - 1 - length)
        seen = (number - 1) * self._stride + length - start if number else 0
        return held.read(start, start + length + 1).astype(np.int64), seen


class Text(AnyFiles, name="text"):
    """Predict the next byte of any files, text or not.

    Every held-out byte but the first, which has nothing before it, is scored exactly once: the first evaluation window
    scores all its targets, each later one only those that no window before it scored, the last `stride`.
    """

    stride: int | None = Field(None, ge=1)
    """Bytes from one evaluation window to the next; None is half a window. Smaller is more context and slower."""

    metric: ClassVar[str] = "bits_per_byte"
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
    def _stride(self) -> int:
        return self.stride or max(1, self.length // 2)

    def train_row(self, seed: int, number: int) -> Row:
        """A window that starts at a random position of what is trained on."""
        return next_token(self.train_window(seed, number))

    def eval_row(self, number: int) -> Row:
        """Window ``number`` over what is held out."""
        window, seen = self.eval_window(number)
        inputs, targets = next_token(window)
        return Row(inputs, np.where(np.arange(len(targets)) < seen, IGNORE, targets))

    def goes_on(self, number: int) -> bool:
        """All that is held out is one text."""
        return True

    def metrics(self, score: Score | Errors) -> dict[str, float]:
        """Loss in nats a byte, the same in bits, and accuracy."""
        named = super().metrics(score)
        return {**named, "bits_per_byte": named["loss"] / math.log(2)}

    def baselines(self) -> dict[str, float]:
        """Bits per held-out byte of gzip and xz, alone and as what the held-out part adds to the training text.

        Of the training text at most the last 64 MiB are shown. xz -9 takes about 700 MB of memory.
        """
        train, held = self.parts
        bits, history = {}, max(0, len(train) - _HISTORY)
        for name, compressor in _COMPRESSORS.items():
            behind = _compressed(compressor, chain(_chunks(train, history), _chunks(held)))
            bits[name] = 8 * _compressed(compressor, _chunks(held)) / len(held)
            added = behind - _compressed(compressor, _chunks(train, history))
            bits[f"{name} given the training text"] = 8 * added / len(held)
        return bits


class MaskedText(AnyFiles, name="masked_text"):
    """Tell hidden bytes of any files from what stands on both sides.

    In each window a share of the bytes is asked for; of these 80 % appear as the token 256, 10 % as a random byte, and
    10 % as they are. Evaluation windows follow each other without overlap but for the last one, and which of their
    bytes are hidden depends on the window alone.

    Source: Devlin et al. (2018) "BERT", arXiv:1810.04805, sec. 3.1.
    """

    hidden: float = Field(0.15, gt=0, le=1)
    """The fraction of the bytes of a window that is asked for; at least one is."""

    @property
    def inputs(self) -> Inputs:
        """One id a byte value, and one that hides."""
        return Tokens(257)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of bytes, and the one that hides."""
        return plain_bytes(MASK)

    def train_row(self, seed: int, number: int) -> Row:
        """A window that starts at a random position of what is trained on."""
        return self._hide(self.train_window(seed, number)[:-1], random_stream(seed, HIDE, number))

    def eval_row(self, number: int) -> Row:
        """Window ``number`` over what is held out."""
        return self._hide(self.eval_window(number)[0][:-1], random_stream(0, EVAL, number))

    def _hide(self, ids: np.ndarray, random: np.random.Generator) -> Row:
        asked = np.zeros(len(ids), bool)
        asked[random.permutation(len(ids))[: max(1, round(self.hidden * len(ids)))]] = True
        fate, noise = random.random(len(ids)), random.integers(256, size=len(ids))
        shown = np.where(fate < 0.8, 256, np.where(fate < 0.9, noise, ids))
        return Row(np.where(asked, shown, ids), np.where(asked, ids.astype(np.int64), IGNORE))


def _chunks(part: Stretches, start: int = 0) -> Iterator[bytes]:
    """The bytes of a part from a place on."""
    for at in range(start, len(part), _CHUNK):
        yield part.read(at, min(at + _CHUNK, len(part))).tobytes()


def _compressed(compressor: Callable[[], Any], chunks: Iterable[bytes]) -> int:
    """Bytes that they take when compressed."""
    encode = compressor()
    return sum(len(encode.compress(chunk)) for chunk in chunks) + len(encode.flush())


_COMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip -9": lambda: zlib.compressobj(9, wbits=31),  # 31: with the header and the trailer of a gzip file
    "xz -9": lambda: lzma.LZMACompressor(preset=9),
}
