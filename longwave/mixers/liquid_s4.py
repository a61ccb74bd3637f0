"""Liquid-S4: a state space that also hears products of successive inputs, then a gated linear unit.

Source: Hasani, Lechner, Wang, Chahine, Amini & Rus (2022) "Liquid Structural State-Space Models", arXiv:2209.12951,
sec. 3. The liquid system  h[t] = (a + b u[t]) h[t-1] + b u[t]  unrolls into  y = k * u  plus a kernel over products of
inputs ("correlations"). Of these the products of successive inputs are kept,  v_q[t] = u[t] u[t-1] ... u[t-q+1]  for
q = 2 ... p, and heard by one of two kernels, the parts :class:`PB` and :class:`KB`. All of it is causal here, as the
paper's recurrence is; the authors' code reverses the products in time.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers.base import Mixer
from longwave.nn import OutputGLU, S4DFilter
from longwave.nn.filters import DPLRFilter, Filter, FilterSpec
from longwave.nn.long_conv import go_on
from longwave.nn.module import widened
from longwave.nn.padding import last_steps
from longwave.ops import causal_conv
from longwave.spec import Parts


class Power(NamedTuple):
    """A state space whose input map is a power of that of a filter."""

    system: Any

    def realized(self) -> Any:
        """The system for many steps."""
        return self.system

    def stepper(self) -> Any:
        """The system for one."""
        return self.system.stepper()


class PB:
    """Powers of B: the state matrix of the correlations is the identity,  y[t] = (2 Re sum_n c_n b_n^q) v_q[t].

    Source: arXiv:2209.12951, sec. 3.2, K_liquid = PB.
    """

    def __call__(
        self, v: Tensor, system: Any, h: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """v (B, L, C), the system with b^q for b -> what v adds to y (B, L, C), and the state, which has no part."""
        return v * system.taps(1)[:, 0], h


class KB:
    """The kernel times powers of B:  y = k_q * v_q,  k_q[l] = 2 Re sum_n c_n a_n^l b_n^q.

    Source: arXiv:2209.12951, sec. 3.2, K_liquid = KB.
    """

    def __call__(
        self, v: Tensor, system: Any, h: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """v (B, L, C), the system with b^q for b -> what v adds to y (B, L, C) and to the state, where there is one."""
        if h is None:
            return causal_conv(v, system.taps(v.shape[1])), None
        y, more = go_on(v, Power(system), system.rest(v.shape[0]), padding)
        return y, h + more


LIQUID: dict[str, Callable[[], Any]] = {"pb": PB, "kb": KB}
STATE_SPACES: Parts[Filter, FilterSpec] = Parts(
    "state space", FilterSpec, given=("channels",), classes={"s4d": S4DFilter, "s4": DPLRFilter}
)
AnyStateSpace = Annotated[SerializeAsAny[FilterSpec], BeforeValidator(STATE_SPACES.field)]
BILINEAR = {"kind": "s4d", "discretization": "bilinear"}


class LiquidS4State(NamedTuple):
    h: Tensor  # (B, D, N/2) complex or (B, D, N) real: that of the filter, to which KB adds
    past: Tensor  # (B, p-1, D) the last inputs


class LiquidS4(Mixer, name="liquid_s4"):
    """y = GLU(W gelu(k * u + sum_{q=2}^p liquid_q(v_q) + D u)).

    Args:
        d_model: D.
        degree: p >= 2, how many successive inputs a product has at most.
        liquid: pb | kb, what a product does: see :class:`PB`, :class:`KB`.
        filter: what gives a, b, c: s4d or s4, or ``{"kind": name, ...}`` with its options, see
            :class:`longwave.nn.S4DFilter` and :class:`longwave.nn.DPLRFilter`. Powers of b are taken mode by mode.
    Raises:
        ValueError: for degree < 2, an unknown name or option, or a value that the filter refuses.
    Cost: that of the filter; kb convolves p times instead of once.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"filter": {**BILINEAR, "d_state": 8, "dt_max": 0.5}},
        {
            "degree": 3,
            "liquid": "kb",
            "filter": {**BILINEAR, "d_state": 8, "dt_max": 0.5, "init": "legs", "systems": 2},
        },
        {"degree": 3, "filter": {"kind": "s4", "d_state": 8, "dt_max": 0.5}},
    )

    def __init__(
        self,
        d_model: int,
        degree: int = 2,
        liquid: str = "pb",
        filter: AnyStateSpace = STATE_SPACES.read(BILINEAR),  # noqa: B008
    ):
        super().__init__()
        if degree < 2:
            raise ValueError(f"liquid_s4 needs degree >= 2; got {degree}: 1 is the state space itself")
        self.d_model, self.degree = d_model, degree
        self.liquid = choose("liquid kernel", liquid, LIQUID)()
        self.kernel: Any = STATE_SPACES.read(filter).build(d_model)
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = OutputGLU(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.D.normal_()

    def init_state(self, batch: int) -> LiquidS4State:
        past = self.D.detach().new_zeros(batch, self.degree - 1, self.d_model)
        return LiquidS4State(self.kernel.realized().rest(batch), past)

    def mix(self, x: Tensor, state: LiquidS4State | None, padding: Tensor | None):
        L, system = x.shape[1], self.kernel.realized()
        h: Tensor | None = None
        if state is None:
            y = causal_conv(x, system.taps(L), skip=self.D)
            known = F.pad(x, (0, 0, self.degree - 1, 0))
        else:
            y, h = go_on(x, self.kernel, state.h, padding, skip=self.D)
            known = torch.cat([state.past, x.to(state.past.dtype)], dim=1)
        (known,) = widened(known)
        v, power = known[:, self.degree - 1 :], system.b
        for q in range(2, self.degree + 1):
            v = v * known[:, self.degree - q : self.degree - q + L]
            power = _times(power, system.b)
            more, h = self.liquid(v, system._replace(b=power), h, padding)
            y = y + more
        y = OutputGLU.around(self.output_linear, y.to(x.dtype))
        if state is None or h is None:
            return y, None
        return y, LiquidS4State(h, last_steps(known, padding, self.degree - 1).to(state.past.dtype, copy=True))


def _times(b: Tensor, c: Tensor) -> Tensor:
    """The product mode by mode, of complex modes or of real ones that are kept as (real parts, imaginary parts)."""
    if b.is_complex():
        return b * c
    (re, im), (cre, cim) = b.chunk(2, dim=-1), c.chunk(2, dim=-1)
    return torch.cat([re * cre - im * cim, re * cim + im * cre], dim=-1)
