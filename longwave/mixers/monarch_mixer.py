"""Monarch Mixer's sequence mixer: Hyena that looks both ways, and a second pair of long convolutions past its gates.

Source: Fu et al. (2023) "Monarch Mixer", arXiv:2310.12109, sec. 4 and app. (M2-BERT). Filters are named as in Hyena;
the authors' code calls the second ones ``filter_fn2``.
"""

from typing import Any, ClassVar

from torch import Tensor

from longwave.mixers.base import WholeMixer
from longwave.mixers.hyena import HyenaLayer
from longwave.nn import NORMS, AnyNorm, HyenaFilter
from longwave.nn.padding import silence
from longwave.ops import causal_conv


class MonarchMixer(WholeMixer, HyenaLayer, name="monarch_mixer"):
    """y = W_o (x_0 h(v x_1) + r(x)),  h and r two-sided long convolutions: h(u) is

        sum_s k[s] u[t-s] + sum_s f[s] u[t+1+s] + bias u[t].

    Args:
        d_model: D.
        max_len: longest sequence.
        norm: of x, before all else; None for none.
        d_conv: K >= 1, taps of the short convolution on the projections, which looks back.
        emb_dim, width, inner_layers, frequency, target, slowest, fastest, shift: of all four implicit filters, see
            :class:`longwave.nn.HyenaFilter`.
    Raises:
        ValueError: as :class:`Hyena`.
    """

    filters = ("filter_fn", "filter_ahead", "residual", "residual_ahead")
    filter_ahead: HyenaFilter
    residual: HyenaFilter
    residual_ahead: HyenaFilter
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"max_len": 64, "width": 8, "emb_dim": 5},
        {"max_len": 32, "norm": "rms", "d_conv": 4, "width": 4, "emb_dim": 3, "frequency": 1.0, "shift": 0.05},
    )

    def __init__(
        self,
        d_model: int,
        max_len: int,
        norm: AnyNorm | None = None,
        d_conv: int = 3,
        emb_dim: int = 5,
        width: int = 128,
        inner_layers: int = 2,
        frequency: float = 10.0,
        target: float = 1e-2,
        slowest: float = 1.5,
        fastest: float = 0.3,
        shift: float = 0.0,
    ):
        window = (target, slowest, fastest, shift)
        super().__init__(d_model, max_len, 2, d_conv, emb_dim, width, inner_layers, frequency, *window)
        self.norm = None if norm is None else NORMS.read(norm).build(d_model)

    def mix_whole(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if self.norm is not None:
            x = silence(self.norm(x), padding)
        first, (gate,), v, _ = self.project(x, None, padding)
        filters = (self.filter_fn, self.filter_ahead, self.residual, self.residual_ahead)
        k, f, r, g = (filter(x.shape[1]) for filter in filters)
        y = first * causal_conv(v, k, skip=self.filter_fn.bias, gate_in=gate, k_future=f)
        return self.out_proj(y + causal_conv(x, r, skip=self.residual.bias, k_future=g))
