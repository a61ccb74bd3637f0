"""Linear maps that keep their weights in 8 or 16 bits, for inference: a token costs the bytes of weights it reads."""

from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.nn.channel import OutputGLU, OutputLinear
from longwave.ops import weight_only_linear
from longwave.ops.weight_only_linear import packed

FORMS = {"int8": torch.int8, "bf16": torch.bfloat16}


class WeightOnlyLinear(nn.Module):
    """What stands in the place of a Linear: the same map, its weights rounded and read as they are stored.

    See :func:`longwave.ops.weight_only_linear`. Gradients reach its input, not its weights: it refuses training mode.

    Args:
        linear: an nn.Linear.
        form: "int8", with a scale for every row of weights, or "bf16".
        group: with int8, how many weights of a row share a scale; None for all of a row.

    Attributes:
        like: an empty tensor of the dtype, and on the device, of what the map gives.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    like: Tensor

    def __init__(self, linear: nn.Linear, form: str, group: int | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.group = form, group
        weight, scale = self._stored(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("like", linear.weight.new_empty(0).detach(), persistent=False)
        self.training = False

    def _stored(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return packed(weight, self.group) if self.form == "int8" else (weight.to(FORMS[self.form]), None)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Take other weights (M, K) float."""
        stored, scale = self._stored(weight)
        self.weight.copy_(stored)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)

    def product(self, x: Tensor) -> Tensor:
        """W x, without the bias."""
        return weight_only_linear(x, self.weight, None, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_linear(x, self.weight, self.bias, self.scale)

    def train(self, mode: bool = True) -> "WeightOnlyLinear":
        """Raises ValueError for training mode."""
        if mode:
            raise ValueError(f"weights kept in {self.form} cannot be trained: train the float model, then convert it")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form}"


def weight_only(model: nn.Module, form: str, *, group: int | None = None) -> nn.Module:
    """Keep the weights of a model's Linears in fewer bits, for inference; the model is changed and returned.

    Filters, and what says ``makes_taps``, stay as they are: what follows from them is derived once. So does an
    embedding, of which a token reads one row, also where it is tied to a head that does not: rounding it would add half
    as much again to the logits' error.

    Args:
        model: a model, a mixer or a Linear; put into evaluation mode, and none of its parameters asks for a gradient.
        form: "int8" or "bf16".
        group: with int8, how many weights of a row share a scale, 1..4096; None for all of a row.
    Raises:
        ValueError: for an unknown form, a group without int8 or outside its range, a model that is converted already,
            or weights that are not finite.
    """
    choose("form of weights", form, FORMS)
    if group is not None and form != "int8":
        raise ValueError(f"weights in {form} have no scale to share; leave out group = {group}")
    if any(isinstance(module, WeightOnlyLinear) for module in model.modules()):
        raise ValueError("the weights of this model are converted already; convert the float model")
    if _is_linear(model):
        return WeightOnlyLinear(model, form, group)
    filters = {part for module in model.modules() if hasattr(module, "makes_taps") for part in module.modules()}
    parents = [parent for parent in model.modules() if not (parent in filters or _is_linear(parent))]
    made: WeakKeyDictionary[nn.Module, WeightOnlyLinear] = WeakKeyDictionary()  # a Linear that is left goes at once
    for parent in parents:
        for name, child in parent.named_children():
            if child in filters or not _is_linear(child):
                continue
            if child not in made:
                made[child] = WeightOnlyLinear(child, form, group)
            parent.add_module(name, made[child])
    return model.eval().requires_grad_(False)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in (nn.Linear, OutputLinear, OutputGLU)


def without_bias(linear: nn.Linear | WeightOnlyLinear, x: Tensor) -> Tensor:
    """W x of a Linear or what stands in its place, such as one with an adapter."""
    if isinstance(linear, WeightOnlyLinear):
        return linear.product(x)
    return F.linear(x, linear.weight) if type(linear) is nn.Linear else linear(x) - linear.bias


def like_output(linear: nn.Linear | WeightOnlyLinear) -> Tensor:
    """A tensor of the dtype, and on the device, of what a Linear or what stands in its place gives."""
    return linear.like if isinstance(linear, WeightOnlyLinear) else linear.weight
