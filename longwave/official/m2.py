"""Monarch Mixer's sequence mixer of github.com/HazyResearch/m2 (commit 7d359e8): M2-BERT's layer and the causal one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.mixers import Hyena, HyenaTwoSided
from longwave.nn import HyenaFilter
from longwave.official.safari_hyena import convert_filter, filter_aliases, filter_keys, filter_options
from longwave.official.system import Options, Shapes, Size, State, System, prefixed, under
from longwave.ops import causal_conv


class MonarchMixer(nn.Module):
    """y = Hyena(x) + W_o (r * x), with a norm before both and the second convolution where they are there.

    Args:
        model: Hyena of order 2, with its own state where it is causal.
        residual: r, taps behind, and ahead where there are two filters; their own weight of the present is the first's.
        norm: of the input.
    """

    def __init__(self, model: Hyena | HyenaTwoSided, residual: list[HyenaFilter], norm: nn.Module | None):
        super().__init__()
        self.model, self.residual, self.norm = model, nn.ModuleList(residual), norm

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> y (B, L, D)."""
        x = x if self.norm is None else self.norm(x)
        y, _ = self.model(x)
        if not len(self.residual):
            return y
        k, *ahead = (filter(x.shape[1]) for filter in self.residual)
        r = causal_conv(x, k, skip=self.residual[0].bias, k_future=ahead[0] if ahead else None)
        return y + F.linear(r, self.model.out_proj.weight)


def _filter(o: Options) -> Options:
    """The options of the filters under the names of Hyena's code."""
    return Options(
        l_max=o.l_max,
        filter_order=o.hyena_filter_order,
        emb_dim=o.hyena_emb_dim,
        w=o.hyena_w,
        num_inner_mlps=2,
        modulate=True,
        shift=0.0,
        target=1e-2,
        fast_decay_pct=0.3,
        slow_decay_pct=1.5,
        bias=True,
        normalized=False,
    )


def _filters(o: Options) -> list[str]:
    return ["filter_fn", "filter_fn2"] if o.residual_long_conv else ["filter_fn"]


def _keys(o: Options) -> Shapes:
    D, filter = o.d_model, filter_keys(_filter(o), o.d_model)
    if o.bidirectional:
        filter |= {_reversed(key): shape for key, shape in filter.items()}
    keys: Shapes = {
        "in_linear.weight": (3 * D, D),
        "in_linear.bias": (3 * D,),
        "out_linear.weight": (D, D),
        "out_linear.bias": (D,),
        "short_filter.weight": (3 * D, 1, 3),
        "short_filter.bias": (3 * D,),
    }
    if o.hyena_training_additions:
        keys |= {"layernorm.weight": (D,), "layernorm.bias": (D,)}
    return keys | {f"{name}.{key}": shape for name in _filters(o) for key, shape in filter.items()}


def _reversed(key: str) -> str:
    """The key of the filter ahead: an MLP of its own, and the same sine, positions and window."""
    return key.replace("implicit_filter.", "implicit_filter_rev.")


def _aliases(o: Options) -> dict[str, str]:
    freqs = filter_aliases(_filter(o))
    if o.bidirectional:
        first = next(iter(freqs.values()))
        freqs |= {_reversed(key): first for key in (first, *freqs)}
    return {f"{name}.{key}": f"{name}.{first}" for name in _filters(o) for key, first in freqs.items()}


def _build(o: Options) -> MonarchMixer:
    options = filter_options(_filter(o))
    model = (HyenaTwoSided if o.bidirectional else Hyena)(o.d_model, o.l_max, **options)
    residual = []
    if o.residual_long_conv:
        skips = (True, False) if o.bidirectional else (True,)
        residual = [HyenaFilter(o.d_model, o.l_max, **options, skip=skip) for skip in skips]
    return MonarchMixer(model, residual, nn.LayerNorm(o.d_model) if o.hyena_training_additions else None)


def _convert(state: State, o: Options) -> State:
    ours = {}
    for key in ("weight", "bias"):
        ours[f"model.out_proj.{key}"] = state[f"out_linear.{key}"]
        for theirs, name in (("in_linear", "in_proj"), ("short_filter", "short_filter")):
            x_1, x_0, v = state[f"{theirs}.{key}"].chunk(3)  # the gate of the input comes first there
            ours[f"model.{name}.{key}"] = torch.cat([x_0, x_1, v])
        if o.hyena_training_additions:
            ours[f"norm.{key}"] = state[f"layernorm.{key}"]
    places = {"filter_fn": ("model.filter_fn", "model.filter_ahead"), "filter_fn2": ("residual.0", "residual.1")}
    for name in _filters(o):
        for place, filter in zip(places[name], _directions(state, o, name)):
            ours |= prefixed(f"{place}.", filter)
    return ours


def _directions(state: State, o: Options, name: str) -> list[State]:
    """The filter behind, and the one ahead where there is one, which has no weight of the present."""
    filter = under(f"{name}.", state)
    freq = filter["implicit_filter.1.freq"] * o.hyena_w_mod
    found = []
    for rename in (lambda key: key, _reversed)[: 2 if o.bidirectional else 1]:
        one = {key: filter[rename(key)] for key in filter_keys(_filter(o), o.d_model) if rename(key) in filter}
        found.append(convert_filter({**one, "implicit_filter.1.freq": freq}, _filter(o)))
    for ahead in found[1:]:
        del ahead["bias"]
    return found


M2 = System(
    options={
        "d_model": Size(),
        "l_max": 128,
        "bidirectional": False,
        "hyena_w": 10.0,
        "hyena_w_mod": 1.0,
        "hyena_emb_dim": 3,
        "hyena_filter_order": 16,
        "residual_long_conv": False,
        "hyena_training_additions": False,
    },
    ignored=frozenset({"dropout", "hyena_kernel_lr", "hyena_lr_pos_emb", "hyena_wd", "hyena_filter_dropout"}),
    keys=_keys,
    build=_build,
    convert=_convert,
    aliases=_aliases,
    optional=True,
)

SYSTEMS = {"m2": M2}
