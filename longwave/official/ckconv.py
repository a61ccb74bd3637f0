"""Modules of github.com/dwromero/ckconv (commit d44c644): CKConv, its residual block, and the network of blocks."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.filters.ckconv import Siren, evaluate
from longwave.nn.module import at_least_float32
from longwave.official.blocks import BatchNorm
from longwave.official.system import (
    Choice,
    Family,
    Number,
    Options,
    Shapes,
    Size,
    State,
    System,
    prefixed,
    under,
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "Swish": nn.SiLU}
NORMS = ("", "LayerNorm", "BatchNorm")


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
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 1, bias=bias) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm_layer(norm, size) for size in sizes[1:-1])
        self.activation = ACTIVATIONS[activation]()

    def forward(self, positions: Tensor) -> Tensor:
        """positions (P, dim) -> (P, out)."""
        h = positions.T[None]
        for layer, norm in zip(self.layers[:-1], self.norms):
            h = self.activation(norm(layer(h)))
        return self.layers[-1](h)[0].T


def mlp_keys(sizes: list[int], dim: int, norm: str, bias: bool, stride: int, weight_norm: bool) -> Shapes:
    """The official keys of a network of linear maps, ``stride`` entries apart, and of the norms behind them."""
    keys: Shapes = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        name, points = f"kernel_net.{i * stride}", (1,) * dim
        if weight_norm:
            keys |= {f"{name}.weight_g": (b, 1, *points), f"{name}.weight_v": (b, a, *points)}
        else:
            keys[f"{name}.weight"] = (b, a, *points)
        if bias:
            keys[f"{name}.bias"] = (b,)
        if norm and i + 2 < len(sizes):
            at = f"kernel_net.{(i + 1) * stride - 2}"
            if norm == "LayerNorm":
                keys |= {f"{at}.layer_norm.{key}": (b,) for key in ("weight", "bias")}
            else:
                keys |= {f"{at}.{key}": (b,) for key in ("weight", "bias", "running_mean", "running_var")}
                keys[f"{at}.num_batches_tracked"] = ()
    return keys


def convert_mlp(state: State, layers: int, norm: str, stride: int, weight_norm: bool, flat: bool) -> State:
    """Those tensors under the keys of :class:`KernelMLP`, or of a :class:`Siren` where ``flat``."""
    ours = {}
    for i in range(layers):
        name = f"kernel_net.{i * stride}"
        if weight_norm:
            v = state[f"{name}.weight_v"]
            weight = v * (
                state[f"{name}.weight_g"] / torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.ndim - 1))
            )
        else:
            weight = state[f"{name}.weight"]
        ours[f"layers.{i}.weight"] = weight.flatten(1) if flat else weight.flatten(1)[..., None]
        if f"{name}.bias" in state:
            ours[f"layers.{i}.bias"] = state[f"{name}.bias"]
        if norm and i + 1 < layers:
            prefix = f"kernel_net.{(i + 1) * stride - 2}."
            for key, tensor in state.items():
                if key.startswith(prefix) and not key.endswith("num_batches_tracked"):
                    ours[f"norms.{i}.{key.removeprefix(prefix).removeprefix('layer_norm.')}"] = tensor
    return ours


def own_tensors(state: State) -> State:
    """The convolution's own tensors besides its network's."""
    return {"train_length": state["train_length"].long(), **({"bias": state["bias"]} if "bias" in state else {})}


def correlate(x: Tensor, kernel: Tensor, bias: Tensor | None, fft: bool) -> Tensor:
    """The authors' causal correlation of x (B, D, L), by FFT or not, in the dtype of the kernel or of x if better."""
    (wide,) = at_least_float32(x)
    run = causal_fft_correlation if fft else causal_correlation
    return run(wide, padded_to_odd(kernel), None if bias is None else bias.to(kernel.dtype)).to(x.dtype)


