"""The S4 layer of state-spaces v3, as github.com/raminmh/liquid-s4 (commit 06031dc) has it, with its liquid terms."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.models.pretrained import s4
from longwave.models.pretrained.blocks import ACTIVATIONS, ELEMENTWISE, ConvBlock, output_linear
from longwave.models.pretrained.system import REQUIRED, Choice, Options, Shapes, State, System
from longwave.nn.module import at_least_float32
from longwave.ops import causal_conv


def _identity(x: Tensor) -> Tensor:
    return x


def _lecun(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(0.666 * x)


CONTRACTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: _identity,
    "tanh": torch.tanh,
    "lecun": _lecun,
}


class Hyper(nn.Module):
    """y * act(h) of (..., 2 C), y the first half of the features, h the second.

    Args:
        activation: its name.
    """

    def __init__(self, activation: str):
        super().__init__()
        self.activation = ELEMENTWISE[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y, h = x.chunk(2, dim=-1)
        return self.activation(h) * y


class LateConv(nn.Module):
    """The convolution of the authors' ``shift``, which is a step late:  y[t] = sum_s k[s] u[t-1-s] + skip u[t].

    Args:
        conv: whose filter is taken.
    """

    def __init__(self, conv: s4.StateSpaceConv):
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


class Correlations(nn.Module):
    """Products of 2, 3, ... inputs as the authors take them, in reversed order of time.

    Args:
        degree: of the last product.
        all_combinations: of q inputs, the last L combinations of steps near the end, in lexicographic order, rather
            than the product of degree q - 1 and its own predecessor in time.
        contraction: what is applied to the products.
    """

    def __init__(self, degree: int, all_combinations: bool, contraction: Callable[[Tensor], Tensor]):
        super().__init__()
        self.degree, self.all_combinations, self.contraction = degree, all_combinations, contraction

    def forward(self, u: Tensor) -> list[Tensor]:
        """u (B, H, L) -> one (B, H, L) a degree."""
        products, v, L = [], u, u.shape[2]
        for q in range(2, self.degree + 1):
            v = u[..., self._steps(q, L, u.device)].prod(-1) if self.all_combinations else v * F.pad(v, (1, -1))
            products.append(self.contraction(v).flip(-1))
        return products

    def _steps(self, q: int, L: int, device: torch.device) -> Tensor:
        """(L, q) steps: combinations of the last n, the fewest of which there are L."""
        n = next((n for n in range(2, L) if math.comb(n, q) >= L), None)
        if n is None:
            raise ValueError(f"liquid_degree = {self.degree} with allcombs = True needs a longer input than L = {L}")
        skipped = math.comb(n, q) - L
        chosen = itertools.islice(itertools.combinations(range(L - n, L), q), skipped, None)
        return torch.tensor(list(chosen), device=device)


class Stash(nn.Module):
    """The tensors that the authors' liquid terms take: (C, A, B, dt) as they were drawn, and never trained.

    Args:
        features, systems, modes, rows: H, S (1 or H), P, and how many C there are of each feature.
    """

    B: Tensor
    C: Tensor
    w: Tensor
    log_dt: Tensor

    def __init__(self, features: int, systems: int, modes: int, rows: int):
        super().__init__()
        self.register_buffer("B", torch.zeros(systems, modes, 2))
        self.register_buffer("C", torch.zeros(rows, features, modes, 2))
        self.register_buffer("w", torch.zeros(systems, modes, 2))
        self.register_buffer("log_dt", torch.zeros(features))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The discrete input map (H, P), of the diagonal part of A alone, and C (rows, H, P)."""
        B, C, w, log_dt = at_least_float32(self.B, self.C, self.w, self.log_dt)
        dt = log_dt.exp()[:, None]
        b = dt / (1 - dt / 2 * torch.view_as_complex(w)) * torch.view_as_complex(B)
        return b, torch.view_as_complex(C)


class PolyB(nn.Module):
    """The authors' liquid term ``polyb``:  y[t] += v_q[t] 2 Re sum_n C_n b_qn,  b_q = b_{q-1} 2 Re sum_n b_{q-1,n}.

    Args:
        stash: gives b = b_1 and C, whose second row, where there is one, takes the products backwards.
    """

    def __init__(self, stash: Stash):
        super().__init__()
        self.stash = stash

    def forward(self, products: list[Tensor], conv: s4.StateSpaceConv) -> Tensor:
        """Products (B, H, L) -> what they add to y (B, H, L)."""
        b, C = self.stash()
        y = torch.zeros_like(products[0])
        for v in products:
            b = b * 2 * b.real.sum(1, keepdim=True)
            weights = 2 * (C * b).real.sum(2)[..., None]  # (1 or 2, H, 1)
            y = y + v * weights[0] + (v.flip(-1) * weights[1] if len(weights) == 2 else 0)
        return y


