"""S5SSM and SequenceLayer of github.com/lindermanlab/S5 (commit 3c18fdb): keys are flax paths, Dense is (in, out)."""

from functools import partial
from typing import Any

from torch import nn

from longwave.mixers import S5, S5TwoSided
from longwave.mixers.s5 import C_INITS
from longwave.official.blocks import BatchNorm, MixerFace, ResidualBlock
from longwave.official.system import (
    Choice,
    Number,
    Options,
    Shapes,
    Size,
    State,
    System,
    prefixed,
    read_options,
    read_part,
)

NORM = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
DENSE = {"full_glu": ("out1", "out2"), "half_glu1": ("out2",), "half_glu2": ("out2",), "gelu": ()}
LAYER: dict[str, Any] = {
    "activation": Choice(*DENSE, default="gelu"),
    "prenorm": False,
    "batchnorm": False,
    "bn_momentum": 0.9,
    "step_rescale": Number(None, above=0),
}


def _layer(o: Options) -> Options | None:
    if o.layer is None:
        return None
    return read_part("layer", partial(read_options, LAYER, ignored={"dropout", "training", "d_model"}), o.layer)


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
    keys: Shapes = prefixed("seq/", ssm)
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
    norm = BatchNorm(o.H, momentum=1 - layer.bn_momentum) if layer.batchnorm else nn.LayerNorm(o.H, eps=1e-6)
    return MixerFace(ResidualBlock(mixer, norm, layer.prenorm).eval())


def _convert(state: State, o: Options) -> State:
    inner = "" if o.layer is None else "mixer."
    ours = {}
    for key, tensor in state.items():
        *path, name = key.split("/")
        part = path[0] if path else "seq"
        if part == "norm":
            ours[f"norm.{NORM.get(name, name)}"] = tensor
        elif part != "seq":
            weight = name == "kernel"
            ours[f"{inner}activation.{part}.{'weight' if weight else name}"] = tensor.mT if weight else tensor
        elif name == "C" and o.bidirectional:
            ours[f"{inner}C1"], ours[f"{inner}C2"] = tensor.chunk(2, dim=1)
        elif name == "log_step":
            ours[f"{inner}seq.log_step"] = tensor[:, 0]
        else:
            ours[f"{inner}{name if name in ('C', 'C1', 'C2', 'D') else f'seq.{name}'}"] = tensor
    return prefixed("model.", ours)


S5_SYSTEM = System(
    options={
        "H": Size(),
        "P": Size(None),
        "P_local": Size(None),
        "P_given": Size(None),
        "conj_sym": True,
        "discretization": Choice("zoh", "bilinear"),
        "C_init": Choice(*C_INITS),
        "bidirectional": False,
        "clip_eigs": False,
        "step_rescale": Number(1.0, above=0),
        "layer": None,
    },
    ignored=frozenset({"blocks", "dt_min", "dt_max"}),
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"s5": S5_SYSTEM}
