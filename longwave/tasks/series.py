"""Time series: what comes next, and what a series is of."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from longwave.errors import nearest, shown
from longwave.machine import required
from longwave.tasks.base import Task, opened, shuffled
from longwave.tasks.forms import Future, Inputs, Row, Signal
from longwave.tasks.labelled import HeldOut, Labelled, Sets, existing_folder

Missing = Literal["refuse", "hold"]
TIMES = ("date", "time", "timestamp", "datetime")


class Table(NamedTuple):
    """Columns of numbers and, maybe, of times."""

    names: list[str]
    values: np.ndarray  # (rows, columns) float64, NaN where there is none
    times: np.ndarray | None  # (rows,) datetime64[s] or float64


def read_table(file: Path, time: str | None) -> Table:
    """A CSV file, plain or gzip, or a parquet file.

    Args:
        time: the column of times; None is one called date, time, timestamp or datetime, if there is one.
    Raises:
        ValueError: where it cannot be read, lacks the column, or has what is no number (its row and column named).
    """
    if not file.is_file():
        raise ValueError(f"there is no file {shown(str(file))}; give a CSV (.csv, .csv.gz) or parquet file")
    columns = _parquet(file) if file.suffix in (".parquet", ".pq") else _csv(file)
    name = time if time is not None else next((name for name in columns if name.lower() in TIMES), None)
    if name is not None and name not in columns:
        raise ValueError(f"{file} has no column {shown(name)}{nearest(name, columns)}; it has {', '.join(columns)}")
    times = None if name is None else _times(file, name, columns.pop(name))
    values = np.column_stack([_numbers(file, column, texts) for column, texts in columns.items()])
    return Table(list(columns), values, times)


def _csv(file: Path) -> dict[str, Sequence[Any]]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", newline="") as opened:
            names, *lines = list(csv.reader(opened))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is not a CSV file with a header: {error}") from error
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise ValueError(f"{file}, row {number} has {len(line)} columns and the header has {len(names)}")
    return dict(zip(names, zip(*lines)))


def _parquet(file: Path) -> dict[str, Sequence[Any]]:
    parquet, lib = required("pyarrow.parquet", "data"), required("pyarrow", "data")
    try:
        table = parquet.read_table(file)
    except (OSError, lib.ArrowException) as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from error
    return {name: table[name].to_pylist() for name in table.column_names}


def _numbers(file: Path, column: str, texts: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(texts))
    for row, text in enumerate(texts):
        try:
            out[row] = np.nan if text is None or text == "" else float(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, row {row + 2}, column {column}: {shown(text)} is no number") from error
    return out


def _times(file: Path, column: str, texts: Sequence[Any]) -> np.ndarray:
    try:
        times = np.array([float(text) for text in texts])
    except (TypeError, ValueError):
        try:
            times = np.array([np.datetime64(text, "s") for text in texts])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, column {column} holds neither numbers nor dates such as 2016-07-01: {error}"
            ) from error
    back = np.flatnonzero(np.diff(times.astype(np.float64)) < 0)
    if len(back):
        raise ValueError(f"{file}, row {back[0] + 3}: the {column} is before that of the row above; sort the rows")
    return times


def _gaps(x: np.ndarray, missing: Missing, where: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (L, F) without NaN, each instead the last before it, or 0; and 1 where there was none, if it is held."""
    gaps = ~np.isfinite(x)
    if missing == "refuse":
        if gaps.any():
            row, column = np.argwhere(gaps)[0]
            raise ValueError(
                f"{where}, row {row + 2}, column {names[column]} has no finite number; fill it, or set missing: hold"
            )
        return x, None
    last = np.maximum.accumulate(np.where(gaps, -1, np.arange(len(x))[:, None]), axis=0)
    held = np.where(last >= 0, np.take_along_axis(x, np.maximum(last, 0), axis=0), 0)
    return held, gaps.astype(np.float64)


