"""Modules of github.com/HazyResearch/safari (commit 02220c6): H3, Hyena in both versions, LongConv, BlockFFT."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from longwave.nn.block_fft import BlockFFT, block_fft, dft_matrices
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


Transform = Callable[[Tensor, int], Tensor]
_RADIX = 16  # of the official transform, whatever its max_m


def _matrix_sizes(o: Options) -> list[int]:
    """Of the official parameters: max_m says how many there are, and no more than that."""
    if o.max_m < 1 or o.max_m & (o.max_m - 1):
        raise ValueError(f"the option max_m = {o.max_m} is no power of two")
    if not o.learn_dft_matrices:
        return []
    if o.max_m < _RADIX:
        raise ValueError(f"the option max_m = {o.max_m} leaves out the matrix of {_RADIX}, which is always needed")
    return [2**i for i in range(1, o.max_m.bit_length())]


def _block_keys(o: Options) -> Shapes:
    shapes = [(o.H, n, n, 2) for n in _matrix_sizes(o)]
    return {
        **{f"mat_{shape[1]}": shape for shape in shapes},
        **{f"dft_matrices.{i}": shape for i, shape in enumerate(shapes)},
    }


def _block_aliases(o: Options) -> dict[str, str]:
    return {f"dft_matrices.{i}": f"mat_{n}" for i, n in enumerate(_matrix_sizes(o))}


def _build_block(o: Options) -> Transform:
    activation = None if o.activation is None else ELEMENTWISE[o.activation]()
    if not _matrix_sizes(o):
        return partial(block_fft, activation=activation)
    return BlockFFT(o.H, _RADIX, activation)


def _build_block_face(o: Options) -> nn.Module:
    if o.N < 1:
        raise ValueError(f"the option N = {o.N} is below 1")
    return BlockFFTFace(_build_block(o), o.N)


def _convert_block(state: State, o: Options) -> State:
    ours = {}
    if o.learn_dft_matrices:
        for n, fourier in dft_matrices(_RADIX, torch.complex128).items():
            ours[f"mat_{n}"] = state[f"mat_{n}"]
            if o.learn_additive:
                ours[f"mat_{n}"] = ours[f"mat_{n}"] + torch.view_as_real(fourier).to(ours[f"mat_{n}"])
    return ours


class BlockFFTFace(nn.Module):
    """A transform behind the call of the authors' BlockFFT, complex numbers as pairs.

    Args:
        model: the transform.
        length: N.
    """

    def __init__(self, model: Transform, length: int):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x (..., H, L) complex, or (..., H, L, 2) real -> {"re", "im"}, (..., H, N rounded up to a power of two)."""
        y = self.model(x if x.is_complex() else torch.view_as_complex(x.contiguous()), self.length)
        return {"re": y.real, "im": y.imag}


_BLOCK_OPTIONS = {
    "learn_dft_matrices": True,
    "H": 1,
    "max_m": 16,
    "learn_additive": False,
    "activation": Choice(*ELEMENTWISE, default=None),
}

BLOCK_FFT = System(
    options={**_BLOCK_OPTIONS, "N": REQUIRED, "forward": Choice(True)},
    ignored=frozenset({"dft_lr", "dropout"}),
    keys=_block_keys,
    build=_build_block_face,
    convert=lambda state, o: {f"model.{key}": tensor for key, tensor in _convert_block(state, o).items()},
    aliases=_block_aliases,
)
BLOCK_FFT_ARGS = replace(BLOCK_FFT, options=_BLOCK_OPTIONS)  # to read them; the LongConv around says the length


def _all_taps(filter: FreeFilter, length: int, bidirectional: bool) -> Tensor:
    """(C, taps); where bidirectional the second half of the rows looks ahead, from the last tap backwards."""
    k = filter(filter.max_len)
    if bidirectional:
        behind, ahead = k.chunk(2)
        k = F.pad(behind, (0, length)) + F.pad(ahead.flip(1), (length, 0))
    return k


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
        k = _all_taps(self.filter, L, self.bidirectional)
        circle = F.pad(k, (0, max(0, n - k.shape[1])))[:, :n]  # tap p weighs x[t - p] and x[t - p + n]
        return causal_conv(u, circle[:, :L], skip=skip, k_future=circle[:, n - L + 1 :].flip(1)), None


