"""Parts of one long sequence: which are held out, each laid end to end as one, and windows over them."""

from typing import Protocol

import numpy as np

_GOLDEN = 0.6180339887498949  # of the numbers of units, so that those held out are spread evenly


class Source(Protocol):
    """A sequence that is read where it is asked for."""

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> np.ndarray: ...


class Stretches:
    """Stretches of a sequence, laid end to end as one.

    Args:
        source: the sequence.
        starts, stops: of each, (n,) int64, one behind the other; those that touch become one, empty ones none.
    Attributes:
        starts: of each in the source.
        ends: of each in what they make together.
    """

    def __init__(self, source: Source, starts: np.ndarray, stops: np.ndarray):
        kept = stops > starts
        starts, stops = starts[kept], stops[kept]
        apart = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        first, last = np.append(0, apart)[: len(starts)], np.append(apart - 1, len(starts) - 1)[: len(starts)]
        self.source, self.starts = source, starts[first]
        self.ends = np.cumsum(stops[last] - self.starts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def stops(self) -> np.ndarray:
        """Of each in the source."""
        return self.starts + np.diff(self.ends, prepend=0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of what lies from start up to stop; 0 <= start <= stop <= len."""
        number, found = int(self.ends.searchsorted(start, side="right")), []
        while start < stop:
            begin = int(self.ends[number - 1]) if number else 0
            until, base = min(stop, int(self.ends[number])), int(self.starts[number]) - begin
            found.append(self.source.read(base + start, base + until))
            start, number = until, number + 1
        return found[0] if len(found) == 1 else np.concatenate([self.source.read(0, 0), *found])

    def borders(self, ends: np.ndarray) -> np.ndarray:
        """Where its own ends and those within the source (n,) lie in what it is together."""
        if not len(self.ends):
            return self.ends
        number = self.starts.searchsorted(ends - 1, side="right") - 1
        begin = np.append(0, self.ends[:-1])
        place = ends - self.starts[number] + begin[number]
        return np.union1d(self.ends, place[(number >= 0) & (place < self.ends[number])])


def spread(count: int, share: float) -> np.ndarray:
    """Which of so many are held out, (count,) bool: a share of them, one at least, at even distances."""
    place = (np.arange(count) * _GOLDEN + share) % 1
    out = place < share
    return out if out.any() else place == place.max(initial=0)


def split(source: Source, ends: np.ndarray, whole: bool, share: float) -> tuple[Stretches, Stretches]:
    """What is trained on and what is held out.

    Args:
        source: a sequence of units.
        ends: of the units, (n,) int64.
        whole: hold out single units, spread evenly, one at least; else the end of each.
        share: of the units, or of each.
    """
    starts = np.append(0, ends[:-1])[: len(ends)]
    if not whole:
        borders = ends - ((ends - starts) * share).astype(np.int64)
        return Stretches(source, starts, borders), Stretches(source, borders, ends)
    out = spread(len(ends), share)
    return Stretches(source, starts[~out], ends[~out]), Stretches(source, starts[out], ends[out])


class Windows:
    """Windows one behind the other, each with what follows it.

    Args:
        stretches: what they lie in.
        borders: where no window runs on, the end among them, (n,) int64.
        length: steps of a window at most; the last one before a border may be shorter.
    """

    def __init__(self, stretches: Stretches, borders: np.ndarray, length: int):
        self.stretches, self.borders, self.length = stretches, borders, length
        self._ends = np.cumsum(-(-np.maximum(np.diff(borders, prepend=0) - 1, 0) // length))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def goes_on(self, number: int) -> bool:
        """Whether a window begins where the one before ended, no border between them."""
        part = self._ends.searchsorted(number, side="right")
        return bool(number and part == self._ends.searchsorted(number - 1, side="right"))

    def place(self, number: int) -> tuple[int, int]:
        """Where a window and what follows it lie in the stretches."""
        part = int(self._ends.searchsorted(number, side="right"))
        begin, before = (int(self.borders[part - 1]), int(self._ends[part - 1])) if part else (0, 0)
        start = begin + (number - before) * self.length
        return start, min(start + self.length + 1, int(self.borders[part]))

    def __getitem__(self, number: int) -> np.ndarray:
        return self.stretches.read(*self.place(number))
