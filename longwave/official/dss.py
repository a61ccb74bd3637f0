"""Modules of github.com/ag1988/dss (commit 777084e): the standalone DSS layer and its kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn import DSSFilter, Filter, long_conv
from longwave.nn.filters.dss import (
    EPSILON,
    ClipEigenvalues,
    ExpEigenvalues,
    ExpReImEigenvalues,
    softmax_taps,
    steps,
)
from longwave.nn.module import at_least_float32
from longwave.official.blocks import (
    ELEMENTWISE,
    ConvBlock,
    KernelFace,
    Multiplied,
    NamedInput,
    linear_activation,
)
from longwave.official.system import Choice, Options, Shapes, Size, State, System, prefixed, under
from longwave.ops import causal_conv


def run_softmax_taps(modes: Tensor, step: Tensor, W: Tensor, length: int, epsilon: float = EPSILON) -> Tensor:
    """:func:`longwave.nn.filters.dss.softmax_taps` with the authors' gradient.

    They shift the powers of a growing mode by a maximum that they detach. So its weight here is W exp(shift), with the
    exponential held at 1.
    """
    shift = step * (modes.real > 0) * (length - 1)
    return softmax_taps(modes, step, W * (shift - shift.detach()).exp().to(W.dtype), length, epsilon)


class RunSoftmaxFilter(Filter):
    """The softmax kernel over the length that is asked for, where ours is over a fixed one.

    Args:
        channels: C.
        modes: N.
        epsilon: see :func:`longwave.nn.filters.dss.softmax_taps`.
    """

    def __init__(self, channels: int, modes: int, epsilon: float):
        super().__init__()
        self.channels, self.epsilon = channels, epsilon
        self.log_dt = nn.Parameter(torch.zeros(channels, 2))
        self.Lambda = nn.Parameter(torch.zeros(modes, 2))
        self.W = nn.Parameter(torch.zeros(channels, modes, 2))

    def forward(self, length: int) -> Tensor:
        log_dt, Lambda, W = at_least_float32(self.log_dt, self.Lambda, self.W)
        modes = torch.view_as_complex(Lambda)
        return run_softmax_taps(modes, steps(modes, log_dt), torch.view_as_complex(W), length, self.epsilon)


class DSSConv(nn.Module):
    """The convolution of the authors' DSS.

    Args:
        filter: one row a channel; where bidirectional as many again, which look ahead.
        max_kernel_length: taps of the kernel that are used, or None for all.
        bidirectional: whether half of the rows look ahead.
    """

    def __init__(self, filter: Filter, max_kernel_length: int | None, bidirectional: bool):
        super().__init__()
        self.filter, self.max_kernel_length, self.bidirectional = filter, max_kernel_length, bidirectional

    def kernel(self, length: int) -> Tensor:
        """The rows of the filter that a sequence of this length meets."""
        return self.filter(min(self.max_kernel_length or length, length))

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, C, N), complex; the official layer has no state, ours has one where the kernel allows it."""
        return self._recurrent().realize().rest(batch)

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """u (B, L, C), state (B, C, N) from :meth:`init_state` -> y (B, L, C) and the state, or None without one."""
        if state is not None:
            return long_conv(u, self._recurrent(), state, skip=skip)
        k, L = self.kernel(u.shape[1]), u.shape[1]
        if not self.bidirectional:
            return causal_conv(u, k, skip=skip), None
        behind, ahead = k.chunk(2)
        # On a circle of L + K steps the taps ahead end at 2 K: where K < L that is not its end, so they look behind.
        n = L + k.shape[1]
        circle = F.pad(torch.cat([behind, ahead.flip(1)], dim=1), (0, L - k.shape[1]))
        return causal_conv(u, circle[:, :L], skip=skip, k_future=circle[:, n - L + 1 :].flip(1)), None

    def _recurrent(self) -> DSSFilter:
        if self.bidirectional:
            raise ValueError("bidirectional = True has no state: it looks ahead")
        if self.max_kernel_length or not isinstance(self.filter, DSSFilter):
            raise ValueError("there is no state with max_kernel_length or version = 'softmax': neither is a recurrence")
        return self.filter


def _width(o: Options) -> tuple[int, int]:
    """(H, N), which the kernel and the layer name differently."""
    names = ("H", "N") if o.kernel_only else ("d_model", "d_state")
    H, N = (getattr(o, name) for name in names)
    if H is None:
        raise ValueError(f"the option {names[0]!r} is missing")
    return H, 64 if N is None else N


def _channels(o: Options) -> int:
    return o.channels * (1 if o.hyper_act is None else 2)


