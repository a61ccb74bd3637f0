"""Filters without a state space, fitted by a few modes each: a model whose state is constant."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers import MIXERS, Mixer, MixerSpec
from longwave.mixers.conv_layer import ConvLayer
from longwave.mixers.hyena import Hyena, LaughingHyena
from longwave.models.lm import LM
from longwave.models.spec import ModelSpec

COMPARED = 512  # tokens, at most, on which logits are compared


class Distilled(NamedTuple):
    """What :func:`distill` returns.

    Fields:
        model: in evaluation mode, on the CPU.
        spec: its description, for ``save``.
        filters: by the name of a layer, the error of each of its filters, (orders, C) or (1, C): the root mean square
            of the difference of the taps but the present one, which is exact, over that of the taps.
        logits: the same of the logits.
    """

    model: LM
    spec: ModelSpec
    filters: dict[str, Tensor]
    logits: float


def distill(model: nn.Module, spec: ModelSpec, order: int = 16, *, ids: Tensor | None = None) -> Distilled:
    """An ordinary model like this one, in which filters without a state space are sums of ``order / 2`` mode pairs.

    Layers that have a state space already, and attention, stay what they are. How near a filter comes is its own
    matter: smooth ones do with few modes, those that look like noise with none. Look at the errors.

    Source: Massaroli et al. (2023) "Laughing Hyena Distillery: Extracting Compact Recurrences From Convolutions",
    arXiv:2310.18780.

    Args:
        model, spec: a language model, as :func:`longwave.models.load` returns them.
        order: N, even, real state size of every fitted filter.
        ids: (B, L) int64 tokens on which to compare the logits; by default 512 random ones, or as many as it takes.
    Raises:
        ValueError: for a model that is no language model, one without such filters, one with ckconv, which has a
            matrix for every lag, or an odd order.
    """
    if not isinstance(model, LM):
        raise ValueError(f"distill is for language models, which generate; got a {type(model).__name__}")
    kinds = [mixer.kind for mixer in spec.pattern]
    if "ckconv" in kinds:
        raise ValueError("distill fits one filter a feature; ckconv has a matrix for every lag: train another mixer")
    if not set(kinds) & set(_RULES):
        found, known = (", ".join(dict.fromkeys(names)) for names in (kinds, _RULES))
        raise ValueError(f"there is nothing to distill in {found}; it fits the filters of {known}")
    pattern = [_RULES[m.kind].spec(m, order) if m.kind in _RULES else m for m in spec.pattern]
    new_spec = type(spec).model_validate({**dict(spec), "pattern": pattern})
    student: Any = new_spec.build().eval().to(next(model.parameters()).dtype)
    filters, theirs = {}, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fitted = {name: m for name, m in model.named_modules() if isinstance(m, Mixer) and m.name in _RULES}
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            if name in theirs:
                tensor.copy_(theirs[name])
        for name, layer in fitted.items():
            filters[name] = _RULES[layer.name].fit(layer, student.get_submodule(name))
        if ids is None:
            ids = torch.randint(model.vocab, (1, _length(fitted)), generator=torch.Generator().manual_seed(0))
        exact = model(ids)[0].double()
        error = (student(ids)[0].double() - exact).norm() / exact.norm()
    return Distilled(student, new_spec, filters, error.item())


def _length(fitted: dict[str, Any]) -> int:
    """As many tokens as all filters that are fitted are defined for."""
    filters = [layer.filter_fn if isinstance(layer, Hyena) else layer.kernel for layer in fitted.values()]
    return min([COMPARED, *(filter.longest() for filter in filters)])


class _Rule(NamedTuple):
    spec: Callable[[Any, int], MixerSpec]  # of the layer that takes the place of one with this spec
    fit: Callable[[Any, Any], Tensor]  # the new layer's filters to the old one's; the errors


def _hyena(old: Any, order: int) -> MixerSpec:
    return MIXERS.make("laughing_hyena", d_state=order, order=old.order, d_conv=old.d_conv)


def _fit_hyena(old: Hyena, new: LaughingHyena) -> Tensor:
    k = old.by_order(old.filter_fn(old.filter_fn.max_len))
    fits = [filter.fit(taps) for filter, taps in zip(new.modes(), k, strict=True)]
    skips = torch.stack([skip for _, skip in fits])
    new.bias.copy_(torch.stack(old.by_order(old.filter_fn.bias)) + skips)
    return torch.stack([error for error, _ in fits])


def _conv(output: str) -> Callable[[Any, int], MixerSpec]:
    def spec(old: Any, order: int) -> MixerSpec:
        filter = {"kind": "modal", "d_state": order}
        return MIXERS.make("conv", filter=filter, channels=getattr(old, "channels", 1), output=output)

    return spec


def _fit_conv(old: ConvLayer, new: ConvLayer) -> Tensor:
    kernel: Any = new.kernel
    length = old.kernel.longest()
    assert length is not None
    error, skip = kernel.fit(old.kernel(length))
    new.D.copy_(old.D + skip)
    return error[None]


_RULES = {
    "hyena": _Rule(_hyena, _fit_hyena),
    "long_conv": _Rule(_conv("glu"), _fit_conv),
    "dss_softmax": _Rule(_conv("linear"), _fit_conv),
}
