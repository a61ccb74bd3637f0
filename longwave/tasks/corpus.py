"""Text that was turned into tokens once: how a corpus is written, and how its documents are read."""

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longwave.errors import shown
from longwave.machine import required
from longwave.tasks.labelled import visible
from longwave.tasks.shards import replace

MANIFEST, TOKENIZER, FORMAT = "manifest.json", "tokenizer.json", 1
END = "<|endoftext|>"
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")  # what published tokenizers call the end of a document
TOGETHER = 2**25  # bytes of small files that make one part
AT_ONCE = 1000  # documents given to a tokenizer at a time


class Tokenizer(Protocol):
    """What turns texts into ids.

    Attributes:
        vocab: how many ids there are, that of the end of a document among them.
        end: that id.
    """

    vocab: int
    end: int

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Bytes:
    """UTF-8: an id a byte, and 256 for the end of a document."""

    vocab, end = 257, 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; an end becomes nothing, and what is no UTF-8 a replacement character."""
        return bytes(i for i in ids if i != self.end).decode(errors="replace")


class Subwords:
    """A tokenizer file of the tokenizers package, which transformers has beside its models.

    Args:
        file: tokenizer.json.
    Raises:
        ValueError: where it is none.
    """

    def __init__(self, file: Path):
        tokenizers = required("tokenizers", "data")
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer.json of the tokenizers package: {error}") from error
        known = [self.inner.token_to_id(name) for name in ENDS]
        found = [i for i in known if i is not None]
        self.vocab = self.inner.get_vocab_size() + (not found)
        self.end = found[0] if found else self.vocab - 1

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without special ones around it."""
        encoded = self.inner.encode_batch(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; an end becomes nothing."""
        return self.inner.decode([i for i in ids if i != self.end], skip_special_tokens=True)


def tokenizer_at(path: Path) -> Tokenizer:
    """The tokenizer of a corpus, of a folder or of a file; bytes where a corpus has none.

    Raises:
        ValueError: where there is none.
    """
    file = path / TOKENIZER if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / MANIFEST).exists():
        return Bytes()
    if not file.is_file():
        raise ValueError(
            f"there is no tokenizer at {shown(str(path))}; name a tokenizer.json, or a folder that has one"
        )
    return Subwords(file)


def train_tokenizer(texts: Iterable[str], vocab: int, file: Path) -> None:
    """Learn byte pairs (BPE over bytes, as GPT-2's) from texts and write them to a tokenizer.json.

    Source: Sennrich et al. (2016), arXiv:1508.07909, through the tokenizers package.

    Raises:
        ValueError: for fewer than 257 ids, which are the bytes and the end.
    """
    if vocab < 257:
        raise ValueError(f"vocab = {vocab} must be at least 257: the bytes and the end of a document")
    tokenizers = required("tokenizers", "data")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    replace(file, lambda half: bpe.save(str(half)))


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
    tokenizer: str | int = "bytes",
    field: str = "text",
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Turn text into the tokens of a corpus; parts that are there, of files that did not change, stay.

    Args:
        names: files and folders: text (a document a file), .jsonl, .parquet, folders of the datasets package.
        folder: to fill.
        tokenizer: "bytes"; the path of a tokenizer.json or of a folder that has one; or a number of ids, for which
            byte pairs are learned from the text.
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
    if isinstance(tokenizer, int) and not (folder / TOKENIZER).exists():
        train_tokenizer((text for part in parts for text in part.texts(field)), tokenizer, folder / TOKENIZER)
    elif isinstance(tokenizer, str) and tokenizer != "bytes":
        source = Path(tokenizer).expanduser()
        source = source / TOKENIZER if source.is_dir() else source
        Subwords(source)
        replace(folder / TOKENIZER, lambda half: half.write_bytes(source.read_bytes()))
    of: Tokenizer = Bytes() if tokenizer == "bytes" else Subwords(folder / TOKENIZER)
    if isinstance(tokenizer, int) and of.vocab > tokenizer:
        raise ValueError(f"{folder} has a tokenizer of {of.vocab} ids, not {tokenizer}; name another folder")
    identity = hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest() if tokenizer != "bytes" else "bytes"
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
                ids.append(np.append(one, of.end).astype(dtype))
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
        vocab, end: see :class:`Tokenizer`.
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
