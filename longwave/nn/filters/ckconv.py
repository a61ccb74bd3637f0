"""Continuous kernels: a small network says what every tap is, from where it lies between the oldest step and now."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import Filter, require_max_len
from longwave.nn.filters.implicit import evaluate
from longwave.nn.module import positive_rate, widened


class Siren(nn.Module):
    """W_n h,  h <- sin(omega (W_i h + b_i)) from a position on: a network that has all frequencies up to omega.

    Source: Sitzmann et al. (2020) "Implicit Neural Representations with Periodic Activation Functions",
    arXiv:2006.09661, as in Romero et al. (2021), arXiv:2102.02611.

    Args:
        dim: coordinates of a position, each in [-1, 1].
        width: of the hidden layers.
        out: size of the result.
        layers: linear maps, >= 2, the one to the result among them.
        omega: > 0, the highest frequency of its sines, in radians over the range of positions.
        bias: whether the maps have one.
    Raises:
        ValueError: for no width, fewer than two layers, or omega <= 0.
    """

    def __init__(self, dim: int, width: int, out: int, layers: int = 3, omega: float = 30.0, bias: bool = True):
        super().__init__()
        if width < 1 or layers < 2 or not omega > 0:
            raise ValueError(
                f"a SIREN needs width >= 1, layers >= 2 and omega > 0; got width = {width}, layers = {layers}, "
                f"omega = {omega}"
            )
        self.omega = omega
        sizes = [dim, *[width] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            bound = 1 / layer.in_features if i == 0 else math.sqrt(6 / layer.in_features) / self.omega
            layer.weight.uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.uniform_(-1, 1)

    def forward(self, positions: Tensor) -> Tensor:
        """positions (P, dim) -> (P, out)."""
        h = positions
        for layer in self.layers[:-1]:
            h = torch.sin(self.omega * layer(h))
        return self.layers[-1](h)


class Gabor(nn.Module):
    """sin(W p + b) under a Gaussian window exp(-|Gamma_h (p - mu_h)|^2 / 2), another one for every feature h.

    Args:
        dim: coordinates of a position.
        width: features.
        input_scale: of the frequencies W.
        alpha, beta: Gamma is drawn diagonal from the gamma distribution with this shape and rate.
        spread: mu is drawn from [-spread, spread].
        bias: whether there is b.
    """

    def __init__(
        self, dim: int, width: int, input_scale: float, alpha: float, beta: float, spread: float, bias: bool = True
    ):
        super().__init__()
        self.input_scale, self.alpha, self.beta, self.spread = input_scale, alpha, beta, spread
        self.linear = nn.Linear(dim, width, bias=bias)
        self.mu = nn.Parameter(torch.empty(width, dim))
        self.gamma = nn.Parameter(torch.empty(width, dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        with torch.device("cpu"):  # nothing can be drawn from this distribution on the meta device
            drawn = torch.distributions.Gamma(self.alpha, self.beta).sample(tuple(self.mu.shape))
        self.gamma.copy_(torch.diag_embed(drawn))
        self.mu.uniform_(-self.spread, self.spread)
        bound = self.mu.shape[1] ** -0.5
        self.linear.weight.uniform_(-bound, bound).mul_(self.input_scale * self.gamma.diagonal(dim1=1, dim2=2))
        if self.linear.bias is not None:
            self.linear.bias.uniform_(-math.pi, math.pi)

    def forward(self, positions: Tensor) -> Tensor:
        """positions (P, dim) -> (P, width)."""
        turned = torch.einsum("hij,phj->phi", self.gamma, positions[:, None] - self.mu)
        return torch.exp(-0.5 * turned.square().sum(2)) * torch.sin(self.linear(positions))


class Magnet(nn.Module):
    """W_n h,  h <- Gabor_i(p) (W_i h + b_i): a multiplicative anisotropic Gabor network.

    Source: Romero et al. (2022) "FlexConv", arXiv:2110.08059, sec. 3.2, on the multiplicative filter networks of
    Fathony et al. (2021).

    Args:
        dim: coordinates of a position, each in [-1, 1].
        width: hidden features.
        out: size of the result.
        layers: products, >= 1; there are as many Gabor filters and one more.
        input_scale: of the frequencies.
        spread: of the windows' centres.
        bias: whether the maps have one.
    Raises:
        ValueError: for no width or no layers.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        out: int,
        layers: int = 3,
        input_scale: float = 25.6,
        spread: float = 1.0,
        bias: bool = True,
    ):
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"a MAGNet needs width >= 1 and layers >= 1; got width = {width}, layers = {layers}")
        scale = input_scale / math.sqrt(layers + 1)
        self.filters = nn.ModuleList(
            Gabor(dim, width, scale, 6.0 / (i + 1), 1.0, spread, bias) for i in range(layers + 1)
        )
        self.linear = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(layers))
        self.output_linear = nn.Linear(width, out, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in self.linear:
            assert isinstance(layer, nn.Linear)
            layer.weight.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5)
        for layer in (*self.linear, self.output_linear):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, positions: Tensor) -> Tensor:
        """positions (P, dim) -> (P, out)."""
        h = self.filters[0](positions)
        for gabor, layer in zip(self.filters[1:], self.linear):
            h = gabor(positions) * layer(h)
        return self.output_linear(h)


