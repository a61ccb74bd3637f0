"""Conv: the layer of S4 and its kin around any filter, a state space or not.

Source: Gu et al. (2021) "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv:2111.00396, fig. 1,
for the layer; by default its filter is one of few free modes, Massaroli et al. (2023), arXiv:2310.18780.
"""

from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from longwave.mixers.conv_layer import ConvLayer
from longwave.mixers.states import Growing
from longwave.nn import FILTERS, AnyFilter, Filter, OutputGLU, OutputLinear, init_conv_state
from longwave.spec import Parts, PartSpec


class OutputSpec(PartSpec):
    """A map behind a convolution as data."""

    def build(self, d_in: int, d_out: int) -> OutputLinear | OutputGLU:
        """The module, freshly drawn."""
        return self._built(d_in, d_out)


OUTPUTS: Parts[OutputLinear | OutputGLU, OutputSpec] = Parts(
    "output map", OutputSpec, given=("d_in", "d_out"), classes={"glu": OutputGLU, "linear": OutputLinear}
)
AnyOutput = Annotated[SerializeAsAny[OutputSpec], BeforeValidator(OUTPUTS.field)]


class ConvState(NamedTuple):
    past: Tensor  # (B, C, N) what a state space knows of it; (B, support - 1, C) the last inputs


class ConvPastState(NamedTuple):
    past: Growing  # (B, t, C) every input so far, of a filter without a state space or an end


def conv_state(kernel: Filter) -> type[ConvState] | type[ConvPastState]:
    """What holds the state of a filter."""
    return ConvPastState if init_conv_state(kernel, 1).shape[1] == 0 else ConvState


class Conv(ConvLayer, name="conv"):
    """y = output([k_c * x + D_c x]_c).

    Args:
        d_model: D.
        filter: k: a name in :data:`longwave.nn.FILTERS`, or ``{"kind": name, ...}`` with its options.
        channels: c, filters a feature.
        output: from width c D to D: glu, a * sigmoid(b) with [a | b] = W gelu(x), or linear, W gelu(x).
    Raises:
        ValueError: for an unknown filter, output or option, channels < 1, or where the filter refuses a value; and on a
            sequence for which the filter is not defined.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"filter": {"kind": "modal", "d_state": 4}},
        {"filter": {"kind": "shift", "d_state": 3}, "channels": 2, "output": "linear"},
        {"filter": {"kind": "hyena", "max_len": 64, "width": 8, "emb_dim": 5}},
    )

    def __init__(
        self,
        d_model: int,
        filter: AnyFilter = FILTERS.make("modal"),  # noqa: B008
        channels: int = 1,
        output: AnyOutput = OUTPUTS.make("glu"),  # noqa: B008
    ):
        if channels < 1:
            raise ValueError(f"conv needs channels >= 1; got {channels}")
        kernel = FILTERS.read(filter).build(channels * d_model)
        super().__init__(d_model, kernel, OUTPUTS.read(output).build(channels * d_model, d_model))
        self.State = conv_state(kernel)
