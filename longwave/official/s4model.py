"""SequenceModel of github.com/state-spaces/s4 (commit e757cef), in its Lightning checkpoints under ``model.``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.official.blocks import ACTIVATIONS, ELEMENTWISE, BatchNorm, FeedForward, MixerFace, ResidualBlock
from longwave.official.s4 import S4_BLOCK, under
from longwave.official.sashimi import S4Layer, ScalarNorm
from longwave.official.system import (
    Anything,
    Choice,
    Number,
    Options,
    Shapes,
    Size,
    State,
    System,
    prefixed,
    read_part,
)


class InstanceNorm(nn.Module):
    """Every feature of a sequence by its mean and variance over time.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), arXiv:1607.08022.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> the same shape."""
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)


class GroupNorm(nn.Module):
    """A sequence by its mean and variance over time and features, then an affine map.

    Source: Wu & He (2018), arXiv:1803.08494, in one group.

    Args:
        features: D.
    """

    def __init__(self, features: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> the same shape."""
        return F.group_norm(x.transpose(1, 2), 1, self.weight, self.bias).transpose(1, 2)


class Residual(nn.Module):
    """alpha x + beta y.

    Args:
        alpha, beta: weights of what enters a block and of what its layer makes of it.
    """

    def __init__(self, alpha: float, beta: float):
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.alpha * x + self.beta * y if self.alpha else self.beta * y


class Affine(nn.Module):
    """alpha x + affine y.

    Args:
        alpha: weight of what enters a block.
        features: how many learned weights the other one has, 1 or D.
    """

    def __init__(self, alpha: float, features: int):
        super().__init__()
        self.alpha, self.affine = alpha, nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.alpha * x + self.affine * y


