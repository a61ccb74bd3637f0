"""Modules of github.com/state-spaces/s4 (commit e757cef): S4Block, its kernels by themselves, and the minimal S4D."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from longwave.mixers import S4D, Mixer, MixerSpec, mixer
from longwave.official.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    Activation,
    Call,
    ConvBlock,
    Elementwise,
    mixed,
    mixed_transposed,
    output_linear,
)
from longwave.official.s4_kernel import (
    KERNEL,
    TRANSFORMS,
    Kernel,
    KernelParts,
    StateSpaceConv,
    kernel_alone,
    untruncated,
)
from longwave.official.source import FIRST, Flag, Name, Names, One, Size, Source, System, Turn, inside

PLAIN = {  # options of a block that is our mixer
    "channels": 1,
    "activation": "gelu",
    "mult_act": None,
    "bidirectional": False,
    "is_real": False,
    "dt_tie": True,
    "dt_fast": False,
    "imag_transform": "none",
    "bandlimit": None,
    "rate": 1.0,
}
Named = Literal["dplr", "nplr", "s4", "diag", "s4d", None]
NamedDiagonal = Literal["diag", "s4d", None]


class S4State(NamedTuple):
    h: Tensor  # (B, H, P) complex


class S4Layer(Mixer):
    """The authors' S4Block as a mixer.

    Args:
        block: takes x (B, L, D), and with a state returns y and next_state.
        d_model: D.
        causal: whether it does not look ahead.
    """

    name = "S4Block"

    def __init__(self, block: ConvBlock, d_model: int, causal: bool):
        super().__init__()
        self.block: Any = block
        self.d_model, self.causal = d_model, causal  # type: ignore[misc]

    def init_state(self, batch: int) -> S4State:
        return S4State(self.block.conv.init_state(batch))

    def mix(self, x: Tensor, state: S4State | None, padding: Tensor | None) -> tuple[Tensor, S4State | None]:
        if state is None:
            return self.block(x), None
        y, h = self.block(x, state.h, padding).values()
        return y, S4State(h)


class BlockParts(KernelParts):
    """The options of S4Block but for those that a model gives all of its blocks."""

    ignored = KernelParts.ignored | {"drop_kernel", "gate_act", "initializer", "weight_norm"}
    swap_channels: Flag = False
    activation: Activation = "gelu"
    mult_act: Elementwise = None
    final_act: Activation = "glu"
    postact: Activation = None
    gate: None = None
    bottleneck: None = None


class Block(BlockParts, Kernel):
    """The options of S4Block."""

    bidirectional: Flag = False
    transposed: Flag = True

    def build(self) -> ConvBlock:
        if self.postact is not None and self.final_act is not None:
            raise ValueError(f"final_act = {self.final_act!r} must be None where postact = {self.postact!r} is given")
        H, K = self.d_model, self.channels * (2 if self.activation == "glu" else 1)
        filter = self.filter(K * (2 if self.bidirectional else 1))
        out = nn.Sequential(
            ACTIVATIONS[self.activation](),
            ELEMENTWISE[self.mult_act](),
            output_linear(self.channels * H, H, self.postact or self.final_act),
        )
        conv = StateSpaceConv(filter, self.support, self.bidirectional)
        return ConvBlock(conv, H, K, out, transposed=self.transposed, swapped=self.swap_channels)

    def names(self) -> Names:
        kernel = inside("layer.kernel.", "conv.filter.", KERNEL)
        return [Name("layer.D", "D"), *kernel, Name("output_linear.", "out.2.")]

    def ours(self) -> MixerSpec:
        """Our mixer of the same function, for sequences up to l_max.

        Raises:
            ValueError: for an option that it does not have.
        """
        last = "final_act" if self.postact is None else "postact"
        for name, value in {**PLAIN, last: "glu"}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is not carried over into a model; longwave has {value!r}"
                )
        if self.low_rank:
            return mixer("s4", d_state=self.d_state, rank=self.rank, systems=self.n_ssm)
        return mixer("s4d", d_state=self.d_state, systems=self.n_ssm, discretization=self.disc)

    def our_names(self) -> Names:
        """Of :meth:`ours`."""
        theirs, kernel = ["A_real", "A_imag", "B", "C", "inv_dt"], ["log_A_real", "A_imag", "B", "C", "log_dt"]
        if self.low_rank:
            theirs, kernel = [*theirs, "P", "l_kernel"], [*kernel, "P"]
        turned = Turn(self._as_ours, self._as_theirs)
        return [
            Name(tuple(f"layer.kernel.{x}" for x in theirs), tuple(f"kernel.{x}" for x in kernel), turned),
            Name("layer.D", "D", FIRST),
            Name("output_linear.0.", "output_linear."),
        ]

    def _as_ours(self, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, inv_dt: Tensor, *low: Tensor) -> Any:
        """Logarithms, and C as it is rather than as a kernel of one length needs it."""
        log_A, log_dt = (
            t if transform == "exp" else TRANSFORMS[transform](t).log()
            for t, transform in ((A_real, self.real_transform), (inv_dt, self.dt_transform))
        )
        B, C, log_dt = B[0], C[0], log_dt[:, 0]
        if not low:
            return log_A, -A_imag, B, C, log_dt
        P, length = low
        return log_A, -A_imag, B, untruncated(log_A, -A_imag, P, B, C, log_dt, int(length)), log_dt, P

    def _as_theirs(self, log_A: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, log_dt: Tensor, *low: Tensor) -> Any:
        lengths = [low[0].new_empty((), dtype=torch.int64)] if low else []
        return log_A, A_imag, B[None], C[None], log_dt[:, None], *low, *lengths

    def mixer(self) -> Mixer:
        """The layer of a model, which is not transposed."""
        return S4Layer(self.build(), self.d_model, not self.bidirectional)

    def mixer_names(self) -> Names:
        """Of :meth:`mixer`."""
        return inside("", "block.", self.names())


class S4Block(Block):
    """S4Block with any of the kernels."""

    mode: Named = "dplr"
    kernel: Named = None
    rank: Size = 1


class S4DBlock(Block):
    """S4Block with the diagonal kernel, which has no rank."""

    mode: NamedDiagonal = Field("dplr", validate_default=True)
    kernel: NamedDiagonal = None


class KernelAlone(Kernel):
    """A kernel class of the repository by itself; L and rate, of its call, are among the options."""

    L: Any = None

    def build(self) -> nn.Module:
        return Call(self.filter(self.channels), partial(kernel_alone, length=self.L))

    def names(self) -> Names:
        return inside("", "model.", KERNEL)


class S4KernelAlone(KernelAlone):
    """SSMKernelDPLR."""

    mode: Literal["dplr"] = "dplr"
    kernel: None = None
    rank: Size = 1


class S4DKernelAlone(KernelAlone):
    """SSMKernelDiag."""

    mode: Literal["diag"] = "diag"
    kernel: None = None
    L: Size


class MinimalS4D(Source):
    """The S4D of the minimal implementation, which has no B."""

    ignored = frozenset({"dropout", "tie_dropout", "lr", "wd", "verbose", "dt_min", "dt_max"})
    d_model: Size
    d_state: Size = 64
    transposed: Flag = True
    rate: One = 1

    def build(self) -> nn.Module:
        mixer: Any = S4D(self.d_model, self.d_state // 2 * 2)
        mixer.kernel.B.data.copy_(mixer.kernel.B.new_tensor([1.0, 0.0]).expand_as(mixer.kernel.B))
        return Call(mixer, mixed_transposed if self.transposed else mixed)

    def names(self) -> Names:
        tap = Turn(lambda t: t[..., 0], lambda t: t[..., None])
        return [
            Name("D", "model.D"),
            Name((), "model.kernel.B"),
            Name("output_linear.0.weight", "model.output_linear.weight", tap),
            Name("output_linear.0.", "model.output_linear."),
            Name("", "model."),
        ]


SYSTEMS = {
    "s4": System(S4Block),
    "s4kernel": System(S4KernelAlone),
    "s4d": System(S4DBlock),
    "s4dkernel": System(S4DKernelAlone),
    "s4dmin": System(MinimalS4D),
}
