"""What stands in for a task whose files are not there: nothing but its forms."""

from pydantic import Field

from longwave.tasks.base import Task
from longwave.tasks.forms import Future, Inputs, Label, Pair, Row, Signal, Targets, Tokens


class Zeros(Task):
    """Rows of zeros, of the forms that a recipe's ``stand_in`` says: for ``longwave train --dry-run`` alone."""

    vocab: int | None = Field(None, ge=1)
    """Token ids go in, so many; None for real numbers."""
    features: int | None = Field(None, ge=1)
    """Real numbers a step."""
    classes: int | None = Field(None, ge=1)
    """Labels asked for; None for the next token, or for real numbers where steps are told."""
    steps: int | None = Field(None, ge=1)
    """The last steps of a row, at which one real number each is asked for."""
    pair: bool = False
    """Whether two sequences go in."""
    length: int = Field(ge=1)
    """Steps of a row."""

    @property
    def inputs(self) -> Inputs:
        """By vocab or features."""
        form = Signal(self.features or 1) if self.vocab is None else Tokens(self.vocab)
        return Pair(form) if self.pair else form

    @property
    def targets(self) -> Targets:
        """By classes or steps."""
        if self.steps is not None:
            return Future(self.steps, 1)
        return Label(self.classes) if self.classes is not None else Tokens(self.vocab or 1)

    @property
    def longest(self) -> int:
        """A row."""
        return self.length

    @property
    def eval_rows(self) -> int:
        """One."""
        return 1

    def train_row(self, seed: int, number: int) -> Row:
        """Zeros."""
        return self.eval_row(number)

    def eval_row(self, number: int) -> Row:
        """Zeros."""
        batch = self.blank(1)
        return Row(batch.inputs[0], batch.targets[0])
