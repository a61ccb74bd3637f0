"""S5: one state space for all features at once, diagonal, run by a parallel scan.

Source: Smith, Warrington & Linderman (2022) "Simplified State Space Layers for Sequence Modeling", arXiv:2208.04933,
sec. 3; parameter names and draws of the authors' S5SSM and SequenceLayer (github.com/lindermanlab/S5).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers.base import Mixer, no_state, zero_padding
from longwave.nn import Hint, hippo, positive_rate
from longwave.nn.filters.diagonal import DISCRETIZATIONS
from longwave.nn.module import at_least_float32, choose
from longwave.ops import linear_scan


def normal_hippo(size: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues and eigenvectors of HiPPO-N, the normal part of HiPPO-LegS:  -1/2 + its skew part.

    Source: app. B.1 of arXiv:2208.04933.

    Args:
        size: R >= 1.
    Returns:
        Lambda: (R,) complex128, by growing imaginary part: the first half are the conjugates of the second.
        V: (R, R), unitary; its phases are arbitrary.
    """
    A, _ = hippo("legs", size)
    imag, V = torch.linalg.eigh(-0.5j * (A - A.T))
    return torch.complex(torch.full_like(imag, -0.5), imag), V


def lecun(*shape: int, fan_in: int) -> Tensor:
    """Normal numbers of variance 1 / fan_in, cut at two standard deviations of the uncut, in float64."""
    cut = 0.87962566103423978  # standard deviation of a standard normal cut at 2
    return nn.init.trunc_normal_(torch.empty(shape, dtype=torch.float64), a=-2, b=2) / (cut * fan_in**0.5)


def lecun_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """C (D, P, 2) of a dense one (D, N) of variance 1 / (D N), in the basis V (R, p) of each block, N = R blocks."""
    N = blocks * len(V)
    return _in_basis(lecun(D, N, 2, fan_in=D * N), V)


def trunc_standard_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """As :func:`lecun_normal`, but each row has its own fan: variance 1 / N. The name is the authors'."""
    N = blocks * len(V)
    return _in_basis(lecun(D, N, 2, fan_in=N), V)


def complex_normal(D: int, blocks: int, V: Tensor) -> Tensor:
    """C (D, P, 2) drawn in the basis itself, with variance 1."""
    return torch.randn(D, blocks * V.shape[1], 2, dtype=torch.float64) * 0.5**0.5


def _in_basis(C: Tensor, V: Tensor) -> Tensor:
    blocks = torch.view_as_complex(C).unflatten(1, (-1, len(V)))
    return torch.view_as_real((blocks @ V).flatten(1))


C_INITS: dict[str, Callable[[int, int, Tensor], Tensor]] = {
    "lecun_normal": lecun_normal,
    "trunc_standard_normal": trunc_standard_normal,
    "complex_normal": complex_normal,
}


