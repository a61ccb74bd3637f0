"""Modules of github.com/rjbruin/flexconv (commit 0f355d1): CKConv and FlexConv in one and two dimensions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.filters.ckconv import Magnet, Siren, evaluate, gaussian, reach
from longwave.nn.module import at_least_float32
from longwave.official.ckconv import (
    ACTIVATIONS,
    NORMS,
    KernelMLP,
    convert_mlp,
    correlate,
    mlp_keys,
    own_tensors,
)
from longwave.official.system import (
    Anything,
    Choice,
    Family,
    Options,
    Shapes,
    Size,
    State,
    System,
    prefixed,
    under,
)


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
        (wide,) = at_least_float32(x)
        bias = None if self.bias is None else self.bias.to(k.dtype)
        if fft:
            return _centred_fft(wide, k, bias).to(x.dtype)
        return F.conv2d(wide, k, bias, padding=[size // 2 for size in k.shape[2:]]).to(x.dtype)


def _centred_fft(x: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The authors' fftconv, which pads both axes by half the kernel's last one, and so is wrong where they differ."""
    half, axes = k.shape[-1] // 2, (2, 3)
    padded = F.pad(x, [half] * 4)
    sizes = [padded.shape[2], padded.shape[3] + padded.shape[3] % 2]
    spectrum = torch.einsum(
        "bi...,oi...->bo...", torch.fft.rfftn(padded, sizes, axes), torch.fft.rfftn(k, sizes, axes).conj()
    )
    y = torch.fft.irfftn(spectrum, sizes, axes)[:, :, : x.shape[2], : x.shape[3]]
    return y if bias is None else y + bias[:, None, None]


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


_STRIDES = {"MLP": 3, "SIREN": 2, "nSIREN": 2}  # entries of the authors' kernel_net from one linear map to the next
_PRODUCTS = ("MAGNet", "Gabor", "Fourier")


def _norm(o: Options) -> str:
    return o.kernel_norm if o.kernel_type == "MLP" else ""


def _sizes(o: Options) -> list[int]:
    layers = o.kernel_no_layers
    if layers < (2 if o.kernel_type in _STRIDES else 1):
        raise ValueError(f"the option kernel_no_layers = {layers} makes no {o.kernel_type}")
    return [o.kernel_dim_linear, *[o.kernel_no_hidden] * (layers - 1), o.out_channels * o.in_channels]


def _product_keys(o: Options) -> Shapes:
    """Of a multiplicative filter network."""
    H, dim, out = o.kernel_no_hidden, o.kernel_dim_linear, o.out_channels * o.in_channels
    points, layers = (1,) * dim, o.kernel_no_layers
    maps = {f"filters.{i}.linear": (H, dim) for i in range(layers + 1)}
    maps |= {f"linear.{i}": (H, H) for i in range(layers)} | {"output_linear": (out, H)}
    keys: Shapes = {f"{name}.weight": (*shape, *points) for name, shape in maps.items()}
    keys |= {f"{name}.bias": shape[:1] for name, shape in maps.items()}
    for i in range(layers + 1):
        if o.kernel_type != "Fourier":
            keys[f"filters.{i}.mu"] = (H, dim)
            keys[f"filters.{i}.gamma"] = (H, dim) if o.kernel_type == "MAGNet" else (H, 1)
        if _steerable(o):
            keys[f"filters.{i}.theta"] = (H,)
    return keys


def _steerable(o: Options) -> bool:
    if o.kernel_type == "MAGNet" and o.kernel_steerable and o.kernel_dim_linear != 2:
        raise ValueError("the option kernel_steerable = True needs kernel_dim_linear = 2")
    return o.kernel_type == "MAGNet" and o.kernel_steerable


def _conv_keys(o: Options) -> Shapes:
    sizes = _sizes(o)
    if o.horizon not in ("full", "same") and (not str(o.horizon).isdigit() or int(o.horizon) % 2 == 0):
        raise ValueError(f"the option horizon = {o.horizon!r} is not 'full', 'same' or an odd number")
    if o.kernel_type in _PRODUCTS:
        if not o.conv_bias:
            raise ValueError(f"the option conv_bias = False makes no {o.kernel_type}: the official one needs biases")
        net = _product_keys(o)
    else:
        stride = _STRIDES[o.kernel_type]
        net = mlp_keys(sizes, o.kernel_dim_linear, _norm(o), o.conv_bias, stride, o.kernel_weight_norm)
        if o.kernel_type != "MLP":
            net |= {f"kernel_net.{i * stride}.omega_0": (1,) for i in range(len(sizes) - 2)}
    keys: Shapes = {"train_length": (1,), **prefixed("Kernel.", net)}
    return keys | ({"bias": (o.out_channels,)} if o.conv_bias else {})


def _flex_keys(o: Options) -> Shapes:
    return {**_conv_keys(o), "mask_params": (o.kernel_dim_linear, 2), "temperature": (1,), "mask_threshold": (1,)}


