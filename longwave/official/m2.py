"""Monarch Mixer's sequence mixer of github.com/HazyResearch/m2 (commit 7d359e8): M2-BERT's layer and the causal one."""

import torch
from torch import Tensor, nn

from longwave.mixers import Hyena, HyenaTwoSided
from longwave.nn import HyenaFilter, without_bias
from longwave.official.source import Alias, Flag, Name, Names, Size, Source, System, Turn, inside
from longwave.ops import causal_conv


class MonarchMixer(nn.Module):
    """y = Hyena(x) + W_o (r * x), with a norm before both and the second convolution where they are there.

    Args:
        model: Hyena of order 2, with its own state where it is causal.
        residual: r, taps behind, and ahead where there are two filters; their own weight of the present is the first's.
        norm: of the input.
    """

    def __init__(self, model: Hyena | HyenaTwoSided, residual: list[HyenaFilter], norm: nn.Module):
        super().__init__()
        self.model, self.residual, self.norm = model, nn.ModuleList(residual), norm

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        x = self.norm(x)
        y, _ = self.model(x)
        if not len(self.residual):
            return y
        k, *ahead = (filter(x.shape[1]) for filter in self.residual)
        r = causal_conv(x, k, skip=self.residual[0].bias, k_future=ahead[0] if ahead else None)
        return y + without_bias(self.model.out_proj, r)


def _gate_first(t: Tensor) -> Tensor:
    x_1, x_0, v = t.chunk(3)  # the gate of the input comes first there
    return torch.cat([x_0, x_1, v])


class MonarchMixerSequenceMixing(Source):
    """MonarchMixerSequenceMixing."""

    ignored = frozenset({"dropout", "hyena_kernel_lr", "hyena_lr_pos_emb", "hyena_wd", "hyena_filter_dropout"})
    optional = True
    d_model: Size
    l_max: Size = 128
    bidirectional: Flag = False
    hyena_w: float = 10.0
    hyena_w_mod: float = 1.0
    hyena_emb_dim: Size = 3
    hyena_filter_order: Size = 16
    residual_long_conv: Flag = False
    hyena_training_additions: Flag = False

    def build(self) -> nn.Module:
        sizes = {"emb_dim": self.hyena_emb_dim, "width": self.hyena_filter_order}
        model = (HyenaTwoSided if self.bidirectional else Hyena)(
            self.d_model, self.l_max, frequency=self.hyena_w, **sizes
        )
        skips = [True, False] if self.bidirectional else [True]
        residual = [
            HyenaFilter(self.d_model, self.l_max, frequency=self.hyena_w, **sizes, skip=skip)
            for skip in skips
            if self.residual_long_conv
        ]
        norm = nn.LayerNorm(self.d_model) if self.hyena_training_additions else nn.Identity()
        return MonarchMixer(model, residual, norm)

    def names(self) -> Names:
        places = {"filter_fn": ("model.filter_fn", "model.filter_ahead"), "filter_fn2": ("residual.0", "residual.1")}
        table: Names = []
        for name in ("filter_fn", "filter_fn2") if self.residual_long_conv else ("filter_fn",):
            for side, place in zip(("", "_rev") if self.bidirectional else ("",), places[name]):
                table += inside(f"{name}.", f"{place}.", self._filter(f"implicit_filter{side}"))
        linear = Turn(_gate_first, lambda t: t)
        return [
            *table,
            Name("in_linear.", "model.in_proj.", linear),
            Name("short_filter.", "model.short_filter.", linear),
            Name("out_linear.", "model.out_proj."),
            Name("layernorm.", "norm."),
        ]

    def _filter(self, mlp: str) -> Names:
        """Of one filter; the one ahead has an MLP of its own, and the same sine, positions and window."""
        names: Names = []
        faster = Turn(lambda t: t * self.hyena_w_mod, lambda t: t)
        for i in (1, 3, 5):
            freq, first = f"{mlp}.{i}.freq", "implicit_filter.1.freq"
            names += [Alias(freq, first)] if freq != first else []
            names.append(Name(freq, f"implicit_filter.{i}.freq", faster))
        return [*names, Name(f"{mlp}.", "implicit_filter."), Name("", "")]


SYSTEMS = {"m2": System(MonarchMixerSequenceMixing)}
