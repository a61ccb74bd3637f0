"""SequenceModel of github.com/state-spaces/s4 (commit e757cef), in its Lightning checkpoints under ``model.``.

A module and no spec: its norms over batch or time and its residuals are none of our blocks', and the released language
model (s4-wt103) has an adaptive softmax. SaShiMi's checkpoints are specs: sashimi.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers import Mixer
from longwave.mixers.base import WholeMixer
from longwave.nn.norm import NO_EPS, ScalarLayerNorm
from longwave.official.blocks import (
    Activation,
    BatchNorm,
    Call,
    Elementwise,
    FeedForward,
    ResidualBlock,
    mixed,
)
from longwave.official.s4 import S4Block
from longwave.official.source import (
    CONSTANT,
    Flag,
    Layer,
    Name,
    Names,
    Positive,
    Size,
    Source,
    System,
    inside,
    part,
    unused,
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


class Joined(WholeMixer):
    """W [f(x) | g(x)]: the authors' ``bidirectional`` around a layer, whose g does not hear x in reverse.

    Args:
        layer, reverse_layer: f and g, each of width D.
    """

    name = "bidirectional"

    def __init__(self, layer: Mixer, reverse_layer: Mixer):
        super().__init__()
        self.layer, self.reverse_layer, self.d_model = layer, reverse_layer, layer.d_model
        self.bidirectional_linear = nn.Linear(2 * self.d_model, self.d_model)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        both = [layer.mix(x, None, padding)[0] for layer in (self.layer, self.reverse_layer)]
        return self.bidirectional_linear(torch.cat(both, dim=-1))


class Blocks(nn.Module):
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


class FFN(Source):
    """FFN."""

    ignored = frozenset({"initializer", "dropout", "tie_dropout", "transposed"})
    d_model: Size
    expand: float = 2.0
    d_output: None = None
    activation: Activation = "gelu"

    def mixer(self) -> Mixer:
        """The layer, freshly drawn."""
        return FeedForward(self.d_model, int(self.expand * self.d_model), self.activation)

    def mixer_names(self) -> Names:
        """Of :meth:`mixer`."""
        return [Name("ff.0." if self.activation is None else "ff.0.0.", "fc1."), Name("ff.2.", "fc2.")]


class S4InModel(S4Block):
    """S4Block as a layer, where glu has no channels, unlike in the standalone block."""

    activation: Elementwise = "gelu"
    layer: Literal["fftconv"] = "fftconv"


LAYERS: dict[str, type[S4InModel | FFN]] = {"s4": S4InModel, "ffn": FFN}


class SequenceModel(Source):
    """SequenceModel."""

    ignored = frozenset({"dropout", "tie_dropout", "track_norms", "dropinp"})
    d_model: Size
    layer: Any
    n_layers: Size = 1
    n_repeat: Size = 1
    transposed: Flag = False
    prenorm: Flag = True
    bidirectional: Flag = False
    residual: Any = None
    norm: Any = None
    pool: Any = None
    rate: Positive = 1.0

    def layers(self) -> list[Layer]:
        """Those of every depth."""
        found: list[Layer] = []
        for config in self.layer if isinstance(self.layer, list | tuple) else [self.layer]:
            name = config.get("_name_") if isinstance(config, Mapping) else config
            run = {"rate": self.rate} if name == "s4" else {}
            source = choose("layer", str(name), LAYERS)
            found.append(part("layer", source, config, **run, d_model=self.d_model, transposed=False))
        return found * (self.n_layers * self.n_repeat)

    def make_norm(self) -> nn.Module:
        """One of the norms."""
        name, arguments = _named("norm", self.norm, {"scalar"})
        D = self.d_model
        table = {
            "none": nn.Identity,
            "layer": lambda: nn.LayerNorm(D),
            "batch": lambda: BatchNorm(D),
            "instance": InstanceNorm,
            "group": lambda: GroupNorm(D),
        }
        if name == "layer" and self.transposed and arguments.get("scalar", True):
            return ScalarLayerNorm(D, NO_EPS)
        return choose("norm", name or "none", table)()

    def norm_names(self) -> Names:
        """Of one norm."""
        norm = self.make_norm()
        transposed = isinstance(norm, nn.LayerNorm) and self.transposed
        running = [Name(f"norm.norm.{key}", f"norm.{key}", CONSTANT) for key in ("running_mean", "running_var")]
        counted = [unused("norm.norm.num_batches_tracked")] if isinstance(norm, BatchNorm) else []
        return [*running, *counted, Name("norm.norm.ln." if transposed else "norm.norm.", "norm.")]

    def make_residual(self, i: int) -> nn.Module:
        """That of block i, counted from 1."""
        name, arguments = _named("residual", self.residual, {"alpha", "beta", "scalar", "gamma", "power", "l2"})
        alpha, beta = arguments.get("alpha", 1.0), arguments.get("beta", 1.0)
        if name in ("R", "residual"):
            return Residual(alpha, beta)
        if name in ("A", "affine"):
            return Affine(alpha, 1 if arguments.get("scalar", True) else self.d_model)
        if name in ("D", "decay"):
            weight = i ** -arguments.get("power", 0.5)
            return Residual((1 - weight**2) ** 0.5 if arguments.get("l2", True) else 1 - weight, weight)
        if name in (None, "F", "N", "none", "ff", "feedforward"):
            return Residual(0.0, 1.0)
        raise ValueError(
            f"residual = {name!r} is not carried over; longwave has R, A, D, F, N, by these or longer names"
        )

    def build(self) -> nn.Module:
        if self.bidirectional and self.transposed:
            raise ValueError("bidirectional = True needs transposed = False; the official model fails with it")
        pool, factors = _named("pool", self.pool, {"stride", "pool", "expand"})
        if pool not in (None, "sample") or any(factor != 1 for factor in factors.values()):
            raise ValueError(
                f"pool = {self.pool!r} is not carried over: longwave has none, or 'sample' with factors of 1"
            )
        blocks = []
        for i, layer in enumerate(self.layers(), 1):
            mixer = Joined(layer.mixer(), layer.mixer()) if self.bidirectional else layer.mixer()
            blocks.append(ResidualBlock(mixer, self.make_norm(), self.prenorm, self.make_residual(i)))
        model = Blocks(blocks, self.make_norm() if self.prenorm else nn.Identity())
        return Call(model, mixed).eval()  # batch norm by its running statistics

    def names(self) -> Names:
        table: Names = []
        for i, layer in enumerate(self.layers()):
            mixer = inside("layer.", "", layer.mixer_names())
            if self.bidirectional:
                both = [(f"{one}.", f"{one}.", layer.mixer_names()) for one in ("layer", "reverse_layer")]
                mixer = [name for one in both for name in inside(*one)]
                mixer.append(Name("bidirectional_linear.", "bidirectional_linear."))
            block = [*self.norm_names(), *inside("", "mixer.", mixer), Name("residual.", "residual.")]
            table += inside(f"layers.{i}.", f"layers.{i}.", block)
        return inside("", "model.", [*table, *(self.norm_names() if self.prenorm else [])])


SYSTEMS = {"s4model": System(SequenceModel)}
