"""Whole models whose body has the authors' files and whose ends are an embedding and a map to logits: cases besides."""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from official import Case, series
from torch import Tensor

from longwave.official import SYSTEMS


class Derived(NamedTuple):
    """A language model around an official body.

    Attributes:
        stem: for the test's id.
        system: name of the whole in longwave.official.
        config: its options.
    """

    stem: str
    system: str
    config: dict

    def case(self) -> Case:
        """Weights, logits and gradients."""
        return _sashimi_lm(self.stem)


SMALL = {"vocab_size": 11, "d_model": 4, "n_layers": 2, "pool": [3, 2], "d_state": 6, "L": 25}
DERIVED = [
    Derived("sashimi_lm__nplr", "sashimi_lm", {**SMALL, "mode": "nplr", "n_ssm": 1, "dt_transform": "softplus"}),
    Derived("sashimi_lm__diag", "sashimi_lm", {**SMALL, "mode": "diag", "transposed": False, "dt_transform": "exp"}),
]


@functools.cache
def _sashimi_lm(stem: str) -> Case:
    derived = next(one for one in DERIVED if one.stem == stem)
    rng, L, V = torch.Generator().manual_seed(1), derived.config["L"], derived.config["vocab_size"]
    options: Any = SYSTEMS[derived.system].read(derived.config)
    body = options.body()
    state: dict[str, Tensor] = {}
    for key, shape in options.tensors().items():
        t = 0.6 * torch.randn(shape, generator=rng)
        state[key] = torch.tensor(37) if key.endswith("l_kernel") else t - 1 if key.endswith("inv_dt") else t
    leaves = {key: t.double().requires_grad_() for key, t in state.items() if t.is_floating_point()}
    inner = {key.removeprefix("model."): t for key, t in {**state, **leaves}.items() if key.startswith("model.")}
    ids = torch.randint(V, (2, L), generator=rng)
    with torch.enable_grad():
        module = body.build().double()
        x = F.embedding(ids, leaves["encoder.0.weight"])
        y = torch.func.functional_call(module, body.convert(inner), (), {"x": x})
        y = F.linear(y, *(leaves[f"decoder.0.output_transform.{what}"] for what in ("weight", "bias")))
        cotangent = series(*y.shape)
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    tensors = {f"state.{key}": t for key, t in state.items()} | {"input.input_ids": ids, "cotangent": cotangent}
    tensors |= {f"grad64.state.{key}": t for key, t in zip(leaves, grads)}
    return Case(derived.system, derived.config, tensors | {"output64.y": y.detach(), "output.y": y.detach().float()})