def calendar(times: np.ndarray) -> np.ndarray:
    """Hour of the day, day of the week, of the month and of the year, (L, 4), each in [-0.5, 0.5].

    Source: Zhou et al. (2021) "Informer", arXiv:2012.07436, its hourly time features.
    """
    day = times.astype("datetime64[D]")
    hour = (times - day).astype(np.int64) / 3600
    week = (day.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    month = (day - times.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64)
    year = (day - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    return np.stack([np.floor(hour) / 23, week / 6, month / 30, year / 365], axis=1) - 0.5


class _Series(NamedTuple):
    inputs: np.ndarray  # (rows, features), what is not known of the future first
    hidden: int  # how many columns are not
    targets: np.ndarray  # (rows, width), NaN where there is none
    borders: tuple[int, int, int]  # rows where training, validation and test end


class Forecast(Task, name="forecast"):
    """What are the next values of some columns, from what came before?

    Source: the protocol of Zhou et al. (2021) "Informer", arXiv:2012.07436, sec. 5.1, for ETT: parts in the order of
    time, standardised by the mean and deviation of the training part, all windows at stride 1, mean squared and mean
    absolute error of standardised values. For hourly ETT its parts are `[8640, 2880, 2880]` rows.

    Inputs are `context` steps and `horizon` steps in which the columns are 0. Beside the columns each step has, of
    `missing: hold`, a 1 for every column where there was no value and the last one stands for it; with `gaps` the time
    since the step before over the median of training; with `calendar` four numbers of its date. The last two are known
    of the future as well. Targets that are missing are not scored.

    Raises:
        ValueError: where the file is no table, a column is not in it, a value is missing and must not (row and column
            named), times go back, or a part has no room for a window.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    file: str
    """A CSV file (.csv, .csv.gz) or a parquet file, with a header."""
    columns: list[str] | None = None
    """Inputs; None is all but the time."""
    predict: list[str] | None = None
    """Columns whose future is asked for; None is all of columns."""
    time: str | None = None
    """The column of times: numbers or dates; None is one that is called so, if there is one."""
    context: int = Field(336, ge=1)
    """Steps that are seen."""
    horizon: int = Field(96, ge=1)
    """Steps that are predicted."""
    parts: list[float] = Field([0.7, 0.1, 0.2], min_length=3, max_length=3)
    """For training, validation and test: fractions of all rows, or numbers of rows."""
    held_out: HeldOut = "validation"
    """What is evaluated."""
    calendar: bool = False
    """Whether hour, weekday, day and day of the year are inputs."""
    gaps: bool = False
    """Whether the time since the last step is an input, for steps that are irregular."""
    missing: Missing = "refuse"
    """What a missing value is: an error, or the last value before it and a mark."""

    metric: ClassVar[str] = "mse"

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.file]

    @property
    def inputs(self) -> Inputs:
        """The columns and what stands beside them."""
        return Signal(self._series.inputs.shape[1])

    @property
    def targets(self) -> Future:
        """The columns that are asked for."""
        return Future(self.horizon, self._series.targets.shape[1])

    @property
    def longest(self) -> int:
        """A window."""
        return self.context + self.horizon

    def prepare(self) -> None:
        """Read the file anew."""
        super().prepare()
        for name in ("train", self.held_out):
            self._windows(name)

    @opened
    def _series(self) -> _Series:
        file = Path(self.file).expanduser()
        table = read_table(file, self.time)
        columns = table.names if self.columns is None else self.columns
        predict = columns if self.predict is None else self.predict
        for name in {*columns, *predict}:
            if name not in table.names:
                known = ", ".join(table.names)
                raise ValueError(f"{file} has no column {shown(name)}{nearest(name, table.names)}; it has {known}")
        borders = self._borders(len(table.values))
        x = table.values[:, [table.names.index(name) for name in columns]]
        y = table.values[:, [table.names.index(name) for name in predict]]
        filled, marks = _gaps(x, self.missing, str(file), columns)
        _gaps(y, self.missing, str(file), predict)
        mean, deviation = filled[: borders[0]].mean(0), np.maximum(filled[: borders[0]].std(0), 1e-8)
        held, _ = _gaps(y[: borders[0]], "hold", "", predict)
        targets = (y - held.mean(0)) / np.maximum(held.std(0), 1e-8)
        beside = [] if marks is None else [marks]
        beside += self._known(file, table.times, borders[0])
        hidden = x.shape[1] * (1 if marks is None else 2)
        inputs = np.concatenate([(filled - mean) / deviation, *beside], axis=1)
        return _Series(inputs.astype(np.float32), hidden, targets.astype(np.float32), borders)

    def _known(self, file: Path, times: np.ndarray | None, border: int) -> list[np.ndarray]:
        if (self.calendar or self.gaps) and times is None:
            raise ValueError(f"{file} has no column of times, which calendar and gaps need; name it with time")
        found = []
        if self.gaps and times is not None:
            step = np.diff(times.astype(np.float64), prepend=np.nan)
            step[:1] = median = np.median(step[1:border])
            found.append((step / max(float(median), 1e-12))[:, None])
        if self.calendar and times is not None:
            if times.dtype.kind != "M":
                raise ValueError(f"{file} has numbers as times, and calendar needs dates such as 2016-07-01 00:00")
            found.append(calendar(times))
        return found

    def _borders(self, rows: int) -> tuple[int, int, int]:
        sizes = self.parts if max(self.parts) > 1 else [part * rows for part in self.parts]
        first, second, third = (round(size) for size in np.cumsum(sizes))
        if min(self.parts) < 0 or third > rows + 1:
            raise ValueError(f"parts = {self.parts} must be fractions up to 1 in all, or up to {rows} rows in all")
        return first, second, min(third, rows)

    def _windows(self, name: str) -> range:
        """Where windows of a part start: a held-out one may see what comes before it."""
        train, validation, test = self._series.borders
        first, last = {
            "train": (0, train),
            "validation": (max(0, train - self.context), validation),
            "test": (max(0, validation - self.context), test),
        }[name]
        if last - first < self.longest:
            raise ValueError(
                f"the {name} part has {last - first} rows with its context, and a window has {self.longest}; "
                "set context or horizon lower, or the parts otherwise"
            )
        return range(first, last - self.longest + 1)

    def train_row(self, seed: int, number: int) -> Row:
        """A window of the training part in the order of the epoch."""
        windows = self._windows("train")
        return self._row(windows[shuffled(seed, number, len(windows))])

    @property
    def eval_rows(self) -> int:
        """All windows of the held-out part."""
        return len(self._windows(self.held_out))

    def eval_row(self, number: int) -> Row:
        """A window of the held-out part."""
        return self._row(self._windows(self.held_out)[number])

    def _row(self, start: int) -> Row:
        x = self._series.inputs[start : start + self.longest].copy()
        x[self.context :, : self._series.hidden] = 0
        return Row(x, self._series.targets[start + self.context : start + self.longest])


class SeriesLabels(Labelled, name="series_labels"):
    """What is a series of? One of several classes.

    `series` is an `.npz` of arrays x_train, y_train, x_test, y_test with x (n, L) or (n, L, channels), or a folder with
    NAME_TRAIN.tsv and NAME_TEST.tsv of the UCR archive (a label, then values). Where the steps are irregular, arrays
    t_train and t_test (n, L) say when each was, and the time since the last step is one more channel. A series ends
    where only NaN follow; other NaN are treated as `missing` says. Channels are standardised by the training set's mean
    and deviation.

    Raises:
        ValueError: where there is nothing of the kind, for lines of other lengths, or a value that is missing and must
            not (its row and step named).
    """

    series: str
    """An .npz file, or a folder."""
    missing: Missing = "refuse"
    """What a missing value within a series is: an error, or the last value before it and a mark."""

    @property
    def sources(self) -> list[str]:
        """What it reads."""
        return [self.series]

    @property
    def inputs(self) -> Inputs:
        """The channels, and with missing: hold as many marks."""
        return Signal(self._scale[0].shape[0] * (1 if self.missing == "refuse" else 2))

    @property
    def longest(self) -> int:
        """Steps of the longest series."""
        return max(len(x) for part in (self._sets.train, self._sets.test) for x, _ in part)

    def look(self) -> Sets:
        """Series by label."""
        path = Path(self.series).expanduser()
        arrays = self._of_npz(path) if path.suffix == ".npz" else self._of_ucr(existing_folder(self.series))
        names = sorted({str(label) for label in arrays["y_train"].tolist()})

        def rows(part: str) -> list[tuple[np.ndarray, int]]:
            found = []
            for number, (x, label) in enumerate(zip(arrays[f"x_{part}"], arrays[f"y_{part}"].tolist())):
                if str(label) not in names:
                    raise ValueError(f"{path}: row {number} of the {part} set has the label {label}, and training none")
                x = x.reshape(len(x), -1).astype(np.float64)
                real = np.flatnonzero(np.isfinite(x).any(axis=1))
                if not len(real):
                    raise ValueError(f"{path}: row {number} of the {part} set has no number; take it out")
                found.append((x[: real[-1] + 1], names.index(str(label))))
            return found

        return Sets(names, rows("train"), rows("test") if "x_test" in arrays else [])

    @staticmethod
    def _of_npz(file: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is not a readable .npz of plain arrays: {error}") from error
        if not {"x_train", "y_train"} <= arrays.keys() or arrays["x_train"].ndim not in (2, 3):
            raise ValueError(
                f"{file} must have x_train (n, L) or (n, L, channels) and y_train (n,); it has {_shapes(arrays)}"
            )
        for times in arrays.keys() & {"t_train", "t_test"}:
            x, t = arrays.get(f"x{times[1:]}", np.empty(0)), arrays[times]
            if t.shape != x.shape[:2]:
                raise ValueError(f"{file} must have {times} (n, L) for x{times[1:]}; it has {_shapes(arrays)}")
            steps = np.diff(t.astype(np.float64), axis=1, prepend=np.nan)
            steps[:, 0] = np.nanmedian(steps, axis=1)
            arrays[f"x{times[1:]}"] = np.concatenate([x.reshape(*t.shape, -1), steps[..., None]], axis=2)
        return arrays

    @staticmethod
    def _of_ucr(folder: Path) -> dict[str, np.ndarray]:
        arrays = {}
        for part in ("train", "test"):
            files = sorted(folder.glob(f"*_{part.upper()}.tsv"))
            if len(files) != 1:
                raise ValueError(f"{folder} must have one *_{part.upper()}.tsv, and has {len(files)}")
            try:
                table = np.loadtxt(files[0], delimiter="\t", ndmin=2)
            except ValueError as error:
                raise ValueError(f"{files[0]} is no table of numbers with tabs between: {error}") from error
            arrays[f"x_{part}"], arrays[f"y_{part}"] = table[:, 1:], table[:, 0].astype(np.int64)
        return arrays

    @opened
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        every = np.concatenate([x for x, _ in self._sets.train])
        return np.nanmean(every, axis=0), np.maximum(np.nanstd(every, axis=0), 1e-8)

    def row(self, item: tuple[np.ndarray, int]) -> Row:
        """Its steps and its label."""
        x, label = item
        mean, deviation = self._scale
        names = [str(channel) for channel in range(x.shape[1])]
        filled, marks = _gaps((x - mean) / deviation, self.missing, self.series, names)
        steps = filled if marks is None else np.concatenate([filled, marks], axis=1)
        return Row(steps.astype(np.float32), label)


def _shapes(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
