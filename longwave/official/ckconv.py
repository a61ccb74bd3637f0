"""Modules of github.com/dwromero/ckconv (commit d44c644): CKConv, its residual block, and the network of blocks."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.filters.ckconv import Siren, evaluate
from longwave.official.blocks import BatchNorm
from longwave.official.replicas.correlation import correlate
from longwave.official.source import (
    WHOLE,
    Flag,
    Name,
    Names,
    Positive,
    Size,
    Source,
    System,
    Turn,
    inside,
    numbered,
    unused,
    weight_norm,
)

Activation = Literal["ReLU", "LeakyReLU", "Swish"]
Norm = Literal["", "LayerNorm", "BatchNorm"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "Swish": nn.SiLU}


def norm_layer(name: str, channels: int) -> nn.Module:
    """A norm of (1, channels, P); the authors' LayerNorm is over channels and positions together."""
    if name == "LayerNorm":
        return nn.GroupNorm(1, channels, eps=1e-12)
    if name == "BatchNorm":
        return BatchNorm(channels, axis=1)
    return nn.Identity()


class KernelMLP(nn.Module):
    """A kernel network that is not a sine network: linear maps with a norm and an activation between them.

    Args:
        sizes: of the position, the hidden layers and the result.
        activation: ReLU, LeakyReLU or Swish.
        norm: LayerNorm, BatchNorm or "".
        bias: whether the maps have one.
    """

    def __init__(self, sizes: list[int], activation: str, norm: str, bias: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm_layer(norm, size) for size in sizes[1:-1])
        self.activation = ACTIVATIONS[activation]()

    def forward(self, positions: Tensor) -> Tensor:
        """positions (P, dim) -> (P, out)."""
        h = positions
        for layer, norm in zip(self.layers[:-1], self.norms):
            h = self.activation(norm(layer(h).T[None])[0].T)
        return self.layers[-1](h)


def points(dim: int) -> Turn:
    """A matrix that is a convolution of one point in ``dim`` dimensions there."""
    ones = (1,) * dim
    return Turn(lambda t: t.flatten(1) if t.ndim > 1 else t, lambda t: t.reshape(*t.shape, *ones) if t.ndim > 1 else t)


def net_names(layers: int, dim: int, norm: str, stride: int, normed: bool) -> Names:
    """Of the linear maps of a network, ``stride`` entries apart, with or without weight norm, and of their norms."""
    table: Names = []
    for i in range(layers):
        there, here = f"kernel_net.{i * stride}", f"layers.{i}."
        table.append(weight_norm(there, here, dim) if normed else Name(f"{there}.weight", f"{here}weight", points(dim)))
        table.append(Name(f"{there}.bias", f"{here}bias"))
        if i + 1 < layers:
            at = f"kernel_net.{(i + 1) * stride - 2}."
            table.append(Name(f"{at}layer_norm." if norm == "LayerNorm" else at, f"norms.{i}."))
            table += [unused(f"{at}num_batches_tracked")] if norm == "BatchNorm" else []
    return table


class CKConvLayer(nn.Module):
    """The authors' CKConv: a causal convolution with a kernel as long as the input.

    Positions go from -1, the oldest, to 1, now. An input of another length than that of training is taken to be
    sampled at another rate, the ratio of the lengths rounded: the kernel is scaled by it, smoothed where the rate is
    higher, and positions end where the last sample lies. Shorter inputs are correlated directly, others by FFT,
    which the authors' code gets right for even lengths only.

    Args:
        in_channels, out_channels: D and E.
        net: positions (P, 1) -> (P, E D).
        bias: whether there is one.
    """

    train_length: Tensor
    makes_taps = True

    def __init__(self, in_channels: int, out_channels: int, net: nn.Module, bias: bool):
        super().__init__()
        self.in_channels, self.net = in_channels, net
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("train_length", torch.zeros(1, dtype=torch.int64))  # 0: that of the input

    def kernel(self, length: int) -> Tensor:
        """The taps (E, D, length), the oldest first."""
        trained = int(self.train_length.item()) or length
        change = float(round(trained / length)) if trained > length else 1 / round(length / trained)
        step = 2 / max(1, trained - 1)
        beyond = -((trained - 1) % change) if change > 1 else (length - 1) % (1 / change) * change
        last = 1 + beyond * step
        positions = torch.linspace(-1, last, length, dtype=torch.float64, device=self.train_length.device)
        k = evaluate(self.net, positions[:, None]).T.unflatten(0, (-1, self.in_channels))
        return change * (_smoothed(k, int(1 / change)) if change < 1 else k)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, L) -> (B, E, L)."""
        L = x.shape[2]
        return correlate(x, self.kernel(L), self.bias, fft=int(self.train_length) <= L)


def _smoothed(k: Tensor, width: int) -> Tensor:
    """Every tap averaged with ``width`` neighbours on both sides, by a Gaussian of deviation 1/2; the ends stay."""
    offsets = torch.arange(-width, width + 1, dtype=torch.float64, device=k.device)
    weight = (torch.exp(-2 * offsets.square()) / (0.5 * math.sqrt(2 * math.pi))).to(k.dtype)
    middle = F.conv1d(k.flatten(0, 1)[:, None], weight[None, None])[:, 0].view(*k.shape[:2], -1)
    return torch.cat([k[..., :width], middle, k[..., k.shape[2] - width :]], dim=2)


class CKBlock(nn.Module):
    """The authors' residual block:  relu(h_2 + shortcut(x)),  h_i = relu(norm_i(conv_i(h_{i-1}))),  h_0 = x.

    Args:
        conv1, conv2: CKConvs.
        in_channels, out_channels: D and E; where they differ, the shortcut is a linear map.
    """

    def __init__(self, conv1: CKConvLayer, conv2: CKConvLayer, in_channels: int, out_channels: int):
        super().__init__()
        self.cconv1, self.cconv2 = conv1, conv2
        self.norm1, self.norm2 = (norm_layer("LayerNorm", out_channels) for _ in range(2))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, L) -> (B, E, L)."""
        y = torch.relu(self.norm1(self.cconv1(x)))
        y = torch.relu(self.norm2(self.cconv2(y)))
        return torch.relu(y + self.shortcut(x))


