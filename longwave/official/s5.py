"""S5SSM and SequenceLayer of github.com/lindermanlab/S5 (commit 3c18fdb): keys are flax paths, Dense is (in, out)."""

from typing import Any, Literal

import torch
from torch import nn

from longwave.mixers import S5, S5TwoSided
from longwave.official.blocks import BatchNorm, Call, ResidualBlock, mixed
from longwave.official.source import Flag, Name, Names, Positive, Size, Source, System, Turn, inside, part

DENSE = Turn(lambda t: t.mT if t.ndim > 1 else t, lambda t: t.mT if t.ndim > 1 else t)
HALVES = Turn(lambda t: t.chunk(2, dim=1), lambda first, second: torch.cat([first, second], dim=1))


class Layer(Source):
    """SequenceLayer, as far as it is not the state space."""

    ignored = frozenset({"dropout", "training", "d_model"})
    activation: Literal["full_glu", "half_glu1", "half_glu2", "gelu"] = "gelu"
    prenorm: Flag = False
    batchnorm: Flag = False
    bn_momentum: float = 0.9
    step_rescale: Positive | None = None


class S5SSM(Source):
    """S5SSM, in a SequenceLayer where ``layer`` has its options."""

    ignored = frozenset({"blocks", "dt_min", "dt_max"})
    H: Size
    P: Size | None = None
    P_local: Size | None = None
    P_given: Size | None = None
    conj_sym: Flag = True
    discretization: Literal["zoh", "bilinear"] = "zoh"
    C_init: Literal["lecun_normal", "trunc_standard_normal", "complex_normal"] = "lecun_normal"
    bidirectional: Flag = False
    clip_eigs: Flag = False
    step_rescale: Positive = 1.0
    layer: Any = None

    def modes(self) -> int:
        """P of the authors' S5SSM: said as it is, or before conjugate pairs were halved."""
        said = {P for P in (self.P, self.P_local) if P is not None}
        if self.P_given is not None:
            said.add(self.P_given // 2 if self.conj_sym else self.P_given)
        if not said:
            raise ValueError("the option 'P' is missing; P_local, or P_given of conjugate pairs, is the same")
        if len(said) > 1:
            raise ValueError(f"P = {self.P}, P_local = {self.P_local} and P_given = {self.P_given} do not agree")
        return said.pop()

    def build(self) -> nn.Module:
        layer = None if self.layer is None else part("layer", Layer, self.layer)
        mixer = (S5TwoSided if self.bidirectional else S5)(
            self.H,
            self.modes() * (2 if self.conj_sym else 1),
            conj_sym=self.conj_sym,
            discretization=self.discretization,
            clip_eigs=self.clip_eigs,
            rate=self.step_rescale if layer is None or layer.step_rescale is None else layer.step_rescale,
            activation="none" if layer is None else layer.activation,
        )
        if layer is None:
            return Call(mixer, mixed)
        if layer.batchnorm:
            norm: nn.Module = BatchNorm(self.H, momentum=1 - layer.bn_momentum)
        else:
            norm = nn.LayerNorm(self.H, eps=1e-6)
        return Call(ResidualBlock(mixer, norm, layer.prenorm).eval(), mixed)

    def names(self) -> Names:
        together = self.bidirectional and self.C_init == "complex_normal"
        ssm = [
            *([Name("C", ("C1", "C2"), HALVES)] if together else []),
            Name("log_step", "seq.log_step", Turn(lambda t: t[:, 0], lambda t: t[:, None])),
            Name("", "seq."),
        ]
        if self.layer is None:
            return inside("", "model.", [*ssm, Name("", "")])
        norm = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        dense = [
            Name(f"{name}/{theirs}", f"mixer.activation.{name}.{ours}", DENSE)
            for name in ("out1", "out2")
            for theirs, ours in (("kernel", "weight"), ("bias", "bias"))
        ]
        table = [Name(f"norm/{theirs}", f"norm.{ours}") for theirs, ours in norm.items()]
        return inside("", "model.", [*table, *dense, *inside("seq/", "mixer.", [*ssm, Name("", "")])])


SYSTEMS = {"s5": System(S5SSM)}
