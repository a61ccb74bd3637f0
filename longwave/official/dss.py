"""Modules of github.com/ag1988/dss (commit 777084e): the standalone DSS layer and its kernel."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from longwave.nn import DSSFilter, Filter
from longwave.nn.filters.dss import EIGENVALUES, EPSILON, ClipEigenvalues, softmax_taps, steps
from longwave.nn.module import widened
from longwave.official.blocks import (
    ELEMENTWISE,
    Call,
    ConvBlock,
    Multiplied,
    by_either_name,
    kernel_rows,
    linear_activation,
)
from longwave.official.replicas.conv import Conv
from longwave.official.source import COLUMN, Flag, Name, Names, Size, Source, System, Turn, flat, inside

Act = Literal["gelu", None, "id", "identity", "linear", "tanh", "relu", "swish", "silu", "sigmoid"]


def run_softmax_taps(modes: Tensor, step: Tensor, W: Tensor, length: int, epsilon: float = EPSILON) -> Tensor:
    """:func:`longwave.nn.filters.dss.softmax_taps` with the authors' gradient.

    They shift the powers of a growing mode by a maximum that they detach. So its weight here is W exp(shift), with the
    exponential held at 1.
    """
    shift = step * (modes.real > 0) * (length - 1)
    return softmax_taps(modes, step, W * (shift - shift.detach()).exp().to(W.dtype), length, epsilon)


class RunSoftmaxFilter(Filter):
    """The softmax kernel over the length that is asked for, where ours is over a fixed one.

    Args:
        channels: C.
        modes: N.
        epsilon: see :func:`longwave.nn.filters.dss.softmax_taps`.
    """

    def __init__(self, channels: int, modes: int, epsilon: float):
        super().__init__()
        self.channels, self.epsilon = channels, epsilon
        self.log_dt = nn.Parameter(torch.zeros(channels, 2))
        self.Lambda = nn.Parameter(torch.zeros(modes, 2))
        self.W = nn.Parameter(torch.zeros(channels, modes, 2))

    def forward(self, length: int) -> Tensor:
        log_dt, Lambda, W = widened(self.log_dt, self.Lambda, self.W)
        modes = torch.view_as_complex(Lambda)
        return run_softmax_taps(modes, steps(modes, log_dt), torch.view_as_complex(W), length, self.epsilon)


class DSS(Source):
    """The layer, or where ``kernel_only`` its kernel, which names the sizes differently."""

    ignored = frozenset(
        {"l_max", "dt_min", "dt_max", "trainable", "lr", "Lambda_init", "initializer", "dropout", "verbose"}
    )
    d_model: Size | None = None
    d_state: Size | None = None
    channels: Size = 1
    bidirectional: Flag = False
    activation: Act = "gelu"
    postact: Literal["glu"] | Act = None
    weight_norm: Literal[False] = False
    hyper_act: Act = None
    transposed: Flag = True
    max_kernel_length: Size | None = None
    version: Literal["softmax", "exp", "exp-re-im", "exp-no-scale", "clip", "clip-no-scale"] = "softmax"
    sep_dt_re_im: Flag = True
    epsilon: float = 1e-7
    max_real_Lambda: float = 1e-4
    kernel_only: Flag = False
    H: Size | None = None
    N: Size | None = None
    L: Size | None = None
    length: Size | None = None

    def features(self) -> int:
        """H."""
        name = "H" if self.kernel_only else "d_model"
        if (H := getattr(self, name)) is None:
            raise ValueError(f"the option {name!r} is missing")
        return H

    @property
    def filters(self) -> int:
        """Of a feature, in one direction."""
        return self.channels * (1 if self.kernel_only or self.hyper_act is None else 2)

    @property
    def rows(self) -> int:
        """Filters of a feature."""
        return self.filters * (2 if self.bidirectional and not self.kernel_only else 1)

    def filter(self) -> Filter:
        """All rows of the kernel."""
        N = (self.N if self.kernel_only else self.d_state) or 64
        C = self.rows * self.features()
        if self.version == "softmax":
            return RunSoftmaxFilter(C, N, self.epsilon)
        clipped = self.version.startswith("clip")
        kind = "exp_re_im" if self.version == "exp-re-im" else "exp"
        modes = ClipEigenvalues(N, self.max_real_Lambda) if clipped else EIGENVALUES[kind](N)
        return DSSFilter(C, N, eigenvalues=modes, discretization="none" if "no-scale" in self.version else "zoh")

    def build(self) -> nn.Module:
        H, K, filter = self.features(), self.filters, self.filter()
        if self.kernel_only:
            length = self.length or self.L
            if length is None:
                raise ValueError("a kernel alone needs the option 'L', its length")
            return Call(filter, partial(kernel_rows, features=H, length=length))
        out = nn.Sequential(
            nn.Identity() if self.hyper_act is None else Multiplied(self.hyper_act),
            ELEMENTWISE[self.activation](),
            linear_activation(self.channels * H, H, self.postact),
        )
        conv = Conv(filter, self.max_kernel_length, self.bidirectional, adjacent=True)
        return Call(ConvBlock(conv, H, K, out, transposed=self.transposed), by_either_name)

    def names(self) -> Names:
        H = self.features()
        kernel = [
            Name("log_dt", "log_dt", Turn(self._copied, lambda t: t[:H] if self.sep_dt_re_im else t[:H, 0])),
            Name("W", "W", flat(H)),
            Name("Lambda_log_neg_re", "Lambda.log_neg_re"),
            Name("Lambda_log_im", "Lambda.log_im"),
            Name("Lambda_im", "Lambda.im"),
            Name("Lambda", "Lambda.re_im"),
            Name("Lambda", "Lambda"),
        ]
        if self.kernel_only:
            return inside("", "model.", kernel)
        biases = [Name(f"output_linear.{key}", f"out.2.{key}", COLUMN) for key in ("bias", "0.bias") if self.transposed]
        layer = [Name("D", "D"), *inside("kernel.", "conv.filter.", kernel), *biases, Name("output_linear.", "out.2.")]
        return inside("", "model.", layer)

    def _copied(self, log_dt: Tensor) -> Tensor:
        """For every row, and for real and imaginary parts."""
        return (log_dt if self.sep_dt_re_im else log_dt[:, None].expand(-1, 2)).repeat(self.rows, 1)


SYSTEMS = {"dss": System(DSS)}
