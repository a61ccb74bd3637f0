"""Synthetic languages that ask one thing of a model: to remember what was said, and where."""

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator

from longwave.machine import require_memory
from longwave.tasks.base import EVAL, TRAIN, Task, random_stream, shuffled
from longwave.tasks.forms import IGNORE, Batch, Row, Tokens

_MOST_KEYS = 2**16  # every sequence has a table with one value a key


class Synthetic(Task):
    """Sequences drawn at random, fresh for ever or a fixed number of them, with answers at the end.

    Evaluation example i is the same whatever the batch size and the seed. A fixed training set is gone through in
    a new random order every epoch, batches running on from one epoch into the next; its example i depends on the seed
    and on i alone. Examples are drawn independently, so a set as large as the language holds some of them twice.
    """

    length: int
    train_examples: int | None = Field(None, ge=1)
    """The size of the training set; None is fresh examples for ever."""
    eval_examples: int = Field(500, ge=1)
    """The size of the evaluation set."""
    eval_length: int | None = Field(None, ge=1)
    """The length of evaluation sequences; None is that of training sequences."""
    shortest: int | None = Field(None, ge=1)
    """Every fresh training batch draws its length between this and `length`, log-uniformly; None is always `length`."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_fit(self) -> "Synthetic":
        self._check()
        if self.shortest is not None and (self.shortest > self.length or self.train_examples is not None):
            raise ValueError(
                f"shortest {self.shortest} must not exceed length {self.length}, and goes with fresh examples only: "
                "leave train_examples out"
            )
        lengths = (("length", self.length), ("eval_length", self.eval_length), ("shortest", self.shortest))
        for name, length in lengths:
            if length is not None and length < self._least_length:
                raise ValueError(
                    f"{name} {length} is too short for the other options of {type(self).__name__}; "
                    f"set it to {self._least_length} or more"
                )
        return self

    def _check(self) -> None:
        """Raise ValueError where options that have nothing to do with the length contradict each other."""

    @property
    @abstractmethod
    def _least_length(self) -> int:
        """The least length that the other options allow."""

    @abstractmethod
    def _draw(self, random: np.random.Generator, rows: int, length: int) -> Row:
        """Draw `rows` sequences: inputs and targets, (rows, L) int64 each."""

    @property
    def longest(self) -> int:
        """Of a sequence of the greater length."""
        return len(self._row(random_stream(0, EVAL, 0), max(self.length, self.eval_length or 0), train=True).inputs)

    def prepare(self) -> None:
        """Refuse a sequence that this machine cannot hold, with its inputs and targets.

        Raises:
            ValueError: with what it takes and what there is.
        """
        length = max(self.length, self.eval_length or 0)
        require_memory(24 * length, f"a sequence of {length:,} tokens", "set length and eval_length lower")

    def train_row(self, seed: int, number: int) -> Row:
        """A fresh example, or one of the training set in the order of the epoch."""
        if self.train_examples is not None:
            number = shuffled(seed, number, self.train_examples)
        return self._row(random_stream(seed, TRAIN, number), self.length, train=True)

    def train_batch(self, size: int, seed: int, index: int) -> Batch:
        """As of every task; with ``shortest``, rows of the length that is drawn for this batch, and so together."""
        if self.shortest is None:
            return super().train_batch(size, seed, index)
        random = random_stream(seed, TRAIN, index)
        length = round(math.exp(random.uniform(math.log(self.shortest), math.log(self.length))))
        return Batch(*map(torch.from_numpy, self._asked(self._draw(random, size, length), train=True)))

    @property
    def eval_rows(self) -> int:
        """The size of the evaluation set."""
        return self.eval_examples

    def eval_row(self, number: int) -> Row:
        """An example of the evaluation set."""
        return self._row(random_stream(0, EVAL, number), self.eval_length or self.length, train=False)

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        inputs, targets = self._asked(self._draw(random, 1, length), train)
        return Row(inputs[0], targets[0])

    def _asked(self, rows: Row, train: bool) -> Row:
        """Rows with the targets that count."""
        return rows


class _NextToken(Synthetic):
    """The two languages of H3 and Hyena: strings of numbers, a prefix token that asks, and a blank.

    Token ids are the ranks of the tokens' names in lexicographic order, the authors' ids: the blank "." is 0, the
    numbers "0", "1", "10", ... follow, and the prefix "=>" is the last.
    """

    vocab_size: int
    """Token ids, the two special ones among them."""
    mask_train: bool = False
    """Train on the answers alone, not on every next token as the authors do."""

    asks_next: ClassVar[bool] = True

    @property
    def inputs(self) -> Tokens:
        """All tokens, the two special ones among them."""
        return Tokens(self.vocab_size)

    def tokens(self) -> list[str]:
        """The name of every token id."""
        return sorted([".", "=>", *map(str, range(self.vocab_size - 2))])

    @property
    def names(self) -> list[str]:
        """See :meth:`tokens`."""
        return self.tokens()

    @property
    @abstractmethod
    def _answers(self) -> int:
        """How many positions at the end of a sequence evaluation scores."""

    def _asked(self, rows: Row, train: bool) -> Row:
        if train and not self.mask_train:
            return rows
        targets = np.full_like(rows.targets, IGNORE)
        targets[:, -self._answers :] = rows.targets[:, -self._answers :]
        return Row(rows.inputs, targets)

    def _draw(self, random: np.random.Generator, rows: int, length: int) -> Row:
        sequences = self._sequences(random, rows, length)
        return Row(sequences[:, :-1].copy(), sequences[:, 1:].copy())

    @abstractmethod
    def _sequences(self, random: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """Draw sequences (rows, tokens) int64, answers included."""


class AssociativeRecall(_NextToken, name="associative_recall"):
    """Pairs of a key and its value, then a key again: what was its value?

    Source: Fu et al. (2023), arXiv:2212.14052, sec. 3.1, as in the authors' generator (safari, synthetics.py).

    With vocab_size 8 and length 6: keys are 1, 2, 3, values 4, 5, 6, the prefix is 7, and in

        inputs   2 5  1 4  2 5  7 1
        targets  5 1  4 2  5 7  1 4

    evaluation scores the last target, 4. A key keeps its value within a sequence, and each sequence draws its own
    values. The last key is drawn from the keys that occurred, each as likely as another; with allow_dot from all
    keys, and the answer to one that did not occur is the blank, 0. With keys_per_query above 1 a key is that many
    tokens. Inputs have as many whole pairs as fit in `length`, then the prefix and a key.

    Raises:
        ValueError: where the vocabulary has no key and no value, there are too many keys, or no pair fits the length.
    """

    vocab_size: int = Field(10, ge=4)
    length: int = Field(20, ge=1)
    """Tokens before the prefix (input_seq_len)."""
    keys_per_query: int = Field(1, ge=1)
    """Tokens that make a key (num_keys)."""
    allow_dot: bool = False
    """Ask for keys that did not occur, too."""

    @property
    def _key_tokens(self) -> int:
        return (self.vocab_size - 2) // 2

    def _check(self) -> None:
        if self.keys_per_query * math.log2(self._key_tokens) > math.log2(_MOST_KEYS):
            raise ValueError(
                f"{self._key_tokens} key tokens make more than {_MOST_KEYS} keys of {self.keys_per_query} tokens; "
                "set vocab_size or keys_per_query lower"
            )

    @property
    def _least_length(self) -> int:
        return self.keys_per_query + 1

    @property
    def _answers(self) -> int:
        return 1

    def _sequences(self, random: np.random.Generator, rows: int, length: int) -> np.ndarray:
        keys = self._key_tokens**self.keys_per_query
        digits = np.arange(keys)[:, None] // self._key_tokens ** np.arange(self.keys_per_query) % self._key_tokens
        key_tokens = digits + 1  # (keys, keys_per_query)
        value_of = random.integers(self._key_tokens + 1, self.vocab_size - 1, size=(rows, keys))
        chosen = random.integers(keys, size=(rows, length // (self.keys_per_query + 1)))
        occurs = np.zeros((rows, keys), dtype=bool)
        np.put_along_axis(occurs, chosen, True, axis=1)
        candidates = np.ones_like(occurs) if self.allow_dot else occurs
        asked = np.where(candidates, random.random((rows, keys)), -1).argmax(axis=1)[:, None]
        answer = np.where(np.take_along_axis(occurs, asked, axis=1), np.take_along_axis(value_of, asked, axis=1), 0)
        pairs = np.concatenate([key_tokens[chosen], np.take_along_axis(value_of, chosen, axis=1)[..., None]], axis=-1)
        prefix = np.full((rows, 1), self.vocab_size - 1)
        return np.concatenate([pairs.reshape(rows, -1), prefix, key_tokens[asked[:, 0]], answer], axis=1)


class InductionHeads(_NextToken, name="induction_heads"):
    """A special token once among random ones, and again at the end: what came after it?

    Source: Fu et al. (2023), arXiv:2212.14052, sec. 3.1, as in the authors' generator (safari, synthetics.py);
    Gu and Dao (2023), arXiv:2312.00752, sec. 4.1.2, is vocab_size 16, length 256 and eval_length up to 2^20.

    With vocab_size 8 and length 6: the special token is 7, the others are 1 to 6, and in

        inputs   3 1 7 4 2 6 7
        targets  1 7 4 2 6 7 4

    evaluation scores the last target, 4. With copy_length c the answer is the c tokens that came after. With triggers
    n above 1 half of the sequences have n special tokens, but for those fewer than c + 1 positions after another,
    each followed by the same c tokens. Inputs are `length` tokens, the special one and c - 1 tokens of the answer.

    Raises:
        ValueError: where the length leaves no place for the special token and what follows it.
    """

    vocab_size: int = Field(20, ge=3)
    length: int = Field(30, ge=1)
    """Tokens before the last special token (input_seq_len)."""
    triggers: int = Field(1, ge=1)
    """Special tokens put among the random ones (induction_num_triggers)."""
    copy_length: int = Field(1, ge=1)
    """Tokens to repeat (induction_len)."""

    @property
    def _least_length(self) -> int:
        return self.copy_length + 2

    @property
    def _answers(self) -> int:
        return self.copy_length

    def _sequences(self, random: np.random.Generator, rows: int, length: int) -> np.ndarray:
        special = self.vocab_size - 1
        sequence = random.integers(1, special, size=(rows, length + 1 + self.copy_length))
        places = random.integers(length - 1 - self.copy_length, size=(rows, self.triggers))
        single = random.random(rows) < 0.5
        places[single] = places[single, :1]
        places.sort(axis=1)
        after = np.arange(1, self.copy_length + 1)
        copied = np.take_along_axis(sequence, places[:, :1] + after, axis=1)
        last = places[:, 0]
        sequence[np.arange(rows), last] = special
        for place in places[:, 1:].T:
            free = np.flatnonzero(place - last > self.copy_length)
            sequence[free, place[free]] = special
            sequence[free[:, None], place[free, None] + after] = copied[free]
            last = np.where(place - last > self.copy_length, place, last)
        sequence[:, length] = special
        sequence[:, length + 1 :] = copied
        return sequence


class SelectiveCopying(Synthetic, name="selective_copying"):
    """A few data tokens scattered in noise: repeat them in order.

    Source: Gu and Dao (2023), arXiv:2312.00752, sec. 4.1.1 and app. E.1; the format is that of the authors' S4
    repository (copying.py, variable spacing), whose L is length - copy_length here.

    With vocab_size 6, length 8 and copy_length 3: noise is 0, data are 1 to 4, the marker is 5, and in

        inputs   0 3 0 0 1 4 0 0 5 5 5
        targets  - - - - - - - - 3 1 4

    the targets under the markers are scored, in training and in evaluation; - is IGNORE. The data's positions are
    equally likely to be any, as are the data. Inputs are `length` tokens and `copy_length` markers.

    Raises:
        ValueError: where the data do not fit into the length.
    """

    vocab_size: int = Field(16, ge=3)
    """Token ids: the noise is 0, the marker vocab_size - 1, the data are those between."""
    length: int = Field(4096, ge=1)
    """Tokens before the markers, noise and data together."""
    copy_length: int = Field(16, ge=1)
    """Data tokens in a sequence."""

    @property
    def inputs(self) -> Tokens:
        """Noise, data and marker."""
        return Tokens(self.vocab_size)

    @property
    def _least_length(self) -> int:
        return self.copy_length

    def _draw(self, random: np.random.Generator, rows: int, length: int) -> Row:
        data = random.integers(1, self.vocab_size - 1, size=(rows, self.copy_length))
        places = random.random((rows, length)).argpartition(self.copy_length - 1, axis=1)[:, : self.copy_length]
        places.sort(axis=1)
        inputs = np.zeros((rows, length + self.copy_length), dtype=np.int64)
        np.put_along_axis(inputs, places, data, axis=1)
        inputs[:, length:] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORE)
        targets[:, length:] = data
        return Row(inputs, targets)
