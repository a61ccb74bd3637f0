"""S4ND of github.com/state-spaces/s4 (commit e757cef): one of the repository's kernels an axis, and their product."""

from collections.abc import Sequence

from torch import Tensor, nn

from longwave.nn import SeparableConv, Truncated
from longwave.official.blocks import ACTIVATIONS, ELEMENTWISE, ConvBlock, linear_activation, shapes_of
from longwave.official.s4 import S4_BLOCK, S4_KERNEL, build_kernel, convert_kernel, kernel_shapes
from longwave.official.system import Choice, Options, Shapes, Size, Sizes, State, System, prefixed, under


class NDConv(nn.Module):
    """A convolution over several axes as :class:`ConvBlock` calls it.

    Args:
        inner: the convolution.
    """

    def __init__(self, inner: SeparableConv):
        super().__init__()
        self.inner = inner

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, None]:
        """u (B, *axes, K H), skip (K H) -> y (B, *axes, K H)."""
        if state is not None:
            raise ValueError("S4ND has no state: its axes have no common order")
        return self.inner(u, skip), None


def _axes(o: Options) -> list[Options]:
    """The options of each axis' kernel."""
    if isinstance(o.l_max, Sequence):
        l_max = list(o.l_max)
    elif o.dim is None:
        raise ValueError(f"dim = None needs an l_max for each axis; got l_max = {o.l_max}")
    else:
        l_max = [o.l_max] * o.dim
    if o.contract_version == 0 and len(l_max) != 2:
        raise ValueError(f"contract_version = 0 is for 2 axes; {len(l_max)} need contract_version = 1")
    name = o.mode if o.kernel is None else o.kernel
    return [Options(**{**vars(o), "l_max": length, "kernel": name, "mode": None}) for length in l_max]


def _copies(o: Options) -> tuple[int, int]:
    """K outputs a feature, and how many products are averaged for each.

    With contract_version 1 the official code forgets to sum over ranks, so that they are outputs of their own.
    """
    if o.contract_version == 0 or o.trank == 1:
        return o.channels, o.trank
    if o.channels > 1 or not o.linear:
        raise ValueError(f"trank = {o.trank} with contract_version = 1 needs channels = 1 and linear = True")
    return o.trank, 1


def _rows(o: Options) -> int:
    return o.channels * o.trank * (2 if o.bidirectional else 1)


def _output_linear(o: Options) -> nn.Module:
    """The map after the convolution, which is there without an activation too."""
    return linear_activation(o.channels * o.d_model, o.d_model, o.final_act)


def _keys(o: Options) -> Shapes:
    shapes: Shapes = {"D": (o.channels, o.d_model)}
    for i, axis in enumerate(_axes(o)):
        shapes |= prefixed(f"kernel.{i}.", kernel_shapes(axis, _rows(o)))
    if not o.linear:
        shapes |= shapes_of("output_linear", _output_linear, o)
    return shapes


def _build(o: Options) -> ConvBlock:
    channels, ranks = _copies(o)
    filters = []
    for axis in _axes(o):
        filter = build_kernel(axis, _rows(o))
        filters.append(filter if axis.l_max is None else Truncated(filter, round(axis.l_max / o.rate)))
    conv = NDConv(SeparableConv(filters, o.bidirectional, ranks))
    out = nn.Identity() if o.linear else nn.Sequential(ELEMENTWISE[o.activation](), _output_linear(o))
    return ConvBlock(conv, o.d_model, channels, out, transposed=o.transposed)


def _convert(state: State, o: Options) -> State:
    ours = {"D": state["D"].expand(_copies(o)[0], -1)}
    for i, axis in enumerate(_axes(o)):
        place = f"conv.inner.filters.{i}." + ("" if axis.l_max is None else "inner.")
        ours |= prefixed(f"{place}", convert_kernel(under(f"kernel.{i}.", state)))
    return ours | prefixed("out.1.", under("output_linear.", state))


S4ND = System(
    options={
        **{name: option for name, option in S4_BLOCK.options.items() if name in S4_KERNEL.options},
        "l_max": Sizes(None, single=True),
        "dim": Size(2, none=True),
        "trank": 1,
        "contract_version": Choice(0, 1),
        "bidirectional": True,
        "linear": True,
        "transposed": True,
        "activation": Choice(*ELEMENTWISE, default="gelu"),
        "final_act": Choice(*ACTIVATIONS, default=None),
        "out_channels": Choice(None),
        "weight_norm": Choice(False),
    },
    ignored=S4_BLOCK.ignored | {"dims", "ln", "hyper_act", "return_state"},
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"s4nd": S4ND}
