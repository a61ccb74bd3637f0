"""S5SSM and SequenceLayer of github.com/lindermanlab/S5 (commit 3c18fdb): keys are flax paths, Dense is (in, out)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import S5, Mixer, S5TwoSided, nearest
from longwave.mixers.s5 import C_INITS
from longwave.models.pretrained.blocks import MixerFace
from longwave.models.pretrained.system import REQUIRED, Choice, Options, Shapes, State, System

LAYER: dict[str, Any] = {
    "activation": "gelu",
    "prenorm": False,
    "batchnorm": False,
    "bn_momentum": 0.9,
    "step_rescale": None,
    "dropout": 0.0,
    "training": False,
    "d_model": None,
}
DENSE = {"full_glu": ("out1", "out2"), "half_glu1": ("out2",), "half_glu2": ("out2",), "gelu": ()}


class BatchNorm(nn.Module):
    """Batch normalisation of (B, L, D) over batch and time, flax's: running statistics outside training, eps 1e-5.

    Args:
        d_model: D.
        momentum: weight of the old statistics.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, d_model: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("var", torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        y = F.batch_norm(rows, self.mean, self.var, self.weight, self.bias, self.training, 1 - self.momentum, 1e-5)
        return y.view_as(x)


class SequenceLayer(nn.Module):
    """x + mixer(norm x), or norm(x + mixer(x)): called as a mixer, with a mixer's states.

    Args:
        mixer: with its activation.
        norm: of (B, L, D).
        prenorm: the first of the two.
    """

    def __init__(self, mixer: Mixer, norm: nn.Module, prenorm: bool):
        super().__init__()
        self.mixer, self.norm, self.prenorm = mixer, norm, prenorm

    def init_state(self, batch: int) -> Any:
        """The mixer's."""
        return self.mixer.init_state(batch)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, L, D), the mixer's state -> (B, L, D) and the state, or None where none came in."""
        y, state = self.mixer(self.norm(x) if self.prenorm else x, state)
        return x + y if self.prenorm else self.norm(x + y), state


def _layer(o: Options) -> Options | None:
    if o.layer is None:
        return None
    for name, value in o.layer.items():
        if name not in LAYER:
            raise ValueError(f"layer has no option {name!r} (= {value!r}){nearest(name, LAYER)}")
    layer = Options(**{**LAYER, **o.layer})
    if layer.activation not in DENSE:
        known = ", ".join(DENSE)
        raise ValueError(f"layer has no activation {layer.activation!r}; there are {known}")
    return layer


def _modes(o: Options) -> int:
    """P of the authors' S5SSM: said as it is, or before conjugate pairs were halved."""
    said = [P for P in (o.P, o.P_local) if P is not None]
    if o.P_given is not None:
        said.append(o.P_given // 2 if o.conj_sym else o.P_given)
    if not said:
        raise ValueError("the option 'P' is missing; P_local, or P_given of conjugate pairs, is the same")
    if len(set(said)) > 1:
        raise ValueError(f"P = {o.P}, P_local = {o.P_local} and P_given = {o.P_given} do not agree")
    return said[0]


def _readouts(o: Options) -> Shapes:
    H, P = o.H, _modes(o)
    if not o.bidirectional:
        return {"C": (H, P, 2)}
    return {"C": (H, 2 * P, 2)} if o.C_init == "complex_normal" else {"C1": (H, P, 2), "C2": (H, P, 2)}


def _keys(o: Options) -> Shapes:
    H, P, layer = o.H, _modes(o), _layer(o)
    ssm: Shapes = {
        "Lambda_re": (P,),
        "Lambda_im": (P,),
        "B": (P, H, 2),
        **_readouts(o),
        "D": (H,),
        "log_step": (P, 1),
    }
    if layer is None:
        return ssm
    keys: Shapes = {f"seq/{key}": shape for key, shape in ssm.items()}
    for name in DENSE[layer.activation]:
        keys |= {f"{name}/kernel": (H, H), f"{name}/bias": (H,)}
    statistics = ("scale", "bias", "mean", "var") if layer.batchnorm else ("scale", "bias")
    return keys | {f"norm/{name}": (H,) for name in statistics}


def _build(o: Options) -> MixerFace:
    layer, kind = _layer(o), S5TwoSided if o.bidirectional else S5
    rate = o.step_rescale if layer is None or layer.step_rescale is None else layer.step_rescale
    mixer = kind(
        o.H,
        _modes(o) * (2 if o.conj_sym else 1),
        conj_sym=o.conj_sym,
        discretization=o.discretization,
        clip_eigs=o.clip_eigs,
        rate=rate,
        activation="none" if layer is None else layer.activation,
    )
    if layer is None:
        return MixerFace(mixer)
    norm = BatchNorm(o.H, layer.bn_momentum) if layer.batchnorm else nn.LayerNorm(o.H, eps=1e-6)
    return MixerFace(SequenceLayer(mixer, norm, layer.prenorm).eval())


def _convert(state: State, o: Options) -> State:
    inner = "" if o.layer is None else "mixer."
    ours = {}
    for key, tensor in state.items():
        *path, name = key.split("/")
        part = path[0] if path else "seq"
        if part == "norm":
            ours[f"norm.{'weight' if name == 'scale' else name}"] = tensor
        elif part != "seq":
            weight = name == "kernel"
            ours[f"{inner}activation.{part}.{'weight' if weight else name}"] = tensor.mT if weight else tensor
        elif name == "C" and o.bidirectional:
            ours[f"{inner}C1"], ours[f"{inner}C2"] = tensor.chunk(2, dim=1)
        elif name == "log_step":
            ours[f"{inner}seq.log_step"] = tensor[:, 0]
        else:
            ours[f"{inner}{name if name in ('C', 'C1', 'C2', 'D') else f'seq.{name}'}"] = tensor
    return {f"model.{key}": tensor for key, tensor in ours.items()}


S5_SYSTEM = System(
    options={
        "H": REQUIRED,
        "P": None,
        "P_local": None,
        "P_given": None,
        "conj_sym": True,
        "discretization": Choice("zoh", "bilinear"),
        "C_init": Choice(*C_INITS),
        "bidirectional": False,
        "clip_eigs": False,
        "step_rescale": 1.0,
        "layer": None,
    },
    ignored=frozenset({"blocks", "dt_min", "dt_max"}),
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"s5": S5_SYSTEM}