def padded_to_odd(kernel: Tensor) -> Tensor:
    """A kernel (E, D, K) with a zero in front where K is even, as the authors have it."""
    return F.pad(kernel, (1, 0)) if kernel.shape[2] % 2 == 0 else kernel


def causal_correlation(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """y[t] = sum_s kernel[:, :, K - 1 - s] x[t - s] + bias, x (B, D, L) -> (B, E, L)."""
    return F.conv1d(F.pad(x, (kernel.shape[2] - 1, 0)), kernel, bias)


def causal_fft_correlation(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The authors' causal_fftconv of x (B, D, L) with a kernel of odd length, bug for bug.

    Their inverse transform does not know the length, so it makes an even one: where L + K - 1 is odd, the result is
    resampled and is not the correlation.
    """
    L, n = x.shape[2], x.shape[2] + kernel.shape[2] - 1
    spectrum = torch.einsum(
        "bi...,oi...->bo...", torch.fft.rfft(F.pad(x, (n - L, 0))), torch.fft.rfft(kernel, n).conj()
    )
    y = torch.fft.irfft(spectrum, n // 2 * 2)[..., :L]
    return y if bias is None else y + bias[:, None]


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


_STRIDE = 4  # entries of the authors' kernel_net from one linear map to the next


def _norm(o: Options) -> str:
    return "" if o.activation_function == "Sine" else o.norm_type


def _sizes(o: Options) -> list[int]:
    return [1, o.hidden_channels, o.hidden_channels, o.out_channels * o.in_channels]


def _conv_keys(o: Options) -> Shapes:
    net = mlp_keys(_sizes(o), 1, _norm(o), o.bias, _STRIDE, True)
    keys: Shapes = {"train_length": (1,), **prefixed("Kernel.", net)}
    return keys | ({"bias": (o.out_channels,)} if o.bias else {})


def _build_conv(o: Options) -> CKConvLayer:
    sizes = _sizes(o)
    if o.activation_function == "Sine":
        net: nn.Module = Siren(1, o.hidden_channels, sizes[-1], 3, o.omega_0, o.bias)
    else:
        net = KernelMLP(sizes, o.activation_function, _norm(o), o.bias)
    return CKConvLayer(o.in_channels, o.out_channels, net, o.bias)


def _convert_conv(state: State, o: Options) -> State:
    net = convert_mlp(under("Kernel.", state), 3, _norm(o), _STRIDE, True, o.activation_function == "Sine")
    ours = prefixed("net.", net)
    return ours | own_tensors(state)


def _conv_options(o: Options, in_channels: int) -> Options:
    """The options of a block's convolution."""
    return Options(
        in_channels=in_channels,
        out_channels=o.out_channels,
        hidden_channels=o.kernelnet_hidden_channels,
        activation_function=o.kernelnet_activation_function,
        norm_type=o.kernelnet_norm_type,
        bias=o.bias,
        omega_0=o.omega_0,
    )


def _convs(o: Options) -> dict[str, Options]:
    return {"cconv1": _conv_options(o, o.in_channels), "cconv2": _conv_options(o, o.out_channels)}


def _block_keys(o: Options) -> Shapes:
    keys = {f"{name}.{key}": shape for name, conv in _convs(o).items() for key, shape in _conv_keys(conv).items()}
    keys |= {f"norm{i}.layer_norm.{key}": (o.out_channels,) for i in (1, 2) for key in ("weight", "bias")}
    if o.in_channels != o.out_channels:
        keys |= {"shortcut.0.weight": (o.out_channels, o.in_channels, 1), "shortcut.0.bias": (o.out_channels,)}
    return keys


def _build_block(o: Options) -> CKBlock:
    first, second = (_build_conv(conv) for conv in _convs(o).values())
    return CKBlock(first, second, o.in_channels, o.out_channels)


def _convert_block(state: State, o: Options) -> State:
    ours: State = {}
    for name, conv in _convs(o).items():
        ours |= prefixed(f"{name}.", _convert_conv(under(f"{name}.", state), conv))
    for key, tensor in state.items():
        if not key.startswith("cconv"):
            ours[key.replace(".layer_norm.", ".").replace("shortcut.0.", "shortcut.")] = tensor
    return ours


def _blocks(o: Options) -> list[Options]:
    """The options of every block of a network."""
    first = {**vars(o), "out_channels": o.hidden_channels}
    later = {**first, "in_channels": o.hidden_channels}
    return [Options(**first)] + [Options(**later) for _ in range(o.num_blocks - 1)]


def _outputs(o: Options) -> int | None:
    """Of the head, where the network has one."""
    return {"CKCNN": None, "CopyMemory_CKCNN": 10, "AddProblem_CKCNN": 1, "seqImg_CKCNN": o.out_channels}[o.cls]


def _network_keys(o: Options) -> Shapes:
    if o.cls == "seqImg_CKCNN" and o.out_channels is None:
        raise ValueError("the option 'out_channels' is missing")
    keys: Shapes = {}
    for i, block in enumerate(_blocks(o)):
        keys |= prefixed(f"backbone.{i}.", _block_keys(block))
    outputs = _outputs(o)
    return keys | (
        {} if outputs is None else {"finallyr.weight": (outputs, o.hidden_channels), "finallyr.bias": (outputs,)}
    )


def _build_network(o: Options) -> CKNetwork:
    outputs = _outputs(o)
    head = None if outputs is None else nn.Linear(o.hidden_channels, outputs)
    blocks = [_build_block(block) for block in _blocks(o)]
    return CKNetwork(blocks, head, last=o.cls != "CopyMemory_CKCNN", squeezed=o.cls == "seqImg_CKCNN")


def _convert_network(state: State, o: Options) -> State:
    ours = prefixed("head.", under("finallyr.", state))
    for i, block in enumerate(_blocks(o)):
        converted = _convert_block(under(f"backbone.{i}.", state), block)
        ours |= prefixed(f"blocks.{i}.", converted)
    return ours


_IGNORED = frozenset({"dropout", "weight_dropout", "train_length"})
_KERNEL_OPTIONS = {
    "kernelnet_hidden_channels": Size(),
    "kernelnet_activation_function": Choice("Sine", *ACTIVATIONS),
    "kernelnet_norm_type": Choice(*NORMS),
    "dim_linear": Choice(1),
    "bias": True,
    "omega_0": Number(above=0),
}

SYSTEMS = {
    "ckconv": Family(
        {
            "CKConv": System(
                options={
                    **dict.fromkeys(("in_channels", "out_channels", "hidden_channels"), Size()),
                    "activation_function": Choice("Sine", *ACTIVATIONS),
                    "norm_type": Choice(*NORMS),
                    "dim_linear": Choice(1),
                    "bias": True,
                    "omega_0": Number(above=0),
                    "cls": Choice("CKConv"),
                },
                ignored=_IGNORED,
                keys=_conv_keys,
                build=_build_conv,
                convert=_convert_conv,
            ),
            "CKBlock": System(
                options={
                    "in_channels": Size(),
                    "out_channels": Size(),
                    **_KERNEL_OPTIONS,
                    "cls": Choice("CKBlock"),
                },
                ignored=_IGNORED,
                keys=_block_keys,
                build=_build_block,
                convert=_convert_block,
            ),
            "CKCNN": System(
                options={
                    **dict.fromkeys(("in_channels", "hidden_channels", "num_blocks"), Size()),
                    "out_channels": Size(None),
                    **_KERNEL_OPTIONS,
                    "pool": Choice(False),
                    "cls": Choice("CKCNN", "seqImg_CKCNN", "CopyMemory_CKCNN", "AddProblem_CKCNN"),
                },
                ignored=_IGNORED,
                keys=_network_keys,
                build=_build_network,
                convert=_convert_network,
            ),
        }
    )
}
