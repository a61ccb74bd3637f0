"""Generation: one prefill, then one token at a time, through the same forward as training."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor

from longwave.errors import shown
from longwave.models.lm import LM

PREFILL_CHUNK = 8192  # tokens of a prompt that go through the model at once


@torch.inference_mode()
def stream(
    model: LM,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int | None = None,
    report: list | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, step by step; None for a row that has met a stop token before.

    Args:
        model: a language model; its mode (train or eval) is not changed.
        prompts: rows of token ids, of any lengths >= 1 (shorter ones are padded on the left), or a tensor (B, L).
        max_new: most tokens to draw a row, >= 0.
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_k: draw among the k most probable tokens.
        top_p: draw among the fewest tokens whose probabilities reach p, 0 < p <= 1.
        stop: token ids that end a row, after they are yielded.
        seed: of the draws; None draws anew each time.
        report: a list to which the state after the prompt and after every later step is given, for inspection.
    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, options out of range, or a stop of several tokens.
    """
    ids, mask = _batch(prompts, model)
    _check(model, max_new, temperature, top_k, top_p, stop, seed)
    generator = None
    if temperature > 0:
        generator = torch.Generator(device=ids.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
    state = model.init_state(len(ids))
    for chunk, real in zip(ids.split(PREFILL_CHUNK, dim=1), mask.split(PREFILL_CHUNK, dim=1)):
        logits, state = model(chunk, state, mask=None if real.all() else real, last=True)
    alive = torch.ones(len(ids), dtype=torch.bool)
    for step in range(max_new):
        token = _draw(logits[:, -1].float(), temperature, top_k, top_p, generator)  # (B,)
        yield [t if on else None for t, on in zip(token.tolist(), alive.tolist())]
        alive &= ~torch.isin(token.cpu(), torch.tensor(stop, dtype=token.dtype))
        if report is not None:
            report.append(state)
        if not alive.any() or step == max_new - 1:
            return
        logits, state = model(token[:, None], state)


def generate(model: LM, prompts: Sequence[Sequence[int]] | Tensor, max_new: int, **options) -> list[list[int]]:
    """The new tokens of every row, up to and with its stop token. Arguments: see :func:`stream`."""
    rows: list[list[int]] = [[] for _ in range(len(prompts))]
    for tokens in stream(model, prompts, max_new, **options):
        for row, token in zip(rows, tokens):
            if token is not None:
                row.append(token)
    return rows


def _batch(prompts: Sequence[Sequence[int]] | Tensor, model: LM) -> tuple[Tensor, Tensor]:
    """Ids (B, L) padded on the left, and which of them are real."""
    device = model.embedding.weight.device
    rows = [list(row) for row in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
    if not rows:
        raise ValueError("there is no prompt: give at least one row of token ids")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty: a model needs at least one token to go on from")
        if min(row) < 0 or max(row) >= model.vocab:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(f"prompt {i} has token id {wrong}; the model knows 0..{model.vocab - 1}")
    L = max(map(len, rows))
    ids = torch.tensor([[0] * (L - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (L - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def _check(
    model: LM,
    max_new: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    stop: Sequence[int],
    seed: int | None,
) -> None:
    if max_new < 0:
        raise ValueError(f"max_new must be >= 0; got {max_new}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be >= 0 (0 takes the most probable token); got {temperature}")
    for token in stop:
        if not isinstance(token, Integral) or not 0 <= token < model.vocab:
            raise ValueError(
                f"stop takes single token ids in 0..{model.vocab - 1}, such as [10]; got {shown(token)} (to stop at "
                "several tokens in a row, look for them in what stream yields)"
            )
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2^63-1; got {shown(seed)}")
    if top_k is not None and not 1 <= top_k <= model.vocab:
        raise ValueError(f"top_k must lie in 1..{model.vocab}; got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        probability, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = probability.cumsum(-1) - probability >= top_p  # what the more probable ones have reached already
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