class Joined(nn.Module):
    """W [f(x) | g(x)]: the authors' ``bidirectional`` around a layer, whose g does not hear x in reverse.

    Args:
        layer, reverse_layer: f and g.
        d_model: D.
    """

    causal = False

    def __init__(self, layer: nn.Module, reverse_layer: nn.Module, d_model: int):
        super().__init__()
        self.layer, self.reverse_layer = layer, reverse_layer
        self.bidirectional_linear = nn.Linear(2 * d_model, d_model)

    def forward(self, x: Tensor, state: None = None, *, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.bidirectional_linear(torch.cat([self.layer(x)[0], self.reverse_layer(x)[0]], dim=-1)), None


class SequenceModel(nn.Module):
    """Blocks in a row, then a norm.

    Args:
        blocks: of one width D.
        norm: behind the last.
    """

    def __init__(self, blocks: list[ResidualBlock], norm: nn.Module):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(blocks), norm

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first token of ``batch`` sequences: that of every layer.

        Raises:
            ValueError: where a layer or a norm looks ahead.
        """
        for module in self.modules():
            if isinstance(module, InstanceNorm | GroupNorm) or not getattr(module, "causal", True):
                raise ValueError(f"a model with {type(module).__name__} looks ahead here, so it has no state")
        blocks: list[Any] = list(self.layers)
        return tuple(block.init_state(batch) for block in blocks)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, L, D) -> y (B, L, D) and the state after it, or None where none came in."""
        states = list(state or [None] * len(self.layers))
        for i, block in enumerate(self.layers):
            x, states[i] = block(x, states[i])
        return self.norm(x), None if state is None else tuple(states)


def _named(what: str, option: Any, known: set[str]) -> tuple[str | None, dict[str, Any]]:
    """A part of the config as (its name, its arguments): it is None, a name, or a mapping with ``_name_``."""
    arguments = dict(option) if isinstance(option, Mapping) else {"_name_": option}
    name = arguments.pop("_name_", None)
    if not isinstance(name, str | None):
        raise ValueError(f"{what} = {option!r} is neither None, a name, nor a mapping with _name_")
    for key in arguments:
        if key not in known:
            carried = ", ".join(sorted(known))
            raise ValueError(f"{what} = {name!r} with {key!r} is not carried over; longwave has {carried}")
    return name, arguments


def _norm(o: Options, features: int) -> nn.Module:
    name, arguments = _named("norm", o.norm, {"scalar"})
    table = {
        "none": nn.Identity,
        "layer": lambda: nn.LayerNorm(features),
        "batch": lambda: BatchNorm(features),
        "instance": InstanceNorm,
        "group": lambda: GroupNorm(features),
    }
    if name == "layer" and o.transposed and arguments.get("scalar", True):
        return ScalarNorm()
    return choose("norm", name or "none", table)()


def _residual(o: Options, i: int) -> nn.Module:
    """That of block i, counted from 1."""
    name, arguments = _named("residual", o.residual, {"alpha", "beta", "scalar", "gamma", "power", "l2"})
    alpha, beta = arguments.get("alpha", 1.0), arguments.get("beta", 1.0)
    if name in ("R", "residual"):
        return Residual(alpha, beta)
    if name in ("A", "affine"):
        return Affine(alpha, 1 if arguments.get("scalar", True) else o.d_model)
    if name in ("D", "decay"):
        weight = i ** -arguments.get("power", 0.5)
        return Residual((1 - weight**2) ** 0.5 if arguments.get("l2", True) else 1 - weight, weight)
    if name in (None, "F", "N", "none", "ff", "feedforward"):
        return Residual(0.0, 1.0)
    raise ValueError(f"residual = {name!r} is not carried over; longwave has R, A, D, F, N, by these or longer names")


def _ffn_hidden(o: Options) -> int:
    return int(o.expand * o.d_model)


def _ffn_keys(o: Options) -> Shapes:
    hidden, first = _ffn_hidden(o), "ff.0" if o.activation is None else "ff.0.0"
    widened = hidden * (2 if o.activation == "glu" else 1)
    return {
        f"{first}.weight": (widened, o.d_model),
        f"{first}.bias": (widened,),
        "ff.2.weight": (o.d_model, hidden),
        "ff.2.bias": (o.d_model,),
    }


FFN_LAYER = System(
    options={
        "d_model": Size(),
        "expand": 2.0,
        "d_output": Choice(None),
        "activation": Choice(*ACTIVATIONS, default="gelu"),
    },
    ignored=frozenset({"initializer", "dropout", "tie_dropout", "transposed"}),
    keys=_ffn_keys,
    build=lambda o: FeedForward(o.d_model, _ffn_hidden(o), o.activation),
    convert=lambda state, o: {
        f"{'fc2' if key.startswith('ff.2') else 'fc1'}.{key.rpartition('.')[2]}": tensor
        for key, tensor in state.items()
    },
)

S4_LAYER = replace(
    S4_BLOCK,
    options={
        **S4_BLOCK.options,
        "activation": Choice(*ELEMENTWISE, default="gelu"),  # unlike in the standalone block, glu has no channels
        "layer": Choice("fftconv"),
    },
    build=lambda o: S4Layer(S4_BLOCK.build(o), o.d_model, not o.bidirectional),
    convert=lambda state, o: prefixed("block.", S4_BLOCK.convert(state, o)),
)

LAYERS = {"s4": S4_LAYER, "ffn": FFN_LAYER}


def _layers(o: Options) -> list[tuple[System, Options]]:
    """What every layer is, and its options."""
    configs = []
    for config in o.layer if isinstance(o.layer, list | tuple) else [o.layer]:
        name = config.get("_name_") if isinstance(config, Mapping) else config
        system = choose("layer", str(name), LAYERS)
        run = {"rate": o.rate} if name == "s4" else {}
        configs.append((system, read_part("layer", system.read, config, **run, d_model=o.d_model, transposed=False)))
    return configs * (o.n_layers * o.n_repeat)


def _parts(o: Options) -> tuple[str, ...]:
    """The layers within a block, by their official names."""
    return ("layer", "reverse_layer") if o.bidirectional else ("layer",)


def _norm_keys(o: Options) -> Shapes:
    """Of one norm, official: those of ours, and what ours does not count."""
    norm = _norm(o, o.d_model)
    shapes: Shapes = {f"norm.norm.{key}": tuple(tensor.shape) for key, tensor in norm.state_dict().items()}
    if isinstance(norm, BatchNorm):
        shapes["norm.norm.num_batches_tracked"] = ()
    elif isinstance(norm, nn.LayerNorm) and o.transposed:
        return {key.replace("norm.norm.", "norm.norm.ln."): shape for key, shape in shapes.items()}
    return shapes


def _keys(o: Options) -> Shapes:
    keys: Shapes = {}
    for i, (system, options) in enumerate(_layers(o)):
        inner = {f"{part}.{key}": shape for part in _parts(o) for key, shape in system.keys(options).items()}
        inner |= _norm_keys(o)
        inner |= {f"residual.{key}": tuple(t.shape) for key, t in _residual(o, i + 1).state_dict().items()}
        if o.bidirectional:
            inner |= {"bidirectional_linear.weight": (o.d_model, 2 * o.d_model)}
            inner |= {"bidirectional_linear.bias": (o.d_model,)}
        keys |= prefixed(f"layers.{i}.", inner)
    return {**keys, **(_norm_keys(o) if o.prenorm else {})}


def _build(o: Options) -> nn.Module:
    if o.bidirectional and o.transposed:
        raise ValueError("bidirectional = True needs transposed = False; the official model fails with it")
    pool, factors = _named("pool", o.pool, {"stride", "pool", "expand"})
    if pool not in (None, "sample") or any(factor != 1 for factor in factors.values()):
        raise ValueError(f"pool = {o.pool!r} is not carried over: longwave has none, or 'sample' with factors of 1")
    blocks = []
    for i, (system, options) in enumerate(_layers(o)):
        layer = system.build(options)
        if o.bidirectional:
            layer = Joined(layer, system.build(options), o.d_model)
        blocks.append(ResidualBlock(layer, _norm(o, o.d_model), o.prenorm, _residual(o, i + 1)))
    model = SequenceModel(blocks, _norm(o, o.d_model) if o.prenorm else nn.Identity())
    return MixerFace(model).eval()  # batch norm by its running statistics


def _convert_norm(state: State) -> State:
    """Tensors of one norm, keys without ``norm.norm.``."""
    ours = {key.removeprefix("ln."): t for key, t in state.items() if key != "num_batches_tracked"}
    return {f"norm.{key}": t.detach() if key.startswith("running_") else t for key, t in ours.items()}


def _convert(state: State, o: Options) -> State:
    ours: State = {}
    for i, (system, options) in enumerate(_layers(o)):
        block = under(f"layers.{i}.", state)
        inner = _convert_norm(under("norm.norm.", block))
        for part in _parts(o):
            place = f"mixer.{part}" if o.bidirectional else "mixer"
            converted = system.convert(under(f"{part}.", block), options)
            inner |= prefixed(f"{place}.", converted)
        inner |= {key: t for key, t in block.items() if key.startswith("residual.")}
        inner |= {f"mixer.{key}": t for key, t in block.items() if key.startswith("bidirectional_linear.")}
        ours |= prefixed(f"layers.{i}.", inner)
    return prefixed("model.", {**ours, **_convert_norm(under("norm.norm.", state))})


S4_MODEL = System(
    options={
        "d_model": Size(),
        "layer": Anything(),
        "n_layers": 1,
        "n_repeat": 1,
        "transposed": False,
        "prenorm": True,
        "bidirectional": False,
        "residual": None,
        "norm": None,
        "pool": None,
        "rate": Number(1.0, above=0),
    },
    ignored=frozenset({"dropout", "tie_dropout", "track_norms", "dropinp"}),
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"s4model": S4_MODEL}
