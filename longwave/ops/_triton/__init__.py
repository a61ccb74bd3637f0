"""GPU kernels in Triton, sums in float32: one file an op. The only folder that imports triton, but for its tests.

On a CPU they run in Triton's interpreter, for tests: where TRITON_INTERPRET=1 is set and the backend is named.
"""

import importlib.util
import os

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def why_not(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors: what all of them have in common, told before one is imported."""
    if not _HAS_TRITON:
        return "triton is not installed; pip install triton"
    for tensor in tensors:
        if INTERPRETED and (tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.complex64)):
            found = f"{tensor.dtype} on {tensor.device}"
            return f"TRITON_INTERPRET is set, and Triton interprets float32 on the CPU alone; a tensor is {found}"
        if not INTERPRETED and tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}, not on a GPU"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; the kernels take float32, bfloat16 and float16, and sum in float32"
    return _too_old(tensors[0].device.index or 0) if tensors and not INTERPRETED else None


def _too_old(index: int) -> str | None:
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(index)) < (8, 0):
        return f"the GPU has compute capability {found[0]}.{found[1]}; the kernels need 8.0 (Ampere) or newer"
    return None


vars(_too_old)["_dynamo_marked_constant"] = True  # called while a graph is made