class BlockConv(nn.Module):
    """The convolution of the authors' LongConv with ``block_fft_conv``:  y = Re ifft(U(x) K(k)), U and K in blocks.

    As the official one does, it cuts the product of the two transforms, whose length is a power of two, to
    n = min(L, reach) + L before the inverse: where n is no power of two, y is no convolution even if U and K are
    Fourier transforms, and it looks ahead.

    Args:
        filter, reach, bidirectional: as in :class:`CircularConv`.
        channels: rows of the filter a feature of the input, behind the halving.
        block_fft_u, block_fft_k: (x (..., H, T), length) -> (..., H, length rounded up to a power of two).
    """

    def __init__(
        self,
        filter: FreeFilter,
        reach: int,
        bidirectional: bool,
        channels: int,
        block_fft_u: Transform,
        block_fft_k: Transform,
    ):
        super().__init__()
        self.filter, self.reach, self.bidirectional, self.channels = filter, reach, bidirectional, channels
        self.block_fft_u, self.block_fft_k = block_fft_u, block_fft_k

    def forward(self, u: Tensor, skip: Tensor, state: None = None) -> tuple[Tensor, None]:
        """u (B, L, C), the same H features for every channel -> y (B, L, C); there is no state."""
        if state is not None:
            raise ValueError("a LongConv has no official state")
        L = u.shape[1]
        n = min(L, self.reach) + L
        k = _all_taps(self.filter, L, self.bidirectional).unflatten(0, (self.channels, -1))  # (channels, H, taps)
        x = u[:, :, : k.shape[1]].transpose(1, 2)
        spectrum = self.block_fft_u(x, n)[:, None] * self.block_fft_k(k, n)  # (B, channels, H, n or more)
        y = torch.fft.ifft(spectrum, n=n).real[..., :L].flatten(1, 2).transpose(1, 2)
        return y.to(u.dtype) + skip * u, None


def _block_options(o: Options) -> Options:
    """The official arguments of a LongConv's two transforms."""
    if not isinstance(o.block_fft_conv_args, Mapping):
        raise ValueError(f"the option block_fft_conv_args = {o.block_fft_conv_args!r} is no mapping")
    try:
        options = BLOCK_FFT_ARGS.read(o.block_fft_conv_args)
        if options.learn_dft_matrices and options.H not in (1, o.d_model):
            raise ValueError(f"H = {options.H} fits no input; it is 1 or d_model = {o.d_model}")
        return options
    except ValueError as error:
        raise ValueError(f"block_fft_conv_args: {error}") from error


def _taps(o: Options) -> int:
    return o.l_max if o.causal else 2 * o.l_max


_TRANSFORMS = ("block_fft_u", "block_fft_k")


def _long_conv_keys(o: Options) -> Shapes:
    H = o.d_model
    keys: Shapes = {
        "D": (o.channels, H),
        "kernel.kernel": (o.channels * (2 if o.bidirectional else 1), H, _taps(o)),
        **output_shapes(o.channels * H, H, o.postact),
    }
    if o.block_fft_conv:
        block = _block_keys(_block_options(o))
        keys |= {f"{name}.{key}": shape for name in _TRANSFORMS for key, shape in block.items()}
    return keys


def _long_conv_aliases(o: Options) -> dict[str, str]:
    if not o.block_fft_conv:
        return {}
    block = _block_aliases(_block_options(o))
    return {f"{name}.{key}": f"{name}.{first}" for name in _TRANSFORMS for key, first in block.items()}


def _build_long_conv(o: Options) -> ConvBlock:
    smooth: nn.Module | None = None
    if o.use_ma_smoothing:
        smooth = SpectrumSmoothing(o.ma_window_len) if o.smooth_freq else Smooth(o.ma_window_len)
    rows = o.channels * (2 if o.bidirectional else 1) * o.d_model
    filter = FreeFilter(rows, _taps(o), squash=o.lam, smooth=smooth)
    out = nn.Sequential(ELEMENTWISE[o.activation](), output_linear(o.channels * o.d_model, o.d_model, o.postact))
    reach = round(o.l_max / o.rate)
    conv: nn.Module = CircularConv(filter, reach, o.bidirectional)
    if o.block_fft_conv:
        transforms = [_build_block(_block_options(o)) for _ in _TRANSFORMS]
        conv = BlockConv(filter, reach, o.bidirectional, o.channels, *transforms)
    return ConvBlock(conv, o.d_model, o.channels, out, transposed=o.transposed)


def _convert_long_conv(state: State, o: Options) -> State:
    ours = {key.replace("output_linear.", "out.1."): t for key, t in state.items() if not key.startswith("block_fft")}
    ours["conv.filter.kernel"] = ours.pop("kernel.kernel").flatten(0, 1)
    if o.block_fft_conv:
        for name in _TRANSFORMS:
            block = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
            ours |= {f"conv.{name}.{key}": t for key, t in _convert_block(block, _block_options(o)).items()}
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
        "block_fft_conv": False,
        "block_fft_conv_args": {},
    },
    ignored=frozenset(
        {"initializer", "dropout", "tie_dropout", "verbose", "kernel_dropout", "weight_init"}
        | {"learning_rate", "lr", "wd"}
    ),
    keys=_long_conv_keys,
    build=_build_long_conv,
    convert=_convert_long_conv,
    aliases=_long_conv_aliases,
)

SYSTEMS = {
    "h3": H3_LAYER,
    "hyena": HYENA,
    "hyenastandalone": HYENA_STANDALONE,
    "longconv": LONG_CONV,
    "blockfft": BLOCK_FFT,
}