class KB(nn.Module):
    """The authors' liquid term ``kb``: products meet the kernel in two different sets of frequencies.

    The spectrum of the kernel, (2 Re sum_n b_n)^(q-1) times, is a transform of n//2 + 1 points; that of the products
    has as many bins, but of a transform of n points. What comes of it is no convolution.

    Args:
        stash: gives b.
    """

    def __init__(self, stash: Stash):
        super().__init__()
        self.stash = stash

    def forward(self, products: list[Tensor], conv: s4.StateSpaceConv) -> Tensor:
        """Products (B, H, L) -> what they add to y (B, K H, L)."""
        b, _ = self.stash()
        H, L = products[0].shape[1:]
        k = conv.filter(L if conv.support is None else min(L, conv.support))
        n = k.shape[1] + L
        if conv.bidirectional:
            behind, ahead = k.chunk(2)
            k = F.pad(behind, (0, L)) + F.pad(ahead.flip(-1), (L, 0))
        scale = 2 * b.real.sum(1)[:, None]
        kernel = torch.fft.fft(k.unflatten(0, (-1, H)) * scale, n=n // 2 + 1)  # (K, H, n//2 + 1)
        total = torch.zeros((), dtype=kernel.dtype, device=k.device)
        for i, v in enumerate(products):
            total = total + torch.fft.rfft(v.to(scale.dtype), n=n)[:, None] * kernel * scale**i
        return torch.fft.irfft(total, n=n)[..., :L].flatten(1, 2)


class LiquidConv(nn.Module):
    """A convolution and a liquid term of the authors, which looks ahead.

    Args:
        conv: of the state space.
        correlations: products of inputs.
        term: what they add.
    """

    def __init__(self, conv: s4.StateSpaceConv, correlations: Correlations, term: PolyB | KB):
        super().__init__()
        self.conv, self.correlations, self.term = conv, correlations, term

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """u (B, L, K H), K equal copies -> y (B, L, K H) and the state, of which the liquid term is no part."""
        y, state = self.conv(u, skip, state)
        H = self.term.stash.log_dt.shape[0]
        products = self.correlations(u[..., :H].transpose(1, 2))
        return (y + self.term(products, self.conv).transpose(1, 2)).to(u.dtype), state


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
        self.input_linear = _linear(d_model, width, activation) if bottleneck else nn.Identity()
        self.input_gate = None if gate is None else _linear(d_model, gate * d_model, activation)
        self.output_gate = None if gate is None else nn.Linear(gate * d_model, d_model)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Any]:
        """x (B, D, L) -> y (B, D, L), or with a state {"y": y, "next_state": the state after the last step}."""
        x = x.transpose(1, 2)
        out = self.block(self.input_linear(x), state)
        y = out if state is None else out["y"]
        if self.input_gate is not None and self.output_gate is not None:
            y = self.output_gate(y * self.input_gate(x))
        return y.transpose(1, 2) if state is None else {**out, "y": y.transpose(1, 2)}


class InputU(nn.Module):
    """A layer whose input is called u.

    Args:
        layer: whose first argument it is.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor, state: Tensor | None = None) -> Tensor | dict[str, Any]:
        """That of the layer."""
        return self.layer(u, state)


def _linear(d_in: int, d_out: int, activation: str | None) -> nn.Module:
    """The authors' LinearActivation: keys ``0.weight``, ``0.bias`` where an activation follows, else without the 0."""
    return nn.Linear(d_in, d_out) if activation is None else output_linear(d_in, d_out, activation)


def _shapes(name: str, d_in: int, d_out: int, activation: str | None) -> Shapes:
    widened, key = d_out * (2 if activation == "glu" else 1), name if activation is None else f"{name}.0"
    return {f"{key}.weight": (widened, d_in), f"{key}.bias": (widened,)}


