"""Generation: a prompt is read once, then one token at a time, through the same forward as training."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral
from random import Random
from typing import Any

import torch
from torch import Tensor

from longwave.errors import shown
from longwave.mixers import join, select
from longwave.models.lm import LM
from longwave.models.states import Held
from longwave.nn import Filter, frozen

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
    written: list[int] = field(default_factory=list)
    end: Held | None = None


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
        self.model, self.max_new, self.slots, self.progress = model, max_new, slots, progress
        self.sampling, self.stop = Sampling(**sampling), [_sequence(s, model.vocab) for s in stop]
        for name, value in {"max_new": max_new, "slots": slots}.items():
            if value is not None and value != round(value):
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
        self._rows = [
            _Row(i, prompt, Random(own), None if state is None else select(state, [i]))
            for i, (prompt, own) in enumerate(zip(rows, _seeds(seed, len(rows))))
        ]
        _check_lengths(model, self._rows, max_new)
        self._waiting, self._live = list(self._rows), list[_Row]()
        self._frozen = frozen(model)
        self.state: Any = None
        self._logits: Any = None  # (rows, V) of the live rows, for their next token
        self._tokens: Any = None  # (rows, 1) of the live rows, drawn and not yet read

    @torch.inference_mode()
    def __next__(self) -> list[int | None]:
        if self._live:
            self._logits, self.state = self._read(self._tokens, self.state)
        self._admit()
        if self.max_new == 0:
            self.close()
        if not self._live:
            raise StopIteration
        device = self._logits.device
        draws = torch.tensor([row.draws.random() for row in self._live], dtype=torch.float64, device=device)
        tokens = self.sampling.draw(self._logits.double(), draws, self._seen())
        self._step = [row.index for row in self._live], self._logits, tokens
        self._tokens = tokens[:, None]
        for row, token in zip(self._live, tokens.tolist()):
            row.written.append(token)
        self._release()
        step: list[int | None] = [None] * len(self._rows)
        for index, token in zip(self._step[0], tokens.tolist()):
            step[index] = token
        return step

    @property
    def logprobs(self) -> list[float | None]:
        """The natural logarithms of the probabilities that the model gave to the tokens of the last step."""
        result: list[float | None] = [None] * len(self._rows)
        indices, logits, tokens = self._step
        values = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for index, value in zip(indices, values.tolist()):
            result[index] = value
        return result

    @property
    def held(self) -> Held:
        """What each row goes on from when all of them have ended, for ``stream(..., state=...)`` or ``save_state``.

        Raises:
            ValueError: where a row has not ended, or with slots, as the states of rows that gave way are not kept.
        """
        if self.slots is not None:
            raise ValueError("with slots the states of rows that have ended are not kept; leave slots out to hold them")
        ends = [row.end for row in self._rows]
        if any(end is None for end in ends):
            raise ValueError("a row has not ended yet: go through the stream to its end, or close() it")
        return join(ends)

    def close(self) -> None:
        """End every row where it is."""
        self._waiting = []
        self._release(every=True)

    def _read(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) behind ids (B, L), and the state."""
        with self._frozen:
            logits, state = self.model(ids, state, last=True)
        return logits[:, -1], state

    def _admit(self) -> None:
        """Read the prompts of as many waiting rows as there are free slots for; those of one length together."""
        free = len(self._waiting) if self.slots is None else self.slots - len(self._live)
        new, self._waiting = self._waiting[:free], self._waiting[free:]
        if not new:
            return
        device = self.model.embedding.weight.device
        total, done = sum(len(row.prompt) + (row.begin is not None) for row in new), 0
        for _, group in groupby(new, key=lambda row: (len(row.prompt), row.begin is None)):
            rows = list(group)
            ids = torch.tensor([row.prompt for row in rows], dtype=torch.int64, device=device)
            state, logits = self.model.init_state(len(rows)), ids.new_zeros(len(rows), self.model.vocab)
            if rows[0].begin is not None:
                state, last = join([row.begin for row in rows])
                ids = torch.cat([last.to(device), ids], dim=1)
            self._tokens = torch.cat([self._tokens, ids[:, -1:]]) if self._live else ids[:, -1:]
            read = ids if self.max_new else ids[:, :-1]  # nothing is to be drawn: the last token stays unread
            for chunk in read.split(max(1, PREFILL_CHUNK // len(rows)), dim=1) if read.numel() else ():
                logits, state = self._read(chunk, state)
                done += chunk.numel()
                if self.progress is not None:
                    self.progress(done, total)
            if self._live:
                state, logits = join([self.state, state]), torch.cat([self._logits, logits])
            self.state, self._logits = state, logits
            self._live += rows

    def _seen(self) -> Tensor | None:
        """(B, V) which tokens each live row has read or written."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self._live), self.model.vocab, dtype=torch.bool)
        for i, row in enumerate(self._live):
            seen[i, row.prompt + row.written] = True
        return seen.to(self.model.embedding.weight.device)

    def _release(self, every: bool = False) -> None:
        """Take out the rows that have ended, with what they would go on from."""
        ended = [every or self._ended(row) for row in self._live]
        if not any(ended):
            return
        for i, row in enumerate(self._live):
            if ended[i] and self.slots is None:
                row.end = Held(select(self.state, [i]), self._tokens[i : i + 1])
        if not all(ended):
            keep = [i for i, end in enumerate(ended) if not end]
            self.state, self._tokens, self._logits = select(self.state, keep), self._tokens[keep], None
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
        state: what rows go on from: ``held`` of an earlier stream of this model, or the first that ``load_state``
            returns, which refuses those of other weights.
        slots: most rows that run side by side; the others wait, and take the place of rows that end.
        progress: called with (tokens read, tokens to read) while prompts are read.
        temperature, top_k, top_p, min_p, repetition_penalty: see :class:`Sampling`.
    Raises:
        ValueError: for an empty prompt or stop sequence, ids outside the vocabulary, options out of range, or more
            tokens than a filter of the model can serve.
    """
    return Stream(model, prompts, max_new, **options)


def generate(model: LM, prompts: Rows | None, max_new: int, **options) -> list[list[int]]:
    """The new tokens of every row, up to and with what stopped it. Arguments: see :func:`stream`."""
    tokens = Stream(model, prompts, max_new, **options)
    for _ in tokens:
        pass
    return [row.written for row in tokens._rows]


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
    seeds = [seed + i for i in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"seed has {len(seeds)} entries for {rows} rows; give one a row, or one int")
    for own in seeds:
        if not 0 <= own < 2**63:
            raise ValueError(f"seed must lie in 0..2^63-1; got {shown(own)}")
    return seeds  # type: ignore[return-value]


def _prompts(model: LM, prompts: Rows | None, state: Held | None) -> list[list[int]]:
    if state is None:
        rows = [list(row) for row in (prompts.tolist() if isinstance(prompts, Tensor) else prompts or [])]
        if not rows:
            raise ValueError("there is no prompt: give at least one row of token ids")
    else:
        held = len(state.last)
        rows = [[] for _ in range(held)] if prompts is None else [list(row) for row in prompts]
        if len(rows) != held:
            raise ValueError(f"there are {len(rows)} prompts for a state of {held} rows; give one a row")
    for i, row in enumerate(rows):
        if not row and state is None:
            raise ValueError(f"prompt {i} is empty: a model needs at least one token to go on from")
        if row and (min(row) < 0 or max(row) >= model.vocab):
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(f"prompt {i} has token id {wrong}; the model knows 0..{model.vocab - 1}")
    return rows


def _check_lengths(model: LM, rows: list[_Row], max_new: int) -> None:
    """Before the first token, not at it: a filter of the model ends somewhere."""
    every = [m.longest() for m in model.modules() if isinstance(m, Filter)]
    limits = [limit for limit in every if limit is not None]
    longest = max(len(row.prompt) for row in rows) + max(max_new - 1, 0)
    if limits and longest > min(limits):
        raise ValueError(
            f"a prompt of {longest - max(max_new - 1, 0)} tokens and max_new = {max_new} are more than the model's "
            f"filters of max_len = {min(limits)} can serve; take max_new <= "
            f"{max(0, min(limits) - longest + max_new)}, or a model of larger max_len"
        )
