"""Modules of lucidrains' gated-state-spaces-pytorch 0.1.0: DSS, GSS and GatedStateSpacesLM."""

import torch
from torch import Tensor, nn

from longwave.mixers import GSS
from longwave.models.backbone import Backbone, Block
from longwave.models.lm import LM
from longwave.nn import GSSFilter, LongConv
from longwave.official.blocks import LMFace, MixerFace
from longwave.official.system import Choice, Number, Options, Shapes, Size, State, System, prefixed, under


class NormedConv(nn.Module):
    """y = k * v + D v,  v = norm(x).

    Args:
        filter: gives k.
    """

    def __init__(self, filter: GSSFilter):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(filter.channels), LongConv(filter)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> y (B, L, C)."""
        return self.conv(self.norm(x))[0]


def _dss_keys(C: int, N: int) -> Shapes:
    keys: Shapes = {"norm.weight": (C,), "norm.bias": (C,), "param_D": (C,), "Lambda_real": (N,), "Lambda_imag": (N,)}
    return keys | {"C_real": (C, N), "C_imag": (C, N)}


def _gss_keys(o: Options) -> Shapes:
    D, E, C = o.dim, int(o.dim_expansion_factor * o.dim), o.dss_kernel_H
    return {
        "norm.weight": (D,),
        "norm.bias": (D,),
        "to_u.0.weight": (E, D),
        "to_v.0.weight": (C, D),
        **prefixed("dss.", _dss_keys(C, o.dss_kernel_N)),
        "to_gate.weight": (E, C),
        "to_out.weight": (D, E),
        "to_out.bias": (D,),
    }


def _keys(o: Options) -> Shapes:
    if o.cls == "DSS":
        return _dss_keys(o.dim, o.kernel_N)
    if o.cls == "GSS":
        return _gss_keys(o)
    return {
        "token_emb.weight": (o.num_tokens, o.dim),
        **{f"layers.{i}.{key}": shape for i in range(o.depth) for key, shape in _gss_keys(o).items()},
        "to_logits.weight": (o.num_tokens, o.dim),
    }


def _eigenvalues(o: Options) -> str:
    return "exp_re_im" if o.dss_kernel_lambda_imag_exp else "exp"


def _mixer(o: Options) -> GSS:
    return GSS(o.dim, o.dss_kernel_N, o.dss_kernel_H, o.dim_expansion_factor, _eigenvalues(o))


def _build(o: Options) -> nn.Module:
    needed = {"DSS": ("dim",), "GSS": ("dim",), "GatedStateSpacesLM": ("dim", "num_tokens", "depth")}[o.cls]
    for name in needed:
        if getattr(o, name) is None:
            raise ValueError(f"the option {name!r} is missing")
    if o.cls == "DSS":
        return NormedConv(GSSFilter(o.dim, o.kernel_N, eigenvalues=_eigenvalues(o)))
    if o.cls == "GSS":
        return MixerFace(Block(_mixer(o), nn.LayerNorm), reverse=o.reverse_seq)
    backbone = Backbone([_mixer(o) for _ in range(o.depth)], nn.LayerNorm)
    backbone.norm = nn.Identity()  # the official model ends without one
    return LMFace(LM(backbone, o.num_tokens, tied=False))


def _convert_dss(state: State, o: Options) -> State:
    return {
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
        "conv.D": state["param_D"],
        "conv.filter.Lambda.log_neg_re": state["Lambda_real"],
        f"conv.filter.Lambda.{'log_im' if o.dss_kernel_lambda_imag_exp else 'im'}": state["Lambda_imag"],
        "conv.filter.C": torch.stack([state["C_real"], state["C_imag"]], dim=-1),
    }


def _convert_block(state: State, o: Options) -> State:
    return {
        "norm1.weight": state["norm.weight"],
        "norm1.bias": state["norm.bias"],
        "mixer.to_u.weight": state["to_u.0.weight"],
        "mixer.to_v.weight": state["to_v.0.weight"],
        **prefixed("mixer.", _convert_dss(under("dss.", state), o)),
        **{f"mixer.{key}": state[key] for key in ("to_gate.weight", "to_out.weight", "to_out.bias")},
    }


def _convert(state: State, o: Options) -> State:
    if o.cls == "DSS":
        return _convert_dss(state, o)
    if o.cls == "GSS":
        return prefixed("model.", _convert_block(state, o))
    ours = {"model.embedding.weight": state["token_emb.weight"], "model.head.weight": state["to_logits.weight"]}
    for i in range(o.depth):
        block = _convert_block(under(f"layers.{i}.", state), o)
        ours |= prefixed(f"model.backbone.layers.{i}.", block)
    return ours


GSS_LUCIDRAINS = System(
    options={
        "cls": Choice("DSS", "GSS", "GatedStateSpacesLM", default="GSS"),
        "dim": Size(None),
        "kernel_N": 512,
        "dim_expansion_factor": Number(4.0, above=0),
        "dss_kernel_N": 512,
        "dss_kernel_H": 256,
        "reverse_seq": False,
        "dss_kernel_lambda_imag_exp": True,
        "num_tokens": Size(None),
        "depth": Size(None),
    },
    keys=_keys,
    build=_build,
    convert=_convert,
)

SYSTEMS = {"gss_lucidrains": GSS_LUCIDRAINS}
