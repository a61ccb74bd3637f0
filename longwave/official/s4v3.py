"""The S4 layer of state-spaces v3, as github.com/raminmh/liquid-s4 (commit 06031dc) has it, with its liquid terms."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.official.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    ConvBlock,
    Multiplied,
    NamedInput,
    linear_activation,
    shapes_of,
)
from longwave.official.liquid import CONTRACTIONS, KB, Correlations, LiquidConv, PolyB, Stash
from longwave.official.s4 import S4_BLOCK
from longwave.official.s4_kernel import TRANSFORMS, StateSpaceConv, build_kernel, convert_kernel
from longwave.official.system import Choice, Number, Options, Shapes, Size, State, System, prefixed, under
from longwave.ops import causal_conv


class LateConv(nn.Module):
    """The convolution of the authors' ``shift``, which is a step late:  y[t] = sum_s k[s] u[t-1-s] + skip u[t].

    Args:
        conv: whose filter is taken.
    """

    def __init__(self, conv: StateSpaceConv):
        super().__init__()
        self.conv = conv

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, None]:
        """u (B, L, C) -> y (B, L, C)."""
        L, support = u.shape[1], self.conv.support
        if state is not None:
            raise ValueError("shift = True has no state: the official one is not late")
        if support is not None and support < L:
            raise ValueError(f"with shift = True, L = {L} must not exceed l_max = {support}")
        return causal_conv(u, F.pad(self.conv.filter(L), (1, 0)), skip=skip), None


class GatedBlock(nn.Module):
    """The gated state space of the authors:  output_gate(block(input_linear(x)) * input_gate(x)).

    Source: the options ``gate`` and ``bottleneck``, after Mehta et al. (2022), arXiv:2206.13947.

    Args:
        block: on (B, L, width).
        d_model, width: D and the width of the block.
        gate: width of the product over D; None for neither gate.
        bottleneck: whether a linear map leads to the block.
        activation: of that map and of the gate.
    """

    def __init__(
        self, block: ConvBlock, d_model: int, width: int, gate: int | None, bottleneck: bool, activation: str | None
    ):
        super().__init__()
        self.block = block
        self.input_linear = linear_activation(d_model, width, activation) if bottleneck else nn.Identity()
        self.input_gate = None if gate is None else linear_activation(d_model, gate * d_model, activation)
        self.output_gate = None if gate is None else nn.Linear(gate * d_model, d_model)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Any]:
        """x (B, D, L) -> y (B, D, L), or with a state {"y": y, "next_state": the state after the last step}."""
        x = x.transpose(1, 2)
        out = self.block(self.input_linear(x), state)
        y = out if state is None else out["y"]
        if self.input_gate is not None and self.output_gate is not None:
            y = self.output_gate(y * self.input_gate(x))
        return y.transpose(1, 2) if state is None else {**out, "y": y.transpose(1, 2)}


def _width(o: Options) -> int:
    if o.bottleneck is not None and o.bottleneck > o.d_model:
        raise ValueError(f"bottleneck = {o.bottleneck} leaves nothing of d_model = {o.d_model}")
    return o.d_model if o.bottleneck is None else o.d_model // o.bottleneck


def _channels(o: Options) -> int:
    return o.channels * (1 if o.hyper_act is None else 2)


def _systems(o: Options) -> int:
    return _width(o) if o.n_ssm is None else o.n_ssm


def _d_out(o: Options) -> int:
    return o.d_model * (o.gate or 1)


def _rows(o: Options) -> int:
    """Filters of a feature."""
    return _channels(o) * (2 if o.bidirectional else 1)


def _v4(o: Options) -> Options:
    """The options of the same kernel in v4."""
    return S4_BLOCK.read(
        {
            "d_model": _width(o),
            "d_state": o.d_state,
            "n_ssm": o.n_ssm,
            "l_max": o.l_max,
            "rate": o.rate,
            "mode": o.mode,
            "disc": o.disc,
            "rank": o.rank,
            "real_transform": o.real_type,
            "bandlimit": o.bandlimit,
        }
    )


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
        if name == "log_dt":
            name, tensor = "inv_dt", tensor[:, None]
        elif name in ("w_imag", "A_imag"):
            name, tensor = "A_imag", -tensor
        elif name in ("inv_w_real", "inv_A_real"):
            name = "A_real"
        elif prefix and name == "L":
            name = "l_kernel"
        if prefix:
            ours[f"layer.kernel.{name}"] = tensor
        else:
            ours[f"layer.{key}" if key == "D" else key] = tensor
    return ours


def _check(o: Options) -> None:
    """Raises ValueError for options that the official code crashes on or mixes up."""
    gated = o.gate is not None or o.bottleneck is not None
    if gated and not o.transposed:
        raise ValueError("gate and bottleneck need transposed = True; the official layer fails without")
    if o.shift and o.bidirectional:
        raise ValueError("shift = True with bidirectional = True is not carried over: it is a circular mixture")
    if o.mode == "nplr" and o.real_type == "relu":
        raise ValueError("real_type = 'relu' is not carried over in mode = 'nplr'")
    if o.liquid_kernel is None:
        return
    if o.shift:
        raise ValueError(f"shift = True is not carried over with liquid_kernel = {o.liquid_kernel!r}")
    if _systems(o) not in (1, _width(o)):
        raise ValueError(f"n_ssm = {o.n_ssm} with liquid_kernel must be 1 or {_width(o)}, the features of the kernel")
    if o.liquid_kernel == "polyb" and _channels(o) != 1:
        raise ValueError("liquid_kernel = 'polyb' takes channels = 1 and no hyper_act; others mix up rows of the batch")


def _stash_shapes(o: Options) -> Shapes:
    """The official attributes ``kernel.B`` ..., which are no part of its state_dict."""
    if o.liquid_kernel is None:
        return {}
    H, P, S = _width(o), o.d_state // 2, _systems(o)
    return {
        "kernel.B": (S, P, 2),
        "kernel.C": (_rows(o), H, P, 2),
        "kernel.w": (S, P, 2),
        "kernel.log_dt": (H,),
    }


def _keys(o: Options) -> Shapes:
    H, P, S = _width(o), o.d_state // 2, _systems(o)
    kernel: Shapes = {"C": (_rows(o), H, P, 2), "log_dt": (H,)}
    if o.mode == "diag":
        kernel |= {"A": (S, P, 2), "B": (S, P, 2), "inv_A_real": (S, P), "A_imag": (S, P)}
    else:
        kernel |= {"B": (1, S, P, 2), "P": (o.rank, S, P, 2), "inv_w_real": (S, P), "w_imag": (S, P), "L": ()}
    keys: Shapes = {"D": (_channels(o), H), **prefixed("kernel.kernel.", kernel)}
    if not o.linear:
        keys |= shapes_of("output_linear", linear_activation, H * o.channels, _d_out(o), o.postact)
    if o.bottleneck is not None:
        keys |= shapes_of("input_linear", linear_activation, o.d_model, H, o.activation)
    if o.gate is not None:
        keys |= shapes_of("input_gate", linear_activation, o.d_model, _d_out(o), o.activation)
        keys |= shapes_of("output_gate", nn.Linear, _d_out(o), o.d_model)
    return keys


def _build(o: Options) -> nn.Module:
    _check(o)
    H, K = _width(o), _channels(o)
    support = None if o.l_max is None else round(o.l_max / o.rate)
    plain = StateSpaceConv(build_kernel(_v4(o), _rows(o)), support, o.bidirectional)
    conv: nn.Module = LateConv(plain) if o.shift else plain
    if o.liquid_kernel is not None:
        stash = Stash(H, _systems(o), o.d_state // 2, _rows(o))
        term = PolyB(stash) if o.liquid_kernel == "polyb" else KB(stash)
        conv = LiquidConv(plain, Correlations(o.liquid_degree, o.allcombs, CONTRACTIONS[o.lcontract]), term)
    out = nn.Sequential(
        nn.Identity() if o.hyper_act is None else Multiplied(o.hyper_act),
        nn.Identity() if o.linear else ELEMENTWISE[o.activation](),
        nn.Identity() if o.linear else linear_activation(H * o.channels, _d_out(o), o.postact),
    )
    if o.gate is None and o.bottleneck is None:
        return ConvBlock(conv, H, K, out, transposed=o.transposed)
    block = ConvBlock(conv, H, K, out, transposed=False)
    return GatedBlock(block, o.d_model, H, o.gate, o.bottleneck is not None, o.activation)


def _convert(state: State, o: Options) -> State:
    official = {key: t for key, t in state.items() if key.startswith("kernel.kernel.")}
    unused = official.pop("kernel.kernel.A", None)
    kernel = under("layer.kernel.", v3_to_v4(official))
    if unused is not None:  # of the diagonal kernel: a parameter that its forward never looks at, so its gradient is 0
        kernel |= {"B": kernel["B"][None], "A_imag": kernel["A_imag"] + 0 * unused[..., 1]}
    inner = "conv.conv." if o.shift or o.liquid_kernel is not None else "conv."
    ours = prefixed(f"{inner}filter.", convert_kernel(kernel))
    ours |= {"D": state["D"], **prefixed("out.2.", under("output_linear.", state))}
    if o.liquid_kernel is not None:
        ours |= prefixed("conv.term.stash.", _stash(state, o))
    if o.gate is None and o.bottleneck is None:
        return ours
    outer = {key: t for key, t in state.items() if key.startswith(("input_linear.", "input_gate.", "output_gate."))}
    return {**prefixed("block.", ours), **outer}


def _stash(state: State, o: Options) -> State:
    """What the liquid term takes: as given, else what a layer that starts from these weights would have kept."""
    k = under("kernel.kernel.", state)
    low_rank = o.mode == "nplr"
    w = torch.stack([-TRANSFORMS[o.real_type](k["inv_w_real"]), k["w_imag"]], dim=-1) if low_rank else k["A"]
    C = k["C"] * k["C"].new_tensor([1.0, -1.0])  # the parameter is the conjugate of what was drawn
    kept = {}
    for key, like in {"B": k["B"].flatten(0, -3), "C": C, "w": w, "log_dt": k["log_dt"]}.items():
        tensor = state.get(f"kernel.{key}", like)
        kept[key] = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().clone()
    return kept


V3 = System(
    options={
        "d_model": Size(),
        "d_state": 64,
        "l_max": Size(None),
        "channels": 1,
        "bidirectional": False,
        "activation": Choice(*ELEMENTWISE, default="gelu"),
        "postact": Choice(*ACTIVATIONS, default="glu"),
        "weight_norm": Choice(False),
        "hyper_act": Choice(*ELEMENTWISE, default=None),
        "bottleneck": Size(None),
        "gate": Size(None),
        "transposed": True,
        "shift": False,
        "linear": False,
        "liquid_kernel": Choice(None, "polyb", "kb"),
        "liquid_degree": Size(2, least=2),
        "allcombs": True,
        "lcontract": Choice(*CONTRACTIONS),
        "mode": Choice("nplr", "diag"),
        "n_ssm": Size(None),
        "rank": 1,
        "disc": Choice("bilinear", "zoh", "dss"),
        "real_type": Choice(*TRANSFORMS),
        "bandlimit": Number(None),
        "rate": Number(1.0, above=0),
    },
    ignored=frozenset(
        {"verbose", "initializer", "dropout", "tie_dropout", "measure", "measure_args", "dt_min", "dt_max"}
        | {"deterministic", "lr", "keops", "real_tolerance"}
    ),
    keys=_keys,
    extra=_stash_shapes,
    build=_build,
    convert=_convert,
)

LIQUID_S4 = replace(
    V3,
    build=lambda o: NamedInput(_build(o)),
    convert=lambda state, o: prefixed("layer.", _convert(state, o)),
)

SYSTEMS = {"s4v3": V3, "gss": V3, "liquids4": V3, "liquid_s4": LIQUID_S4}
