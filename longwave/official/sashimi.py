"""SaShiMi of github.com/state-spaces/s4 (commit e757cef): the standalone model, and the one it was trained with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from longwave.models.sashimi import Level, Sashimi
from longwave.official.blocks import FeedForward, MixerFace, ResidualBlock, ScalarNorm
from longwave.official.s4 import S4_BLOCK, S4Layer, under
from longwave.official.system import Choice, Options, Shapes, Size, Sizes, State, System, prefixed, read_part


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


def _parts(o: Options) -> Iterator[Part]:
    """Every part of the model."""
    lowest, unet = len(o.pool), getattr(o, "unet", False)
    kinds = ["s4", *["ff"] * (o.ff > 0)] * o.n_layers

    def blocks(official: str, first: int, level: int, name: str = "blocks") -> Iterator[Part]:
        for i, kind in enumerate(kinds):
            ours = f"levels.{level}.{name}.{i}."
            yield Part(f"{official}{first + i}.", ours, kind, o.d_model * o.expand**level, 1)

    before = len(kinds) if unet else 0
    for level, factor in enumerate(o.pool):
        first, up, width = level * (before + 1), lowest - 1 - level, o.d_model * o.expand**level
        if unet:
            yield from blocks("d_layers.", first, level, "before")
        yield Part(f"d_layers.{first + before}.", f"pools.{level}.down.", "down", width, factor)
        yield Part(f"u_layers.{up}.0.", f"pools.{level}.up.", "up", width, factor)
        yield from blocks(f"u_layers.{up}.", 1, level)
    yield from blocks("c_layers.", 0, lowest)


class Variant(NamedTuple):
    """Where the two models of the repository differ.

    Attributes:
        s4: the options of the S4 block of a part.
        prenorm: see :class:`ResidualBlock`.
        norm: makes the norm of a width.
        norm_shapes: its official keys behind ``norm.``.
        convolutions: whether linear maps are stored as convolutions of one tap, (d_out, d_in, 1).
        weight_norm: whether those of the pools are stored as direction and length.
    """

    s4: Callable[[Part], Options]
    prenorm: bool
    norm: Callable[[int], nn.Module]
    norm_shapes: Callable[[int], Shapes]
    convolutions: bool
    weight_norm: bool


def _layer_norm_shapes(width: int, prefix: str = "") -> Shapes:
    return {f"{prefix}weight": (width,), f"{prefix}bias": (width,)}


def _system(options: dict[str, Any], ignored: frozenset[str], variant: Callable[[Options], Variant]) -> System:
    """The importer of one of the two."""

    def keys(o: Options) -> Shapes:
        v, shapes = variant(o), _layer_norm_shapes(o.d_model, "norm.")
        for part in _parts(o):
            for key, shape in _part_keys(part, o, v).items():
                shapes[part.official + key] = shape
        return shapes

    def build(o: Options) -> MixerFace:
        return MixerFace(_build(o, variant(o)))

    def convert(state: State, o: Options) -> State:
        v, ours = variant(o), {f"norm.{key}": state[f"norm.{key}"] for key in ("weight", "bias")}
        for part in _parts(o):
            for key, tensor in _convert_part(under(part.official, state), part, v).items():
                ours[part.ours + key] = tensor
        return prefixed("model.", ours)

    return System(options=options, ignored=ignored, keys=keys, build=build, convert=convert)


def _part_keys(part: Part, o: Options, v: Variant) -> Shapes:
    D, one = part.width, (1,) if v.convolutions else ()
    if part.kind in ("down", "up"):
        low = D * o.expand
        d_out, d_in = (low, D * part.factor) if part.kind == "down" else (D * part.factor, low)
        weight: Shapes = {"linear.weight": (d_out, d_in, *one)}
        if v.weight_norm:
            weight = {"linear.weight_g": (d_out, 1), "linear.weight_v": (d_out, d_in)}
        return {**weight, "linear.bias": (d_out,)}
    norm = prefixed("norm.", v.norm_shapes(D))
    if part.kind == "s4":
        return {**prefixed("layer.", S4_BLOCK.keys(v.s4(part))), **norm}
    E = int(o.ff * D)
    return {
        "layer.ff.0.0.weight": (E, D, *one),
        "layer.ff.0.0.bias": (E,),
        "layer.ff.2.weight": (D, E, *one),
        "layer.ff.2.bias": (D,),
        **norm,
    }


def _convert_part(state: State, part: Part, v: Variant) -> State:
    if part.kind in ("down", "up"):
        if v.weight_norm:
            direction = state["linear.weight_v"]
            weight = state["linear.weight_g"] * direction / direction.norm(dim=1, keepdim=True)
        else:
            weight = state["linear.weight"]
        return {"weight": weight.flatten(1), "bias": state["linear.bias"]}
    norm = {f"norm.{key.rpartition('.')[2]}": tensor for key, tensor in under("norm.", state).items()}
    if part.kind == "s4":
        block = S4_BLOCK.convert(under("layer.", state), v.s4(part))
        return {**prefixed("mixer.block.", block), **norm}
    names = {
        "ff.0.0.weight": "fc1.weight",
        "ff.0.0.bias": "fc1.bias",
        "ff.2.weight": "fc2.weight",
        "ff.2.bias": "fc2.bias",
    }
    maps = under("layer.", state)
    return {
        **{f"mixer.{name}": maps[key].flatten(1) if maps[key].ndim > 1 else maps[key] for key, name in names.items()},
        **norm,
    }


def _build(o: Options, v: Variant) -> Sashimi:
    if o.n_layers < 1:
        raise ValueError(f"n_layers = {o.n_layers} is not carried over; longwave has n_layers >= 1")

    def block(part: Part) -> ResidualBlock:
        D = part.width
        if part.kind == "ff":
            return ResidualBlock(FeedForward(D, int(o.ff * D)), v.norm(D), v.prenorm)
        options = v.s4(part)
        return ResidualBlock(S4Layer(S4_BLOCK.build(options), D, not options.bidirectional), v.norm(D), v.prenorm)

    levels: list[Any] = []
    for i in range(len(o.pool) + 1):
        before, blocks = (
            [cast(Any, block(part)) for part in _parts(o) if part.ours.startswith(f"levels.{i}.{name}.")]
            for name in ("before", "blocks")
        )
        levels.append(UNetLevel(before, blocks) if before else Level(blocks))
    return Sashimi(levels, o.pool, nn.LayerNorm(o.d_model))


_GIVEN = {"d_model", "d_state", "transposed", "bidirectional", "rate"}  # by SaShiMi itself


def _standalone(o: Options) -> Variant:
    s4 = {name: getattr(o, name) for name in S4_BLOCK.options if name not in _GIVEN}
    return Variant(
        s4=lambda part: Options(
            **s4, d_model=part.width, d_state=64, transposed=False, rate=1.0, bidirectional=o.bidirectional
        ),
        prenorm=True,
        norm=nn.LayerNorm,
        norm_shapes=_layer_norm_shapes,
        convolutions=True,
        weight_norm=False,
    )


SASHIMI = _system(
    {
        "d_model": 64,
        "n_layers": 8,
        "pool": Sizes([4, 4]),
        "expand": 2,
        "ff": 2.0,
        "bidirectional": False,
        "unet": False,
        **{name: value for name, value in S4_BLOCK.options.items() if name not in _GIVEN},
    },
    S4_BLOCK.ignored,
    _standalone,
)


NORMS: dict[str | None, tuple[Callable[[int], nn.Module], Callable[[int], Shapes]]] = {
    None: (lambda width: nn.Identity(), lambda width: {}),
    "none": (lambda width: nn.Identity(), lambda width: {}),
    "layer": (nn.LayerNorm, partial(_layer_norm_shapes, prefix="norm.")),
    "scalar": (lambda width: ScalarNorm(), lambda width: {"norm.m": (1,), "norm.s": (1,)}),
}


def _trained(o: Options) -> Variant:
    def s4(part: Part) -> Options:
        central = part.official.startswith("c_layers.") and o.center_layer is not None
        which = "center_layer" if central else "layer"
        config = getattr(o, which)
        if not isinstance(config, Mapping) or config.get("_name_") != "s4":
            raise ValueError(f"the option {which} = {config!r} is not carried over; longwave has _name_ 's4'")
        return read_part(which, S4_BLOCK.read, config, d_model=part.width, transposed=False)

    norm, shapes = NORMS["scalar" if o.norm == "layer" and o.transposed else o.norm]
    return Variant(s4, o.prenorm, norm, shapes, convolutions=False, weight_norm=True)


SASHIMI_TRAINED = _system(
    {
        "d_model": Size(),
        "n_layers": Size(),
        "pool": Sizes([]),
        "expand": 1,
        "ff": 2.0,
        "prenorm": False,
        "layer": None,
        "center_layer": None,
        "residual": Choice(None, "R", "residual"),
        "norm": Choice(None, "none", "layer"),
        "transposed": True,
        "interp": Choice(0),
        "act_pool": Choice(None),
    },
    frozenset({"dropout", "dropres", "initializer"}),
    _trained,
)

SYSTEMS = {"sashimi": SASHIMI, "sashimisrc": SASHIMI_TRAINED}
