"""The S4 layer of state-spaces v3, as github.com/raminmh/liquid-s4 (commit 06031dc) has it, with its liquid terms."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from longwave.official.blocks import (
    ELEMENTWISE,
    Activation,
    Call,
    ConvBlock,
    Elementwise,
    Multiplied,
    by_either_name,
    linear_activation,
)
from longwave.official.replicas.liquid import CONTRACTIONS, KB, Correlations, LateConv, LiquidConv, PolyB, Stash
from longwave.official.s4_kernel import LENGTH, TRANSFORMS, Kernel, StateSpaceConv, Transform
from longwave.official.source import (
    AS_IT_IS,
    Flag,
    Name,
    Names,
    Positive,
    Shapes,
    Size,
    Source,
    State,
    System,
    Turn,
    inside,
    prefixed,
    under,
    unused,
)

NEGATED = Turn(lambda t: -t, lambda t: t)
# Tensors of a kernel whose names or signs are others in version 4.
SHARED = {"log_dt": ("inv_dt", Turn(lambda t: t[:, None], lambda t: t[:, 0])), "L": ("l_kernel", AS_IT_IS)}
LOW_RANK = {"w_imag": ("A_imag", NEGATED), "inv_w_real": ("A_real", AS_IT_IS), **SHARED}
DIAGONAL = {"A_imag": ("A_imag", NEGATED), "inv_A_real": ("A_real", AS_IT_IS), **SHARED}


def v3_to_v4(state: State) -> State:
    """The tensors of an S4 layer of version 3 of the repository under the keys and signs of version 4.

    Source: checkpoints/convert_v3_to_v4.py of github.com/state-spaces/s4.

    Args:
        state: of the layer: ``D``, ``kernel.kernel.*``, ``output_linear.*``.
    Returns:
        ``layer.D``, ``layer.kernel.*``, ``output_linear.*``.
    """
    ours: State = {}
    for key, tensor in state.items():
        prefix, _, name = key.rpartition("kernel.")
        if prefix:
            name, turn = (LOW_RANK | DIAGONAL).get(name, (name, AS_IT_IS))
            ours[f"layer.kernel.{name}"] = turn.ours(tensor)
        else:
            ours[f"layer.{key}" if key == "D" else key] = tensor
    return ours


class GatedBlock(nn.Module):
    """The gated state space of the authors:  output_gate(block(input_linear(x)) * input_gate(x)).

    Source: the options ``gate`` and ``bottleneck``, after Mehta et al. (2022), arXiv:2206.13947.

    Args:
        block: on (B, L, width).
        o: the options.
    """

    def __init__(self, block: ConvBlock, o: "V3"):
        super().__init__()
        self.block, D = block, o.d_model
        self.input_linear: nn.Module = nn.Identity()
        self.input_gate: nn.Module | None = None
        self.output_gate: nn.Module | None = None
        if o.bottleneck is not None:
            self.input_linear = linear_activation(D, o.width, o.activation)
        if o.gate is not None:
            self.input_gate = linear_activation(D, o.gate * D, o.activation)
            self.output_gate = nn.Linear(o.gate * D, D)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Any]:
        """x (B, D, L) -> y (B, D, L), or with a state {"y": y, "next_state": the state after the last step}."""
        x = x.transpose(1, 2)
        out = self.block(self.input_linear(x), state)
        y = out if state is None else out["y"]
        if self.input_gate is not None and self.output_gate is not None:
            y = self.output_gate(y * self.input_gate(x))
        return y.transpose(1, 2) if state is None else {**out, "y": y.transpose(1, 2)}


class V3(Source):
    """The layer."""

    ignored = frozenset(
        {"verbose", "initializer", "dropout", "tie_dropout", "measure", "measure_args", "dt_min", "dt_max"}
        | {"deterministic", "lr", "keops", "real_tolerance"}
    )
    d_model: Size
    d_state: Size = 64
    l_max: Size | None = None
    channels: Size = 1
    bidirectional: Flag = False
    activation: Elementwise = "gelu"
    postact: Activation = "glu"
    weight_norm: Literal[False] = False
    hyper_act: Elementwise = None
    bottleneck: Size | None = None
    gate: Size | None = None
    transposed: Flag = True
    shift: Flag = False
    linear: Flag = False
    liquid_kernel: Literal[None, "polyb", "kb"] = None
    liquid_degree: Annotated[int, Ge(2)] = 2
    allcombs: Flag = True
    lcontract: Literal[None, "tanh", "lecun"] = None
    mode: Literal["nplr", "diag"] = "nplr"
    n_ssm: Size | None = None
    rank: Size = 1
    disc: Literal["bilinear", "zoh", "dss"] = "bilinear"
    real_type: Transform = "exp"
    bandlimit: float | None = None
    rate: Positive = 1.0

    @property
    def width(self) -> int:
        """Features of the kernel."""
        if self.bottleneck is not None and self.bottleneck > self.d_model:
            raise ValueError(f"bottleneck = {self.bottleneck} leaves nothing of d_model = {self.d_model}")
        return self.d_model // (self.bottleneck or 1)

    @property
    def filters(self) -> int:
        """Of a feature, in one direction."""
        return self.channels * (1 if self.hyper_act is None else 2)

    @property
    def rows(self) -> int:
        """Filters of a feature."""
        return self.filters * (2 if self.bidirectional else 1)

    @property
    def systems(self) -> int:
        """How many different ones the features share."""
        return self.n_ssm or self.width

    @property
    def gated(self) -> bool:
        """Whether there is more than the block."""
        return self.gate is not None or self.bottleneck is not None

    def _check(self) -> None:
        """Raises ValueError for options that the official code crashes on or mixes up."""
        if self.gated and not self.transposed:
            raise ValueError("gate and bottleneck need transposed = True; the official layer fails without")
        if self.shift and self.bidirectional:
            raise ValueError("shift = True with bidirectional = True is not carried over: it is a circular mixture")
        if self.mode == "nplr" and self.real_type == "relu":
            raise ValueError("real_type = 'relu' is not carried over in mode = 'nplr'")
        if self.liquid_kernel is None:
            return
        if self.shift:
            raise ValueError(f"shift = True is not carried over with liquid_kernel = {self.liquid_kernel!r}")
        if self.systems not in (1, self.width):
            raise ValueError(
                f"n_ssm = {self.n_ssm} with liquid_kernel must be 1 or {self.width}, the features of the kernel"
            )
        if self.liquid_kernel == "polyb" and self.filters != 1:
            raise ValueError(
                "liquid_kernel = 'polyb' takes channels = 1 and no hyper_act; others mix up rows of the batch"
            )

    def build(self) -> nn.Module:
        self._check()
        H, K = self.width, self.filters
        names = ("d_state", "n_ssm", "l_max", "rate", "mode", "disc", "rank", "bandlimit")
        kernel = Kernel(d_model=H, real_transform=self.real_type, **{name: getattr(self, name) for name in names})
        plain = StateSpaceConv(kernel.filter(self.rows), kernel.support, self.bidirectional)
        conv: nn.Module = LateConv(plain) if self.shift else plain
        if self.liquid_kernel is not None:
            stash = Stash(H, self.systems, self.d_state // 2, self.rows)
            term = PolyB(stash) if self.liquid_kernel == "polyb" else KB(stash)
            correlations = Correlations(self.liquid_degree, self.allcombs, CONTRACTIONS[self.lcontract])
            conv = LiquidConv(plain, correlations, term)
        d_out = self.d_model * (self.gate or 1)
        out = nn.Sequential(
            nn.Identity() if self.hyper_act is None else Multiplied(self.hyper_act),
            nn.Identity() if self.linear else ELEMENTWISE[self.activation](),
            nn.Identity() if self.linear else linear_activation(H * self.channels, d_out, self.postact),
        )
        block = ConvBlock(conv, H, K, out, transposed=self.transposed and not self.gated)
        return GatedBlock(block, self) if self.gated else block

    def names(self) -> Names:
        low_rank = self.mode == "nplr"
        kernel: Names = [
            Name(theirs, ours if ours == "l_kernel" else f"system.{ours}", LENGTH if ours == "l_kernel" else turn)
            for theirs, (ours, turn) in (LOW_RANK if low_rank else DIAGONAL).items()
        ]
        kernel += [Name("P", "P")] if low_rank else [Name("B", "system.B", Turn(lambda t: t[None], lambda t: t[0]))]
        kernel += [Name("", "system.")]
        kernel += [] if low_rank else [unused("A", self.systems, self.d_state // 2, 2)]  # a parameter all the same
        outer = "conv." if self.shift or self.liquid_kernel is not None else ""
        block = [
            Name("D", "D"),
            *inside("kernel.kernel.", f"conv.{outer}filter.", kernel),
            Name((), "conv.term.stash."),
            Name("output_linear.", "out.2."),
        ]
        return [*inside("", "block.", block), Name("", "")] if self.gated else block

    def extra(self) -> Shapes:
        """The official attributes ``kernel.B`` ..., which are no part of its state_dict."""
        if self.liquid_kernel is None:
            return {}
        H, P, S = self.width, self.d_state // 2, self.systems
        shapes = {"B": (S, P, 2), "C": (self.rows, H, P, 2), "w": (S, P, 2), "log_dt": (H,)}
        return prefixed("kernel.", shapes)

    def rest(self, state: State) -> State:
        """What the liquid term takes: as given, else what a layer that starts from these weights would have kept."""
        if self.liquid_kernel is None:
            return {}
        k = under("kernel.kernel.", state)
        low_rank = self.mode == "nplr"
        w = torch.stack([-TRANSFORMS[self.real_type](k["inv_w_real"]), k["w_imag"]], dim=-1) if low_rank else k["A"]
        C = k["C"] * k["C"].new_tensor([1.0, -1.0])  # the parameter is the conjugate of what was drawn
        kept = {}
        for key, like in {"B": k["B"].flatten(0, -3), "C": C, "w": w, "log_dt": k["log_dt"]}.items():
            tensor = state.get(f"kernel.{key}", like)
            kept[key] = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().clone()
        return prefixed("block.conv.term.stash." if self.gated else "conv.term.stash.", kept)


class LiquidS4(V3):
    """The layer by either name of its input."""

    def build(self) -> nn.Module:
        return Call(super().build(), by_either_name)

    def names(self) -> Names:
        return inside("", "model.", super().names())

    def rest(self, state: State) -> State:
        return prefixed("model.", super().rest(state))


SYSTEMS = {"s4v3": System(V3), "gss": System(V3), "liquids4": System(V3), "liquid_s4": System(LiquidS4)}
