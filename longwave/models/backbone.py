"""A stack of residual blocks around mixers: any mixer at any layer, so a hybrid is a list."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from longwave.mixers import Mixer
from longwave.mixers.base import without_padding
from longwave.nn import RMSNorm
from longwave.ops import at_least_float32


class Branches(nn.Module):
    """What blocks have in common: a mixer, a channel mixer or none, and a norm before each.

    Args:
        mixer: moves information along time.
        norm: makes a norm of a width, such as RMSNorm.
        channel: makes a channel mixer of a width, or None.
        dropout: probability, on both branches.
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: Callable[[int], nn.Module] = RMSNorm,
        channel: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.mixer = norm(mixer.d_model), mixer
        self.norm2 = None if channel is None else norm(mixer.d_model)
        self.channel = None if channel is None else channel(mixer.d_model)
        self.dropout = nn.Dropout(dropout)

    def dropped(self, y: Tensor) -> Tensor:
        """What is left of a branch."""
        return self.dropout(y) if self.training else y  # a module that does nothing takes as long as a sum


class Block(Branches):
    """x + mixer(norm1 x), then x + channel(norm2 x) where there is a channel mixer; see :class:`Branches`."""

    def forward(
        self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, L, D), the mixer's state and mask -> (B, L, D) and the state, or None where none came in; dtype is that
        of the parts, where x is kept in a wider one."""
        dtype = dtype or x.dtype
        y, state = self.mixer(self.norm1(x.to(dtype)), state, mask=mask)
        x = x + self.dropped(y)
        if (channel := self.channel) is not None and (norm := self.norm2) is not None:
            x = x + self.dropped(channel(norm(x.to(dtype))))
        return x, state


class ParallelBlock(Branches):
    """x + mixer(norm1 x) + channel(norm2 x).  Source: Wang & Komatsuzaki (2021), GPT-J; Black et al. (2022), GPT-NeoX,
    arXiv:2204.06745, sec. 2.1; see :class:`Branches`."""

    def forward(
        self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Any]:
        """As :class:`Block`."""
        u = x.to(dtype or x.dtype)
        y, state = self.mixer(self.norm1(u), state, mask=mask)
        if (channel := self.channel) is not None and (norm := self.norm2) is not None:
            x = x + self.dropped(channel(norm(u)))
        return x + self.dropped(y), state


class OneNormBlock(Branches):
    """norm2(u + channel u),  u = mixer x.  Source: Fu et al. (2023) "Monarch Mixer", arXiv:2310.12109, in the authors'
    code (M2-BERT), whose mixer has a convolution of x in it in the place of a residual; see :class:`Branches`.

    Raises:
        ValueError: where there is no channel mixer.
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: Callable[[int], nn.Module] = RMSNorm,
        channel: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(mixer, norm, channel, dropout)
        if channel is None:
            raise ValueError("a block of one norm has it behind its channel mixer; give one")
        self.norm1 = nn.Identity()

    def forward(
        self, x: Tensor, state: Any = None, *, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Any]:
        """As :class:`Block`."""
        dtype = dtype or x.dtype
        u, state = self.mixer(x.to(dtype), state, mask=mask)
        assert self.channel is not None
        assert self.norm2 is not None
        return self.norm2(u + self.dropped(self.channel(u))).to(x.dtype), state


class BackboneState(NamedTuple):
    layers: tuple[Any, ...]  # one mixer state a layer
    positions: Any = ()  # of the positions, where there are any


class Backbone(nn.Module):
    """Blocks one after another, then a norm: (B, L, D) -> (B, L, D). Obeys the mixers' rule on states.

    What the blocks add up is kept in float32 or better, whatever dtype they compute in: else a sum of many rounds what
    the last ones add away.

    Args:
        mixers: one a layer, all of one d_model.
        norm, channel, dropout: see :class:`Branches`.
        block: which kind of block.
        positions: a mixer that x passes before the first block, such as
            :class:`longwave.mixers.LearnedPositions`.
        first_norm: before the first block, behind positions; None for none.
        final_norm: behind the last block; None for one like the others.
    Raises:
        ValueError: where there is no mixer, or their widths differ.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        norm: Callable[[int], nn.Module] = RMSNorm,
        channel: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        block: type[Branches] = Block,
        positions: Mixer | None = None,
        first_norm: nn.Module | None = None,
        final_norm: nn.Module | None = None,
    ):
        super().__init__()
        widths = {mixer.d_model for mixer in [*mixers, *([] if positions is None else [positions])]}
        if len(widths) != 1:
            raise ValueError(f"a backbone needs mixers of one d_model; got {sorted(widths) or 'no mixer'}")
        self.d_model = widths.pop()
        self.positions, self.first_norm = positions, first_norm
        self.layers = nn.ModuleList(block(mixer, norm, channel, dropout) for mixer in mixers)
        self.norm = norm(self.d_model) if final_norm is None else final_norm

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every layer."""
        return [cast(Branches, layer).mixer for layer in self.layers]

    def init_state(self, batch: int) -> BackboneState:
        """The state before the first token of ``batch`` sequences."""
        layers = tuple(mixer.init_state(batch) for mixer in self.mixers)
        return BackboneState(layers, () if self.positions is None else self.positions.init_state(batch))

    def forward(
        self, x: Tensor, state: BackboneState | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, BackboneState | None]:
        """See :class:`longwave.mixers.Mixer`."""
        x, mask = without_padding(x, mask)
        dtype, x = x.dtype, x.to(at_least_float32(x.dtype))
        states = [None] * len(self.layers) if state is None else state.layers
        placed: Any = ()
        if self.positions is not None:
            x, placed = self.positions(x, None if state is None else state.positions, mask=mask)
        if self.first_norm is not None:
            x = self.first_norm(x.to(dtype)).to(x.dtype)
        new = []
        for layer, s in zip(self.layers, states, strict=True):
            x, s = layer(x, s, mask=mask, dtype=dtype)
            new.append(s)
        return self.norm(x.to(dtype)), None if state is None else BackboneState(tuple(new), placed)
