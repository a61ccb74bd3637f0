"""Modules of github.com/HazyResearch/safari (commit 02220c6): H3, Hyena in both versions, LongConv."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import H3, Hyena
from longwave.models.pretrained.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    ConvBlock,
    MixerFace,
    output_linear,
    output_shapes,
)
from longwave.models.pretrained.system import REQUIRED, Choice, Options, Shapes, State, System
from longwave.nn import Filter, FreeFilter, HyenaFilter, ShiftFilter, Truncated, conv_with_past
from longwave.nn.filters import Smooth
from longwave.ops import causal_conv, short_conv

LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {  # of the authors' transforms of -Re A
    "exp": lambda x: x,
    "none": torch.log,
    "relu": lambda x: torch.log(F.relu(x) + 1e-4),
    "sigmoid": F.logsigmoid,
    "softplus": lambda x: torch.log(F.softplus(x)),
}


def _h3_keys(o: Options) -> Shapes:
    D, H, N, P = o.d_model, o.d_model // o.head_dim, o.d_state, o.d_state // 2
    S = H if o.n_ssm is None else o.n_ssm
    linears = ("q_proj", "k_proj", "v_proj", "output_linear")
    return {
        "ssm_k_D": (D,),
        "D": (H,),
        **{f"{name}.weight": (D, D) for name in linears},
        **{f"{name}.bias": (D,) for name in linears},
        "ssm_k_kernel.kernel.B": (D, N),
        "ssm_k_kernel.kernel.C": (1, D, N),
        "kernel.kernel.log_dt": (H,),
        "kernel.kernel.inv_A_real": (S, P),
        "kernel.kernel.A_imag": (S, P),
        "kernel.kernel.B": (S, P, 2),
        "kernel.kernel.C": (1, H, P, 2),
    }


def _build_h3(o: Options) -> MixerFace:
    model = H3(o.d_model, o.d_state // 2 * 2, o.head_dim, discretization=o.disc, systems=o.n_ssm)
    model.ssm_k_kernel = ShiftFilter(o.d_model, o.d_state)
    if o.l_max is not None:  # the authors truncate when they convolve, though not when they step
        model.kernel = Truncated(model.kernel, o.l_max)  # type: ignore[assignment]
        if o.l_max < o.d_state:
            model.ssm_k_kernel = Truncated(model.ssm_k_kernel, o.l_max)  # type: ignore[assignment]
    return MixerFace(model)


def _convert_h3(state: State, o: Options) -> State:
    ours = {key: tensor for key, tensor in state.items() if "kernel.kernel." not in key}
    system = {key: state[f"kernel.kernel.{key}"] for key in ("log_dt", "A_imag", "B", "C")}
    system["C"] = system["C"][0]
    real = state["kernel.kernel.inv_A_real"]
    if o.real_type == "none" and (real <= 0).any():
        raise ValueError("real_type = 'none' is carried over where 'kernel.kernel.inv_A_real' is positive; it is not")
    system["log_A_real"] = LOGARITHMS[o.real_type](real)
    if o.force_real:
        system["A_imag"] = 0 * system["A_imag"]
    if o.bandlimit is not None:  # modes that oscillate too fast are silenced for good
        oscillation = system["A_imag"].abs().repeat(len(system["C"]) // len(real), 1)
        slow = system["log_dt"].exp()[:, None] * oscillation / (2 * math.pi) < o.bandlimit / 2
        system["C"] = system["C"] * slow[..., None]
    shift = {"B": state["ssm_k_kernel.kernel.B"], "C": state["ssm_k_kernel.kernel.C"][0]}
    cut = o.l_max is not None
    ours |= {f"kernel.inner.{key}" if cut else f"kernel.{key}": tensor for key, tensor in system.items()}
    cut = cut and o.l_max < o.d_state
    ours |= {f"ssm_k_kernel.inner.{key}" if cut else f"ssm_k_kernel.{key}": tensor for key, tensor in shift.items()}
    return {f"model.{key}": tensor for key, tensor in ours.items()}


H3_LAYER = System(
    options={
        "d_model": REQUIRED,
        "d_state": 64,
        "l_max": None,
        "head_dim": 1,
        "n_ssm": None,
        "mode": Choice("diag"),
        "disc": Choice("bilinear", "zoh"),
        "real_type": Choice(*LOGARITHMS),
        "bandlimit": None,
        "force_real": False,
        "rate": Choice(1.0),
    },
    ignored=frozenset(
        {"use_fast_fftconv", "dropout", "layer_idx", "device", "dtype", "lr", "verbose", "deterministic"}
        | {"dt_min", "dt_max", "measure", "measure_args", "rank"}
    ),
    keys=_h3_keys,
    build=_build_h3,
    convert=_convert_h3,
)


class NormalizedFilter(Filter):
    """A Hyena filter whose taps at every time are divided by their L1 norm over the channels.

    Args:
        inner: the filter.
    """

    def __init__(self, inner: HyenaFilter):
        super().__init__()
        self.inner, self.channels = inner, inner.channels

    @property
    def bias(self) -> Tensor:
        """That of the inner filter."""
        return self.inner.bias

    def forward(self, length: int) -> Tensor:
        k = self.inner(length)
        return k / k.abs().sum(0, keepdim=True)


class OuterHyena(nn.Module):
    """Hyena with the authors' ``outer_mixing`` in one head: v <- v sum_c x_i[c], one gate for all channels.

    Args:
        model: the operator whose parts are used.
    """

    def __init__(self, model: Hyena):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        D, conv, filter = self.model.d_model, self.model.short_filter, self.model.filter_fn
        u, _ = short_conv(self.model.in_proj(x), conv.weight[:, 0], conv.bias)
        first, *gates, v = u.chunk(self.model.order + 1, dim=-1)
        taps = filter(x.shape[1]).unflatten(0, (D, -1)).unbind(1)
        for gate, k, bias in zip(reversed(gates), taps, filter.bias.unflatten(0, (D, -1)).unbind(1)):
            v, _ = conv_with_past(v, k, skip=bias, gate_in=gate.sum(-1, keepdim=True).expand_as(v))
        return self.model.out_proj(v * first)


def _hyena_keys(o: Options) -> Shapes:
    D, width = o.d_model, o.filter_order
    inner, channels = (o.order + 1) * D, (o.order - 1) * D
    keys: Shapes = {
        "in_proj.weight": (inner, D),
        "in_proj.bias": (inner,),
        "out_proj.weight": (D, D),
        "out_proj.bias": (D,),
        "short_filter.weight": (inner, 1, o.short_filter_order),
        "short_filter.bias": (inner,),
        "filter_fn.bias": (channels,),
        "filter_fn.pos_emb.z": (1, o.l_max, o.emb_dim),
        "filter_fn.pos_emb.t": (1, o.l_max, 1),
        "filter_fn.modulation.deltas": (1, 1, channels),
    }
    mlp = "filter_fn.implicit_filter"
    for i in range(o.num_inner_mlps + 1):
        keys[f"{mlp}.{2 * i}.weight"] = (width, width if i else o.emb_dim)
        keys[f"{mlp}.{2 * i}.bias"] = (width,)
        keys[f"{mlp}.{2 * i + 1}.freq"] = (1, width)
    keys[f"{mlp}.{2 * o.num_inner_mlps + 2}.weight"] = (channels, width)
    if o.post_order_ffn:
        keys["ord_proj_w"] = (o.order, 1, 1)
    return keys


def _one_sine(o: Options) -> dict[str, str]:
    """All layers of the filter share one sine."""
    freq = "filter_fn.implicit_filter.{}.freq".format
    return {freq(2 * i + 1): freq(1) for i in range(1, o.num_inner_mlps + 1)}


def _build_hyena(o: Options) -> nn.Module:
    model = Hyena(
        o.d_model,
        o.l_max,
        order=o.order,
        d_conv=o.short_filter_order,
        emb_dim=o.emb_dim,
        width=o.filter_order,
        inner_layers=o.num_inner_mlps,
        frequency=o.w,
        target=o.target,
        slowest=o.slow_decay_pct,
        fastest=o.fast_decay_pct,
        shift=o.shift if o.modulate else 0.0,
    )
    if o.normalized:
        model.filter_fn = NormalizedFilter(model.filter_fn)  # type: ignore[assignment]
    if o.activation not in (None, "id", "identity", "linear"):
        model.out_proj = nn.Sequential(ELEMENTWISE[o.activation](), model.out_proj)  # type: ignore[assignment]
    return OuterHyena(model) if o.outer_mixing else MixerFace(model)


def _convert_hyena(state: State, o: Options, *, features_first: bool) -> State:
    """``features_first``: filter channel (d, i) sits at d (order - 1) + i, as ours; else at i D + d."""
    ours = dict(state)
    if not o.modulate:
        ours["filter_fn.modulation.deltas"] = 0 * state["filter_fn.modulation.deltas"]  # a window of ones
    if not o.bias:
        ours["filter_fn.bias"] = 0 * state["filter_fn.bias"]
    for key, first in _one_sine(o).items():
        ours[key] = state[first]
    if not features_first:
        last = f"filter_fn.implicit_filter.{2 * o.num_inner_mlps + 2}.weight"
        for key, axis in ((last, 0), ("filter_fn.bias", 0), ("filter_fn.modulation.deltas", 2)):
            ours[key] = ours[key].unflatten(axis, (o.order - 1, o.d_model)).transpose(axis, axis + 1)
            ours[key] = ours[key].flatten(axis, axis + 1)
    if o.post_order_ffn:  # a factor after every convolution; the rest is linear in v, so x_0 takes them all
        factor = ours.pop("ord_proj_w")[: o.order - 1].prod()
        for key in ("short_filter.weight", "short_filter.bias"):
            x_0, others = ours[key].tensor_split([o.d_model])
            ours[key] = torch.cat([factor * x_0, others])
    if o.normalized:
        ours = {key.replace("filter_fn.", "filter_fn.inner."): tensor for key, tensor in ours.items()}
    if o.activation not in (None, "id", "identity", "linear"):
        ours = {key.replace("out_proj.", "out_proj.1."): tensor for key, tensor in ours.items()}
    return {f"model.{key}": tensor for key, tensor in ours.items()}


_FILTER_OPTIONS = {
    "d_model": REQUIRED,
    "l_max": REQUIRED,
    "order": 2,
    "filter_order": 64,
    "emb_dim": 3,
    "num_inner_mlps": 2,
    "w": 1,
    "modulate": True,
    "shift": 0.0,
    "target": 1e-2,
    "fast_decay_pct": 0.3,
    "slow_decay_pct": 1.5,
    "rate": Choice(1.0),
}
_FILTER_IGNORED = frozenset(
    {"dropout", "filter_dropout", "lr", "lr_pos_emb", "modulation_lr", "wd", "fused_fft_conv", "use_flashfftconv"}
)

HYENA = System(
    options={
        **_FILTER_OPTIONS,
        "bias": True,
        "normalized": False,
        "short_filter_order": 3,
        "activation": Choice(*ELEMENTWISE, default="id"),
        "outer_mixing": False,
        "post_order_ffn": False,
        "num_heads": Choice(1),
        "num_blocks": Choice(1),
        "inner_factor": Choice(1),
        "filter_cls": Choice("hyena-filter"),
    },
    ignored=_FILTER_IGNORED | {"fused_bias_fc", "jit_filter", "return_state", "layer_idx", "device", "dtype"},
    keys=_hyena_keys,
    build=_build_hyena,
    convert=partial(_convert_hyena, features_first=True),
    aliases=_one_sine,
)


def _as_full(o: Options) -> Options:
    """The options of the full operator that the standalone one leaves at their defaults."""
    defaults = {"short_filter_order": 3, "activation": "id", "outer_mixing": False, "post_order_ffn": False}
    return Options(**vars(o), **defaults, bias=True, normalized=False)


HYENA_STANDALONE = System(
    options=_FILTER_OPTIONS,
    ignored=_FILTER_IGNORED | {"bias", "normalized"},  # it takes these two and does not look at them
    keys=lambda o: _hyena_keys(_as_full(o)),
    build=lambda o: _build_hyena(_as_full(o)),
    convert=lambda state, o: _convert_hyena(state, _as_full(o), features_first=False),
    aliases=_one_sine,
)


class SpectrumSmoothing(nn.Module):
    """The authors' ``smooth_freq``: bins j of the taps' spectrum weighted by exp(-(j - w // 2)^2 / 2) over w of them.

    Unlike :class:`longwave.nn.filters.SmoothFrequencies` it loses the last of an odd number of taps, takes an even
    width, and rounds its weights to float32, as the official one does.

    Args:
        width: w, >= 1.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, k: Tensor) -> Tensor:
        offset = torch.arange(self.width, dtype=torch.float32, device=k.device) - self.width // 2
        weight = torch.exp(-0.5 * offset**2).to(k.dtype).expand(len(k), 1, -1)
        spectrum = torch.fft.rfft(k)
        left = (self.width - 1) // 2
        parts = [F.pad(part, (left, self.width - 1 - left)) for part in (spectrum.real, spectrum.imag)]
        return torch.fft.irfft(torch.complex(*(F.conv1d(part, weight, groups=len(k)) for part in parts)))


class CircularConv(nn.Module):
    """The convolution of the authors' LongConv: on a circle of min(L, reach) + L steps, which all taps share.

    Taps behind the length are not dropped: they wrap around and look ahead, as far as the circle holds them.

    Args:
        filter: all taps, one row a channel; where bidirectional as many again, which look ahead.
        reach: the longest kernel that the circle makes room for.
        bidirectional: whether half of the rows look ahead.
    """

    def __init__(self, filter: FreeFilter, reach: int, bidirectional: bool):
        super().__init__()
        self.filter, self.reach, self.bidirectional = filter, reach, bidirectional

    def forward(self, u: Tensor, skip: Tensor, state: None = None) -> tuple[Tensor, None]:
        """u (B, L, C) -> y (B, L, C); there is no state."""
        if state is not None:
            raise ValueError("a LongConv has no official state")
        L = u.shape[1]
        n = min(L, self.reach) + L
        k = self.filter(self.filter.max_len)
        if self.bidirectional:
            ahead, behind = k.chunk(2)[::-1]
            k = F.pad(behind, (0, L)) + F.pad(ahead.flip(1), (L, 0))
        circle = F.pad(k, (0, max(0, n - k.shape[1])))[:, :n]  # tap p weighs x[t - p] and x[t - p + n]
        return causal_conv(u, circle[:, :L], skip=skip, k_future=circle[:, n - L + 1 :].flip(1)), None


def _taps(o: Options) -> int:
    return o.l_max if o.causal else 2 * o.l_max


def _long_conv_keys(o: Options) -> Shapes:
    H = o.d_model
    return {
        "D": (o.channels, H),
        "kernel.kernel": (o.channels * (2 if o.bidirectional else 1), H, _taps(o)),
        **output_shapes(o.channels * H, H, o.postact),
    }


def _build_long_conv(o: Options) -> ConvBlock:
    smooth: nn.Module | None = None
    if o.use_ma_smoothing:
        smooth = SpectrumSmoothing(o.ma_window_len) if o.smooth_freq else Smooth(o.ma_window_len)
    rows = o.channels * (2 if o.bidirectional else 1) * o.d_model
    filter = FreeFilter(rows, _taps(o), squash=o.lam, smooth=smooth)
    out = nn.Sequential(ELEMENTWISE[o.activation](), output_linear(o.channels * o.d_model, o.d_model, o.postact))
    conv = CircularConv(filter, round(o.l_max / o.rate), o.bidirectional)
    return ConvBlock(conv, o.d_model, o.channels, out, transposed=o.transposed)


def _convert_long_conv(state: State, o: Options) -> State:
    ours = {key.replace("output_linear.", "out.1."): tensor for key, tensor in state.items()}
    ours["conv.filter.kernel"] = ours.pop("kernel.kernel").flatten(0, 1)
    return ours


LONG_CONV = System(
    options={
        "d_model": REQUIRED,
        "l_max": 1024,
        "channels": 1,
        "causal": True,
        "bidirectional": False,
        "lam": 0.1,
        "use_ma_smoothing": False,
        "ma_window_len": 7,
        "smooth_freq": False,
        "activation": Choice(*ELEMENTWISE),
        "postact": Choice(*ACTIVATIONS),
        "transposed": True,
        "rate": 1.0,
        "weight_norm": Choice(False),
        "block_fft_conv": Choice(False),
    },
    ignored=frozenset(
        {"block_fft_conv_args", "initializer", "dropout", "tie_dropout", "verbose", "kernel_dropout", "weight_init"}
        | {"learning_rate", "lr", "wd"}
    ),
    keys=_long_conv_keys,
    build=_build_long_conv,
    convert=_convert_long_conv,
)

SYSTEMS = {"h3": H3_LAYER, "hyena": HYENA, "hyenastandalone": HYENA_STANDALONE, "longconv": LONG_CONV}