def longest_at(max_len: int, rate: float) -> int:
    """The greatest length that :func:`lag_positions` takes."""
    length = 1 + int((max_len - 1) / rate)
    return length if rate * (length - 1) <= max_len - 1 else length - 1


def lag_positions(length: int, max_len: int, rate: float, device: torch.device | None = None) -> Tensor:
    """Where the lags 0 .. length - 1 lie: 1 - 2 rate s / (max_len - 1), (length, 1) in float64.

    Raises:
        ValueError: where the oldest lies before -1.
    """
    if rate * (length - 1) > max_len - 1:
        raise ValueError(
            f"a continuous kernel of max_len = {max_len} at rate = {rate:g} has no taps for a sequence of {length}; "
            f"build it with max_len >= {math.ceil(rate * (length - 1)) + 1}"
        )
    return 1 - 2 * rate * torch.arange(length, dtype=torch.float64, device=device)[:, None] / max(1, max_len - 1)


def gaussian(positions: Tensor, mean: Tensor, width: Tensor) -> Tensor:
    """exp(-((p - mean) / width)^2 / 2)."""
    return torch.exp(-0.5 * ((positions - mean) / width).square())


def reach(width: Tensor, threshold: float | Tensor) -> Tensor:
    """How far from its mean a Gaussian falls to a threshold:  width sqrt(-2 log threshold)."""
    return width * torch.sqrt(-2 * torch.log(torch.as_tensor(threshold, dtype=width.dtype, device=width.device)))


class CKConvFilter(Filter):
    """k[s] = rate SIREN(1 - 2 rate s / (max_len - 1)): one function of relative position for any number of taps.

    Source: Romero et al. (2022) "CKConv: Continuous Kernel Convolution For Sequential Data", arXiv:2102.02611, eq. 2
    and sec. 4; the factor in front keeps the integral at another sampling rate.

    Args:
        channels: C.
        max_len: longest sequence at the rate of training, which positions from 1 (now) to -1 stand for.
        width, layers, omega: of the network, see :class:`Siren`.
        rate: > 0, the step between samples over that of training, see :func:`longwave.nn.set_rate`.
    Raises:
        ValueError: for max_len < 1, rate <= 0, bad options of the network, or on a length that reaches behind -1.
    """

    def __init__(
        self,
        channels: int,
        max_len: int,
        *,
        width: int = 32,
        layers: int = 3,
        omega: float = 30.0,
        rate: float = 1.0,
    ):
        super().__init__()
        require_max_len("a continuous kernel", max_len)
        self.channels, self.max_len, self.rate = channels, max_len, positive_rate(rate)
        self.kernel_net = Siren(1, width, channels, layers, omega)

    def longest(self) -> int:
        return longest_at(self.max_len, self.rate)

    def forward(self, length: int) -> Tensor:
        device = next(self.kernel_net.parameters()).device
        positions = lag_positions(length, self.max_len, self.rate, device)
        return self.rate * evaluate(self.kernel_net, positions).T


class FlexConvFilter(Filter):
    """k[s] = rate MAGNet(p) exp(-((p - mu) / sigma)^2 / 2),  p = 1 - 2 rate s / (max_len - 1), mu and sigma learned.

    Taps further back than where the mask falls below the threshold are zero, so the kernel has the length that it has
    learned, and costs what the longest one costs.

    Source: Romero et al. (2022) "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes",
    arXiv:2110.08059, eq. 2 and sec. 3.1.

    Args:
        channels: C.
        max_len, rate: as in :class:`CKConvFilter`.
        width, layers, input_scale: of the network, see :class:`Magnet`.
        mask_width: sigma at the start, > 0; mu starts at 1, the present.
        threshold: between 0 and 1.
    Raises:
        ValueError: for max_len < 1, rate <= 0, a mask_width or a threshold that cannot be, or on a length that
            reaches behind -1.
    """

    def __init__(
        self,
        channels: int,
        max_len: int,
        *,
        width: int = 32,
        layers: int = 3,
        input_scale: float = 25.6,
        mask_width: float = 0.075,
        threshold: float = 0.1,
        rate: float = 1.0,
    ):
        super().__init__()
        require_max_len("a continuous kernel", max_len)
        if mask_width <= 0 or not 0 < threshold < 1:
            raise ValueError(
                f"a mask needs mask_width > 0 and a threshold between 0 and 1; got mask_width = {mask_width}, "
                f"threshold = {threshold}"
            )
        self.channels, self.max_len, self.rate = channels, max_len, positive_rate(rate)
        self.mask_width, self.threshold = mask_width, threshold
        self.kernel_net = Magnet(1, width, channels, layers, input_scale, min(1.0, 1.667 * mask_width))
        self.mask_params = nn.Parameter(torch.empty(1, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.mask_params[:, 0] = 1
        self.mask_params[:, 1] = self.mask_width

    def longest(self) -> int:
        return longest_at(self.max_len, self.rate)

    def forward(self, length: int) -> Tensor:
        (mask_params,) = widened(self.mask_params)
        mean, width = mask_params[0]
        positions = lag_positions(length, self.max_len, self.rate, mask_params.device).to(mask_params.dtype)
        end = (mean - reach(width, self.threshold).abs()).detach()
        mask = gaussian(positions, mean, width) * ((positions > end) | (end >= 1))
        return self.rate * (mask * evaluate(self.kernel_net, positions)).T
