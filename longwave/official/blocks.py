"""What several sources share: the call of an official module, small layers, the block around one long convolution."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import Mixer
from longwave.models.spec import AnyModel
from longwave.official.source import Shapes, Source
from longwave.tokenizer import Tokenizer

Elementwise = Literal[
    "gelu", None, "id", "identity", "linear", "relu", "elu", "tanh", "sigmoid", "softplus", "silu", "swish"
]
ELEMENTWISE: dict[str | None, Callable[[], nn.Module]] = {
    **dict.fromkeys((None, "id", "identity", "linear"), nn.Identity),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
Activation = Literal["glu"] | Elementwise
ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {"glu": partial(nn.GLU, dim=-1), **ELEMENTWISE}


def linear_activation(d_in: int, d_out: int, activation: str | None) -> nn.Module:
    """A linear map and its activation under the authors' keys: ``0.weight``, ``0.bias``, without the 0 for None."""
    linear = nn.Linear(d_in, d_out * (2 if activation == "glu" else 1))
    return linear if activation is None else nn.Sequential(linear, ACTIVATIONS[activation]())


def output_linear(d_in: int, d_out: int, activation: str | None) -> nn.Module:
    """The same where an activation says so, and nothing for None."""
    return nn.Identity() if activation is None else linear_activation(d_in, d_out, activation)


class Call(nn.Module):
    """A module of ours behind the call of an official one:  call(*inputs) = run(model, *inputs).

    Args:
        model: ours, with its own call and state.
        run: what the official call does with it.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any]):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Official inputs -> official outputs, a dict where there are several."""
        return self.run(self.model, *inputs, **named)


def mixed(mixer: nn.Module, x: Tensor) -> Tensor:
    """A mixer without state, x (B, L, D) -> y (B, L, D)."""
    return mixer(x)[0]


def mixed_transposed(mixer: nn.Module, x: Tensor) -> Tensor:
    """A mixer without state, x (B, D, L) -> y (B, D, L)."""
    return mixer(x.transpose(1, 2))[0].transpose(1, 2)


