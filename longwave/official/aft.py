"""AFTFull, AFTSimple and AFTLocal of github.com/rish-16/aft-pytorch (commit 9a89696), which look ahead."""

from typing import Literal

from torch import nn

from longwave.official.replicas.aft import TwoSidedAFT
from longwave.official.source import Size, Source, System


class AFT(Source):
    """One of the three classes, ``cls``."""

    cls: Literal["AFTFull", "AFTSimple", "AFTLocal"] = "AFTFull"
    max_seqlen: Size
    dim: Size
    hidden_dim: Size = 64
    s: Size = 256

    def build(self) -> nn.Module:
        max_len = None if self.cls == "AFTSimple" else self.max_seqlen
        return TwoSidedAFT(self.dim, self.hidden_dim, max_len, self.s if self.cls == "AFTLocal" else None)


SYSTEMS = {"aft": System(AFT)}
