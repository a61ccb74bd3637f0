"""The tasks of the MAD suite, and multi-query recall: small languages on which architectures differ."""

from abc import abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from longwave.tasks.base import HIDE, random_stream
from longwave.tasks.forms import IGNORE, Recovered, Row, Tokens
from longwave.tasks.synthetic import Synthetic

Pairs = Annotated[int, Field(ge=1)]


class _ByRow(Synthetic):
    """What is drawn one row at a time."""

    vocab_size: int
    """Token ids."""

    @property
    def inputs(self) -> Tokens:
        """All that there are."""
        return Tokens(self.vocab_size)

    @abstractmethod
    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        """Draw one sequence, for training or for evaluation."""

    def _draw(self, random: np.random.Generator, rows: int, length: int) -> Row:
        drawn = [self._row(random, length, train=True) for _ in range(rows)]
        return Row(*(np.stack(part) for part in zip(*drawn)))


class MultiQueryRecall(_ByRow, name="multi_query_recall"):
    """Pairs of a key and its value, then keys among other tokens: under each key, what was its value?

    Source: Arora et al. (2023) "Zoology", arXiv:2312.04927, sec. 4.1, and its authors' generator (multiquery_ar).

    With vocab_size 12, length 16, pairs 2, and `.` for a random token (0 with random_others false), in

        inputs   2 8 4 7 . . 4 . . . . . 2 . . .
        targets  - - - - - - 7 - - - - - 8 - - -

    keys are below vocab_size / 2 and not 0, values from there on, all different; a key is asked again once, at an even
    distance behind the pairs, and of distances 1, 2, ... (in twos) the k-th is chosen in proportion to k^(power - 1).

    Raises:
        ValueError: where there are not as many keys as pairs.
    """

    vocab_size: int = Field(8192, ge=4)
    length: int = Field(64, ge=4)
    """Tokens in a sequence, even."""
    pairs: list[Pairs] = Field([8], min_length=1)
    """Numbers of pairs, of which every sequence draws one."""
    power: float = Field(0.01, gt=0)
    """Of the distances: 1 makes them uniform, smaller ones short."""
    random_others: bool = True
    """Random tokens where nothing is asked, not 0."""

    examples = ({}, {"vocab_size": 64, "length": 32, "pairs": [2, 4, 8], "random_others": False})

    def _check(self) -> None:
        if self.vocab_size // 2 - 1 < max(self.pairs):
            raise ValueError(
                f"vocab_size {self.vocab_size} has {self.vocab_size // 2 - 1} keys, and pairs asks for "
                f"{max(self.pairs)}; set vocab_size to {2 * max(self.pairs) + 2} or more"
            )

    @property
    def _least_length(self) -> int:
        return 4 * max(self.pairs)

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        pairs, half = int(random.choice(self.pairs)), self.vocab_size // 2
        keys = 1 + random.choice(half - 1, size=pairs, replace=False)
        values = half + random.choice(self.vocab_size - half, size=pairs, replace=False)
        weights = np.arange(1, (length - 2 * pairs) // 2 + 1) ** (self.power - 1)
        places = 2 * pairs + 2 * random.choice(len(weights), size=pairs, replace=False, p=weights / weights.sum())
        inputs = random.integers(self.vocab_size, size=length) if self.random_others else np.zeros(length, np.int64)
        inputs[: 2 * pairs] = np.stack([keys, values], axis=1).ravel()
        inputs[places] = keys
        targets = np.full(length, IGNORE)
        targets[places] = values
        return Row(inputs, targets)


class _Noisy(_ByRow):
    """Keys and values, and noise among them."""

    noise_vocab_size: int = Field(0, ge=0)
    """Token ids, of vocab_size, that are noise."""
    noise: float = Field(0.0, ge=0, lt=1)
    """The share of pairs that are noise."""

    def _check(self) -> None:
        if self.noise > 0 and self.noise_vocab_size == 0:
            raise ValueError(f"noise {self.noise} needs token ids: set noise_vocab_size to 1 or more")
        for name, length in (("length", self.length), ("eval_length", self.eval_length)):
            if length is not None and length % 2:
                raise ValueError(f"{name} {length} is odd, and sequences are of pairs; set it to {length + 1}")
        if self._meaningful < 2:
            raise ValueError(
                f"vocab_size {self.vocab_size} with {self.noise_vocab_size} for noise leaves no key and value; "
                f"set it to {self.vocab_size + 2 - self._meaningful} or more"
            )

    @property
    def _meaningful(self) -> int:
        """Ids of keys and of values."""
        return self.vocab_size - self.noise_vocab_size

    @property
    def _least_length(self) -> int:
        return 4

    def _is_noise(self, random: np.random.Generator, pairs: int) -> np.ndarray:
        noise = random.random(pairs) < self.noise
        noise[random.integers(pairs)] = False  # one at least is not
        return noise

    def _noise(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return self._meaningful + random.integers(max(1, self.noise_vocab_size), size=shape)


class InContextRecall(_Noisy, name="in_context_recall"):
    """Pairs of a key and its value, over and over: after a key that was there before, what was its value?

    Noisy recall is ``{vocab_size: 32, noise_vocab_size: 16, noise: 0.2}``: some pairs are noise.

    Source: Poli et al. (2024) "Mechanistic design and scaling of hybrid architectures", arXiv:2403.17844, sec. 3.1, and
    its authors' generator (multi_query, as in their benchmark). Every next token is trained on; evaluation scores the
    values of keys that were seen before. The last key is one of those before it, each as likely as another.

    With vocab_size 6 and length 8, keys 0 to 2 and values 3 to 5, in evaluation

        inputs   0 4 2 3 0 4 2
        targets  - - - - 4 - 3
    """

    vocab_size: int = Field(16, ge=2)
    length: int = Field(128, ge=4)
    """Tokens in a sequence with its last answer, even."""

    asks_next: ClassVar[bool] = True
    examples = ({}, {"vocab_size": 32, "noise_vocab_size": 16, "noise": 0.2, "length": 24})

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        pairs, keys = length // 2, self._meaningful // 2
        noise = self._is_noise(random, pairs)[: pairs - 1]
        while noise.all():  # its only pair was to be the last
            noise = self._is_noise(random, pairs)[: pairs - 1]
        value_of = random.integers(keys, self._meaningful, size=keys)
        chosen = random.integers(keys, size=pairs)
        chosen[-1] = random.choice(np.unique(chosen[:-1][~noise]))
        rows = np.stack([chosen, value_of[chosen]], axis=1)
        rows[:-1][noise] = self._noise(random, (int(noise.sum()), 2))
        told = np.flatnonzero(np.append(~noise, True))  # the pairs that are none of noise
        known = np.zeros(pairs, bool)
        known[np.delete(told, np.unique(chosen[told], return_index=True)[1])] = True
        tokens, scored = rows.ravel(), np.stack([np.zeros_like(known), known], axis=1).ravel()
        targets = tokens if train else np.where(scored, tokens, IGNORE)
        return Row(tokens[:-1], targets[1:])


class FuzzyRecall(_ByRow, name="fuzzy_recall"):
    """In-context recall whose keys and values are several tokens, of numbers that differ.

    Source: as of :class:`InContextRecall`. A key is 1 to `key_size` different tokens of the lower half (of exactly
    `key_size` in evaluation), a value 1 to `value_size` of the upper half; the last token id stands before a sequence
    that is too short. The pair that is asked at the end was put in at a random place, unless the rest was full before.
    """

    vocab_size: int = Field(16, ge=3)
    length: int = Field(128, ge=1)
    """Tokens in a sequence."""
    key_size: int = Field(3, ge=1)
    """Tokens in a key, at most."""
    value_size: int = Field(3, ge=1)
    """Tokens in a value, at most."""

    asks_next: ClassVar[bool] = True
    examples = ({"length": 48}, {"vocab_size": 9, "length": 20, "key_size": 2, "value_size": 1})

    def _check(self) -> None:
        size, half = max(self.key_size, self.value_size), (self.vocab_size - 1) // 2
        if size > half:
            raise ValueError(
                f"vocab_size {self.vocab_size} has {half} tokens for keys, too few for motifs of {size}; "
                f"set it to {2 * size + 1} or more"
            )

    @property
    def _least_length(self) -> int:
        return 2 * (self.key_size + self.value_size) + 1

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        half, most = (self.vocab_size - 1) // 2, self.key_size + self.value_size

        def key() -> tuple[int, ...]:
            size = random.integers(1, self.key_size + 1) if train else self.key_size
            return tuple(random.permutation(half)[:size].tolist())

        def value() -> tuple[int, ...]:
            size = random.integers(1, self.value_size + 1)
            return tuple((half + random.permutation(self.vocab_size - 1 - half)[:size]).tolist())

        asked, answer = key(), value()
        size = len(asked) + len(answer)
        place = int(random.integers(length - 2 * size))
        tokens: list[int] = []
        counts: list[bool] = []
        value_of, seen, put = {asked: answer}, set[tuple[int, ...]](), False
        while len(tokens) < length - size - most:
            chosen = asked if len(tokens) >= place and not put else key()
            told = value_of.setdefault(chosen, value()) if chosen not in value_of else value_of[chosen]
            tokens += [*chosen, *told]
            counts += [False] * len(chosen) + [chosen in seen] * len(told)
            put = put or chosen == asked
            seen.add(chosen)
        tokens += [*asked, *answer]
        counts += [False] * len(asked) + [True] * len(answer)
        before = length + 1 - len(tokens)
        sequence = np.array([self.vocab_size - 1] * before + tokens)
        scored = np.array([False] * before + counts)
        return Row(sequence[:-1], sequence[1:] if train else np.where(scored, sequence, IGNORE)[1:])


class Memorization(_Noisy, name="memorization"):
    """Keys whose values are the same in all sequences: they are to be kept in the weights.

    Source: as of :class:`InContextRecall`. Inputs are a key and the last token id, over and over; the target under that
    is the key's value. Which value a key has is drawn once, by `map_seed`.

    With vocab_size 7, keys 0 to 2 and values 3 to 5,

        inputs   2 6 0 6 2 6
        targets  - 3 - 5 - 3
    """

    vocab_size: int = Field(256, ge=3)
    length: int = Field(32, ge=2)
    """Tokens in a sequence, even."""
    map_seed: int = Field(12345, ge=0, lt=2**63)
    """Of the values of all keys."""

    examples = ({}, {"vocab_size": 48, "noise_vocab_size": 16, "noise": 0.3})

    @property
    def _meaningful(self) -> int:
        return self.vocab_size - 1 - self.noise_vocab_size

    @property
    def _least_length(self) -> int:
        return 2

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        pairs, keys = length // 2, self._meaningful // 2
        values = keys + random_stream(self.map_seed, HIDE, 0).permutation(self._meaningful - keys)
        chosen, noise = random.integers(keys, size=pairs), self._is_noise(random, pairs)
        inputs = np.stack([chosen, np.full(pairs, self.vocab_size - 1)], axis=1)
        targets = np.stack([np.full(pairs, IGNORE), values[chosen]], axis=1)
        inputs[noise], targets[noise] = self._noise(random, (int(noise.sum()), 2)), IGNORE
        return Row(inputs.ravel(), targets.ravel())


class Compression(Synthetic, name="compression"):
    """Random tokens and a last one: tell all of them from what a model makes of the last.

    Source: as of :class:`InContextRecall`; the last token id ends every sequence, and is asked for as the others are.

    With vocab_size 6 and length 5,

        inputs   3 0 4 4 5
        targets  3 0 4 4 5
    """

    vocab_size: int = Field(16, ge=2)
    """Token ids, that of the end among them."""
    length: int = Field(32, ge=2)
    """Tokens in a sequence with its end."""

    examples = ({}, {"vocab_size": 4, "length": 7, "eval_length": 12})

    @property
    def inputs(self) -> Tokens:
        """All that there are."""
        return Tokens(self.vocab_size)

    @property
    def targets(self) -> Recovered:
        """The same."""
        return Recovered(self.vocab_size)

    @property
    def _least_length(self) -> int:
        return 2

    def _draw(self, random: np.random.Generator, rows: int, length: int) -> Row:
        ids = random.integers(self.vocab_size - 1, size=(rows, length))
        ids[:, -1] = self.vocab_size - 1
        return Row(ids, ids.copy())


class _Copy(_ByRow):
    """Tokens, blanks, a marker, and as many blanks again, under which the tokens are asked for."""

    vocab_size: int = Field(16, ge=3)
    """Token ids: the blank is vocab_size - 2, the marker vocab_size - 1, the tokens are those below."""
    length: int = Field(256, ge=1)
    """Tokens in a sequence."""
    copy_length: int = Field(16, ge=1)
    """Tokens to repeat."""

    @property
    def _least_length(self) -> int:
        return 2 * self.copy_length + 2

    @abstractmethod
    def _before(self, random: np.random.Generator, blanks: int) -> np.ndarray:
        """How many of the blanks stand before each token; the others behind the last."""

    def _row(self, random: np.random.Generator, length: int, train: bool) -> Row:
        K = self.copy_length
        data = random.integers(self.vocab_size - 2, size=K)
        inputs = np.full(length, self.vocab_size - 2)
        inputs[np.arange(K) + np.cumsum(self._before(random, length - 2 * K - 1))] = data
        inputs[length - K - 1] = self.vocab_size - 1
        return Row(inputs, np.concatenate([np.full(length - K, IGNORE), data]))


class Copying(_Copy, name="copying"):
    """Some tokens, a long silence, and a marker: repeat them.

    Source: Hochreiter & Schmidhuber (1997) "Long short-term memory"; Arjovsky et al. (2016), arXiv:1511.06464, sec.
    5.1; as in the generator of the MAD suite, see :class:`InContextRecall`.

    With vocab_size 6, length 9 and copy_length 2, blank 4 and marker 5,

        inputs   3 0 4 4 4 4 5 4 4
        targets  - - - - - - - 3 0
    """

    examples = ({}, {"length": 10, "copy_length": 4, "vocab_size": 4})

    def _before(self, random: np.random.Generator, blanks: int) -> np.ndarray:
        return np.zeros(self.copy_length, np.int64)


class SpreadCopying(_Copy, name="spread_copying"):
    """Selective copying as the MAD suite has it: tokens with blanks between them, then a marker: repeat the tokens.

    Source: as of :class:`InContextRecall`. Every blank stands before one of the tokens, each as likely as another, so
    the last token stands next to the marker. In `selective_copying` all arrangements are equally likely.
    """

    examples = ({}, {"length": 10, "copy_length": 4, "vocab_size": 4})

    def _before(self, random: np.random.Generator, blanks: int) -> np.ndarray:
        return random.multinomial(blanks, np.full(self.copy_length, 1 / self.copy_length))
