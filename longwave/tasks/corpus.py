"""Text that was turned into tokens once: how a corpus is written, and how its documents are read."""

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longwave.errors import shown
from longwave.machine import required
from longwave.tasks.labelled import visible
from longwave.tasks.shards import replace
from longwave.tokenizer import END, Tokenizer, find, learn, plain_bytes
from longwave.tokenizer import FILE as TOKENIZER

MANIFEST, FORMAT = "manifest.json", 1
TOGETHER = 2**25  # bytes of small files that make one part
AT_ONCE = 1000  # documents given to a tokenizer at a time


class Part(NamedTuple):
    """Files that become one shard."""

    files: tuple[Path, ...]
    kind: str

    @property
    def fingerprint(self) -> str:
        """Of the names, sizes and times of the files: one that changed is read anew."""
        seen = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.files]
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()

    def texts(self, field: str) -> Iterator[str]:
        """Its documents.

        Raises:
            ValueError: for a line, a column or a byte that is not what it should be, with its place.
        """
        for file in self.files:
            yield from READERS[self.kind](file, field)


def _whole(file: Path, field: str) -> Iterator[str]:
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}; take it out") from error


def _lines(file: Path, field: str) -> Iterator[str]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is no JSON with a field {field!r}: {error}") from error
            if not isinstance(text, str):
                raise ValueError(f"{file}, line {number}: the field {field!r} is no text but {shown(text)}")
            yield text


def _columns(file: Path, field: str) -> Iterator[str]:
    """Parquet, or the Arrow files of a datasets folder."""
    arrow = required("pyarrow", "data")
    try:
        if file.suffix == ".arrow":
            batches: Any = arrow.ipc.open_stream(arrow.memory_map(str(file)))
        else:
            batches = required("pyarrow.parquet", "data").ParquetFile(file).iter_batches(columns=[field])
        for batch in batches:
            yield from batch.column(field).to_pylist()
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read, or has no column {field!r}: {error}") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {"text": _whole, "lines": _lines, "columns": _columns}


def _kind(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "lines"
    return "columns" if name.endswith((".parquet", ".arrow")) else "text"


def parts_of(names: Iterable[str]) -> list[Part]:
    """What is to be read: every file, those of a folder and its folders by name, without what is hidden.

    Raises:
        ValueError: where a name is neither, or there is nothing.
    """

    def walk(path: Path) -> Iterator[Path]:
        if path.is_dir():
            arrow = list(path.glob("*.arrow"))  # of datasets: beside them are only descriptions
            for below in (arrow and sorted(arrow)) or visible(path):
                yield from walk(below)
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"there is no file or folder {shown(str(path))}")

    parts: list[Part] = []
    held, size = [], 0
    for file in (file for name in names for file in walk(Path(name).expanduser())):
        if (kind := _kind(file)) != "text":
            parts.append(Part((file,), kind))
            continue
        held.append(file)
        size += file.stat().st_size
        if size > TOGETHER:
            parts.append(Part(tuple(held), "text"))
            held, size = [], 0
    parts += [Part(tuple(held), "text")] if held else []
    if not parts:
        raise ValueError("there is no file to read")
    return parts


