"""Long convolutions of github.com/HazyResearch/safari (commit 02220c6): kernel, layer, standalone model, BlockFFT."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import FreeFilter
from longwave.nn.filters import Smooth
from longwave.official.blocks import (
    ACTIVATIONS,
    ELEMENTWISE,
    ConvBlock,
    KernelFace,
    output_linear,
    shapes_of,
)
from longwave.official.safari_block_fft import (
    BLOCK_FFT_ARGS,
    Transform,
    block_aliases,
    block_keys,
    build_block,
    convert_block,
)
from longwave.official.system import (
    Choice,
    Family,
    Number,
    Options,
    Shapes,
    Size,
    State,
    System,
    prefixed,
    read_part,
    under,
)
from longwave.ops import causal_conv


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


KERNEL_OPTIONS = {
    "causal": True,
    "lam": Number(0.1, least=0),
    "use_ma_smoothing": False,
    "ma_window_len": 7,
    "smooth_freq": False,
}
KERNEL_IGNORED = frozenset({"kernel_dropout", "weight_init", "learning_rate", "lr", "wd", "verbose"})


def taps(o: Options) -> int:
    """How many taps a kernel has."""
    return o.l_max if o.causal else 2 * o.l_max


def build_kernel(o: Options, rows: int) -> FreeFilter:
    """The authors' LongConvKernel, smoothed and squashed."""
    smooth: nn.Module | None = None
    if o.use_ma_smoothing:
        smooth = SpectrumSmoothing(o.ma_window_len) if o.smooth_freq else Smooth(o.ma_window_len)
    return FreeFilter(rows, taps(o), squash=o.lam, smooth=smooth)


def _sized(o: Options) -> Options:
    """The options of the kernel alone under the names of the layers around it."""
    return Options(**vars(o), l_max=o.L)


LONG_CONV_KERNEL = System(
    options={"H": Size(), "L": Size(), "channels": 1, **KERNEL_OPTIONS},
    ignored=KERNEL_IGNORED | {"rate", "state"},
    keys=lambda o: {"kernel": (o.channels, o.H, taps(_sized(o)))},
    build=lambda o: KernelFace(build_kernel(_sized(o), o.channels * o.H), o.H, taps(_sized(o))),
    convert=lambda state, o: {"filter.kernel": state["kernel"].flatten(0, 1)},
)


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
        reach: the longest kernel that the circle makes room for; None is any.
        bidirectional: whether half of the rows look ahead.
    """

    def __init__(self, filter: FreeFilter, reach: int | None, bidirectional: bool):
        super().__init__()
        self.filter, self.reach, self.bidirectional = filter, reach, bidirectional

    def forward(self, u: Tensor, skip: Tensor, state: None = None) -> tuple[Tensor, None]:
        """u (B, L, C) -> y (B, L, C); there is no state."""
        if state is not None:
            raise ValueError("a LongConv has no official state")
        L = u.shape[1]
        n = (L if self.reach is None else min(L, self.reach)) + L
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
    options = read_part("block_fft_conv_args", BLOCK_FFT_ARGS.read, o.block_fft_conv_args)
    if options.learn_dft_matrices and options.H not in (1, o.d_model):
        raise ValueError(f"block_fft_conv_args: H = {options.H} fits no input; it is 1 or d_model = {o.d_model}")
    return options


_TRANSFORMS = ("block_fft_u", "block_fft_k")


def _long_conv_keys(o: Options) -> Shapes:
    H = o.d_model
    keys: Shapes = {
        "D": (o.channels, H),
        "kernel.kernel": (o.channels * (2 if o.bidirectional else 1), H, taps(o)),
        **shapes_of("output_linear", output_linear, o.channels * H, H, o.postact),
    }
    if o.block_fft_conv:
        block = block_keys(_block_options(o))
        keys |= {f"{name}.{key}": shape for name in _TRANSFORMS for key, shape in block.items()}
    return keys


def _long_conv_aliases(o: Options) -> dict[str, str]:
    if not o.block_fft_conv:
        return {}
    block = block_aliases(_block_options(o))
    return {f"{name}.{key}": f"{name}.{first}" for name in _TRANSFORMS for key, first in block.items()}


def _build_long_conv(o: Options) -> ConvBlock:
    filter = build_kernel(o, o.channels * (2 if o.bidirectional else 1) * o.d_model)
    out = nn.Sequential(ELEMENTWISE[o.activation](), output_linear(o.channels * o.d_model, o.d_model, o.postact))
    reach = round(o.l_max / o.rate)
    conv: nn.Module = CircularConv(filter, reach, o.bidirectional)
    if o.block_fft_conv:
        transforms = [build_block(_block_options(o)) for _ in _TRANSFORMS]
        conv = BlockConv(filter, reach, o.bidirectional, o.channels, *transforms)
    return ConvBlock(conv, o.d_model, o.channels, out, transposed=o.transposed)


def _convert_long_conv(state: State, o: Options) -> State:
    ours = {key.replace("output_linear.", "out.1."): t for key, t in state.items() if not key.startswith("block_fft")}
    ours["conv.filter.kernel"] = ours.pop("kernel.kernel").flatten(0, 1)
    if o.block_fft_conv:
        for name in _TRANSFORMS:
            block = convert_block(under(f"{name}.", state), _block_options(o))
            ours |= prefixed(f"conv.{name}.", block)
    return ours


LONG_CONV = System(
    options={
        "d_model": Size(),
        "l_max": 1024,
        "channels": 1,
        **KERNEL_OPTIONS,
        "bidirectional": False,
        "activation": Choice(*ELEMENTWISE),
        "postact": Choice(*ACTIVATIONS),
        "transposed": True,
        "rate": Number(1.0, above=0),
        "weight_norm": Choice(False),
        "block_fft_conv": False,
        "block_fft_conv_args": {},
    },
    ignored=KERNEL_IGNORED | {"initializer", "dropout", "tie_dropout"},
    keys=_long_conv_keys,
    build=_build_long_conv,
    convert=_convert_long_conv,
    aliases=_long_conv_aliases,
)


_STANDALONE_IGNORED = frozenset({"dropout", "kernel_dropout", "kernel_learning_rate", "L_in"})


def _standalone_keys(o: Options) -> Shapes:
    return {
        "D": (o.channels, o.H),
        "kernel": (o.channels, o.H, 2 * o.L),
        **shapes_of("output_linear", output_linear, o.channels * o.H, o.H, "glu"),
    }


def _build_standalone(o: Options) -> ConvBlock:
    filter = FreeFilter(o.channels * o.H, 2 * o.L, squash=o.kernel_lam)
    out = nn.Sequential(nn.GELU(), output_linear(o.channels * o.H, o.H, "glu"))
    return ConvBlock(CircularConv(filter, None, False), o.H, o.channels, out, transposed=True)


def _convert_standalone(state: State, o: Options) -> State:
    ours = {key.replace("output_linear.", "out.1."): t for key, t in state.items()}
    ours["conv.filter.kernel"] = ours.pop("kernel").flatten(0, 1)
    return ours


STANDALONE = System(
    options={"H": Size(), "L": Size(), "channels": 2, "kernel_lam": Number(0.1, least=0)},
    ignored=_STANDALONE_IGNORED,
    keys=_standalone_keys,
    build=_build_standalone,
    convert=_convert_standalone,
)


class StandaloneModel(nn.Module):
    """The authors' LongConvModel: encoder, residual layers, mean over time, decoder.

    Args:
        d_input, d_output: widths of input and output.
        layers: the convolutions, each (B, H, L) -> (B, H, L).
        d_model: H.
        prenorm: a layer's norm comes before its convolution rather than after the sum.
    """

    def __init__(self, d_input: int, d_output: int, layers: list[ConvBlock], d_model: int, prenorm: bool):
        super().__init__()
        self.prenorm = prenorm
        self.encoder, self.decoder = nn.Linear(d_input, d_model), nn.Linear(d_model, d_output)
        self.conv_layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, d_input) -> y (B, d_output)."""
        x = self.encoder(x)
        for layer, norm in zip(self.conv_layers, self.norms):
            x = x + layer((norm(x) if self.prenorm else x).transpose(1, 2)).transpose(1, 2)
            x = x if self.prenorm else norm(x)
        return self.decoder(x.mean(1))


