"""Mamba: a selective state space behind a short convolution and a gate.

Source: Gu & Dao (2023), arXiv:2312.00752, algorithm 2 and fig. 3. Parameter names are those of state-spaces/mamba.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import NORMS, AnyNorm, Hint, Response, derived, slowest_modes, without_bias
from longwave.nn.module import draw_steps, step_range, widened
from longwave.nn.padding import is_real, padded_short_conv, silence
from longwave.ops import selective_scan


class MambaState(NamedTuple):
    conv: Tensor  # (B, K-1, E) the short convolution's past
    ssm: Tensor  # (B, E, N)


class Mamba(Mixer, name="mamba"):
    """y = W_o (SSM(silu(conv(W_x x))) * silu(W_z x)), the SSM's step, input and output maps read off its input.

    Args:
        d_model: D.
        d_state: N, state size a channel.
        d_conv: K, taps of the short convolution.
        expand: E / D, the width inside over that outside.
        dt_rank: R, rank of the step size's projection; default ceil(D / 16).
        bias: on the in and out projections.
        conv_bias: on the short convolution.
        inner_norm: of what the step sizes are made of, of input and of output maps, as FalconMamba and Jamba have it.
        dt_min, dt_max: initial step sizes are log-uniform between them, and no smaller than 1e-4.
    Raises:
        ValueError: for an option below 1, or unless 0 < dt_min <= dt_max.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"d_state": 4, "d_conv": 2, "expand": 1, "dt_rank": 3, "bias": True, "conv_bias": False, "inner_norm": "rms"},
    )
    optim_hints: ClassVar[dict[str, Hint]] = {"A_log": Hint(), "D": Hint(), "dt_proj.bias": Hint()}

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: AnyNorm | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        super().__init__()
        E, R = round(expand * d_model), math.ceil(d_model / 16) if dt_rank is None else dt_rank
        for option, value in {"d_state": d_state, "d_conv": d_conv, "expand * d_model": E, "dt_rank": R}.items():
            if value < 1:
                raise ValueError(f"mamba needs {option} >= 1; got {value}")
        self.d_model, self.log_dt_range = d_model, step_range(dt_min, dt_max)
        self.in_proj = nn.Linear(d_model, 2 * E, bias=bias)
        self.conv1d = nn.Conv1d(E, E, d_conv, groups=E, bias=conv_bias)
        self.x_proj = nn.Linear(E, R + 2 * d_state, bias=False)
        self.dt_norm, self.B_norm, self.C_norm = (
            None if inner_norm is None else NORMS.read(inner_norm).build(width) for width in (R, d_state, d_state)
        )
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, d_state))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, d_model, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        N, R = self.A_log.shape[1], self.dt_proj.in_features
        self.A_log.copy_(torch.arange(1.0, N + 1, device=self.D.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.dt_proj.weight.uniform_(-(R**-0.5), R**-0.5)
        draw_steps(self.dt_proj.bias, *self.log_dt_range)

    @derived
    def A(self) -> Tensor:
        """The continuous state matrix (E, N)."""
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def responses(self) -> list[Response]:
        """Its step sizes depend on the input: those of a silent input, and of each channel the slowest mode."""
        A_log, bias = widened(self.A_log, self.dt_proj.bias)
        a = torch.exp(-nn.functional.softplus(bias)[:, None] * A_log.exp())
        return [slowest_modes(a)]

    def init_state(self, batch: int) -> MambaState:
        weight = self.conv1d.weight
        E, _, K = weight.shape
        ssm = torch.zeros(batch, *self.A_log.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        return MambaState(weight.new_zeros(batch, K - 1, E), ssm.to(weight.device))

    def mix(self, x: Tensor, state: MambaState | None, padding: Tensor | None):
        N, R, conv = self.A_log.shape[1], self.dt_proj.in_features, self.conv1d
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        past, ssm = (None, None) if state is None else state
        u = silence(u, padding)
        u, past = padded_short_conv(u, conv.weight[:, 0], conv.bias, past, padding, silu=True)
        dt, B, C = self.x_proj(u).split([R, N, N], dim=-1)
        if self.dt_norm is not None and self.B_norm is not None and self.C_norm is not None:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = without_bias(self.dt_proj, dt)
        if padding is not None:
            dt = dt.masked_fill(
                ~is_real(x.shape[1], padding)[..., None], float("-inf")
            )  # a step of length 0 leaves the state as it was
        y, ssm = selective_scan(u, dt, self.A(), B, C, self.D, ssm, z=z, dt_bias=self.dt_proj.bias, softplus=True)
        return self.out_proj(y), None if state is None else MambaState(past, ssm)