def _width(o: Options) -> int:
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
    return s4.S4_BLOCK.read(
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


def _check(o: Options) -> None:
    """Raises ValueError for options that the official code crashes on or mixes up."""
    gated = o.gate is not None or o.bottleneck is not None
    if gated and not o.transposed:
        raise ValueError("gate and bottleneck need transposed = True; the official layer fails without")
    if o.shift and o.bidirectional:
        raise ValueError("shift = True with bidirectional = True is not carried over: it is a circular mixture")
    if o.mode == "nplr" and o.real_type == "relu":
        raise ValueError("real_type = 'relu' is not carried over in mode = 'nplr'")
    if o.liquid_degree < 2:
        raise ValueError(f"liquid_degree must be >= 2; got {o.liquid_degree}")
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
    keys: Shapes = {"D": (_channels(o), H), **{f"kernel.kernel.{key}": shape for key, shape in kernel.items()}}
    if not o.linear:
        keys |= _shapes("output_linear", H * o.channels, _d_out(o), o.postact)
    if o.bottleneck is not None:
        keys |= _shapes("input_linear", o.d_model, H, o.activation)
    if o.gate is not None:
        keys |= _shapes("input_gate", o.d_model, _d_out(o), o.activation)
        keys |= _shapes("output_gate", _d_out(o), o.d_model, None)
    return keys


def _build(o: Options) -> nn.Module:
    _check(o)
    H, K = _width(o), _channels(o)
    support = None if o.l_max is None else round(o.l_max / o.rate)
    plain = s4.StateSpaceConv(s4.build_kernel(_v4(o), _rows(o)), support, o.bidirectional)
    conv: nn.Module = LateConv(plain) if o.shift else plain
    if o.liquid_kernel is not None:
        stash = Stash(H, _systems(o), o.d_state // 2, _rows(o))
        term = PolyB(stash) if o.liquid_kernel == "polyb" else KB(stash)
        conv = LiquidConv(plain, Correlations(o.liquid_degree, o.allcombs, CONTRACTIONS[o.lcontract]), term)
    out = nn.Sequential(
        nn.Identity() if o.hyper_act is None else Hyper(o.hyper_act),
        nn.Identity() if o.linear else ELEMENTWISE[o.activation](),
        nn.Identity() if o.linear else _linear(H * o.channels, _d_out(o), o.postact),
    )
    if o.gate is None and o.bottleneck is None:
        return ConvBlock(conv, H, K, out, transposed=o.transposed)
    block = ConvBlock(conv, H, K, out, transposed=False)
    return GatedBlock(block, o.d_model, H, o.gate, o.bottleneck is not None, o.activation)


def _convert(state: State, o: Options) -> State:
    official = {key: t for key, t in state.items() if key.startswith("kernel.kernel.")}
    unused = official.pop("kernel.kernel.A", None)
    kernel = s4.under("layer.kernel.", s4.v3_to_v4(official))
    if unused is not None:  # of the diagonal kernel: a parameter that its forward never looks at, so its gradient is 0
        kernel |= {"B": kernel["B"][None], "A_imag": kernel["A_imag"] + 0 * unused[..., 1]}
    inner = "conv.conv." if o.shift or o.liquid_kernel is not None else "conv."
    ours = {f"{inner}filter.{key}": t for key, t in s4.convert_kernel(kernel).items()}
    ours |= {"D": state["D"], **{f"out.2.{key}": t for key, t in s4.under("output_linear.", state).items()}}
    if o.liquid_kernel is not None:
        ours |= {f"conv.term.stash.{key}": t for key, t in _stash(state, o).items()}
    if o.gate is None and o.bottleneck is None:
        return ours
    outer = {key: t for key, t in state.items() if key.startswith(("input_linear.", "input_gate.", "output_gate."))}
    return {**{f"block.{key}": t for key, t in ours.items()}, **outer}


def _stash(state: State, o: Options) -> State:
    """What the liquid term takes: as given, else what a layer that starts from these weights would have kept."""
    k = s4.under("kernel.kernel.", state)
    low_rank = o.mode == "nplr"
    w = torch.stack([-s4.TRANSFORMS[o.real_type](k["inv_w_real"]), k["w_imag"]], dim=-1) if low_rank else k["A"]
    C = k["C"] * k["C"].new_tensor([1.0, -1.0])  # the parameter is the conjugate of what was drawn
    kept = {}
    for key, like in {"B": k["B"].flatten(0, -3), "C": C, "w": w, "log_dt": k["log_dt"]}.items():
        tensor = state.get(f"kernel.{key}", like)
        kept[key] = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().clone()
    return kept


V3 = System(
    options={
        "d_model": REQUIRED,
        "d_state": 64,
        "l_max": None,
        "channels": 1,
        "bidirectional": False,
        "activation": Choice(*ELEMENTWISE, default="gelu"),
        "postact": Choice(*ACTIVATIONS, default="glu"),
        "weight_norm": Choice(False),
        "hyper_act": Choice(*ELEMENTWISE, default=None),
        "bottleneck": None,
        "gate": None,
        "transposed": True,
        "shift": False,
        "linear": False,
        "liquid_kernel": Choice(None, "polyb", "kb"),
        "liquid_degree": 2,
        "allcombs": True,
        "lcontract": Choice(*CONTRACTIONS),
        "mode": Choice("nplr", "diag"),
        "n_ssm": None,
        "rank": 1,
        "disc": Choice("bilinear", "zoh", "dss"),
        "real_type": Choice(*s4.TRANSFORMS),
        "bandlimit": None,
        "rate": 1.0,
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
    build=lambda o: InputU(_build(o)),
    convert=lambda state, o: {f"layer.{key}": tensor for key, tensor in _convert(state, o).items()},
)

SYSTEMS = {"s4v3": V3, "gss": V3, "liquids4": V3, "liquid_s4": LIQUID_S4}
