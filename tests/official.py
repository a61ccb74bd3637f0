"""The authors' reference files, and formulas of convolutions, for the tests of official weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from longwave.official import SYSTEMS, from_official

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


class Case(NamedTuple):
    system: str
    config: dict
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, complex where the file has a real view of them."""
        found = {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}
        return {
            key.removesuffix("@complex"): torch.view_as_complex(t) if key.endswith("@complex") else t
            for key, t in found.items()
        }

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The official state, and what the official code uses besides."""
        liquid = {f"kernel.{key}": t for key, t in self.part("extra.liquid_").items()}
        stashed = {key: torch.view_as_real(t) if t.is_complex() else t for key, t in liquid.items()}
        return {key: t.to(dtype) for key, t in {**self.part("state."), **self.part("aux."), **stashed}.items()}

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {key: widened(t, dtype) for key, t in self.part("input.").items()}

    def module(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        return from_official(self.system, self.config, self.state(dtype))


def widened(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(torch.promote_types(t.dtype, dtype)) if t.is_floating_point() or t.is_complex() else t


RELEASES = {"retnet_torchscale__pypi030": {"release": "0.3.0"}}  # which a file's config does not say


def load(path: Any) -> Case:
    """The case of a file, or of what makes one."""
    if not isinstance(path, Path):
        return path.case()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return Case(metadata["system"], json.loads(metadata["config"]) | RELEASES.get(path.stem, {}), load_file(path))


def named(outputs, names) -> dict[str, Tensor]:
    """What a module returns, by the file's output names."""
    return outputs if isinstance(outputs, dict) else {next(iter(names)): outputs}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest magnitude."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def golden(stem: str) -> Case:
    """The case of a file name."""
    return load(next(path for path in GOLDEN if path.stem == stem))


def drawn(system: str, config: dict, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A module and its official state, drawn at random."""
    rng = torch.Generator().manual_seed(1)
    options = SYSTEMS[system].read(config)
    state = {}
    for key, shape in SYSTEMS[system].keys(options).items():
        t = torch.randn(shape, generator=rng, dtype=dtype)
        state[key] = 0.3 * t - 1.5 if key.endswith(("inv_dt", "log_dt")) else t
    for key, first in SYSTEMS[system].aliases(options).items():
        state[key] = state[first]
    return from_official(system, config, state), state


def series(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def convolved(x: Tensor, weight) -> Tensor:
    """y[..., t] = sum_s weight(t - s) x[..., s]; weight(lag) is a tensor without the time axis, or None."""
    L = x.shape[-1]
    columns = []
    for t in range(L):
        terms = [w * x[..., s] for s in range(L) if (w := weight(t - s)) is not None]
        columns.append(sum(terms, torch.zeros_like(x[..., 0])))
    return torch.stack(columns, dim=-1)
