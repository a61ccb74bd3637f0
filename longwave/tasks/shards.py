"""Examples that were drawn once and lie in files: written side by side, checked, read in any order."""

import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longwave.errors import shown

MANIFEST, FORMAT, ROWS = "manifest.json", 1, 1000  # rows of a shard


class Example(NamedTuple):
    """A sequence of small numbers, (L,) uint8, and its label."""

    sequence: np.ndarray
    label: int


def write(
    folder: Path,
    about: dict[str, Any],
    counts: dict[str, int],
    draw: Callable[[str, int], Example],
    jobs: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write so many examples of each split into a folder; shards that are there and whole stay.

    Args:
        folder: made where it is not there.
        about: what the examples are of: a folder that holds others is refused.
        counts: examples by the split's name.
        draw: the example of a split and a number, from several threads.
        jobs: threads.
        progress: told of the rows of each shard that is done, in the main thread.
    Raises:
        ValueError: where the folder holds something else.
        OSError: where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"longwave_shards": FORMAT, "about": about, "counts": counts}
    if (folder / MANIFEST).exists():
        found = _manifest(folder)
        for name in ("about", "counts"):
            if found[name] != manifest[name]:
                raise ValueError(
                    f"{folder} holds other examples: {shown(found[name], 160)}, not {shown(manifest[name], 160)}; "
                    "name another folder, or remove it"
                )
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not made by longwave data; name another folder")
    replace(folder / MANIFEST, lambda file: file.write_text(json.dumps(manifest, indent=1) + "\n"))

    def one(split: str, start: int) -> int:
        numbers = range(start, min(start + ROWS, counts[split]))
        file = _file(folder, split, start)
        with contextlib.suppress(ValueError):
            if len(Shard(file).labels) == len(numbers):
                return len(numbers)
        examples = [draw(split, number) for number in numbers]
        packed = [zlib.compress(sequence.tobytes()) for sequence, _ in examples]
        tensors = {
            "packed": np.frombuffer(b"".join(packed), np.uint8),
            "ends": np.cumsum([len(one) for one in packed]),
            "labels": np.array([label for _, label in examples], np.int64),
        }
        replace(file, lambda file: save_file(tensors, file, {"sha256": _digest(tensors)}))
        return len(numbers)

    todo = iter([(split, start) for split, count in counts.items() for start in range(0, count, ROWS)])
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(one, *it) for it in islice(todo, jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            progress(sum(finished.result() for finished in done))
            running |= {pool.submit(one, *it) for it in islice(todo, len(done))}


def replace(file: Path, put: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    half = file.with_suffix(f".{os.getpid()}.half")
    try:
        put(half)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def _file(folder: Path, split: str, start: int) -> Path:
    return folder / f"{split}-{start // ROWS:06}.safetensors"


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        found = manifest["longwave_shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} was not made by longwave data: {file.name} cannot be read there") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found} and this longwave reads {FORMAT}; make it again")
    return manifest


class Shard:
    """A file of examples, whole.

    Raises:
        ValueError: where it is not there, cut short, or not what was written.
    """

    def __init__(self, file: Path):
        try:
            with safe_open(file, "numpy") as stored:
                tensors = {name: stored.get_tensor(name) for name in ("packed", "ends", "labels")}
                written = (stored.metadata() or {})["sha256"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{file} is missing or cut short; write it again with longwave data") from error
        if _digest(tensors) != written:
            raise ValueError(f"{file} has changed since it was written; write it again with longwave data")
        self.packed, self.ends, self.labels = tensors["packed"], tensors["ends"], tensors["labels"]

    def __getitem__(self, row: int) -> Example:
        packed = self.packed[self.ends[row - 1] if row else 0 : self.ends[row]]
        return Example(np.frombuffer(zlib.decompress(packed.tobytes()), np.uint8).copy(), int(self.labels[row]))


class Shards:
    """The examples in a folder.

    Args:
        folder: that :func:`write` filled.
        about: what they must be of.
    Raises:
        ValueError: where it is none, or of something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        manifest = _manifest(folder)
        if manifest["about"] != about:
            raise ValueError(f"{folder} holds other examples: {shown(manifest['about'], 160)}, not {shown(about, 160)}")
        self.folder, self.counts = folder, manifest["counts"]
        self._shard = functools.lru_cache(maxsize=1024)(Shard)  # compressed: a few megabytes each

    def check(self) -> None:
        """Raises ValueError for the first shard that is not whole."""
        for split, count in self.counts.items():
            for start in range(0, count, ROWS):
                Shard(_file(self.folder, split, start))

    def __getitem__(self, place: tuple[str, int]) -> Example:
        split, number = place
        return self._shard(_file(self.folder, split, number // ROWS * ROWS))[number % ROWS]
