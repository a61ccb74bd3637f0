"""A language model as EleutherAI's lm-evaluation-harness asks one: a prefix is read once, then its state branches.

States are values, so what comes after a prefix costs its own tokens alone, and a text of any length is read without
windows.  Source: Gao et al., github.com/EleutherAI/lm-evaluation-harness; pairs are split into ids as its HFLM does.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.errors import unknown
from longwave.machine import required
from longwave.mixers import select
from longwave.models import LM, generate
from longwave.nn import frozen
from longwave.tokenizer import Tokenizer

lm_eval = required("lm_eval", "eval")
from lm_eval.api.model import LM as Asked  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

CHUNK = 4096  # ids that are read at once
NEW = 256  # ids that are written where a task does not say


class Harness(Asked):
    """Answers of one model.

    Args:
        model: its mode is set to evaluation.
        tokenizer: what made its ids.
        beginning: the id before an empty prefix; default the end of a document, and of bytes a line feed.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, beginning: int | None = None):
        super().__init__()
        tokenizer.check_fits(model.vocab, "the model")
        self.model, self.tokenizer = model.eval(), tokenizer
        known = tokenizer.end if beginning is None else beginning
        self.beginning: int = int(tokenizer.encode(["\n"])[0][0]) if known is None else known

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0].tolist()

    def _pair(self, prefix: str, text: str) -> tuple[tuple[int, ...], list[int]]:
        """The ids of both: spaces at the end of a prefix belong to what follows it."""
        bare = prefix.rstrip()
        before = self._ids(bare)
        if not before:
            return (self.beginning,), self._ids(prefix + text)
        return tuple(before), self._ids(prefix + text)[len(before) :]

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of every (prefix, text): ln p(text | prefix), and whether it is the most probable one, id by id."""
        pairs = [self._pair(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
        answers: dict[int, tuple[float, bool]] = {}
        with frozen(self.model):
            for prefix, group in groupby(order, key=lambda i: pairs[i][0]):
                places = list(group)
                answers |= zip(places, self._choices(prefix, [pairs[i][1] for i in places]))
        return [answers[i] for i in range(len(pairs))]

    def _choices(self, prefix: Sequence[int], texts: list[list[int]]) -> Iterator[tuple[float, bool]]:
        """Of every text behind one prefix, whose state is there once."""
        *_, (_, last, state) = self._read(list(prefix))
        longest = max(map(len, texts))
        first = last.expand(len(texts), -1, -1)  # logits of the first id
        logits = first
        if longest > 1:
            ids = torch.tensor([text[:-1] + [0] * (longest - max(1, len(text))) for text in texts])
            mask = torch.tensor([[i < len(text) - 1 for i in range(longest - 1)] for text in texts])
            rest, _ = self.model(ids.to(last.device), select(state, [0] * len(texts)), mask=mask.to(last.device))
            logits = torch.cat([first, rest], dim=1)
        for text, row in zip(texts, logits):
            yield self._said(row[: len(text)], text)

    def _read(self, ids: list[int]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Chunk by chunk: its logits (L, V), the last of them (1, 1, V), and the state behind it."""
        device = next(self.model.parameters()).device
        state: Any = self.model.init_state(1)
        for start in range(0, len(ids), CHUNK):
            chunk = torch.tensor([ids[start : start + CHUNK]], device=device)
            logits, state = self.model(chunk, state)
            yield logits[0], logits[:, -1:], state

    @staticmethod
    def _said(logits: Tensor, ids: Sequence[int]) -> tuple[float, bool]:
        """ln p of ids by their logits (L, V), and whether each was the most probable."""
        wanted = torch.tensor(ids, device=logits.device)
        logp = logits.double().log_softmax(-1)
        return logp.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """ln p of whole texts, the state carried from their first id to their last."""
        found = []
        with frozen(self.model):
            for request in requests:
                ids = [self.beginning, *self._ids(request.args[0])]
                total = 0.0
                for i, (logits, _, _) in enumerate(self._read(ids[:-1])):
                    wanted = ids[1 + i * CHUNK : 1 + (i + 1) * CHUNK]
                    total += self._said(logits, wanted)[0]
                found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What is written behind prefixes, up to the first of the texts that end it."""
        found = []
        for request in requests:
            prefix, options = request.args
            drawn = ("temperature", "top_k", "top_p") if options.get("do_sample") else ()
            sampling = {key: options[key] for key in drawn if key in options}
            most = int(options.get("max_gen_toks", NEW))
            stop = [] if self.tokenizer.end is None else [self.tokenizer.end]
            (ids,) = generate(self.model, [self._ids(prefix) or [self.beginning]], most, stop=stop, seed=0, **sampling)
            text = self.tokenizer.decode(ids)
            for end in options.get("until", []):
                text = text.partition(end)[0] if end else text
            found.append(text)
        return found


def ask(
    model: LM, tokenizer: Tokenizer, tasks: Sequence[str], shots: int | None, folder: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """What a model reaches on tasks of the harness.

    Args:
        tasks: their names.
        shots: examples before each question; None is as the task has it.
        folder: of YAML files of tasks; then those alone are known, which saves the 16 s that all others take to read.
        limit: questions a task at most; None is all.
    Returns:
        The numbers of every task, by name.
    Raises:
        ValueError: where there is no such task.
    """
    known = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    for name in tasks:
        if name not in known.all_tasks:
            shown = known.all_tasks if folder is not None else ["those of lm_eval ls tasks"]
            raise ValueError(unknown("task of lm-eval", name, shown))
    found = lm_eval.simple_evaluate(
        model=Harness(model, tokenizer), tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=known,
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    return {name: dict(_numbers(told)) for name, told in found["results"].items()}


def _numbers(told: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in told.items():
        if isinstance(value, float) and "stderr" not in key:
            yield key.partition(",")[0], value