def _build(o: Options, mask: FlexMask | None = None) -> ContinuousConv:
    sizes = _sizes(o)
    if o.kernel_type in _PRODUCTS:
        net: nn.Module = Magnet(sizes[0], o.kernel_no_hidden, sizes[-1], o.kernel_no_layers)
    elif o.kernel_type == "MLP":
        net = KernelMLP(sizes, o.kernel_activ_function, _norm(o), o.conv_bias)
    else:
        net = Siren(sizes[0], o.kernel_no_hidden, sizes[-1], o.kernel_no_layers, 1.0, o.conv_bias)
    scale, fft = o.kernel_sampling_rate_norm, o.conv_use_fft
    return ContinuousConv(
        o.in_channels, o.out_channels, o.kernel_dim_linear, str(o.horizon), net, scale, fft, o.conv_bias, mask
    )


def _convert_net(kernel: State, o: Options) -> State:
    if o.kernel_type == "MLP":
        return convert_mlp(kernel, o.kernel_no_layers, _norm(o), _STRIDES["MLP"], o.kernel_weight_norm, flat=False)
    if o.kernel_type in _STRIDES:
        return _convert_siren(kernel, o)
    ours = {key: t.flatten(1) if key.endswith(".weight") else t for key, t in kernel.items()}
    for i in range(o.kernel_no_layers + 1):
        name, dim = f"filters.{i}", o.kernel_dim_linear
        if o.kernel_type == "Fourier":  # a window without end
            weight = ours[f"{name}.linear.weight"]
            ours[f"{name}.mu"], ours[f"{name}.gamma"] = (
                torch.zeros_like(weight),
                weight.new_zeros(len(weight), dim, dim),
            )
            continue
        gamma = torch.diag_embed(ours[f"{name}.gamma"].expand(-1, dim))
        if _steerable(o):
            angle = 2 * math.pi * ours.pop(f"{name}.theta")
            turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=-1).view(-1, 2, 2)
            gamma = gamma @ turn
        ours[f"{name}.gamma"] = gamma
    return ours


def _convert_siren(kernel: State, o: Options) -> State:
    """omega becomes part of the weights: sin(omega (W x + b)) in a SIREN, sin(omega W x + b) in an nSIREN."""
    ours = convert_mlp(kernel, o.kernel_no_layers, "", _STRIDES[o.kernel_type], o.kernel_weight_norm, flat=True)
    for i in range(o.kernel_no_layers - 1):
        omega = kernel[f"kernel_net.{i * _STRIDES[o.kernel_type]}.omega_0"]
        ours[f"layers.{i}.weight"] = omega * ours[f"layers.{i}.weight"]
        if o.conv_bias and o.kernel_type == "SIREN":
            ours[f"layers.{i}.bias"] = omega * ours[f"layers.{i}.bias"]
    return ours


def _convert(state: State, o: Options) -> State:
    ours = prefixed("net.", _convert_net(under("Kernel.", state), o))
    ours |= own_tensors(state)
    return ours | {f"mask.{key}": state[key] for key in ("mask_params", "mask_threshold") if key in state}


_OPTIONS = {
    **dict.fromkeys(("in_channels", "out_channels"), Size()),
    "horizon": Anything(),
    "kernel_type": Choice("MAGNet", "Gabor", "Fourier", "SIREN", "nSIREN", "MLP"),
    "kernel_dim_linear": Choice(2, 1),
    "kernel_no_hidden": 32,
    "kernel_no_layers": 3,
    "kernel_activ_function": Choice(*ACTIVATIONS),
    "kernel_norm": Choice(*NORMS, default="BatchNorm"),
    "kernel_weight_norm": False,
    "kernel_steerable": False,
    "kernel_sampling_rate_norm": 1.0,
    "conv_use_fft": False,
    "conv_bias": True,
}
_IGNORED = frozenset(  # what is in the state, only for the start, or looked at by nothing
    {"kernel_omega_0", "kernel_learn_omega_0", "kernel_init_spatial_value", "kernel_bias_init", "kernel_input_scale"}
    | {"conv_padding", "conv_stride", "shape", "mask_params"}
)

SYSTEMS = {
    "flexconv": Family(
        {
            "CKConv": System(
                options={**_OPTIONS, "cls": Choice("CKConv")},
                ignored=_IGNORED,
                keys=_conv_keys,
                build=_build,
                convert=_convert,
            ),
            "FlexConv": System(
                options={
                    **_OPTIONS,
                    "mask_use": True,
                    "mask_type": Choice("gaussian"),
                    "mask_dynamic_cropping": True,
                    "cls": Choice("FlexConv"),
                },
                ignored=_IGNORED | {"mask_init_value", "mask_temperature", "mask_threshold"},
                keys=_flex_keys,
                build=lambda o: _build(o, FlexMask(o.kernel_dim_linear, o.mask_dynamic_cropping, o.mask_use)),
                convert=_convert,
            ),
        }
    )
}
