"""SaShiMi of github.com/state-spaces/s4 (commit e757cef): the standalone model, and the one it was trained with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field
from torch import Tensor, nn

from longwave.models.sashimi import Level, Sashimi
from longwave.official.blocks import Call, FeedForward, ResidualBlock, ScalarNorm, mixed
from longwave.official.s4 import Block, BlockParts, Named, S4Block
from longwave.official.source import AS_IT_IS, TAP, Flag, Name, Names, Size, Source, System, Turn, inside, weight_norm
from longwave.official.source import part as read_part


class UNetLevel(nn.Module):
    """Blocks on the way down and as many on the way up, where each adds what came out on the way down.

    Source: Goel et al. (2022), arXiv:2202.09729: the variant for diffusion models, ``unet = True`` in the code.

    Args:
        before: blocks above the pool.
        blocks: behind it.
    """

    def __init__(self, before: Sequence[nn.Module], blocks: Sequence[nn.Module]):
        super().__init__()
        self.before, self.blocks = nn.ModuleList(before), nn.ModuleList(blocks)
        self.d_model = self.mixers[0].d_model

    @property
    def mixers(self) -> list[Any]:
        """See :class:`longwave.models.Level`, as the rest."""
        return [block.mixer for block in (*self.before, *self.blocks)]

    def init_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(mixer.init_state(batch) for mixer in self.mixers)

    def descend(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any, Any]:
        kept, states = [x], list(state or [None] * len(self.mixers))
        for i, block in enumerate(self.before):
            x, states[i] = block(x, states[i], mask=mask) if x.shape[1] else (x, states[i])
            kept.append(x)
        return x, kept, None if state is None else tuple(states)

    def ascend(self, below: Tensor, kept: Any, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        x, states = below + kept[-1], list(state or [None] * len(self.mixers))
        for i, (block, skip) in enumerate(zip(self.blocks, kept[-2::-1], strict=True), start=len(self.before)):
            x, states[i] = block(x, states[i], mask=mask) if x.shape[1] else (x, states[i])
            x = x + skip
        return x, None if state is None else tuple(states)


class Part(NamedTuple):
    """A place of the official model, and the same place in ours."""

    official: str  # prefix of its keys
    ours: str
    kind: str  # s4 | ff | down | up
    width: int  # of a block, or of the upper side of a pool
    factor: int  # of a pool


class SashimiModel(Source):
    """What the two models of the repository share; a subclass has their options and says where they differ.

    Attributes:
        linear: the table of a map of a pool.
        turn: of the maps of a feed-forward layer.
    """

    d_model: Size
    n_layers: Size
    pool: Sequence[Size]
    expand: Size
    ff: float = 2.0
    linear: ClassVar[Names]
    turn: ClassVar[Turn]

    def s4(self, part: Part) -> Block:
        """The options of the S4 block of a part."""
        raise NotImplementedError

    def make_norm(self, width: int) -> nn.Module:
        """One of the norms."""
        raise NotImplementedError

    def norm_names(self) -> Names:
        """Of one norm."""
        raise NotImplementedError

    def parts(self) -> Iterator[Part]:
        """Every part of the model."""
        lowest = len(self.pool)
        kinds = ["s4", *["ff"] * (self.ff > 0)] * self.n_layers

        def blocks(official: str, first: int, level: int, name: str = "blocks") -> Iterator[Part]:
            for i, kind in enumerate(kinds):
                ours = f"levels.{level}.{name}.{i}."
                yield Part(f"{official}{first + i}.", ours, kind, self.d_model * self.expand**level, 1)

        unet = getattr(self, "unet", False)  # an option of the standalone model alone
        before = len(kinds) if unet else 0
        for level, factor in enumerate(self.pool):
            first, up, width = level * (before + 1), lowest - 1 - level, self.d_model * self.expand**level
            if unet:
                yield from blocks("d_layers.", first, level, "before")
            yield Part(f"d_layers.{first + before}.", f"pools.{level}.down.", "down", width, factor)
            yield Part(f"u_layers.{up}.0.", f"pools.{level}.up.", "up", width, factor)
            yield from blocks(f"u_layers.{up}.", 1, level)
        yield from blocks("c_layers.", 0, lowest)

    def block(self, part: Part) -> ResidualBlock:
        """A layer and its norm."""
        D = part.width
        mixer = FeedForward(D, int(self.ff * D)) if part.kind == "ff" else self.s4(part).mixer()
        return ResidualBlock(mixer, self.make_norm(D), getattr(self, "prenorm", True))  # an option of the trained one

    def build(self) -> nn.Module:
        levels: list[Any] = []
        for i in range(len(self.pool) + 1):
            before, blocks = (
                [cast(Any, self.block(part)) for part in self.parts() if part.ours.startswith(f"levels.{i}.{name}.")]
                for name in ("before", "blocks")
            )
            levels.append(UNetLevel(before, blocks) if before else Level(blocks))
        return Call(Sashimi(levels, self.pool, nn.LayerNorm(self.d_model)), mixed)

    def names(self) -> Names:
        table: Names = [Name("norm.", "norm.")]
        for part in self.parts():
            if part.kind in ("down", "up"):
                names = self.linear
            elif part.kind == "s4":
                names = [*inside("layer.", "mixer.", self.s4(part).mixer_names()), *self.norm_names()]
            else:
                maps = [Name(f"layer.ff.{i}.", f"mixer.{fc}.", self.turn) for i, fc in (("0.0", "fc1"), ("2", "fc2"))]
                names = [*maps, *self.norm_names()]
            table += inside(part.official, part.ours, names)
        return inside("", "model.", table)


class Standalone(SashimiModel, BlockParts):
    """The standalone Sashimi; further options are those of its S4 blocks."""

    d_model: Size = 64
    n_layers: Size = 8
    pool: Sequence[Size] = Field(default_factory=lambda: [4, 4])
    expand: Size = 2
    bidirectional: Flag = False
    unet: Flag = False
    mode: Named = "dplr"
    kernel: Named = None
    rank: Size = 1
    linear: ClassVar[Names] = [Name("linear.", "", TAP)]
    turn = TAP

    def s4(self, part: Part) -> Block:
        options = {name: getattr(self, name) for name in BlockParts.model_fields}
        return S4Block(**options, d_model=part.width, transposed=False, bidirectional=self.bidirectional)

    def make_norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width)

    def norm_names(self) -> Names:
        return [Name("norm.", "norm.")]


class Trained(SashimiModel):
    """The model of the training runs, whose norms are within modules of their own."""

    ignored = frozenset({"dropout", "dropres", "initializer"})
    pool: Sequence[Size] = Field(default_factory=list)
    expand: Size = 1
    prenorm: Flag = False
    layer: Any = None
    center_layer: Any = None
    residual: Literal[None, "R", "residual"] = None
    norm: Literal[None, "none", "layer"] = None
    transposed: Flag = True
    interp: Literal[0] = 0
    act_pool: None = None
    linear: ClassVar[Names] = [weight_norm("linear", ""), Name("linear.", "")]
    turn = AS_IT_IS

    def s4(self, part: Part) -> Block:
        central = part.official.startswith("c_layers.") and self.center_layer is not None
        which = "center_layer" if central else "layer"
        config = getattr(self, which)
        if not isinstance(config, Mapping) or config.get("_name_") != "s4":
            raise ValueError(f"the option {which} = {config!r} is not carried over; longwave has _name_ 's4'")
        return read_part(which, S4Block, config, d_model=part.width, transposed=False)

    def make_norm(self, width: int) -> nn.Module:
        if self.norm != "layer":
            return nn.Identity()
        return ScalarNorm() if self.transposed else nn.LayerNorm(width)

    def norm_names(self) -> Names:
        return [Name("norm.norm.", "norm.")]


SYSTEMS = {"sashimi": System(Standalone), "sashimisrc": System(Trained)}
