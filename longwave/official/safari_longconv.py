"""Long convolutions of github.com/HazyResearch/safari (commit 02220c6): kernel, layer, standalone model."""

from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from longwave.nn import FreeFilter
from longwave.nn.filters import Smooth
from longwave.official.blocks import (
    ELEMENTWISE,
    Activation,
    Call,
    ConvBlock,
    Elementwise,
    kernel_rows,
    output_linear,
)
from longwave.official.replicas.conv import BlockConv, Conv, SpectrumSmoothing
from longwave.official.safari_block_fft import BlockOptions
from longwave.official.source import Flag, Name, Names, Positive, Size, Source, System, flat, inside, numbered, part


class KernelOptions(Source):
    """The options of every LongConvKernel."""

    ignored = frozenset({"kernel_dropout", "weight_init", "learning_rate", "lr", "wd", "verbose"})
    causal: Flag = True
    lam: float = Field(0.1, ge=0)
    use_ma_smoothing: Flag = False
    ma_window_len: Size = 7
    smooth_freq: Flag = False

    def filter(self, rows: int, length: int) -> FreeFilter:
        """The taps, smoothed and squashed."""
        smooth: nn.Module | None = None
        if self.use_ma_smoothing:
            smooth = SpectrumSmoothing(self.ma_window_len) if self.smooth_freq else Smooth(self.ma_window_len)
        return FreeFilter(rows, length if self.causal else 2 * length, squash=self.lam, smooth=smooth)


class LongConvKernel(KernelOptions):
    """LongConvKernel alone."""

    ignored = KernelOptions.ignored | {"rate", "state"}
    H: Size
    L: Size
    channels: Size = 1

    def build(self) -> nn.Module:
        filter = self.filter(self.channels * self.H, self.L)
        return Call(filter, partial(kernel_rows, features=self.H, length=filter.max_len))

    def names(self) -> Names:
        return [Name("kernel", "model.kernel", flat(self.H))]


class LongConv(KernelOptions):
    """The layer."""

    ignored = KernelOptions.ignored | {"initializer", "dropout", "tie_dropout"}
    d_model: Size
    l_max: Size = 1024
    channels: Size = 1
    bidirectional: Flag = False
    activation: Elementwise = "gelu"
    postact: Activation = "glu"
    transposed: Flag = True
    rate: Positive = 1.0
    weight_norm: Literal[False] = False
    block_fft_conv: Flag = False
    block_fft_conv_args: Any = Field(default_factory=dict)

    def block(self) -> BlockOptions:
        """The options of the two transforms."""
        options = part("block_fft_conv_args", BlockOptions, self.block_fft_conv_args)
        if options.learn_dft_matrices and options.H not in (1, self.d_model):
            raise ValueError(f"block_fft_conv_args: H = {options.H} fits no input; it is 1 or d_model = {self.d_model}")
        return options

    def build(self) -> nn.Module:
        H, K = self.d_model, self.channels
        filter = self.filter(K * (2 if self.bidirectional else 1) * H, self.l_max)
        circle = Conv(filter, round(self.l_max / self.rate), self.bidirectional, whole=True)
        conv: nn.Module = circle
        if self.block_fft_conv:
            conv = BlockConv(circle, K, *(self.block().transform() for _ in range(2)))
        out = nn.Sequential(ELEMENTWISE[self.activation](), output_linear(K * H, H, self.postact))
        return ConvBlock(conv, H, K, out, transposed=self.transposed)

    def names(self) -> Names:
        names = ("block_fft_u", "block_fft_k") if self.block_fft_conv else ()
        place = "conv.conv.filter.kernel" if self.block_fft_conv else "conv.filter.kernel"
        return [
            Name("D", "D"),
            Name("kernel.kernel", place, flat(self.d_model)),
            Name("output_linear.", "out.1."),
            *(line for name in names for line in inside(f"{name}.", f"conv.{name}.", self.block().transform_names())),
        ]


class Standalone(Source):
    """The standalone LongConv."""

    ignored = frozenset({"dropout", "kernel_dropout", "kernel_learning_rate", "L_in"})
    H: Size
    L: Size
    channels: Size = 2
    kernel_lam: float = Field(0.1, ge=0)

    def build(self) -> ConvBlock:
        H, K = self.H, self.channels
        out = nn.Sequential(nn.GELU(), output_linear(K * H, H, "glu"))
        conv = Conv(FreeFilter(K * H, 2 * self.L, squash=self.kernel_lam), whole=True)
        return ConvBlock(conv, H, K, out, transposed=True)

    def names(self) -> Names:
        return [
            Name("D", "D"),
            Name("kernel", "conv.filter.kernel", flat(self.H)),
            Name("output_linear.", "out.1."),
        ]


class StandaloneModel(nn.Module):
    """The authors' LongConvModel: encoder, residual layers, mean over time, decoder.

    Args:
        o: its options.
    """

    def __init__(self, o: "LongConvModel"):
        super().__init__()
        self.prenorm = o.prenorm
        self.encoder, self.decoder = nn.Linear(o.d_input, o.d_model), nn.Linear(o.d_model, o.d_output)
        self.conv_layers = nn.ModuleList(o.layer().build() for _ in range(o.n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(o.d_model) for _ in range(o.n_layers))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, d_input) -> y (B, d_output)."""
        x = self.encoder(x)
        for layer, norm in zip(self.conv_layers, self.norms):
            x = x + layer((norm(x) if self.prenorm else x).transpose(1, 2)).transpose(1, 2)
            x = x if self.prenorm else norm(x)
        return self.decoder(x.mean(1))


class LongConvModel(Source):
    """The standalone LongConvModel."""

    ignored = Standalone.ignored
    d_input: Size
    d_output: Size = 10
    d_model: Size = 512
    n_layers: Size = 6
    prenorm: Flag = False
    channels: Size = 2
    kernel_lam: float = Field(0.1, ge=0)

    def layer(self) -> Standalone:
        """Of every depth; the authors fix its length."""
        return Standalone(H=self.d_model, L=1024, channels=self.channels, kernel_lam=self.kernel_lam)

    def build(self) -> nn.Module:
        return StandaloneModel(self)

    def names(self) -> Names:
        layers = ("conv_layers.{}.", "conv_layers.{}.")
        return [*numbered(self.n_layers, *layers, self.layer().names()), Name("", "")]


SYSTEMS = {
    "longconv": System(LongConv),
    "longconvkernel": System(LongConvKernel),
    "longconvstandalone": System(LongConvModel, Standalone),
}
