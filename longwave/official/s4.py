"""Modules of github.com/state-spaces/s4 (commit e757cef): S4Block, its kernels by themselves, and the minimal S4D."""

from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers import S4D
from longwave.mixers.base import zero_padding
from longwave.official.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    ConvBlock,
    MixerFace,
    output_linear,
    shapes_of,
)
from longwave.official.s4_kernel import (
    TRANSFORMS,
    StateKernelFace,
    StateSpaceConv,
    build_kernel,
    convert_kernel,
    kernel_shapes,
)
from longwave.official.system import Choice, Number, Options, Shapes, Size, State, System, prefixed, under


class S4Layer(nn.Module):
    """The authors' S4Block with the call of a mixer.

    Args:
        block: takes x (B, L, D), and with a state returns y and next_state.
        d_model: D.
        causal: whether it does not look ahead.
    """

    name = "S4Block"

    def __init__(self, block: nn.Module, d_model: int, causal: bool):
        super().__init__()
        self.block: Any = block
        self.d_model, self.causal = d_model, causal

    def init_state(self, batch: int) -> Any:
        """See :class:`longwave.mixers.Mixer`, as the next."""
        return self.block.conv.init_state(batch)

    def forward(self, x: Tensor, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        x = zero_padding(x, mask)
        return (self.block(x), None) if state is None else tuple(self.block(x, state).values())


def _channels(o: Options) -> int:
    return o.channels * (2 if o.activation == "glu" else 1)


def _final_act(o: Options) -> str | None:
    if o.postact is not None and o.final_act is not None:
        raise ValueError(f"final_act = {o.final_act!r} must be None where postact = {o.postact!r} is given")
    return o.final_act if o.postact is None else o.postact


def _directions(o: Options) -> int:
    return 2 if o.bidirectional else 1


def _block_keys(o: Options) -> Shapes:
    H, K = o.d_model, _channels(o)
    kernel = kernel_shapes(o, K * _directions(o))
    return {
        "layer.D": (K, H),
        **prefixed("layer.kernel.", kernel),
        **shapes_of("output_linear", output_linear, o.channels * H, H, _final_act(o)),
    }


def _build_block(o: Options) -> ConvBlock:
    H, K = o.d_model, _channels(o)
    support = None if o.l_max is None else round(o.l_max / o.rate)
    conv = StateSpaceConv(build_kernel(o, K * _directions(o)), support, o.bidirectional)
    out = nn.Sequential(
        ACTIVATIONS[o.activation](), ELEMENTWISE[o.mult_act](), output_linear(o.channels * H, H, _final_act(o))
    )
    return ConvBlock(conv, H, K, out, transposed=o.transposed, swapped=o.swap_channels)


def _convert_block(state: State, o: Options) -> State:
    kernel = convert_kernel(under("layer.kernel.", state))
    return {
        "D": state["layer.D"],
        **prefixed("conv.filter.", kernel),
        **prefixed("out.2.", under("output_linear.", state)),
    }


_TRAINING = {"dropout", "tie_dropout", "lr", "wd", "verbose", "dt_min", "dt_max"}
_INIT = {"init", "measure", "real_random", "real_scale", "imag_random", "imag_scale", "B_random", "B_init", "B_scale"}
_INIT |= {"P_scale", "normalize", "B_clip", "diagonalize_precision", "deterministic", "backend"}

_DIAGONAL = {
    "d_model": Size(),
    "d_state": 64,
    "channels": 1,
    "n_ssm": Size(None),
    "l_max": Size(None),
    "rate": Number(1.0, above=0),
    "disc": Choice("zoh", "bilinear", "dss"),
    "is_real": False,
    "dt_tie": True,
    "dt_fast": False,
    "dt_transform": Choice(*TRANSFORMS),
    "real_transform": Choice(*TRANSFORMS),
    "imag_transform": Choice(*TRANSFORMS, default="none"),
    "bandlimit": Number(None),
}
_BLOCK = {
    **_DIAGONAL,
    "bidirectional": False,
    "swap_channels": False,
    "transposed": True,
    "activation": Choice(*ACTIVATIONS, default="gelu"),
    "mult_act": Choice(*ELEMENTWISE, default=None),
    "final_act": Choice(*ACTIVATIONS),
    "postact": Choice(*ACTIVATIONS, default=None),
    "gate": Choice(None),
    "bottleneck": Choice(None),
}
_IGNORED = _TRAINING | _INIT | {"drop_kernel", "gate_act", "initializer", "weight_norm"}

S4D_BLOCK = System(
    options={
        **_BLOCK,
        "mode": Choice("diag", "s4d", None, default="dplr"),
        "kernel": Choice(None, "diag", "s4d"),
    },
    ignored=frozenset(_IGNORED | {"rank"}),
    keys=_block_keys,
    build=_build_block,
    convert=_convert_block,
)

S4_BLOCK = System(
    options={
        **_BLOCK,
        "mode": Choice("dplr", "nplr", "s4", "diag", "s4d", None),
        "kernel": Choice(None, "dplr", "nplr", "s4", "diag", "s4d"),
        "rank": 1,
    },
    ignored=frozenset(_IGNORED),
    keys=_block_keys,
    build=_build_block,
    convert=_convert_block,
)


def _kernel_system(mode: str, **more: Any) -> System:
    """A kernel class of the repository by itself; L and rate, of its call, are among the options."""
    return System(
        options={**_DIAGONAL, **more, "mode": Choice(mode), "kernel": Choice(None)},
        ignored=frozenset(_TRAINING | _INIT | ({"rank"} - set(more))),
        keys=lambda o: kernel_shapes(o, o.channels),
        build=lambda o: StateKernelFace(build_kernel(o, o.channels), o.L),
        convert=lambda state, o: prefixed("filter.", convert_kernel(state)),
    )


S4_KERNEL = _kernel_system("dplr", rank=1, L=None)
S4D_KERNEL = _kernel_system("diag", L=Size())


def _minimal_keys(o: Options) -> Shapes:
    H, P = o.d_model, o.d_state // 2
    return {
        "D": (H,),
        "kernel.C": (H, P, 2),
        "kernel.log_dt": (H,),
        "kernel.log_A_real": (H, P),
        "kernel.A_imag": (H, P),
        "output_linear.0.weight": (2 * H, H, 1),
        "output_linear.0.bias": (2 * H,),
    }


def _convert_minimal(state: State, o: Options) -> State:
    A = state["kernel.A_imag"]
    ours = {key: state[key] for key in ("D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")}
    ours["kernel.B"] = torch.stack([torch.ones_like(A), torch.zeros_like(A)], dim=-1)
    ours["output_linear.weight"] = state["output_linear.0.weight"][..., 0]
    ours["output_linear.bias"] = state["output_linear.0.bias"]
    return prefixed("model.", ours)


S4D_MINIMAL = System(
    options={"d_model": Size(), "d_state": 64, "transposed": True, "rate": Choice(1.0)},
    ignored=frozenset(_TRAINING),
    keys=_minimal_keys,
    build=lambda o: MixerFace(S4D(o.d_model, o.d_state // 2 * 2), o.transposed),
    convert=_convert_minimal,
)

SYSTEMS = {
    "s4": S4_BLOCK,
    "s4kernel": S4_KERNEL,
    "s4d": S4D_BLOCK,
    "s4dkernel": S4D_KERNEL,
    "s4dmin": S4D_MINIMAL,
}
