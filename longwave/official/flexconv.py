"""Modules of github.com/rjbruin/flexconv (commit 0f355d1): CKConv and FlexConv in one and two dimensions."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.filters.ckconv import Magnet, Siren, evaluate, gaussian, reach
from longwave.nn.module import widened
from longwave.official.ckconv import Activation, KernelMLP, Norm, net_names, points
from longwave.official.replicas.correlation import centred_fft, correlate
from longwave.official.source import WHOLE, Flag, Name, Names, Size, Source, System, Turn, inside, unused


class ContinuousConv(nn.Module):
    """The authors' CKConv: causal in one dimension, centred in two, with a kernel on a grid over [-1, 1].

    Args:
        in_channels, out_channels: D and E.
        dim: 1 or 2.
        horizon: "full", "same" or an odd number: points of the grid along every axis, 2 L - 1, L or that number, with
            L the last axis of the first input, which the module never forgets once ``train_length`` says it.
        net: positions (P, dim) -> (P, E D).
        scale: a factor on the kernel.
        fft: whether the convolution is by FFT.
        bias: whether there is one.
        mask: None, or (dynamic cropping, whether the mask is used): see :class:`FlexMask`.
    """

    train_length: Tensor
    makes_taps = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int,
        horizon: str,
        net: nn.Module,
        scale: float,
        fft: bool,
        bias: bool,
        mask: "FlexMask | None" = None,
    ):
        super().__init__()
        self.in_channels, self.dim, self.horizon, self.scale, self.fft = in_channels, dim, horizon, scale, fft
        self.net, self.mask = net, mask
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("train_length", torch.zeros(1, dtype=torch.int64))  # 0: by the horizon

    def kernel(self, length: int) -> Tensor:
        """The taps (E, D, ...) for an input of that last axis; in one dimension the oldest comes first."""
        points = int(self.train_length.item()) or {"full": 2 * length - 1, "same": length}.get(self.horizon, 0)
        grid = torch.linspace(-1, 1, points or int(self.horizon), dtype=torch.float64, device=self.train_length.device)
        axes = [grid] * self.dim if self.mask is None else self.mask.cropped(grid, self.dim)
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        k = self.scale * evaluate(self.net, positions.flatten(0, -2)).T
        k = k.unflatten(1, positions.shape[:-1]).unflatten(0, (-1, self.in_channels))
        return k if self.mask is None else self.mask(k, axes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, ...) -> (B, E, ...)."""
        if x.ndim != self.dim + 2:
            raise ValueError(f"an input of kernel_dim_linear = {self.dim} has {self.dim + 2} axes; got {x.ndim}")
        k = self.kernel(x.shape[-1])
        fft = self.fft and (self.mask is None or min(k.shape[2:]) > 50)  # as the authors choose
        if self.dim == 1:
            return correlate(x, k, self.bias, fft)
        if any(size % 2 == 0 for size in k.shape[2:]):
            raise ValueError(f"a centred kernel has odd sizes; got {tuple(k.shape[2:])}: give an odd horizon")
        (wide,) = widened(x)
        bias = None if self.bias is None else self.bias.to(k.dtype)
        if fft:
            return centred_fft(wide, k, bias).to(x.dtype)
        return F.conv2d(wide, k, bias, padding=[size // 2 for size in k.shape[2:]]).to(x.dtype)


class FlexMask(nn.Module):
    """The authors' Gaussian mask: a mean and a width for every axis, and a threshold under which points are cut off.

    Args:
        dim: axes.
        crop: whether points are cut off.
        masked: whether the kernel is multiplied by the mask.
    """

    mask_threshold: Tensor

    def __init__(self, dim: int, crop: bool, masked: bool):
        super().__init__()
        self.crop, self.masked = crop, masked
        self.mask_params = nn.Parameter(torch.zeros(dim, 2))
        self.register_buffer("mask_threshold", torch.zeros(1))

    @torch.no_grad()
    def cropped(self, grid: Tensor, dim: int) -> list[Tensor]:
        """The points of every axis where the mask is above the threshold: in one dimension behind the oldest such
        point, in two within the same distance of the centre on both sides."""
        if not self.crop:
            return [grid] * dim
        means, widths = self.mask_params.unbind(1)
        reaches = reach(widths, self.mask_threshold)
        axes = []
        for mean, distance in zip(means, reaches):
            first, last = (mean - distance).item(), (mean + distance).item()
            if dim == 1:
                root = min(first, last)
                axes.append(grid[grid > root] if abs(root) < 1 else grid)
            else:
                root = max(abs(first), abs(last))
                cut = int((grid[: len(grid) // 2 + 1] <= -root).sum()) if root < 1 else 0
                axes.append(grid[cut : len(grid) - cut])
        return axes

    def forward(self, k: Tensor, axes: list[Tensor]) -> Tensor:
        """k (E, D, ...) times the mask at the points of the axes."""
        if not self.masked:
            return k
        for i, axis in enumerate(axes):
            mean, width = self.mask_params[i]
            k = k * gaussian(axis.to(k.dtype), mean, width).view(-1, *[1] * (len(axes) - 1 - i))
        return k


STRIDES = {"MLP": 3, "SIREN": 2, "nSIREN": 2}  # entries of the authors' kernel_net from one linear map to the next


def scaled(name: Name, omega: str) -> Name:
    """The tensors of a name times a frequency that is kept apart."""
    official = (name.official,) if isinstance(name.official, str) else name.official

    def back(t: Tensor) -> tuple[Tensor, ...]:
        shapes = name.turn.official(t)
        return (*(shapes if isinstance(shapes, tuple) else (shapes,)), t.new_empty(1))

    return Name((*official, omega), name.ours, Turn(lambda *t: t[-1] * name.turn.ours(*t[:-1]), back))


class ContinuousKernel(Source):
    """The options that both classes have."""

    ignored = frozenset(  # what is in the state, only for the start, or looked at by nothing
        {"kernel_omega_0", "kernel_learn_omega_0", "kernel_init_spatial_value", "kernel_bias_init"}
        | {"kernel_input_scale", "conv_padding", "conv_stride", "shape", "mask_params"}
    )
    in_channels: Size
    out_channels: Size
    horizon: Any
    kernel_type: Literal["MAGNet", "Gabor", "Fourier", "SIREN", "nSIREN", "MLP"] = "MAGNet"
    kernel_dim_linear: Literal[2, 1] = 2
    kernel_no_hidden: Size = 32
    kernel_no_layers: Size = 3
    kernel_activ_function: Activation = "ReLU"
    kernel_norm: Norm = "BatchNorm"
    kernel_weight_norm: Flag = False
    kernel_steerable: Flag = False
    kernel_sampling_rate_norm: float = 1.0
    conv_use_fft: Flag = False
    conv_bias: Flag = True

    @property
    def steerable(self) -> bool:
        """Whether the windows are turned."""
        if self.kernel_type == "MAGNet" and self.kernel_steerable and self.kernel_dim_linear != 2:
            raise ValueError("the option kernel_steerable = True needs kernel_dim_linear = 2")
        return self.kernel_type == "MAGNet" and self.kernel_steerable

    def _net(self) -> nn.Module:
        kind, layers, dim, H = self.kernel_type, self.kernel_no_layers, self.kernel_dim_linear, self.kernel_no_hidden
        out = self.out_channels * self.in_channels
        if layers < 2 and kind in STRIDES:
            raise ValueError(f"the option kernel_no_layers = {layers} makes no {kind}")
        if kind == "MLP":
            sizes = [dim, *[H] * (layers - 1), out]
            return KernelMLP(sizes, self.kernel_activ_function, self.kernel_norm, self.conv_bias)
        if kind in STRIDES:
            return Siren(dim, H, out, layers, 1.0, self.conv_bias)
        if not self.conv_bias:
            raise ValueError(f"the option conv_bias = False makes no {kind}: the official one needs biases")
        net = Magnet(dim, H, out, layers)
        if kind == "Fourier":  # windows without end
            windows: Any = net.filters
            for window in windows:
                nn.init.zeros_(window.mu)
                nn.init.zeros_(window.gamma)
        return net

    def mask(self) -> FlexMask | None:
        """That of the kernel."""
        return None

    def build(self) -> nn.Module:
        horizon = str(self.horizon)
        if horizon not in ("full", "same") and (not horizon.isdigit() or int(horizon) % 2 == 0):
            raise ValueError(f"the option horizon = {self.horizon!r} is not 'full', 'same' or an odd number")
        return ContinuousConv(
            self.in_channels,
            self.out_channels,
            self.kernel_dim_linear,
            horizon,
            self._net(),
            self.kernel_sampling_rate_norm,
            self.conv_use_fft,
            self.conv_bias,
            self.mask(),
        )

    def names(self) -> Names:
        own = [Name("train_length", "train_length", WHOLE), Name("bias", "bias"), Name("", "mask.")]
        net = self._net_names() if self.kernel_type in STRIDES else self._product_names()
        return [*own, *inside("Kernel.", "net.", net)]

    def _net_names(self) -> Names:
        kind, layers, dim = self.kernel_type, self.kernel_no_layers, self.kernel_dim_linear
        norm = self.kernel_norm if kind == "MLP" else ""
        table = net_names(layers, dim, norm, STRIDES[kind], self.kernel_weight_norm)
        if kind == "MLP":
            return table
        sines: Names = []  # omega is in our weights: sin(omega (W x + b)) in a SIREN, sin(omega W x + b) in an nSIREN
        for i in range(layers - 1):
            there = f"kernel_net.{i * STRIDES[kind]}"
            parts = [name for name in table if isinstance(name, Name) and str(name.ours).startswith(f"layers.{i}.")]
            with_bias = kind == "SIREN" and self.conv_bias
            sines += [scaled(name, f"{there}.omega_0") for name in (parts if with_bias else parts[:1])]
        return [*sines, *table]

    def _product_names(self) -> Names:
        """Of a multiplicative filter network."""
        table: Names = []
        for i in range(self.kernel_no_layers + 1):
            mu, gamma, theta = (f"filters.{i}.{name}" for name in ("mu", "gamma", "theta"))
            if self.kernel_type == "Fourier":
                table += [Name((), mu), Name((), gamma)]
                continue
            official = (gamma, theta) if self.steerable else gamma
            table += [Name(mu, mu), Name(official, gamma, Turn(self._windows, self._window_shapes))]
        return [*table, Name("", "", points(self.kernel_dim_linear))]

    def _windows(self, gamma: Tensor, theta: Tensor | None = None) -> Tensor:
        widths = torch.diag_embed(gamma.expand(-1, self.kernel_dim_linear))
        if theta is None:
            return widths
        angle = 2 * math.pi * theta
        turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=-1).view(-1, 2, 2)
        return widths @ turn

    def _window_shapes(self, gamma: Tensor) -> Any:
        widths = gamma[:, 0] if self.kernel_type == "MAGNet" else gamma[:, 0, :1]
        return (widths, gamma[:, 0, 0]) if self.steerable else widths


class CKConv(ContinuousKernel):
    """CKConv."""

    cls: Literal["CKConv"] = "CKConv"


class FlexConv(ContinuousKernel):
    """FlexConv."""

    ignored = ContinuousKernel.ignored | {"mask_init_value", "mask_temperature", "mask_threshold"}
    mask_use: Flag = True
    mask_type: Literal["gaussian"] = "gaussian"
    mask_dynamic_cropping: Flag = True
    cls: Literal["FlexConv"] = "FlexConv"

    def mask(self) -> FlexMask | None:
        return FlexMask(self.kernel_dim_linear, self.mask_dynamic_cropping, self.mask_use)

    def names(self) -> Names:
        return [*super().names(), unused("temperature", 1)]


SYSTEMS = {"flexconv": System(CKConv, FlexConv)}
