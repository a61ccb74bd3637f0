"""What goes into a model and what it is asked for, in shapes and ranges; rows, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CHARACTERS = [chr(i) if 32 < i < 127 else "␣" if i == 32 else "·" for i in range(257)]  # of bytes, as they are drawn
IGNORE = -100  # a target that is not scored; the default ignore_index of torch's cross entropy


@dataclass(frozen=True)
class Tokens:
    """An id at every step: (B, L) int64 in [0, vocab); as targets, IGNORE where none is scored."""

    vocab: int
    dtype: ClassVar[torch.dtype] = torch.int64
    words: ClassVar[str] = "tokens"

    @property
    def below(self) -> int:
        """What no id reaches."""
        return self.vocab

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return rows, length


@dataclass(frozen=True)
class Recovered(Tokens):
    """The ids of the inputs as targets, to be told from one vector a row: (B, L) int64."""

    words: ClassVar[str] = "its tokens from one vector"


@dataclass(frozen=True)
class Signal:
    """Real numbers at every step: (B, L, features) float32."""

    features: int
    dtype: ClassVar[torch.dtype] = torch.float32
    words: ClassVar[str] = "real numbers"
    below: ClassVar[None] = None

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return rows, length, self.features


@dataclass(frozen=True)
class Pair:
    """Two sequences a row: (B, 2, L) or (B, 2, L, features), by the form of each."""

    of: Tokens | Signal
    words: ClassVar[str] = "pairs"

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        return self.of.dtype

    @property
    def below(self) -> int | None:
        """What no id reaches, of ids."""
        return self.of.below

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return rows, 2, *self.of.shape(rows, length)[1:]


@dataclass(frozen=True)
class Label:
    """A class a row: (B,) int64 in [0, classes), or IGNORE."""

    classes: int
    dtype: ClassVar[torch.dtype] = torch.int64
    words: ClassVar[str] = "one label a row"

    @property
    def below(self) -> int:
        """What no class reaches."""
        return self.classes

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return (rows,)


@dataclass(frozen=True)
class Values:
    """Real numbers a row: (B, width) float32, NaN where none is scored."""

    width: int
    dtype: ClassVar[torch.dtype] = torch.float32
    words: ClassVar[str] = "real numbers a row"
    below: ClassVar[None] = None

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return rows, self.width


@dataclass(frozen=True)
class Future:
    """Real numbers at the last ``steps`` real steps of the inputs: (B, steps, width) float32, NaN where none is scored.

    What the inputs hold there is the task's affair: zeros, or what is known of the future, such as the hour.
    """

    steps: int
    width: int
    dtype: ClassVar[torch.dtype] = torch.float32
    words: ClassVar[str] = "real numbers at the last steps"
    below: ClassVar[None] = None

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of a batch."""
        return rows, self.steps, self.width


Inputs = Tokens | Signal | Pair
Targets = Tokens | Label | Values | Future


class Row(NamedTuple):
    """One row of a batch: tensors, arrays or numbers. Inputs are (L,) ids, (L, features) or two such; targets (L,), one
    class, (width,) or (steps, width)."""

    inputs: Any
    targets: Any


class Batch(NamedTuple):
    """Inputs and what a model is to tell of them, in the forms that the task says.

    Attributes:
        inputs, targets: see :class:`Tokens` and its kin.
        mask: True at real steps, False at padding: (B, L) bool, (B, 2, L) of pairs; None where all are real.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None

    @property
    def steps(self) -> int:
        """How many there are in all rows, padding included."""
        return (self.inputs[..., 0] if self.inputs.is_floating_point() else self.inputs).numel()


def scored(targets: Tensor) -> Tensor:
    """True at the targets that count."""
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def collate(rows: Sequence[Row], inputs: Inputs, targets: Targets) -> Batch:
    """Rows of any lengths as a batch in new memory: padded at their ends, with a mask where they differ.

    Raises:
        ValueError: where real numbers stand for ids or classes.
    """
    pair = isinstance(inputs, Pair)
    sequences = [part for row in rows for part in (row.inputs if pair else [row.inputs])]
    x = _together(sequences, inputs.dtype, 0)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = None if bool((lengths == x.shape[1]).all()) else torch.arange(x.shape[1]) < lengths[:, None]
    if pair:
        x, mask = x.unflatten(0, (-1, 2)), None if mask is None else mask.unflatten(0, (-1, 2))
    padding = IGNORE if isinstance(targets, Tokens) else None
    return Batch(x, _together([row.targets for row in rows], targets.dtype, padding), mask)


def _together(values: list[Any], dtype: torch.dtype, padding: int | None) -> Tensor:
    """In new memory: stacked, or with a padding made as long as the longest."""
    alike = all(isinstance(one, np.ndarray) and one.shape == values[0].shape for one in values)
    tensors = [torch.from_numpy(np.stack(values))] if alike else [torch.as_tensor(one) for one in values]
    for tensor in tensors:
        if tensor.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(
                f"ids and classes are whole numbers; got {tensor.dtype}: convert them, or say another form"
            )
    tensors = [tensor.to(dtype).contiguous() for tensor in tensors]
    if alike:
        return tensors[0]
    return torch.stack(tensors) if padding is None else pad_sequence(tensors, batch_first=True, padding_value=padding)


def next_token(sequence: Any) -> Row:
    """Every token but the last of a sequence (L + 1,), with the one after it as its target."""
    return Row(sequence[:-1], sequence[1:])
