"""What several sources share: the face of an official module, and the block around one long convolution."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longwave.models.pretrained.system import Shapes

ELEMENTWISE: dict[str | None, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    None: nn.Identity,
    "id": nn.Identity,
    "identity": nn.Identity,
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {"glu": partial(nn.GLU, dim=-1), **ELEMENTWISE}


def output_linear(d_in: int, d_out: int, activation: str | None) -> nn.Module:
    """A linear map and its activation under the authors' keys ``0.weight``, ``0.bias``; nothing for None."""
    if activation is None:
        return nn.Identity()
    widened = d_out * (2 if activation == "glu" else 1)
    return nn.Sequential(nn.Linear(d_in, widened), ACTIVATIONS[activation]())


def output_shapes(d_in: int, d_out: int, activation: str | None) -> Shapes:
    """The keys of :func:`output_linear`, with their shapes."""
    layer = output_linear(d_in, d_out, activation)
    return {f"output_linear.{key}": tuple(t.shape) for key, t in layer.state_dict().items()}


class MixerFace(nn.Module):
    """A mixer behind the call of an official layer:  y = module(x=x).

    Args:
        model: the mixer, or what is called like one; with state, call it itself.
        transposed: x and y are (B, D, L) rather than (B, L, D).
    """

    def __init__(self, model: nn.Module, transposed: bool = False):
        super().__init__()
        self.model, self.transposed = model, transposed

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.model(x.transpose(1, 2) if self.transposed else x)
        return y.transpose(1, 2) if self.transposed else y


class ConvBlock(nn.Module):
    """y = out(activation(k * x + D x)), several filters a feature, in the layout of the authors.

    Source: FFTConv and S4Block of github.com/state-spaces/s4, LongConv of github.com/HazyResearch/safari.

    Args:
        conv: (u (B, L, K H), skip (K H), state or None) -> (y (B, L, K H), next state or None); row c H + h is
            filter c of feature h.
        d_model: H.
        channels: K, filters a feature.
        out: what follows the convolution, on the last axis.
        transposed: x and y are (B, H, L) rather than (B, L, H); L may be several axes where ``conv`` takes them.
        swapped: ``out`` sees feature by feature its K filters, rather than filter by filter the H features.
    """

    def __init__(
        self,
        conv: nn.Module,
        d_model: int,
        channels: int,
        out: nn.Module,
        *,
        transposed: bool,
        swapped: bool = False,
    ):
        super().__init__()
        self.conv, self.out, self.transposed, self.swapped = conv, out, transposed, swapped
        self.D = nn.Parameter(torch.zeros(channels, d_model))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Any]:
        """x -> y, or with a state {"y": y, "next_state": the state after the last step}."""
        u = torch.cat([x.movedim(1, -1) if self.transposed else x] * len(self.D), dim=-1)
        y, state = self.conv(u, self.D.flatten(), state)
        if self.swapped:
            y = y.unflatten(-1, self.D.shape).transpose(-1, -2).flatten(-2)
        y = self.out(y)
        y = y.movedim(-1, 1) if self.transposed else y
        return y if state is None else {"y": y, "next_state": state}
