"""SaShiMi of github.com/state-spaces/s4 (commit e757cef): the standalone model, and the one it was trained with."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from longwave.models.sashimi import Level, Sashimi
from longwave.models.spec import CHANNEL_MIXERS, SashimiSpec
from longwave.nn import NORMS
from longwave.nn.norm import NO_EPS, ScalarLayerNorm
from longwave.official.blocks import Call, FeedForward, ModelSource, ResidualBlock, mixed
from longwave.official.s4 import Block, BlockParts, Named, S4Block
from longwave.official.source import (
    AS_IT_IS,
    TAP,
    Flag,
    Name,
    Names,
    Shapes,
    Size,
    Source,
    State,
    System,
    Turn,
    inside,
    weight_norm,
)
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

    @abstractmethod
    def s4(self, part: Part) -> Block:
        """The options of the S4 block of a part."""

    @abstractmethod
    def make_norm(self, width: int) -> nn.Module:
        """One of the norms."""

    @abstractmethod
    def norm_names(self) -> Names:
        """Of one norm."""

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
        return ScalarLayerNorm(width, NO_EPS) if self.transposed else nn.LayerNorm(width)

    def norm_names(self) -> Names:
        return [Name("norm.norm.", "norm.")]


V3 = {"log_dt": "inv_dt", "inv_w_real": "A_real", "log_w_real": "A_real", "w_imag": "A_imag", "L": "l_kernel"}


def as_v4(state: State) -> State:
    """S4 layers of checkpoints of version 3 under the names of version 4, and with its signs and shapes.

    Source: checkpoints/convert_v3_to_v4.py of the repository.
    """
    new = {}
    for key, t in state.items():
        before, kernel, name = key.rpartition(".layer.kernel.kernel.")
        if kernel:
            key = f"{before}.layer.layer.kernel.{V3.get(name, name)}"
            t = -t if name == "w_imag" else t[:, None] if name == "log_dt" else t
        elif key.endswith(".layer.D") and not key.endswith(".layer.layer.D"):
            key = f"{key.removesuffix('D')}layer.D"
        new[key] = t
    return new


class SashimiLM(ModelSource):
    """A checkpoint of the training runs, of version 4 or 3: embedding, model and the map to logits.

    The options are those that the shapes of its tensors tell, and ``dt_transform``, which they do not: exp in version 3
    and in what was ported from it, softplus in the configs of version 4.
    """

    ignored = frozenset({"dropout", "dropres", "initializer", "residual", "interp", "act_pool", "center_layer"})
    tokenizer = "mu-law of 8 bits, as of the task audio_tokens"
    vocab_size: Size = 256
    d_model: Size = 64
    n_layers: Size = 8
    pool: Sequence[Size] = Field(default_factory=lambda: [4, 4])
    expand: Size = 2
    ff: float = Field(2.0, gt=0)
    prenorm: Literal[True] = True
    transposed: Flag = True
    mode: Literal["nplr", "diag"] = "nplr"
    disc: Literal["zoh", "bilinear"] = "zoh"
    d_state: Size = 64
    n_ssm: Size | None = None
    rank: Size = 1
    dt_transform: Literal["exp", "softplus"] | None = None

    def body(self) -> Trained:
        """The options of the model without its ends.

        Raises:
            ValueError: where dt_transform is not said.
        """
        if self.dt_transform is None:
            raise ValueError(
                "the option 'dt_transform' is missing, which the tensors do not tell: softplus in the configs of "
                "version 4, exp where it was ported from version 3"
            )
        names = ("mode", "disc", "d_state", "n_ssm", "rank", "dt_transform")
        layer = {"_name_": "s4", **{name: getattr(self, name) for name in names}}
        shared = {name: getattr(self, name) for name in ("d_model", "n_layers", "expand", "ff", "transposed")}
        return Trained(**shared, pool=list(self.pool), prenorm=True, norm="layer", layer=layer)

    def spec(self) -> SashimiSpec:
        body = self.body()
        norm: Any = {"norm": "scalar_layer", "norm_eps": NO_EPS} if self.transposed else {"norm": "layer"}
        return SashimiSpec(
            vocab=self.vocab_size,
            tied=False,
            head_bias=True,
            d_model=self.d_model,
            layers=self.n_layers,
            pattern=[body.s4(next(part for part in body.parts() if part.kind == "s4")).ours()],
            pool=list(self.pool),
            expand=self.expand,
            channel=CHANNEL_MIXERS.make("mlp", expand=self.ff, activation="gelu"),
            final_norm=NORMS.make("layer"),
            **norm,
        )

    def names(self) -> Names:
        body, ours = self.body(), "model.backbone."
        table: Names = [
            Name("encoder.0.", "model.embedding."),
            Name("decoder.0.output_transform.", "model.head."),
            Name("model.norm.", f"{ours}norm."),
        ]
        for part in body.parts():
            official = f"model.{part.official}"
            if part.kind in ("down", "up"):
                table += inside(official, ours + part.ours, body.linear)
                continue
            _, level, _, i, _ = part.ours.split(".")
            if part.kind == "s4":
                block = [*inside("layer.", "mixer.", body.s4(part).our_names()), Name("norm.norm.", "norm1.")]
            else:
                maps = [Name("layer.ff.0.0.", "channel.fc1."), Name("layer.ff.2.", "channel.fc2.")]
                block = [*maps, Name("norm.norm.", "norm2.")]
            table += inside(official, f"{ours}levels.{level}.blocks.{int(i) // 2}.", block)
        return table

    def rename(self, state: State) -> State:
        return as_v4(state)

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        if not {"encoder.0.weight", "decoder.0.output_transform.weight", "model.norm.weight"} <= shapes.keys():
            return None
        told = {
            key: tuple(t.shape)
            for key, t in as_v4({k: torch.empty(s, device="meta") for k, s in shapes.items()}).items()
        }
        layer, feed = "model.c_layers.0.layer.layer.kernel.", "model.c_layers.1.layer.ff.0.0.weight"
        if f"{layer}A_real" not in told or feed not in told:
            return None
        (vocab, D), (S, modes) = told["encoder.0.weight"], told[f"{layer}A_real"]
        pools = [told[key] for key in sorted(told) if re.fullmatch(r"model\.d_layers\.\d+\.linear\.weight(_v)?", key)]
        widths = [D, *(wide for wide, _ in pools)]
        return {
            "vocab_size": vocab,
            "d_model": D,
            "n_layers": sum(key.endswith(".layer.layer.D") for key in told if key.startswith("model.c_layers.")),
            "pool": [joined // width for (_, joined), width in zip(pools, widths)],  # (wider D, D factor)
            "expand": widths[1] // D if pools else 1,
            "ff": told[feed][0] / widths[-1],
            "transposed": "model.c_layers.0.norm.norm.m" in told,
            "mode": "nplr" if f"{layer}P" in told else "diag",
            "d_state": 2 * modes,
            "n_ssm": None if widths[-1] == S else S,
            "rank": told.get(f"{layer}P", (1,))[0],
            **({"dt_transform": "exp"} if told.keys() != shapes.keys() else {}),  # of Lightning's options none is flat
        }


SYSTEMS = {"sashimi": System(Standalone), "sashimisrc": System(Trained), "sashimi_lm": System(SashimiLM)}