class DrivenStates(nn.Module):
    """h[t] = a h[t-1] + b x[t],  (a, b) from (Lambda, B, step): P modes that all features drive.

    Source: sec. 3 of arXiv:2208.04933; Lambda = Lambda_re + i Lambda_im, step = rate exp(log_step).

    Args:
        d_model: D.
        d_state: N, real state size; P = N / 2 conjugate pairs are kept, or all P = N.
        blocks: Lambda starts as so many equal HiPPO-N, each of size N / blocks.
        conj_sym: modes come in conjugate pairs, of which one is kept and both count.
        discretization: zoh | bilinear.
        clip_eigs: Re Lambda is kept <= -1e-4, so that no state grows.
        dt_min, dt_max: step sizes are drawn log-uniformly between them.
        rate: > 0, factor on every step size.
    Raises:
        ValueError: for an unknown discretization, blocks that do not divide d_state into even parts (any parts
            without conj_sym), 0 < dt_min <= dt_max violated, or rate <= 0.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(
        ("Lambda_re", "Lambda_im", "B", "log_step"), Hint(max_lr=1e-3)
    )

    def __init__(
        self,
        d_model: int,
        d_state: int,
        blocks: int,
        *,
        conj_sym: bool,
        discretization: str,
        clip_eigs: bool,
        dt_min: float,
        dt_max: float,
        rate: float,
    ):
        super().__init__()
        if d_state < 1 or blocks < 1 or d_state % (blocks * (2 if conj_sym else 1)):
            parts = "even parts, of conjugate pairs" if conj_sym else "equal parts"
            raise ValueError(f"blocks = {blocks} does not divide d_state = {d_state} into {parts}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"step sizes need 0 < dt_min <= dt_max; got dt_min = {dt_min}, dt_max = {dt_max}")
        self.discretize = choose("discretization", discretization, DISCRETIZATIONS)
        self.d_state, self.blocks, self.conj_sym, self.clip_eigs = d_state, blocks, conj_sym, clip_eigs
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, positive_rate(rate)
        modes = d_state // 2 if conj_sym else d_state
        self.Lambda_re = nn.Parameter(torch.empty(modes))
        self.Lambda_im = nn.Parameter(torch.empty(modes))
        self.B = nn.Parameter(torch.empty(modes, d_model, 2))
        self.log_step = nn.Parameter(torch.empty(modes))
        self.reset_parameters()

    def _basis(self) -> tuple[Tensor, Tensor]:
        """Lambda (P / blocks,) and its eigenvectors (N / blocks, P / blocks) of one block."""
        size = self.d_state // self.blocks
        Lambda, V = normal_hippo(size)
        kept = size // 2 if self.conj_sym else size
        return Lambda[:kept], V[:, :kept]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        D = self.B.shape[1]
        with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
            Lambda, V = self._basis()
            B = lecun(self.blocks, len(V), D, fan_in=self.d_state).to(V.dtype)
            B = torch.view_as_real(V.conj().T @ B)
        self.Lambda_re.copy_(Lambda.real.repeat(self.blocks))
        self.Lambda_im.copy_(Lambda.imag.repeat(self.blocks))
        self.B.copy_(B.flatten(0, 1))
        self.log_step.uniform_(math.log(self.dt_min), math.log(self.dt_max))

    @torch.no_grad()
    def draw_C(self, C: Tensor, init: Callable[[int, int, Tensor], Tensor]) -> None:
        """Fill C (D, P, 2) with a fresh draw."""
        with torch.device("cpu"):
            C.copy_(init(len(C), self.blocks, self._basis()[1]))

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decays a (P,) and what drives the modes, b x (B, L, P), of x (B, L, D)."""
        Lambda_re, Lambda_im, B, log_step = at_least_float32(self.Lambda_re, self.Lambda_im, self.B, self.log_step)
        Lambda = torch.complex(Lambda_re.clamp(max=-1e-4) if self.clip_eigs else Lambda_re, Lambda_im)
        a, b = self.discretize(Lambda, self.rate * log_step.exp())
        b = torch.view_as_real(b[:, None] * torch.view_as_complex(B))  # (P, D, 2)
        driven = F.linear(x.to(b.dtype), b.transpose(1, 2).flatten(0, 1))
        return a, torch.view_as_complex(driven.unflatten(2, (-1, 2)))

    def rest(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, P)."""
        (like,) = at_least_float32(self.Lambda_re.detach())
        zeros = like.new_zeros(batch, len(like))
        return torch.complex(zeros, zeros)

    def read(self, h: Tensor, C: Tensor) -> Tensor:
        """2 Re C h, or Re C h where no mode stands for two: h (B, L, P), C (D, P, 2) -> (B, L, D)."""
        (C,) = at_least_float32(C)
        C = torch.stack([C[..., 0], -C[..., 1]], dim=-1)
        return F.linear(torch.view_as_real(h).flatten(2), (2 * C if self.conj_sym else C).flatten(1))


def scan(a: Tensor, driven: Tensor, h0: Tensor) -> Tensor:
    """h[t] = a h[t-1] + driven[t]  (B, L, P), of a (P,) and h0 (B, P)."""
    return linear_scan(a.expand_as(driven), driven, h0)


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


class S5(Mixer, name="s5"):
    """y = activation(2 Re C h + D x),  h[t] = a h[t-1] + b x[t].

    Args:
        d_model: D.
        d_state: N, real size of the one state.
        blocks, conj_sym, discretization, clip_eigs, dt_min, dt_max, rate: see :class:`DrivenStates`; set ``rate``
            later with :func:`longwave.nn.set_rate`.
        C_init: lecun_normal | trunc_standard_normal | complex_normal; the first two are drawn for the dense system
            and put into its eigenvectors' basis, the last is drawn in it.
        activation: full_glu | half_glu1 | half_glu2 | gelu | none, what follows the state space.
    Raises:
        ValueError: for an unknown name, or what :class:`DrivenStates` refuses.
    """

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
        self.C = nn.Parameter(torch.empty(d_model, len(self.seq.B), 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.activation = choose("S5 activation", activation, ACTIVATIONS)(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.seq.draw_C(self.C, self.C_init)
        self.D.normal_()

    def init_state(self, batch: int) -> S5State:
        return S5State(self.seq.rest(batch))

    def forward(self, x: Tensor, state: S5State | None = None, *, mask: Tensor | None = None):
        x = zero_padding(x, mask)
        a, driven = self.seq.inputs(x)
        h = scan(a, driven, self.seq.rest(len(x)) if state is None else state.h)
        y = self.seq.read(h, self.C).to(x.dtype) + self.D * x
        return self.activation(y), None if state is None else S5State(h[:, -1].clone())  # without the rest of h


class S5TwoSided(Mixer, name="s5_two_sided"):
    """y = activation(2 Re (C1 h + C2 g) + D x),  h[t] = a h[t-1] + b x[t],  g[t] = a g[t+1] + b x[t].

    Both states have seen the present input: the authors' ``bidirectional``, whose checkpoints this loads.

    Args:
        d_model, d_state, blocks, ...: as of :class:`S5`.
    Raises:
        ValueError: as :class:`S5`.
    """

    causal = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 8, "dt_max": 0.5},
        {"d_state": 8, "blocks": 2, "discretization": "bilinear", "C_init": "complex_normal", "activation": "gelu"},
    )

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
        self.C1, self.C2 = (nn.Parameter(torch.empty(d_model, len(self.seq.B), 2)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.activation = choose("S5 activation", activation, ACTIVATIONS)(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.seq.draw_C(self.C1, self.C_init)
        self.seq.draw_C(self.C2, self.C_init)
        self.D.normal_()

    def init_state(self, batch: int):
        no_state(self)

    def forward(self, x: Tensor, state: None = None, *, mask: Tensor | None = None):
        if state is not None:
            no_state(self)
        x = zero_padding(x, mask)
        a, driven = self.seq.inputs(x)
        rest = self.seq.rest(len(x))
        past, future = scan(a, driven, rest), scan(a, driven.flip(1), rest).flip(1)
        y = self.seq.read(past, self.C1) + self.seq.read(future, self.C2)
        return self.activation(y.to(x.dtype) + self.D * x), None
