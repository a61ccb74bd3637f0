"""S5: one state space for all features at once, diagonal, run by a parallel scan.

Source: Smith, Warrington & Linderman (2022) "Simplified State Space Layers for Sequence Modeling", arXiv:2208.04933,
sec. 3; parameter names and draws of the authors' S5SSM and SequenceLayer (github.com/lindermanlab/S5).
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers.base import Mixer, WholeMixer
from longwave.nn import C_INITS, DrivenStates, Response, StateSpace
from longwave.nn.module import widened
from longwave.nn.padding import last_steps


class FullGLU(nn.Module):
    """out1(g) sigmoid(out2(g)),  g = gelu(y)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.out1, self.out2 = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, y: Tensor) -> Tensor:
        g = F.gelu(y, approximate="tanh")
        return self.out1(g) * torch.sigmoid(self.out2(g))


class HalfGLU1(nn.Module):
    """g sigmoid(out2(g)),  g = gelu(y)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.out2 = nn.Linear(d_model, d_model)

    def forward(self, y: Tensor) -> Tensor:
        g = F.gelu(y, approximate="tanh")
        return g * torch.sigmoid(self.out2(g))


class HalfGLU2(nn.Module):
    """y sigmoid(out2(gelu(y)))."""

    def __init__(self, d_model: int):
        super().__init__()
        self.out2 = nn.Linear(d_model, d_model)

    def forward(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(self.out2(F.gelu(y, approximate="tanh")))


# What follows the state space, by the authors' names; "none" is nothing.
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "full_glu": FullGLU,
    "half_glu1": HalfGLU1,
    "half_glu2": HalfGLU2,
    "gelu": lambda d_model: nn.GELU("tanh"),
    "none": lambda d_model: nn.Identity(),
}


class S5State(NamedTuple):
    h: Tensor  # (B, P) complex


class S5Layer(Mixer):
    """What the two layers share: one state space, its skip connection, and the activation behind it.

    Attributes:
        readouts: the names of the maps from states to outputs.
    """

    readouts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 1,
        conj_sym: bool = True,
        discretization: str = "zoh",
        C_init: str = "lecun_normal",
        clip_eigs: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
        activation: str = "full_glu",
    ):
        super().__init__()
        self.d_model, self.C_init = d_model, choose("S5 init of C", C_init, C_INITS)
        self.seq = DrivenStates(
            d_model,
            d_state,
            blocks,
            conj_sym=conj_sym,
            discretization=discretization,
            clip_eigs=clip_eigs,
            dt_min=dt_min,
            dt_max=dt_max,
            rate=rate,
        )
        for name in self.readouts:
            self.register_parameter(name, nn.Parameter(torch.empty(d_model, len(self.seq.B), 2)))
        self.D = nn.Parameter(torch.empty(d_model))
        self.activation = choose("S5 activation", activation, ACTIVATIONS)(d_model)
        self.reset_parameters()

    def of_feature(self, name: str, C: Tensor) -> Response:
        """The response from each feature to itself, which is that of a diagonal state space."""
        (C,) = widened(C)
        a, driven = self.seq.inputs(torch.eye(len(C), dtype=C.dtype, device=C.device)[None])
        c = torch.view_as_complex(C) if self.seq.conj_sym else torch.view_as_complex(C) / 2
        return Response(name, len(C), StateSpace(a.expand(len(C), -1), driven[0], c).taps, a[None])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name in self.readouts:
            self.seq.draw_C(getattr(self, name), self.C_init)
        self.D.normal_()


class S5(S5Layer, name="s5"):
    """y = activation(2 Re C h + D x),  h[t] = a h[t-1] + b x[t].

    Args:
        d_model: D.
        d_state: N, real size of the one state.
        blocks, conj_sym, discretization, clip_eigs, dt_min, dt_max, rate: see :class:`longwave.nn.DrivenStates`; set
            ``rate`` later with :func:`longwave.nn.set_rate`.
        C_init: lecun_normal | trunc_standard_normal | complex_normal; the first two are drawn for the dense system
            and put into its eigenvectors' basis, the last is drawn in it.
        activation: full_glu | half_glu1 | half_glu2 | gelu | none, what follows the state space.
    Raises:
        ValueError: for an unknown name, or what :class:`longwave.nn.DrivenStates` refuses.
    """

    readouts = ("C",)
    C: nn.Parameter
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {
            "d_state": 8,
            "blocks": 2,
            "discretization": "bilinear",
            "C_init": "complex_normal",
            "activation": "half_glu2",
        },
        {"d_state": 6, "conj_sym": False, "clip_eigs": True, "dt_max": 0.5, "activation": "half_glu1"},
    )

    def responses(self) -> list[Response]:
        return [self.of_feature("feature to itself", self.C)]

    def init_state(self, batch: int) -> S5State:
        return S5State(self.seq.rest(batch))

    def mix(self, x: Tensor, state: S5State | None, padding: Tensor | None):
        h = self.seq.scan(*self.seq.inputs(x), None if state is None else state.h)
        y = self.activation(self.seq.read(h, self.C).to(x.dtype) + self.D * x)
        if state is None:
            return y, None
        if padding is not None:
            h = last_steps(torch.cat([state.h[:, None].to(h.dtype), h], dim=1), padding, 1)
        return y, S5State(h[:, -1].clone())  # without the rest of h


class S5TwoSided(WholeMixer, S5Layer, name="s5_two_sided"):
    """S5TwoSided: S5 whose one state space is run forwards and backwards, both runs read by one linear map each.

    y = activation(2 Re (C1 h + C2 g) + D x),  h[t] = a h[t-1] + b x[t],  g[t] = a g[t+1] + b x[t]: both states have
    seen the present input. This is the authors' ``bidirectional``, whose checkpoints it loads.

    Args:
        d_model, d_state, blocks, ...: as of :class:`S5`.
    Raises:
        ValueError: as :class:`S5`.
    """

    readouts = ("C1", "C2")
    C1: nn.Parameter
    C2: nn.Parameter
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 8, "dt_max": 0.5},
        {"d_state": 8, "blocks": 2, "discretization": "bilinear", "C_init": "complex_normal", "activation": "gelu"},
    )

    def responses(self) -> list[Response]:
        return [self.of_feature("to itself, back", self.C1), self.of_feature("to itself, ahead", self.C2)]

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        a, driven = self.seq.inputs(x)
        past, future = self.seq.scan(a, driven), self.seq.scan(a, driven.flip(1)).flip(1)
        y = self.seq.read(past, self.C1) + self.seq.read(future, self.C2)
        return self.activation(y.to(x.dtype) + self.D * x)