class CKNetwork(nn.Module):
    """The authors' CKCNN: blocks, and for a task a linear map of every step or of the last one.

    Args:
        blocks: in their order.
        head: the linear map, or None.
        last: whether it sees the last step alone.
        squeezed: whether a single output loses its axis.
    """

    def __init__(self, blocks: list[CKBlock], head: nn.Module | None, last: bool, squeezed: bool):
        super().__init__()
        self.blocks, self.head, self.last, self.squeezed = nn.Sequential(*blocks), head, last, squeezed

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, L) -> (B, E, L) without a head, else (B, L, outputs) or (B, outputs)."""
        y = self.blocks(x)
        if self.head is None:
            return y
        y = self.head(y[:, :, -1] if self.last else y.transpose(1, 2))
        return y.squeeze(-1) if self.squeezed and y.shape[-1] == 1 else y


class CKConv(Source):
    """CKConv."""

    ignored = frozenset({"dropout", "weight_dropout", "train_length"})
    in_channels: Size
    out_channels: Size
    hidden_channels: Size
    activation_function: Literal["Sine"] | Activation = "Sine"
    norm_type: Norm = ""
    dim_linear: Literal[1] = 1
    bias: Flag = True
    omega_0: Positive
    cls: Literal["CKConv"] = "CKConv"

    def build(self) -> CKConvLayer:
        H, out = self.hidden_channels, self.out_channels * self.in_channels
        if self.activation_function == "Sine":
            net: nn.Module = Siren(1, H, out, 3, self.omega_0, self.bias)
        else:
            net = KernelMLP([1, H, H, out], self.activation_function, self.norm_type, self.bias)
        return CKConvLayer(self.in_channels, self.out_channels, net, self.bias)

    def names(self) -> Names:
        norm = "" if self.activation_function == "Sine" else self.norm_type
        net = inside("Kernel.", "net.", net_names(3, 1, norm, 4, True))
        return [Name("train_length", "train_length", WHOLE), *net, Name("bias", "bias")]


class BlockOptions(Source):
    """The options of the convolutions of a block."""

    ignored = CKConv.ignored
    in_channels: Size
    kernelnet_hidden_channels: Size
    kernelnet_activation_function: Literal["Sine"] | Activation = "Sine"
    kernelnet_norm_type: Norm = ""
    dim_linear: Literal[1] = 1
    bias: Flag = True
    omega_0: Positive

    def convs(self, d_in: int, d_out: int) -> list[CKConv]:
        """The options of the two convolutions."""
        return [
            CKConv(
                in_channels=channels,
                out_channels=d_out,
                hidden_channels=self.kernelnet_hidden_channels,
                activation_function=self.kernelnet_activation_function,
                norm_type=self.kernelnet_norm_type,
                bias=self.bias,
                omega_0=self.omega_0,
            )
            for channels in (d_in, d_out)
        ]

    def block(self, d_in: int, d_out: int) -> CKBlock:
        """A block, freshly drawn."""
        first, second = (conv.build() for conv in self.convs(d_in, d_out))
        return CKBlock(first, second, d_in, d_out)

    def block_names(self, d_in: int, d_out: int) -> Names:
        """Of a block."""
        table: Names = [Name("shortcut.0.", "shortcut.")]
        for i, conv in enumerate(self.convs(d_in, d_out), 1):
            table += [*inside(f"cconv{i}.", f"cconv{i}.", conv.names()), Name(f"norm{i}.layer_norm.", f"norm{i}.")]
        return table


class Block(BlockOptions):
    """CKBlock."""

    out_channels: Size
    cls: Literal["CKBlock"] = "CKBlock"

    def build(self) -> nn.Module:
        return self.block(self.in_channels, self.out_channels)

    def names(self) -> Names:
        return self.block_names(self.in_channels, self.out_channels)


class Network(BlockOptions):
    """CKCNN, and the three networks with a head for a task."""

    hidden_channels: Size
    num_blocks: Size
    out_channels: Size | None = None
    pool: Literal[False] = False
    cls: Literal["CKCNN", "seqImg_CKCNN", "CopyMemory_CKCNN", "AddProblem_CKCNN"] = "CKCNN"

    def build(self) -> nn.Module:
        if self.cls == "seqImg_CKCNN" and self.out_channels is None:
            raise ValueError("the option 'out_channels' is missing")
        H = self.hidden_channels
        blocks = [self.block(H if i else self.in_channels, H) for i in range(self.num_blocks)]
        outputs = {"CopyMemory_CKCNN": 10, "AddProblem_CKCNN": 1, "seqImg_CKCNN": self.out_channels}.get(self.cls)
        head = None if outputs is None else nn.Linear(H, outputs)
        return CKNetwork(blocks, head, last=self.cls != "CopyMemory_CKCNN", squeezed=self.cls == "seqImg_CKCNN")

    def names(self) -> Names:
        H = self.hidden_channels
        first = inside("backbone.0.", "blocks.0.", self.block_names(self.in_channels, H))
        later = numbered(self.num_blocks, "backbone.{}.", "blocks.{}.", self.block_names(H, H))
        return [*first, *later, Name("finallyr.", "head.")]


SYSTEMS = {"ckconv": System(CKConv, Block, Network)}
