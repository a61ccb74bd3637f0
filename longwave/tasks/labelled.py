"""What all tasks share that read sequences with one label each from files."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from longwave.errors import shown
from longwave.tasks.base import Task, opened, shuffled
from longwave.tasks.forms import Label, Row

TENTH = 10  # one in so many training rows is held out for validation
HeldOut = Literal["validation", "test"]


class Sets(NamedTuple):
    """What there is.

    Attributes:
        classes: their names.
        train, test: what rows are made of, anything; test may be empty.
    """

    classes: list[str]
    train: Sequence[Any]
    test: Sequence[Any]


class Labelled(Task):
    """Rows with one label each: a training set, of which a tenth is held out for validation, and maybe a test set.

    Which tenth is fixed: the first of one random order of the training set. A subclass says `look`, `row`, `inputs` and
    `longest`.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ()  # they need files

    held_out: HeldOut = "validation"
    """What is evaluated: a tenth of the training set, which is never trained on, or the test set."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def look(self) -> Sets:
        """Find what there is.

        Raises:
            ValueError: where it is not what the task needs.
        """

    @abstractmethod
    def row(self, item: Any) -> Row:
        """A row of one of the things found."""

    @opened
    def _sets(self) -> Sets:
        return self.look()

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the labels."""
        return self._sets.classes

    @property
    def targets(self) -> Label:
        """The class."""
        return Label(len(self.classes))

    def prepare(self) -> None:
        """Look anew.

        Raises:
            ValueError: as :meth:`look`, or where too little is there.
        """
        super().prepare()
        count = len(self._sets.train)
        if count < TENTH:
            raise ValueError(f"there are {count} rows to train on, and at least {TENTH} are needed, one for validation")
        if self.held_out == "test" and not len(self._sets.test):
            raise ValueError("there is no test set; add one, or set held_out: validation")
        self.eval_row(0)

    @property
    def _border(self) -> int:
        return len(self._sets.train) // TENTH

    def train_row(self, seed: int, number: int) -> Row:
        """A row of the training set but its tenth, in the order of the epoch."""
        train = self._sets.train
        place = self._border + shuffled(seed, number, len(train) - self._border)
        return self.row(train[shuffled(0, place, len(train))])

    @property
    def eval_rows(self) -> int:
        """All that is held out."""
        return self._border if self.held_out == "validation" else len(self._sets.test)

    def eval_row(self, number: int) -> Row:
        """A row that is held out."""
        train, test = self._sets.train, self._sets.test
        return self.row(train[shuffled(0, number, len(train))] if self.held_out == "validation" else test[number])


def existing_folder(name: str, hint: str = "") -> Path:
    """The folder of that name, ~ being the user's, or a ValueError with the hint."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {shown(name)}{hint and f'; {hint}'}")
    return folder


def visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder by name, but what is hidden."""
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def by_class(folder: Path, endings: tuple[str, ...] = (), hint: str = "") -> Sets:
    """Files in folders that are named after their classes, (file, label) each: below `train` and `test`, or directly.

    Args:
        folder: where they lie.
        endings: of the names of files, lower case, such as ".png"; others are left out. None is all.
        hint: for the error where there is nothing of the kind.
    Raises:
        ValueError: for fewer than two classes, or one without a file.
    """
    train, test = folder / "train", folder / "test"
    train = train if train.is_dir() else folder
    names = [path.name for path in visible(train) if path.is_dir()]
    if len(names) < 2:
        raise ValueError(f"{train} has {len(names)} folders, and there must be one a class{hint and f'; {hint}'}")

    def files(within: Path) -> list[tuple[Path, int]]:
        found: list[tuple[Path, int]] = []
        for label, name in enumerate(names):
            one = [p for p in visible(within / name) if p.is_file() and (not endings or p.suffix.lower() in endings)]
            if not one:
                raise ValueError(
                    f"the class {within / name} has no file{f' ending in {chr(32).join(endings)}' if endings else ''}; "
                    "add some, or remove the folder"
                )
            found += [(file, label) for file in one]
        return found

    return Sets(names, files(train), files(test) if test.is_dir() else [])