def _layer_of(o: Options) -> Options:
    """The options of a layer of the model, whose length the authors fix."""
    return Options(H=o.d_model, L=1024, channels=o.channels, kernel_lam=o.kernel_lam)


def _model_keys(o: Options) -> Shapes:
    D = o.d_model
    layers = {
        f"conv_layers.{i}.{key}": s for i in range(o.n_layers) for key, s in _standalone_keys(_layer_of(o)).items()
    }
    norms = {f"norms.{i}.{key}": (D,) for i in range(o.n_layers) for key in ("weight", "bias")}
    linears: Shapes = {"encoder.weight": (D, o.d_input), "encoder.bias": (D,)}
    return {**linears, **layers, **norms, "decoder.weight": (o.d_output, D), "decoder.bias": (o.d_output,)}


def _build_model(o: Options) -> StandaloneModel:
    layers = [_build_standalone(_layer_of(o)) for _ in range(o.n_layers)]
    return StandaloneModel(o.d_input, o.d_output, layers, o.d_model, o.prenorm)


def _convert_model(state: State, o: Options) -> State:
    ours = {key: t for key, t in state.items() if not key.startswith("conv_layers.")}
    for i in range(o.n_layers):
        prefix = f"conv_layers.{i}."
        ours |= prefixed(prefix, _convert_standalone(under(prefix, state), _layer_of(o)))
    return ours


STANDALONE_MODEL = System(
    options={
        "d_input": Size(),
        "d_output": 10,
        "d_model": 512,
        "n_layers": 6,
        "prenorm": False,
        "channels": 2,
        "kernel_lam": Number(0.1, least=0),
    },
    ignored=_STANDALONE_IGNORED,
    keys=_model_keys,
    build=_build_model,
    convert=_convert_model,
)

SYSTEMS: dict[str, System | Family] = {
    "longconv": LONG_CONV,
    "longconvkernel": LONG_CONV_KERNEL,
    "longconvstandalone": Family({"LongConvModel": STANDALONE_MODEL, "LongConv": STANDALONE}),
}
