"""S4ND of github.com/state-spaces/s4 (commit e757cef): one of the repository's kernels an axis, and their product."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from longwave.nn import SeparableConv, Truncated
from longwave.official.blocks import ELEMENTWISE, Activation, ConvBlock, Elementwise, linear_activation
from longwave.official.s4 import Block, Named
from longwave.official.s4_kernel import KERNEL, Kernel
from longwave.official.source import Flag, Name, Names, Size, System, Turn, inside


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


class S4ND(Kernel):
    """S4ND."""

    ignored = Block.ignored | {"dims", "ln", "hyper_act", "return_state"}
    l_max: Annotated[Sequence[Size | None], Field(min_length=1)] | Size | None = Field(  # type: ignore[assignment]
        None, description="must be a list of whole numbers >= 1, or one"
    )
    mode: Named = "dplr"
    kernel: Named = None
    rank: Size = 1
    dim: Size | None = 2
    trank: Size = 1
    contract_version: Literal[0, 1] = 0
    bidirectional: Flag = True
    linear: Flag = True
    transposed: Flag = True
    activation: Elementwise = "gelu"
    final_act: Activation = None
    out_channels: None = None
    weight_norm: Literal[False] = False

    def axes(self) -> list[Kernel]:
        """The options of each axis' kernel."""
        if isinstance(self.l_max, Sequence):
            lengths = list(self.l_max)
        elif self.dim is None:
            raise ValueError(f"dim = None needs an l_max for each axis; got l_max = {self.l_max}")
        else:
            lengths = [self.l_max] * self.dim
        if self.contract_version == 0 and len(lengths) != 2:
            raise ValueError(f"contract_version = 0 is for 2 axes; {len(lengths)} need contract_version = 1")
        shared = {name: getattr(self, name) for name in Kernel.model_fields}
        shared |= {"kernel": self.kernel or self.mode, "mode": None}
        return [Kernel(**{**shared, "l_max": length}) for length in lengths]

    @property
    def copies(self) -> tuple[int, int]:
        """K outputs a feature, and how many products are averaged for each.

        With contract_version 1 the official code forgets to sum over ranks, so that they are outputs of their own.
        """
        if self.contract_version == 0 or self.trank == 1:
            return self.channels, self.trank
        if self.channels > 1 or not self.linear:
            raise ValueError(f"trank = {self.trank} with contract_version = 1 needs channels = 1 and linear = True")
        return self.trank, 1

    def build(self) -> ConvBlock:
        (channels, ranks), H = self.copies, self.d_model
        filters = []
        for axis in self.axes():
            filter = axis.filter(self.channels * self.trank * (2 if self.bidirectional else 1))
            filters.append(filter if axis.support is None else Truncated(filter.channels, filter, axis.support))
        conv = NDConv(SeparableConv(filters, self.bidirectional, ranks))
        linear = linear_activation(self.channels * H, H, self.final_act)  # there without an activation too
        out = nn.Identity() if self.linear else nn.Sequential(ELEMENTWISE[self.activation](), linear)
        return ConvBlock(conv, H, channels, out, transposed=self.transposed)

    def names(self) -> Names:
        copied = Turn(lambda t: t.expand(self.copies[0], -1), lambda t: t[: self.channels])
        table: Names = [Name("D", "D", copied), Name("output_linear.", "out.1.")]
        for i, axis in enumerate(self.axes()):
            place = f"conv.inner.filters.{i}." + ("" if axis.support is None else "inner.")
            table += inside(f"kernel.{i}.", place, KERNEL)
        return table


SYSTEMS = {"s4nd": System(S4ND)}
