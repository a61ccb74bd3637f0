"""Mamba-2: heads of matrix states with one decay each (SSD), behind a short convolution and before a gated norm.

Source: Dao & Gu (2024) "Transformers are SSMs", arXiv:2405.21060, sec. 6 and 7, fig. 6. Parameter names are those of
state-spaces/mamba.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers.base import Mixer
from longwave.nn import GATED_NORMS, AnyGatedNorm, Hint, Response, derived, slowest_modes
from longwave.nn.module import draw_steps, step_range, widened
from longwave.nn.padding import is_real, padded_short_conv, silence
from longwave.ops import linear_attention


class Mamba2State(NamedTuple):
    conv: Tensor  # (B, K-1, E + 2 G N) the short convolution's past
    ssm: Tensor  # (B, H, N, P)


class Mamba2(Mixer, name="mamba2"):
    """y = W_o norm(SSD(x), z),  S[t] = exp(dt[t] A) S[t-1] + dt[t] B[t] x[t]^T,  SSD(x)[t] = S[t]^T C[t] + D x[t].

    [z | x | B | C | dt] = W x[t], of which x, B and C pass the short convolution and silu, and dt + dt_bias softplus;
    A < 0 is a number a head.

    Args:
        d_model: D.
        d_state: N, rows of a head's state.
        d_conv: K, taps of the short convolution.
        expand: E / D, the width inside over that outside.
        head_dim: P, width of a head, divides E; default the largest power of two up to 64 that does.
        groups: G, of neighbouring heads that share B and C; divides the H = E / P heads.
        norm: gate_norm, norm(y silu(z)); norm_gate, norm(y) silu(z); or gate, y silu(z). Norms are those of groups.
        skip: whether D is a number a head or a channel.
        bias: on the in and out projections.
        conv_bias: on the short convolution.
        dt_min, dt_max: initial step sizes are log-uniform between them, and no smaller than 1e-4.
        dt_low, dt_high: limits of the step sizes at any time; None is no upper one.
    Raises:
        ValueError: for an option below 1, head_dim that does not divide E, groups that do not divide the heads, unless
            0 < dt_min <= dt_max and 0 <= dt_low <= dt_high, or for an unknown norm or skip.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 4, "head_dim": 4, "groups": 2, "dt_low": 0.005, "dt_high": 0.05},
        {"d_state": 3, "d_conv": 2, "head_dim": 8, "norm": "norm_gate", "skip": "channel", "bias": True},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"A_log": Hint(), "D": Hint(), "dt_bias": Hint()}

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int | None = None,
        groups: int = 1,
        norm: AnyGatedNorm = GATED_NORMS.make("gate_norm"),  # noqa: B008
        skip: Literal["head", "channel"] = "head",
        bias: bool = False,
        conv_bias: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_low: float = 0.0,
        dt_high: float | None = None,
    ):
        super().__init__()
        E = round(expand * d_model)
        P = math.gcd(64, max(1, E)) if head_dim is None else head_dim
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand * d_model": E, "head_dim": P, "groups": groups}
        for option, value in sizes.items():
            if value < 1:
                raise ValueError(f"mamba2 needs {option} >= 1; got {value}")
        if E % P:
            raise ValueError(f"mamba2: head_dim = {P} does not divide expand * d_model = {E}")
        H = E // P
        if H % groups:
            raise ValueError(f"mamba2: groups = {groups} does not divide the {H} heads (expand * d_model / head_dim)")
        if not (0 <= dt_low < math.inf and (dt_high is None or dt_low <= dt_high)):
            raise ValueError(f"mamba2 needs 0 <= dt_low <= dt_high; got dt_low = {dt_low}, dt_high = {dt_high}")
        self.d_model, self.d_state, self.groups = d_model, d_state, groups
        self.log_dt_range, self.dt_low, self.dt_high = step_range(dt_min, dt_max), dt_low, dt_high
        mixed = E + 2 * groups * d_state
        self.sections = (E, mixed, H)  # of what comes out of in_proj
        self.in_proj = nn.Linear(d_model, sum(self.sections), bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(choose("kind of skip", skip, {"head": H, "channel": E})))
        self.norm = GATED_NORMS.read(norm).build(E, groups)
        self.out_proj = nn.Linear(E, d_model, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        draw_steps(self.dt_bias, *self.log_dt_range)
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1.0)

    @derived
    def A(self) -> Tensor:
        """The continuous decay (H,) of every head."""
        (A_log,) = widened(self.A_log)
        return -A_log.exp()

    def steps(self, dt: Tensor) -> Tensor:
        """Step sizes (..., H) of what is read off the input, in float32 or better."""
        dt = F.softplus(torch.add(*widened(dt, self.dt_bias)))
        return dt if self.dt_low == 0 and self.dt_high is None else dt.clamp(self.dt_low, self.dt_high)

    def responses(self) -> list[Response]:
        """Its step sizes depend on the input: those of a silent input."""
        return [slowest_modes(torch.exp(self.steps(torch.zeros_like(self.dt_bias)) * self.A())[:, None])]

    def init_state(self, batch: int) -> Mamba2State:
        weight = self.conv1d.weight
        (E, mixed, H), K = self.sections, weight.shape[2]
        wide = torch.promote_types(weight.dtype, torch.float32)
        ssm = weight.new_zeros(batch, H, self.d_state, E // H, dtype=wide)
        return Mamba2State(weight.new_zeros(batch, K - 1, mixed), ssm)

    def mix(self, x: Tensor, state: Mamba2State | None, padding: Tensor | None):
        (E, mixed, H), conv, N = self.sections, self.conv1d, self.groups * self.d_state
        past, ssm = (None, None) if state is None else state
        z, u, dt = self.in_proj(x).split((E, mixed, H), dim=-1)
        u, past = padded_short_conv(silence(u, padding), conv.weight[:, 0], conv.bias, past, padding, silu=True)
        v, B, C = u.split((E, N, N), dim=-1)
        dt = self.steps(dt)
        if padding is not None:
            dt = dt.masked_fill(~is_real(x.shape[1], padding)[..., None], 0)  # which leaves the state as it was
        v, B, C = v.unflatten(-1, (H, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))
        y, ssm = linear_attention(C, B, v * dt[..., None], dt * self.A(), ssm)
        y = (y + self.D.view(H, -1) * v).flatten(2)
        return self.out_proj(self.norm(y, z).to(z.dtype)), None if state is None else Mamba2State(past, ssm)
