"""How kernels are started and tuned: all that depends on the make of the GPU, or on there being none."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from longwave.ops._triton import INTERPRETED

_told = False


def size(gpu: int, tiny: int) -> int:
    """A block's size: in the interpreter a tiny one, so that short inputs have several."""
    return tiny if INTERPRETED else gpu


def precision(*tensors: Tensor) -> str:
    """How matrix products multiply: three TF32 products where an input is float32, and one where all have 16 bits.

    Operands are float32 then too: those of 16 bits are TF32 numbers, and what they are multiplied with loses least.
    """
    if INTERPRETED or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if any(tensor.dtype.itemsize > 2 for tensor in tensors) else "tf32"


def tuned(key: list[str], *choices: dict[str, int]) -> Callable[[Callable], Any]:
    """A kernel whose launch takes one of these choices: constants of the kernel, num_warps, num_stages.

    The fastest is measured once for each value of the arguments in ``key`` and kept on disk by Triton. In the
    interpreter, and where torch.use_deterministic_algorithms was called, it is the first. Results may not depend on
    it but by rounding.
    """
    options = ("num_warps", "num_stages")
    configs = [
        triton.Config(
            {n: v for n, v in choice.items() if n not in options}, **{n: choice[n] for n in options if n in choice}
        )
        for choice in choices
    ]

    def first(configs: list, named: dict, **others: Any) -> list:
        return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs

    def wrap(function: Callable) -> Any:
        return triton.autotune(
            configs[:1] if INTERPRETED else configs,
            key,
            prune_configs_by={"early_config_prune": first},
            do_bench=_measured,
            cache_results=True,
        )(triton.jit(function))

    return wrap


def _measured(call: Callable, quantiles: Any) -> Any:
    global _told
    if not _told:
        _told = True
        print("longwave: tuning GPU kernels, once for this GPU and these sizes", file=sys.stderr, flush=True)
    return triton.runtime.driver.active.get_benchmarker()(call, quantiles=quantiles)


def launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """Start a kernel where its first tensor is; ``grid`` is a number of programs, or a function of the constants."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    shape: Any = (lambda meta: (grid(meta),)) if callable(grid) else (grid,)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[shape](*args, **constants)
    else:
        kernel[shape](*args, **constants)


def rows(x: Tensor) -> Tensor:
    """x with its last axis side by side in memory; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def chunk_length(L: int, rows: int, tile: int) -> int:
    """Steps of the chunks that are scanned at once, of ``rows`` programs each: whole tiles, two or more.

    They are as long as leaves enough programs for a GPU of some hundred processors.
    """
    return max(2, triton.cdiv(L, triton.cdiv(4096, rows) * tile)) * tile
