"""H3: q * SSM_diag(SSM_shift(k) * v), linear attention whose memory is two state spaces.

Source: Fu, Dao et al. (2023) "Hungry Hungry Hippos", arXiv:2212.14052, sec. 3.2 and algorithm 1. Parameter names are
those of the authors' H3 (github.com/HazyResearch/H3), whose kernels sit one level deeper.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import Mixer
from longwave.nn import S4DFilter, ShiftFilter, init_conv_state, long_conv
from longwave.nn.padding import silence


class H3State(NamedTuple):
    keys: Tensor  # (B, N-1, D) the last keys, before the shift SSM
    h: Tensor  # (B, P * P, H, N/2) complex, one diagonal SSM a pair of head dimensions


class H3(Mixer, name="h3"):
    """y = W_o (q . SSM_diag(SSM_shift(k) v^T)), the outer product within heads of width P.

    Args:
        d_model: D.
        d_state: N, taps of the shift SSM and real state size of the diagonal one, even.
        head_dim: P, divides D; 1 is the released models' choice, 8 the paper's for language.
        init, discretization, dt_min, dt_max, systems: of the diagonal SSM, see :class:`longwave.nn.S4DFilter`.
    Raises:
        ValueError: where head_dim does not divide d_model.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"d_state": 16},
        {"d_state": 6, "head_dim": 4, "init": "inv", "discretization": "zoh"},
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        init: str = "lin",
        discretization: str = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        systems: int | None = None,
    ):
        super().__init__()
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"h3: head_dim = {head_dim} does not divide d_model = {d_model}")
        heads = d_model // head_dim
        self.d_model, self.head_dim = d_model, head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.ssm_k_kernel = ShiftFilter(d_model, d_state)
        self.ssm_k_D = nn.Parameter(torch.empty(d_model))
        self.kernel = S4DFilter(
            heads, d_state, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max, systems=systems
        )
        self.D = nn.Parameter(torch.empty(heads))
        self.output_linear = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.ssm_k_D.normal_()
        self.D.normal_()

    def init_state(self, batch: int) -> H3State:
        h = init_conv_state(self.kernel, batch * self.head_dim**2)
        return H3State(init_conv_state(self.ssm_k_kernel, batch), h.unflatten(0, (batch, -1)))

    def mix(self, x: Tensor, state: H3State | None, padding: Tensor | None):
        B, L, _ = x.shape
        P, H = self.head_dim, self.d_model // self.head_dim
        keys, h = (None, None) if state is None else (state.keys, state.h.flatten(0, 1))
        q, v = self.q_proj(x), self.v_proj(x)
        k, keys = long_conv(silence(self.k_proj(x), padding), self.ssm_k_kernel, keys, padding, skip=self.ssm_k_D)
        # (B P P, L, H): one copy of the diagonal SSM for every pair (key dimension, value dimension) of a head
        q, k = (t.unflatten(2, (H, P)).movedim(3, 1)[:, :, None].expand(B, P, P, L, H) for t in (q, k))
        v = silence(v, padding).unflatten(2, (H, P)).movedim(3, 1)[:, None].expand(B, P, P, L, H)
        q, k, v = (t.reshape(B * P * P, L, H) for t in (q, k, v))
        padding = None if padding is None else padding.repeat_interleave(P * P)
        y, h = long_conv(v, self.kernel, h, padding, skip=self.D, gate_in=k, gate_out=q)
        y = y.view(B, P, P, L, H)
        y = y[:, 0] if P == 1 else y.sum(1)  # (B, P, L, H); a sum of one term is a copy
        y = y.transpose(1, 2).flatten(2)  # value dimension before head, as the authors' output_linear has it
        if state is None:
            return self.output_linear(y), None
        return self.output_linear(y), H3State(keys, h.unflatten(0, (B, P * P)))
