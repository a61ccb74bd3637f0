"""Generation: a prompt is read once, then one token at a time, through the same forward as training."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from numbers import Integral
from random import Random
from typing import Any

import torch
from torch import Tensor

from longwave.errors import shown, unknown
from longwave.mixers import join, select
from longwave.models.lm import LM
from longwave.models.states import Held, check_weights, fingerprint
from longwave.nn import frozen, longest

PREFILL_CHUNK = 8192  # tokens of prompts that go through the model at once

Rows = Sequence[Sequence[int]] | Tensor
Stop = Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Args:
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_k: draw among the k most probable tokens.
        top_p: draw among the fewest tokens whose probabilities reach p, 0 < p <= 1.
        min_p: draw among the tokens that are at least this share as probable as the most probable one, 0 to 1.
        repetition_penalty: > 0; positive logits of tokens that the row has seen are divided by it, negative ones
            multiplied. Source: Keskar et al. (2019) "CTRL", arXiv:1909.05858, sec. 4.1.
    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be >= 0 (0 takes the most probable token) and finite; got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1]; got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be > 0 and finite; got {self.repetition_penalty}")

    def draw(self, logits: Tensor, draws: Tensor, seen: Tensor | None = None) -> Tensor:
        """One token a row.

        Args:
            logits: (B, V), float64.
            draws: (B,) uniform numbers in [0, 1).
            seen: (B, V) bool, the tokens that a repetition penalty is for.
        Returns:
            tokens: (B,), each from its own row of logits and its own number alone.
        """
        if seen is not None:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], float("-inf"))
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.min_p), float("-inf"))
        if self.top_p < 1:
            probability, order = logits.softmax(-1).sort(dim=-1, descending=True)
            beyond = probability.cumsum(-1) - probability >= self.top_p  # what the more probable ones have reached
            logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), float("-inf"))
        reached = logits.softmax(-1).cumsum(-1)
        return torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)[:, 0]


@dataclass(eq=False)
class _Row:
    """A text that is generated: a slot of the batch holds it until it ends."""

    index: int
    prompt: list[int]
    draws: Random
    begin: Held | None
    seen: bytearray  # by token, whether it is in the text
    length: int  # of the text
    written: list[int] = field(default_factory=list)
    end: tuple[Any, Tensor] | None = None  # the state, and the last token

    def __post_init__(self) -> None:
        self.number = self.draws.random()  # that draws the next token

    def write(self, token: int) -> None:
        """Add a token to the text."""
        self.written.append(token)
        self.seen[token] = True
        self.length += 1
        self.number = self.draws.random()


def _row(index: int, prompt: list[int], seed: int | None, begin: Held | None, vocab: int) -> _Row:
    seen = bytearray(vocab) if begin is None else bytearray(begin.seen[0].cpu().numpy().tobytes())
    for token in set(prompt):
        seen[token] = True
    behind = 0 if begin is None else int(begin.length)
    return _Row(index, prompt, Random(seed), begin, seen, behind + len(prompt))


class Stream(Iterator[list[int | None]]):
    """The next token of every row, step by step; see :func:`stream`.

    Attributes:
        state: of the rows that are being generated now, the model's; None before the first step.
    """

    def __init__(
        self,
        model: LM,
        prompts: Rows | None,
        max_new: int,
        *,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
        state: Held | None = None,
        slots: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **sampling,
    ):
        for name in sampling:
            if name not in _SAMPLING:
                options = [*inspect.signature(Stream).parameters][3:-1]
                raise ValueError(unknown("option of generation", name, [*options, *_SAMPLING]))
        self.model, self.max_new, self.slots, self.progress = model, max_new, slots, progress
        self.sampling, self.stop = Sampling(**sampling), [_sequence(s, model.vocab) for s in stop]
        for name, value in {"max_new": max_new, "slots": slots, "top_k": self.sampling.top_k}.items():
            if not (value is None or isinstance(value, Integral)):
                raise ValueError(f"{name} must be a whole number; got {shown(value)}")
        if max_new < 0:
            raise ValueError(f"max_new must be >= 0; got {max_new}")
        if slots is not None and slots < 1:
            raise ValueError(f"slots must be >= 1, the rows that run side by side; got {slots}")
        if not (state is None or isinstance(state, Held)):
            kind = type(state).__name__
            raise ValueError(f"state is a Held: held of a stream, or the first that load_state returns; got {kind}")
        if self.sampling.top_k is not None and not 1 <= self.sampling.top_k <= model.vocab:
            raise ValueError(f"top_k must lie in 1..{model.vocab}; got {self.sampling.top_k}")
        rows = _prompts(model, prompts, state)
        self._frozen = frozen(model)
        if state is not None:
            with self._frozen, torch.no_grad():
                check_weights(state, model)
        begins = [None if state is None else select(state, [i]) for i in range(len(rows))]
        each = zip(rows, _seeds(seed, len(rows)), begins)
        self._rows = [_row(i, prompt, own, begin, model.vocab) for i, (prompt, own, begin) in enumerate(each)]
        _check_lengths(model, self._rows, max_new)
        self._waiting, self._live = list(self._rows), list[_Row]()
        self.state: Any = None
        self._tokens: Any = None  # (rows, 1) of the live rows, their last ones, not yet read
        self._step: Any = None  # of the last step: rows, logits, tokens

    @torch.inference_mode()
    def __next__(self) -> list[int | None]:
        parts = [(*self._read(self._tokens, self.state), self._tokens)] if self._live else []
        free = len(self._waiting) if self.slots is None else self.slots - len(self._live)
        live, waiting = self._live + self._waiting[:free], self._waiting[free:]
        parts += self._read_prompts(live[len(self._live) :])
        if not live:
            raise StopIteration
        every, states, last = zip(*parts)
        logits, state = torch.cat(every), states[0] if len(states) == 1 else join(states)
        if self.max_new == 0:
            self._live, self._waiting, self.state, self._tokens = live, waiting, state, torch.cat(last)
            self.close()
            raise StopIteration
        draws = torch.tensor([row.number for row in live], dtype=torch.float64, device=logits.device)
        tokens = self.sampling.draw(logits.double(), draws, self._seen(live))
        # At the end, at once: who is interrupted before goes on from where he was.
        self._live, self._waiting, self.state, self._tokens = live, waiting, state, tokens[:, None]
        self._step = [row.index for row in live], logits, tokens
        step: list[int | None] = [None] * len(self._rows)
        for row, token in zip(live, tokens.tolist()):
            row.write(token)
            step[row.index] = token
        self._release()
        return step

    @property
    def logprobs(self) -> list[float | None]:
        """The natural logarithms of the probabilities that the model gave to the tokens of the last step.

        Raises:
            ValueError: before the first step.
        """
        if self._step is None:
            raise ValueError("no token has been drawn yet: take a step of the stream first")
        result: list[float | None] = [None] * len(self._rows)
        indices, logits, tokens = self._step
        values = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for index, value in zip(indices, values.tolist()):
            result[index] = value
        return result

    @property
    def held(self) -> Held:
        """What each row goes on from when all of them have ended, for ``stream(..., state=...)`` or ``save_state``.

        It holds the hash of the weights, so take it before they change.

        Raises:
            ValueError: where a row has not ended, or with slots, as the states of rows that gave way are not kept.
        """
        if self.slots is not None:
            raise ValueError("with slots the states of rows that have ended are not kept; leave slots out to hold them")
        ends = [row.end for row in self._rows]
        if any(end is None for end in ends):
            raise ValueError("a row has not ended yet: go through the stream to its end, or close() it")
        with self._frozen, torch.no_grad():
            own = torch.frombuffer(bytearray(fingerprint(self.model)), dtype=torch.uint8)
        states, tokens = zip(*ends)
        last, seen = torch.cat(tokens), torch.stack([_as_bools(row.seen) for row in self._rows])
        length = torch.tensor([row.length for row in self._rows])
        more = (t.to(last.device) for t in (seen, length, own.repeat(len(ends), 1)))
        return Held(join(states), last, *more)

    def close(self) -> None:
        """End every row where it is."""
        self._waiting = []
        self._release(every=True)

    def _read(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) behind ids (B, L), and the state."""
        with self._frozen:
            logits, state = self.model(ids, state, last=True)
        return logits[:, -1], state

    def _read_prompts(self, new: list[_Row]) -> list[tuple[Tensor, Any, Tensor]]:
        """Logits, state and last tokens of rows that begin; those of one length together."""
        device = self.model.embedding.weight.device
        total, done, parts = sum(len(row.prompt) + (row.begin is not None) for row in new), 0, []
        for _, group in groupby(new, key=lambda row: (len(row.prompt), row.begin is None)):
            rows = list(group)
            ids = torch.tensor([row.prompt for row in rows], dtype=torch.int64, device=device)
            state, logits = self.model.init_state(len(rows)), ids.new_zeros(len(rows), self.model.vocab)
            if begins := [row.begin for row in rows if row.begin is not None]:
                state, last = join([begin.state for begin in begins]), [begin.last for begin in begins]
                ids = torch.cat([torch.cat(last).to(device), ids], dim=1)
            read = ids if self.max_new else ids[:, :-1]  # nothing is to be drawn: the last token stays unread
            for chunk in read.split(max(1, PREFILL_CHUNK // len(rows)), dim=1) if read.numel() else ():
                logits, state = self._read(chunk, state)
                done += chunk.numel()
                if self.progress is not None:
                    self.progress(done, total)
            parts.append((logits, state, ids[:, -1:]))
        return parts

    def _seen(self, live: list[_Row]) -> Tensor | None:
        """(B, V) which tokens each row has read or written."""
        if self.sampling.repetition_penalty == 1:
            return None
        return torch.stack([_as_bools(row.seen) for row in live]).to(self.model.embedding.weight.device)

    def _release(self, every: bool = False) -> None:
        """Take out the rows that have ended, with what they would go on from."""
        ended = [every or self._ended(row) for row in self._live]
        if not any(ended):
            return
        for i, row in enumerate(self._live):
            if ended[i] and self.slots is None:
                row.end = select(self.state, [i]), self._tokens[i : i + 1]
        if not all(ended):
            keep = [i for i, end in enumerate(ended) if not end]
            self.state, self._tokens = select(self.state, keep), self._tokens[keep]
        self._live = [row for row, end in zip(self._live, ended) if not end]

    def _ended(self, row: _Row) -> bool:
        written = row.written
        return len(written) == self.max_new or any(tuple(written[-len(s) :]) == s for s in self.stop)


def stream(model: LM, prompts: Rows | None, max_new: int, **options) -> Stream:
    """Yield the next token of every row, step by step; None for a row that has ended or waits for a slot.

    A row's text depends on its own prompt and seed alone, not on the rows beside it. The model's weights must stand
    still until the stream has ended: what follows from them is derived once.

    Args:
        model: a language model; its mode (train or eval) is not changed.
        prompts: rows of token ids, of any lengths >= 1, or a tensor (B, L). With ``state``, rows may be empty, and
            None is as many empty rows as the state has.
        max_new: most tokens to draw a row, >= 0.
        stop: token ids, or sequences of them, that end a row, after they are yielded.
        seed: of the draws: one a row, or an int s, which gives row i the seed s + i; None draws anew each time.
        state: what rows go on from: ``held`` of an earlier stream, or the first that ``load_state`` returns; of the
            same weights.
        slots: most rows that run side by side; the others wait, and take the place of rows that end.
        progress: called with (tokens read, tokens to read) while prompts are read.
        temperature, top_k, top_p, min_p, repetition_penalty: see :class:`Sampling`.
    Raises:
        ValueError: for an empty prompt or stop sequence, ids outside the vocabulary, options that are unknown or out
            of range, a state of other weights, or more tokens than a filter of the model can serve.
    """
    return Stream(model, prompts, max_new, **options)


def generate(model: LM, prompts: Rows | None, max_new: int, **options) -> list[list[int]]:
    """The new tokens of every row, up to and with what stopped it. Arguments: see :func:`stream`."""
    tokens = Stream(model, prompts, max_new, **options)
    for _ in tokens:
        pass
    return [row.written for row in tokens._rows]


_SAMPLING = [option.name for option in fields(Sampling)]


def _as_bools(flags: bytearray) -> Tensor:
    return torch.frombuffer(flags, dtype=torch.bool)


def _sequence(stop: int | Sequence[int], vocab: int) -> tuple[int, ...]:
    sequence: tuple[Any, ...] = (stop,) if isinstance(stop, Integral) else tuple(stop)  # type: ignore[arg-type]
    if not sequence:
        raise ValueError("a stop sequence is empty: give at least one token id")
    if not all(isinstance(token, Integral) and 0 <= int(token) < vocab for token in sequence):
        raise ValueError(
            f"stop takes token ids in 0..{vocab - 1} or sequences of them, such as [10, [3, 4]]; got {shown(stop)}"
        )
    return sequence


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int | None]:
    if seed is None:
        return [None] * rows
    seeds: list[Any] = list(seed) if hasattr(seed, "__iter__") else [seed + i for i in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"seed has {len(seeds)} entries for {rows} rows; give one a row, or one int")
    for own in seeds:
        if not (isinstance(own, Integral) and 0 <= int(own) < 2**63):
            raise ValueError(f"seed must lie in 0..2^63-1; got {shown(own)}")
    return [int(own) for own in seeds]


def _prompts(model: LM, prompts: Rows | None, state: Held | None) -> list[list[int]]:
    given = [[]] * (0 if state is None else len(state.last)) if prompts is None else list(prompts)
    if state is None and not given:
        raise ValueError("there is no prompt: give at least one row of token ids")
    if state is not None and len(given) != len(state.last):
        raise ValueError(f"there are {len(given)} prompts for a state of {len(state.last)} rows; give one a row")
    rows = []
    for i, prompt in enumerate(given):
        row: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(row, Sequence) or not all(issubclass(kind, Integral) for kind in set(map(type, row))):
            raise ValueError(f"a prompt is a row of token ids, whole numbers; prompt {i} is {shown(row)}")
        if not row and state is None:
            raise ValueError(f"prompt {i} is empty: a model needs at least one token to go on from")
        if row and (min(row) < 0 or max(row) >= model.vocab):
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(f"prompt {i} has token id {wrong}; the model knows 0..{model.vocab - 1}")
        rows.append([int(token) for token in row])
    return rows


def _check_lengths(model: LM, rows: list[_Row], max_new: int) -> None:
    """Before the first token, not at it: a filter of the model ends somewhere."""
    limit, most = longest(model), max(row.length for row in rows)
    if limit is not None and most + max(max_new - 1, 0) > limit:
        raise ValueError(
            f"a text of {most} tokens and max_new = {max_new} are more than the {limit} that filters or positions of "
            f"the model serve; take max_new <= {max(0, limit - most + 1)}, or a model of larger max_len"
        )
