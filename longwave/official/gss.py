"""Modules of lucidrains' gated-state-spaces-pytorch 0.1.0: DSS, GSS and GatedStateSpacesLM."""

from typing import Literal

import torch
from torch import Tensor, nn

from longwave.mixers import GSS
from longwave.models.backbone import Backbone, Block
from longwave.models.lm import LM
from longwave.nn import GSSFilter, LongConv
from longwave.official.blocks import Call, logits, mixed
from longwave.official.source import Flag, Name, Names, Positive, Size, Source, System, Turn, inside

PAIRS = Turn(lambda re, im: torch.stack([re, im], dim=-1), lambda pairs: pairs.unbind(-1))
DSS = [
    Name("param_D", "conv.D"),
    Name("Lambda_real", "conv.filter.Lambda.log_neg_re"),
    Name("Lambda_imag", "conv.filter.Lambda.im"),
    Name("Lambda_imag", "conv.filter.Lambda.log_im"),
    Name(("C_real", "C_imag"), "conv.filter.C", PAIRS),
]
BLOCK = [
    Name("norm.", "norm1."),
    Name("to_u.0.", "mixer.to_u."),
    Name("to_v.0.", "mixer.to_v."),
    *inside("dss.", "mixer.", [*DSS, Name("norm.", "norm.")]),
    Name("", "mixer."),
]


def _from_the_end(block: nn.Module, x: Tensor) -> Tensor:
    return block(x.flip(1))[0].flip(1)


class GSSLucidrains(Source):
    """One of the three classes, ``cls``; options of the others do not matter."""

    cls: Literal["DSS", "GSS", "GatedStateSpacesLM"] = "GSS"
    dim: Size | None = None
    kernel_N: Size = 512
    dim_expansion_factor: Positive = 4.0
    dss_kernel_N: Size = 512
    dss_kernel_H: Size = 256
    reverse_seq: Flag = False
    dss_kernel_lambda_imag_exp: Flag = True
    num_tokens: Size | None = None
    depth: Size | None = None

    def build(self) -> nn.Module:
        for name in ("dim", "num_tokens", "depth") if self.cls == "GatedStateSpacesLM" else ("dim",):
            if getattr(self, name) is None:
                raise ValueError(f"the option {name!r} is missing")
        assert self.dim is not None
        eigenvalues = "exp_re_im" if self.dss_kernel_lambda_imag_exp else "exp"
        if self.cls == "DSS":
            conv = LongConv(GSSFilter(self.dim, self.kernel_N, eigenvalues=eigenvalues))
            parts = nn.ModuleDict({"norm": nn.LayerNorm(self.dim), "conv": conv})
            return Call(parts, lambda m, x: m["conv"](m["norm"](x))[0])
        sizes = (self.dim, self.dss_kernel_N, self.dss_kernel_H, self.dim_expansion_factor)
        if self.cls == "GSS":
            return Call(Block(GSS(*sizes, eigenvalues), nn.LayerNorm), _from_the_end if self.reverse_seq else mixed)
        assert self.depth is not None
        assert self.num_tokens is not None
        backbone = Backbone([GSS(*sizes, eigenvalues) for _ in range(self.depth)], nn.LayerNorm)
        backbone.norm = nn.Identity()  # the official model ends without one
        return Call(LM(backbone, self.num_tokens, tied=False), logits)

    def names(self) -> Names:
        if self.cls != "GatedStateSpacesLM":
            return inside("", "model.", [*DSS, Name("norm.", "norm.")] if self.cls == "DSS" else BLOCK)
        blocks = [
            name
            for i in range(self.depth or 0)
            for name in inside(f"layers.{i}.", f"model.backbone.layers.{i}.", BLOCK)
        ]
        return [Name("token_emb.", "model.embedding."), Name("to_logits.", "model.head."), *blocks]


SYSTEMS = {"gss_lucidrains": System(GSSLucidrains)}
