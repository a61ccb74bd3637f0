"""H3 of github.com/HazyResearch/safari (commit 02220c6) and github.com/HazyResearch/H3, and H3 with free taps."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import H3
from longwave.nn import ShiftFilter, Truncated
from longwave.official.blocks import MixerFace
from longwave.official.safari_longconv import KERNEL_IGNORED, KERNEL_OPTIONS, CircularConv, build_kernel, taps
from longwave.official.system import Choice, Number, Options, Shapes, Size, State, System, prefixed

LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {  # of the authors' transforms of -Re A
    "exp": lambda x: x,
    "none": torch.log,
    "relu": lambda x: torch.log(F.relu(x) + 1e-4),
    "sigmoid": F.logsigmoid,
    "softplus": lambda x: torch.log(F.softplus(x)),
}


def _h3_keys(o: Options) -> Shapes:
    D, H, N, P = o.d_model, o.d_model // o.head_dim, o.d_state, o.d_state // 2
    S = H if o.n_ssm is None else o.n_ssm
    linears = ("q_proj", "k_proj", "v_proj", "output_linear")
    return {
        "ssm_k_D": (D,),
        "D": (H,),
        **{f"{name}.weight": (D, D) for name in linears},
        **{f"{name}.bias": (D,) for name in linears},
        "ssm_k_kernel.kernel.B": (D, N),
        "ssm_k_kernel.kernel.C": (1, D, N),
        "kernel.kernel.log_dt": (H,),
        "kernel.kernel.inv_A_real": (S, P),
        "kernel.kernel.A_imag": (S, P),
        "kernel.kernel.B": (S, P, 2),
        "kernel.kernel.C": (1, H, P, 2),
    }


def _build_h3(o: Options) -> MixerFace:
    if o.d_model % o.head_dim:
        raise ValueError(f"head_dim = {o.head_dim} does not divide d_model = {o.d_model}")
    if o.n_ssm is not None and (o.d_model // o.head_dim) % o.n_ssm:
        raise ValueError(f"n_ssm = {o.n_ssm} does not divide the {o.d_model // o.head_dim} heads")
    model = H3(o.d_model, o.d_state // 2 * 2, o.head_dim, discretization=o.disc, systems=o.n_ssm)
    model.ssm_k_kernel = ShiftFilter(o.d_model, o.d_state)
    if o.l_max is not None:  # the authors truncate when they convolve, though not when they step
        model.kernel = Truncated(model.kernel, o.l_max)  # type: ignore[assignment]
        if o.l_max < o.d_state:
            model.ssm_k_kernel = Truncated(model.ssm_k_kernel, o.l_max)  # type: ignore[assignment]
    return MixerFace(model)


def _convert_h3(state: State, o: Options) -> State:
    ours = {key: tensor for key, tensor in state.items() if "kernel.kernel." not in key}
    system = {key: state[f"kernel.kernel.{key}"] for key in ("log_dt", "A_imag", "B", "C")}
    system["C"] = system["C"][0]
    real = state["kernel.kernel.inv_A_real"]
    if o.real_type == "none" and (real <= 0).any():
        raise ValueError("real_type = 'none' is carried over where 'kernel.kernel.inv_A_real' is positive; it is not")
    system["log_A_real"] = LOGARITHMS[o.real_type](real)
    if o.force_real:
        system["A_imag"] = 0 * system["A_imag"]
    if o.bandlimit is not None:  # modes that oscillate too fast are silenced for good
        oscillation = system["A_imag"].abs().repeat(len(system["C"]) // len(real), 1)
        slow = system["log_dt"].exp()[:, None] * oscillation / (2 * math.pi) < o.bandlimit / 2
        system["C"] = system["C"] * slow[..., None]
    shift = {"B": state["ssm_k_kernel.kernel.B"], "C": state["ssm_k_kernel.kernel.C"][0]}
    cut = o.l_max is not None
    ours |= {f"kernel.inner.{key}" if cut else f"kernel.{key}": tensor for key, tensor in system.items()}
    cut = cut and o.l_max < o.d_state
    ours |= {f"ssm_k_kernel.inner.{key}" if cut else f"ssm_k_kernel.{key}": tensor for key, tensor in shift.items()}
    return prefixed("model.", ours)


H3_LAYER = System(
    options={
        "d_model": Size(),
        "d_state": 64,
        "l_max": Size(None),
        "head_dim": 1,
        "n_ssm": Size(None),
        "mode": Choice("diag"),
        "disc": Choice("bilinear", "zoh"),
        "real_type": Choice(*LOGARITHMS),
        "bandlimit": Number(None),
        "force_real": False,
        "rate": Choice(1.0),
    },
    ignored=frozenset(
        {"use_fast_fftconv", "dropout", "layer_idx", "device", "dtype", "lr", "verbose", "deterministic"}
        | {"dt_min", "dt_max", "measure", "measure_args", "rank"}
    ),
    keys=_h3_keys,
    build=_build_h3,
    convert=_convert_h3,
)


class H3Conv(nn.Module):
    """H3 whose two state spaces are free taps:  y = W_o (q . conv(shift(k) v)).

    Both convolutions live on a circle of 2 L steps, as the authors' do: taps from L on look ahead, so that on fewer
    steps than there are taps it is not causal.

    Args:
        d_model: D.
        k_conv, conv: the convolutions of the keys, and of their products with the values.
    """

    def __init__(self, d_model: int, k_conv: CircularConv, conv: CircularConv):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.k_conv, self.conv = k_conv, conv
        self.k_D, self.D = (nn.Parameter(torch.zeros(d_model)) for _ in range(2))
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        k, _ = self.k_conv(self.k_proj(x), self.k_D)
        y, _ = self.conv(k * self.v_proj(x), self.D)
        return self.output_linear(self.q_proj(x) * y)


def _h3_conv_keys(o: Options) -> Shapes:
    D = o.d_model
    linears = ("q_proj", "k_proj", "v_proj", "output_linear")
    return {
        "k_D": (D,),
        "D": (D,),
        **{f"{name}.weight": (D, D) for name in linears},
        **{f"{name}.bias": (D,) for name in linears},
        "k_kernel.kernel": (1, D, taps(o)),
        "kernel.kernel": (1, D, taps(o)),
    }


def _convert_h3_conv(state: State, o: Options) -> State:
    ours = dict(state)
    ours["k_conv.filter.kernel"] = ours.pop("k_kernel.kernel")[0]
    ours["conv.filter.kernel"] = ours.pop("kernel.kernel")[0]
    return ours


H3_CONV = System(
    options={
        "d_model": Size(),
        "l_max": Size(),
        **KERNEL_OPTIONS,
        "head_dim": Choice(1),
        "channels": Choice(1),
    },
    ignored=KERNEL_IGNORED | {"use_fast_fftconv", "dropout", "layer_idx", "device", "dtype"},
    keys=_h3_conv_keys,
    build=lambda o: H3Conv(o.d_model, *(CircularConv(build_kernel(o, o.d_model), None, False) for _ in range(2))),
    convert=_convert_h3_conv,
)

SYSTEMS = {"h3": H3_LAYER, "h3conv": H3_CONV}
