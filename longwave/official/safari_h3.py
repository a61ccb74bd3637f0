"""H3 of github.com/HazyResearch/safari (commit 02220c6) and github.com/HazyResearch/H3, and H3 with free taps."""

import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import Mixer, MixerSpec, mixer
from longwave.nn import ShiftFilter, Truncated
from longwave.official.blocks import Call, mixed
from longwave.official.replicas.conv import Conv
from longwave.official.replicas.hyena import H3Conv, WholeSequences
from longwave.official.safari_longconv import KernelOptions
from longwave.official.source import FIRST, Flag, Name, Names, One, Size, Source, System, Turn, inside

LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {  # of the authors' transforms of -Re A
    "exp": lambda x: x,
    "none": torch.log,
    "relu": lambda x: torch.log(F.relu(x) + 1e-4),
    "sigmoid": F.logsigmoid,
    "softplus": lambda x: torch.log(F.softplus(x)),
}


class H3Layer(Source):
    """H3."""

    ignored = frozenset(
        {"use_fast_fftconv", "dropout", "layer_idx", "device", "dtype", "lr", "verbose", "deterministic"}
        | {"dt_min", "dt_max", "measure", "measure_args", "rank"}
    )
    d_model: Size
    d_state: Size = 64
    l_max: Size | None = None
    head_dim: Size = 1
    n_ssm: Size | None = None
    mode: Literal["diag"] = "diag"
    disc: Literal["bilinear", "zoh"] = "bilinear"
    real_type: Literal["exp", "none", "relu", "sigmoid", "softplus"] = "exp"
    bandlimit: float | None = None
    force_real: Flag = False
    rate: One = 1

    def mixer(self) -> MixerSpec:
        """The layer of a language model, as data."""
        if self.l_max is not None or self.d_state % 2:
            raise ValueError(
                f"the mixer h3 has no l_max (= {self.l_max}), and an even d_state (= {self.d_state}): from_official "
                "computes what this layer does, but it is no model of longwave"
            )
        return self._plain()

    def _plain(self) -> MixerSpec:
        if self.d_model % self.head_dim:
            raise ValueError(f"head_dim = {self.head_dim} does not divide d_model = {self.d_model}")
        if (self.d_model // self.head_dim) % (self.n_ssm or 1):
            raise ValueError(f"n_ssm = {self.n_ssm} does not divide the {self.d_model // self.head_dim} heads")
        sizes = {"d_state": self.d_state // 2 * 2, "head_dim": self.head_dim, "systems": self.n_ssm}
        return mixer("h3", **sizes, discretization=self.disc)

    def drawn(self) -> Mixer:
        """The same, freshly drawn, with what no mixer has."""
        model: Any = self._plain().build(self.d_model)
        if self.d_state % 2:
            model.ssm_k_kernel = ShiftFilter(self.d_model, self.d_state)
        if self.l_max is not None:  # the authors truncate when they convolve, though not when they step
            model.kernel = Truncated(model.kernel.channels, model.kernel, self.l_max)
            if self.l_max < self.d_state:
                model.ssm_k_kernel = Truncated(self.d_model, model.ssm_k_kernel, self.l_max)
        return model

    def build(self) -> nn.Module:
        return Call(self.drawn(), mixed)

    def mixer_names(self) -> Names:
        """Of :meth:`drawn`."""
        cut = "" if self.l_max is None else "inner."
        short = "inner." if self.l_max is not None and self.l_max < self.d_state else ""
        system = [
            Name("inv_A_real", "log_A_real", Turn(self._logarithm, lambda t: t)),
            *([Name("A_imag", "A_imag", Turn(lambda t: 0 * t, lambda t: t))] if self.force_real else []),
            Name("C", "C", FIRST) if self.bandlimit is None else self._in_band(),
            Name("", ""),
        ]
        return [
            *inside("kernel.kernel.", f"kernel.{cut}", system),
            *inside("ssm_k_kernel.kernel.", f"ssm_k_kernel.{short}", [Name("C", "C", FIRST), Name("", "")]),
            Name("", ""),
        ]

    def _logarithm(self, real: Tensor) -> Tensor:
        if self.real_type == "none" and (real <= 0).any():
            raise ValueError(
                "real_type = 'none' is carried over where 'kernel.kernel.inv_A_real' is positive; it is not"
            )
        return LOGARITHMS[self.real_type](real)

    def _in_band(self) -> Name:
        """Modes that oscillate too fast are silenced for good."""
        assert self.bandlimit is not None
        limit, still = self.bandlimit, self.force_real

        def silenced(C: Tensor, log_dt: Tensor, A_imag: Tensor) -> Tensor:
            oscillation = (0 if still else 1) * A_imag.abs().repeat(len(log_dt) // len(A_imag), 1)
            slow = log_dt.exp()[:, None] * oscillation / (2 * math.pi) < limit / 2
            return C[0] * slow[..., None]

        systems = self.n_ssm or self.d_model // self.head_dim
        shapes = lambda C: (C[None], C.new_empty(len(C)), C.new_empty(systems, C.shape[1]))  # noqa: E731
        return Name(("C", "log_dt", "A_imag"), "C", Turn(silenced, shapes))

    def names(self) -> Names:
        return inside("", "model.", self.mixer_names())


class H3ConvLayer(KernelOptions):
    """H3Conv."""

    ignored = KernelOptions.ignored | {"use_fast_fftconv", "dropout", "layer_idx", "device", "dtype"}
    d_model: Size
    l_max: Size
    head_dim: Literal[1] = 1
    channels: Literal[1] = 1

    def build(self) -> nn.Module:
        return H3Conv(self.d_model, *(Conv(self.filter(self.d_model, self.l_max), whole=True) for _ in range(2)))

    def mixer(self) -> NoReturn:
        """There is none."""
        raise ValueError("h3-conv is no mixer of longwave: from_official computes what it does on whole sequences")

    def drawn(self) -> Mixer:
        """The layer of a language model."""
        return WholeSequences(self.build(), self.d_model)

    def mixer_names(self) -> Names:
        """Of :meth:`drawn`."""
        return inside("", "layer.", self.names())

    def names(self) -> Names:
        return [
            Name("k_kernel.kernel", "k_conv.filter.kernel", FIRST),
            Name("kernel.kernel", "conv.filter.kernel", FIRST),
            Name("", ""),
        ]


SYSTEMS = {"h3": System(H3Layer), "h3conv": System(H3ConvLayer)}