def tokenize(
    names: list[str],
    folder: Path,
    tokenizer: Tokenizer | int | None = None,
    field: str = "text",
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Turn text into the tokens of a corpus; parts that are there, of files that did not change, stay.

    Args:
        names: files and folders: text (a document a file), .jsonl, .parquet, folders of the datasets package.
        folder: to fill.
        tokenizer: None is bytes; of one without an end of a document, a copy that has it is taken. Or a number of ids,
            for which byte pairs are learned from the text, unless the folder has some already.
        field: of JSON lines and tables, where the text is.
        jobs: threads.
        progress: told how many parts of how many are done.
    Raises:
        ValueError: for what cannot be read, with its place; a folder that holds something else.
    """
    parts = parts_of(names)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not {MANIFEST, TOKENIZER} & {path.name for path in folder.iterdir()}:
        raise ValueError(f"{folder} is not empty and was not made by longwave tokenize; name another folder")
    of: Tokenizer
    if not isinstance(tokenizer, int):
        of = (tokenizer or plain_bytes()).with_end()
    elif (folder / TOKENIZER).exists():
        of = find(folder)
        if of.vocab > tokenizer:
            raise ValueError(f"{folder} has a tokenizer of {of.vocab} ids, not {tokenizer}; name another folder")
    else:
        of = learn((text for part in parts for text in part.texts(field)), tokenizer)
    replace(folder / TOKENIZER, lambda half: half.write_text(of.text, encoding="utf-8"))
    identity = hashlib.sha256(of.text.encode()).hexdigest()
    dtype = np.uint16 if of.vocab <= 2**16 else np.uint32

    def write(number: int, part: Part) -> None:
        file = _shard(folder, number)
        made_of = f"{part.fingerprint} {identity} {field}"
        with contextlib.suppress(OSError, SafetensorError, KeyError), safe_open(file, "numpy") as stored:
            if (stored.metadata() or {})["made_of"] == made_of:
                return
        ids: list[np.ndarray] = []
        sizes: list[int] = []
        texts: list[str] = []

        def flush() -> None:
            for text, one in zip(texts, of.encode(texts)):
                ids.append(np.append(one, [of.end]).astype(dtype))
                sizes.append(len(text.encode()))
            texts.clear()

        for text in part.texts(field):
            texts.append(text)
            if len(texts) == AT_ONCE:
                flush()
        flush()
        tensors = {
            "tokens": np.concatenate(ids) if ids else np.zeros(0, dtype),
            "ends": np.cumsum([len(one) for one in ids], dtype=np.int64),
            "bytes": np.array(sizes, np.int64),
        }
        about = {"made_of": made_of, "sha256": hashlib.sha256(tensors["tokens"].data).hexdigest()}
        replace(file, lambda half: save_file(tensors, half, about))

    manifest = {"longwave_tokens": FORMAT, "parts": len(parts), "vocab": of.vocab, "end": of.end, "tokenizer": identity}

    def say(whole: bool) -> None:
        text = json.dumps({**manifest, "whole": whole}, indent=1) + "\n"
        replace(folder / MANIFEST, lambda half: half.write_text(text))

    say(whole=False)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(write, number, part) for number, part in enumerate(parts)]
        try:
            for done, finished in enumerate(as_completed(running), 1):
                finished.result()
                progress(done, len(parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    say(whole=True)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


class TokenFiles:
    """A corpus: documents one behind the other, each with its end, read from disk where they are asked for.

    Args:
        folder: that :func:`tokenize` filled.
    Attributes:
        ends: where each document ends, (documents,) int64.
        bytes: of the text of each.
        tokenizer: that made them.
        vocab, end: see :class:`longwave.tokenizer.Tokenizer`.
        hash: of all tokens.
    Raises:
        ValueError: where it is none, or not whole.
    """

    def __init__(self, folder: Path):
        try:
            about = json.loads((folder / MANIFEST).read_text())
            parts, self.vocab, self.end = about["parts"], about["vocab"], about["end"]
            found, whole = about["longwave_tokens"], about["whole"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no tokens: {MANIFEST} cannot be read; run longwave tokenize") from error
        if not whole:
            raise ValueError(f"{folder} does not hold all of its tokens: run longwave tokenize again, which goes on")
        if found != FORMAT:
            raise ValueError(f"{folder} has format {found} and this longwave reads {FORMAT}; tokenize it again")
        self.folder = folder
        made_of_bytes = about["tokenizer"] == "bytes"  # from before such a corpus had the file
        self.tokenizer = plain_bytes(END) if made_of_bytes else find(folder)
        ends, sizes, digest, total = [], [], hashlib.sha256(), 0
        self._starts = [0]
        for number in range(parts):
            try:
                with safe_open(_shard(folder, number), "numpy") as stored:
                    ends.append(stored.get_tensor("ends") + total)
                    sizes.append(stored.get_tensor("bytes"))
                    digest.update(stored.metadata()["sha256"].encode())
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(f"{_shard(folder, number)} is missing or cut short; run longwave tokenize") from error
            total = int(ends[-1][-1]) if len(ends[-1]) else total
            self._starts.append(total)
        self.ends, self.bytes, self.hash = np.concatenate(ends), np.concatenate(sizes), digest.hexdigest()
        self._part = functools.lru_cache(maxsize=256)(self._open)

    def __len__(self) -> int:
        return self._starts[-1]

    def bytes_in(self, starts: np.ndarray, stops: np.ndarray) -> float:
        """Of the text of stretches of tokens; in a document's midst by its mean."""
        places, sizes = np.append(0, self.ends), np.append(0, np.cumsum(self.bytes))
        return float((np.interp(stops, places, sizes) - np.interp(starts, places, sizes)).sum())

    def _open(self, number: int) -> Any:
        return safe_open(_shard(self.folder, number), "numpy").__enter__().get_slice("tokens")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start up to stop, (stop - start,) int64."""
        found = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, until = self._starts[number], min(stop, self._starts[number + 1])
            if until > start:
                found.append(self._part(number)[start - base : until - base].astype(np.int64))
            start, number = until, number + 1
        return np.concatenate(found) if found else np.zeros(0, np.int64)