def _rows(o: Options) -> int:
    """How many filters a feature has."""
    return o.channels if o.kernel_only else _channels(o) * (2 if o.bidirectional else 1)


def _eigenvalue_keys(o: Options) -> dict[str, str]:
    """Ours to the official key, of the kernel's eigenvalues."""
    if "exp" in o.version:
        im = "log_im" if "im" in o.version else "im"
        return {"Lambda.log_neg_re": "Lambda_log_neg_re", f"Lambda.{im}": f"Lambda_{im}"}
    return {"Lambda" if o.version == "softmax" else "Lambda.re_im": "Lambda"}


def _keys(o: Options) -> Shapes:
    H, N = _width(o)
    pair = () if "exp" in o.version else (2,)
    kernel: Shapes = dict.fromkeys(_eigenvalue_keys(o).values(), (N, *pair))
    kernel |= {"log_dt": (H, 2) if o.sep_dt_re_im else (H,), "W": (_rows(o), H, N, 2)}
    if o.kernel_only:
        return kernel
    linear = "output_linear" if o.postact is None else "output_linear.0"
    widened = H * (2 if o.postact == "glu" else 1)
    return {
        "D": (_channels(o), H),
        **prefixed("kernel.", kernel),
        f"{linear}.weight": (widened, o.channels * H),
        f"{linear}.bias": (widened, 1) if o.transposed else (widened,),
    }


def _filter(o: Options) -> Filter:
    H, N = _width(o)
    C = _rows(o) * H
    if o.version == "softmax":
        return RunSoftmaxFilter(C, N, o.epsilon)
    eigenvalues: nn.Module
    if "clip" in o.version:
        eigenvalues = ClipEigenvalues(N, o.max_real_Lambda)
    else:
        eigenvalues = (ExpReImEigenvalues if "im" in o.version else ExpEigenvalues)(N)
    return DSSFilter(C, N, eigenvalues=eigenvalues, discretization="none" if "no-scale" in o.version else "zoh")


def _build(o: Options) -> nn.Module:
    H, _ = _width(o)
    filter = _filter(o)
    if o.kernel_only:
        length = o.L if o.length is None else o.length
        if length is None:
            raise ValueError("a kernel alone needs the option 'L', its length")
        return KernelFace(filter, H, length)
    first = nn.Identity() if o.hyper_act is None else Multiplied(o.hyper_act)
    out = nn.Sequential(first, ELEMENTWISE[o.activation](), linear_activation(o.channels * H, H, o.postact))
    conv = DSSConv(filter, o.max_kernel_length, o.bidirectional)
    return NamedInput(ConvBlock(conv, H, _channels(o), out, transposed=o.transposed))


def _convert(state: State, o: Options) -> State:
    inside = "" if o.kernel_only else "kernel."
    ours = {key: state[inside + name] for key, name in _eigenvalue_keys(o).items()}
    log_dt = state[inside + "log_dt"]
    log_dt = log_dt if o.sep_dt_re_im else log_dt[:, None].expand(-1, 2)
    ours |= {"log_dt": log_dt.repeat(_rows(o), 1), "W": state[inside + "W"].flatten(0, 1)}
    if o.kernel_only:
        return prefixed("filter.", ours)
    linear = under("output_linear.", state)
    return {
        **prefixed("layer.conv.filter.", ours),
        "layer.D": state["D"],
        **{f"layer.out.2.{key}": t.flatten() if key.endswith("bias") else t for key, t in linear.items()},
    }


VERSIONS = ("softmax", "exp", "exp-re-im", "exp-no-scale", "clip", "clip-no-scale")
_ACTIVATIONS = ("gelu", None, "id", "identity", "linear", "tanh", "relu", "swish", "silu", "sigmoid")

DSS = System(
    options={
        "d_model": Size(None),
        "d_state": Size(None),
        "channels": 1,
        "bidirectional": False,
        "activation": Choice(*_ACTIVATIONS),
        "postact": Choice("glu", *_ACTIVATIONS, default=None),
        "weight_norm": Choice(False),
        "hyper_act": Choice(*_ACTIVATIONS, default=None),
        "transposed": True,
        "max_kernel_length": Size(None),
        "version": Choice(*VERSIONS),
        "sep_dt_re_im": True,
        "epsilon": 1e-7,
        "max_real_Lambda": 1e-4,
        "kernel_only": False,
        "H": Size(None),
        "N": Size(None),
        "L": Size(None),
        "length": Size(None),
    },
    ignored=frozenset(
        {"l_max", "dt_min", "dt_max", "trainable", "lr", "Lambda_init", "initializer", "dropout", "verbose"}
    ),
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"dss": DSS}
