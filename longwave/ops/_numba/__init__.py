"""CPU kernels in Numba, float32, over one small SIMD layer: one file an op. The only folder that imports numba.

Kernels take flat arrays and check nothing: the op that calls them has checked shapes, dtypes and devices.
"""

import importlib.util

import torch
from torch import Tensor

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def why_not(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors: what all of them have in common, told before one is imported."""
    if not _HAS_NUMBA:
        return "numba is not installed; pip install numba"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.dtype in (torch.float64, torch.complex128):
            return f"a tensor is {tensor.dtype}; the kernels compute in float32"
    return None
