"""Reading on, and going back: what guesses a few tokens ahead needs of a model."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longwave.mixers import select
from longwave.models.lm import LM

KEPT = 64  # states, at most, that can be gone back to


class Read(NamedTuple):
    """Tokens that were read, and the state before them."""

    before: Any
    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) bool


class Reader:
    """The state of a language model behind the tokens it has read.

    States are values, so a copy costs nothing and goes its own way. Where it records it goes back as well: to a state
    that it has kept, from where the tokens that stay are read again with the next ones.

    Attributes:
        state: of the model, or None before the first token.
        seen: how many tokens of each row were read, padding included.
        batch_size: of how many rows, or -1 before the first token.
        recording: whether it keeps what :meth:`take_back` needs.
    """

    batch_size: int = -1

    def __init__(self) -> None:
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Back to before the first token."""
        self.state: Any = None
        self.seen, self.batch_size = 0, -1
        self.past: tuple[Read, ...] = ()
        self.unread: Read | None = None

    def __deepcopy__(self, memo: Any) -> "Reader":
        return copy.copy(self)

    def read(self, model: LM, ids: Tensor, mask: Tensor | None = None, keep: int = 0) -> Tensor:
        """Read on.

        Args:
            model: always the same.
            ids: (B, L) int64.
            mask: (B, L) bool, True = real token, or None.
            keep: how many of the last tokens may have to be taken back: where it records, a state is kept before them.
        Returns:
            y: (B, L, D), what logits are made of.
        """
        (B, L), state = ids.shape, model.init_state(len(ids)) if self.state is None else self.state
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if self.unread is not None:
            ids, mask = torch.cat([self.unread.ids, ids], 1), torch.cat([self.unread.mask, mask], 1)
        sizes = [ids.shape[1] - keep, keep] if self.recording and 0 < keep < ids.shape[1] else [ids.shape[1]]
        ys = []
        for part, real in zip(ids.split(sizes, 1), mask.split(sizes, 1)):
            self.past = (*self.past, Read(state, part, real))[-KEPT:] if self.recording else ()
            y, state = model.hidden(part, state, mask=None if real.all() else real)
            ys.append(y)
        self.state, self.seen, self.batch_size, self.unread = state, self.seen + L, B, None
        return torch.cat(ys, 1)[:, -L:]

    def take_back(self, count: int) -> None:
        """As if the last ``count`` tokens had not been read.

        Raises:
            ValueError: where so many are not kept.
        """
        if count == 0:
            return
        past = [*self.past, *([] if self.unread is None else [self.unread])]
        if count > (kept := sum(read.ids.shape[1] for read in past)):
            raise ValueError(
                f"cannot take back {count} tokens: states before the last {kept} are kept; "
                "let it record before tokens are read that may be taken back"
            )
        self.seen -= count
        while count:
            self.state, ids, mask = past.pop()
            left = ids.shape[1] - count
            self.unread = Read(self.state, ids[:, :left], mask[:, :left]) if left > 0 else None
            count = max(0, -left)
        self.past = tuple(past)

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may be taken more than once."""
        if self.state is None:
            return

        def of(read: Read) -> Read:
            return Read(select(read.before, rows), read.ids[rows], read.mask[rows])

        self.state, self.batch_size, self.past = select(self.state, rows), len(rows), tuple(map(of, self.past))
        self.unread = None if self.unread is None else of(self.unread)