def logits(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """A language model without state: input_ids (B, L) -> logits (B, L, V); it does not look at positions. Where
    attention_mask (B, L) is 0 no time passes, in whatever way the official model treats padding."""
    return model(input_ids, mask=attention_mask)[0]


NOTHING: Any = (None, False, "", [], {})


class ModelSource(Source):
    """A whole model that is one of ours as data: what ``spec().build()`` makes is ``build().model``.

    Attributes:
        hf_type: ``model_type`` in its config.json, or None where releases have no such file.
        tokenizer: what its text was tokenized by, in words, with the Hub's name; or itself, where it is plain.
    """

    hf_type: ClassVar[str | None] = None
    tokenizer: ClassVar[str | Tokenizer] = ""

    @abstractmethod
    def spec(self) -> AnyModel:
        """What it is."""

    def build(self) -> nn.Module:
        return Call(self.spec().build(), logits)

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        """The options of a published model, or None where it is not one of these.

        Args:
            config: of its config.json, or what else lies beside the weights; {} where nothing does.
            shapes: of its tensors, by their names.
        """
        if cls.hf_type is None or config.get("model_type") != cls.hf_type:
            return None
        return {  # what is not known and off changes nothing
            name: value for name, value in config.items() if name in cls.model_fields or value not in NOTHING
        }


def positioned_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The same of a model that counts positions itself.

    Raises:
        ValueError: for position_ids that are not 0, 1, 2, ...
    """
    if position_ids is not None and not bool(
        (position_ids == torch.arange(input_ids.shape[1], device=input_ids.device)).all()
    ):
        raise ValueError("position_ids other than 0, 1, 2, ... are not carried over; leave them out")
    return logits(model, input_ids)


def kernel_rows(filter: nn.Module, features: int, length: int) -> Tensor:
    """The taps of a filter whose K rows are of as many features each, one after another: k (K, features, length)."""
    return filter(length).unflatten(0, (-1, features))


def by_either_name(
    layer: nn.Module, u: Tensor | None = None, x: Tensor | None = None, state: Tensor | None = None
) -> Any:
    """A layer of its input by either name."""
    given = u if x is None else x
    if given is None or (u is not None and x is not None):
        raise ValueError("give the input of the layer once, as u or as x")
    return layer(given, state)


class Formula(nn.Module):
    """Weights by their official names, and a function of them:  y = run(weights, *inputs).

    Args:
        run: takes this module, whose attributes the weights are, and the inputs.
        shapes: of the weights, by name.
    """

    def __init__(self, run: Callable[..., Any], **shapes: tuple[int, ...]):
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)


class Multiplied(nn.Module):
    """a * activation(b),  [a | b] = x.

    Args:
        activation: its name.
    """

    def __init__(self, activation: str):
        super().__init__()
        self.activation = ELEMENTWISE[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 2 C) -> (..., C)."""
        a, b = x.chunk(2, dim=-1)
        return a * self.activation(b)


class BatchNorm(nn.Module):
    """Every feature by its mean and variance over all other axes, or outside of training by running ones.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167. As torch's, without its count of batches, which is no number of
    the module's dtype.

    Args:
        features: how many.
        axis: where they are.
        momentum: weight of new statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, axis: int = -1, momentum: float = 0.1):
        super().__init__()
        self.axis, self.momentum = axis, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """x of any axes -> the same shape."""
        statistics = (self.running_mean, self.running_var)
        y = F.batch_norm(
            x.movedim(self.axis, 1), *statistics, self.weight, self.bias, self.training, self.momentum, 1e-5
        )
        return y.movedim(1, self.axis)


class FeedForward(Mixer):
    """fc2(act(fc1 x)), a mixer that mixes nothing: the authors' blocks have one layer each.

    Args:
        d_model: D.
        hidden: inner width.
        activation: name of act.
    """

    name = "FFN"

    def __init__(self, d_model: int, hidden: int, activation: str | None = "gelu"):
        super().__init__()
        self.d_model = d_model
        self.fc1 = nn.Linear(d_model, hidden * (2 if activation == "glu" else 1))
        self.act, self.fc2 = ACTIVATIONS[activation](), nn.Linear(hidden, d_model)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def mix(self, x: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, Any]:
        return self.fc2(self.act(self.fc1(x))), state


class ResidualBlock(nn.Module):
    """residual(x, mixer(norm x)), or norm(residual(x, mixer x)), with the call and the states of the mixer.

    Args:
        mixer: the layer.
        norm: of its width.
        prenorm: which of the two.
        residual: of x and the mixer's output; None for their sum.
    """

    def __init__(self, mixer: Mixer, norm: nn.Module, prenorm: bool, residual: nn.Module | None = None):
        super().__init__()
        self.mixer: Any = mixer
        self.norm, self.prenorm, self.residual = norm, prenorm, residual

    def init_state(self, batch: int) -> Any:
        """The mixer's."""
        return self.mixer.init_state(batch)

    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """See :class:`longwave.mixers.Mixer`."""
        y, state = self.mixer(self.norm(x) if self.prenorm else x, state, mask=mask)
        y = x + y if self.residual is None else self.residual(x, y)
        return (y if self.prenorm else self.norm(y)), state


class ConvBlock(nn.Module):
    """y = out(k * x + D x), several filters a feature, in the layout of the authors.

    Source: FFTConv and S4Block of github.com/state-spaces/s4, LongConv of github.com/HazyResearch/safari.

    Args:
        conv: (u (B, L, K H), skip (K H), state or None, and where they are given numbers of steps of padding)
            -> (y (B, L, K H), next state or None); row c H + h is filter c of feature h.
        d_model: H.
        channels: K, filters a feature.
        out: what follows the convolution, on the last axis.
        transposed: x and y are (B, H, L) rather than (B, L, H); L may be several axes where ``conv`` takes them.
        swapped: ``out`` sees feature by feature its K filters, rather than filter by filter the H features.
    """

    def __init__(
        self, conv: nn.Module, d_model: int, channels: int, out: nn.Module, *, transposed: bool, swapped: bool = False
    ):
        super().__init__()
        self.conv, self.out, self.transposed, self.swapped = conv, out, transposed, swapped
        self.D = nn.Parameter(torch.zeros(channels, d_model))

    def forward(self, x: Tensor, state: Tensor | None = None, padding: Tensor | None = None) -> Tensor | dict[str, Any]:
        """x -> y, or with a state {"y": y, "next_state": the state after the last step}."""
        u = torch.cat([x.movedim(1, -1) if self.transposed else x] * len(self.D), dim=-1)
        y, state = self.conv(u, self.D.flatten(), state, *([] if padding is None else [padding]))
        if self.swapped:
            y = y.unflatten(-1, self.D.shape).transpose(-1, -2).flatten(-2)
        y = self.out(y)
        y = y.movedim(-1, 1) if self.transposed else y
        return y if state is None else {"y": y, "next_state": state}
