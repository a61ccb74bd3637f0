"""CKConv: a convolution with a kernel that a small network draws, a matrix between all features at every lag.

Source: Romero et al. (2022) "CKConv: Continuous Kernel Convolution For Sequential Data", arXiv:2102.02611, eq. 1-2
and the halves of the residual block; with a kernel that learns its length: Romero et al. (2022) "FlexConv",
arXiv:2110.08059. The authors normalise over features and time at once, which looks ahead; here each step is
normalised on its own.
"""

from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.mixers.states import Growing
from longwave.nn import (
    CKConvFilter,
    Filter,
    FilterSpec,
    FlexConvFilter,
    Taps,
    conv_with_past,
    derived,
    online_length,
    taps_needed,
)
from longwave.spec import Parts

KERNELS: Parts[Filter, FilterSpec] = Parts(
    "continuous filter",
    FilterSpec,
    given=("channels", "max_len"),
    classes={"ckconv": CKConvFilter, "flexconv": FlexConvFilter},
)
AnyKernel = Annotated[SerializeAsAny[FilterSpec], BeforeValidator(KERNELS.field)]


class CKConvState(NamedTuple):
    past: Growing  # (B, t, D) every input so far


class CKConv(Mixer, name="ckconv"):
    """y = relu(LayerNorm(sum_s K[s] x[t-s] + b)), K[s] (D, D) drawn by a network from the position of s.

    Args:
        d_model: D.
        max_len: longest sequence at the rate of training.
        filter: what draws the kernel: ckconv or flexconv, or ``{"kind": name, ...}`` with its options, see
            :class:`longwave.nn.CKConvFilter` and :class:`longwave.nn.FlexConvFilter`.
    Raises:
        ValueError: for an unknown filter or option, a value that it refuses, and on a sequence longer than max_len.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "filter": {"kind": "ckconv", "width": 8, "omega": 10.0}},
        {"max_len": 32, "filter": {"kind": "flexconv", "width": 8, "mask_width": 0.3, "input_scale": 8.0}},
        {"max_len": 64, "filter": {"kind": "ckconv", "width": 4, "layers": 2, "rate": 2.0}},
    )

    def __init__(self, d_model: int, max_len: int, filter: AnyKernel = KERNELS.make("ckconv")):  # noqa: B008
        super().__init__()
        self.d_model = d_model
        self.kernel = KERNELS.read(filter).build(d_model * d_model, max_len)
        self.bias = nn.Parameter(torch.empty(d_model))
        self.norm = nn.LayerNorm(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.bias.zero_()

    def taps(self, length: int) -> Tensor:
        """(D, D, length), to each feature from every one."""
        return self.kernel(length).unflatten(0, (self.d_model, self.d_model))

    @derived
    def prepared(self, length: int) -> Taps:
        """The taps, for steps that are to come."""
        return Taps(self.taps(length))

    def init_state(self, batch: int) -> CKConvState:
        return CKConvState(self.bias.new_zeros(batch, 0, self.d_model))

    def mix(self, x: Tensor, state: CKConvState | None, padding: Tensor | None):
        past = None if state is None else state.past
        length = x.shape[1] if past is None else taps_needed(self.kernel, past, x.shape[1], padding)
        steps = None if past is None else online_length(self.kernel, length)
        y, past = conv_with_past(x, self.taps(length) if steps is None else self.prepared(steps), past, padding)
        return torch.relu(self.norm(y + self.bias)), None if past is None else CKConvState(past)
