"""What every module of longwave shares: how it is (re)drawn, and what it asks of the optimiser."""

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from longwave.ops import at_least_float32


@dataclass(frozen=True)
class Hint:
    """What a parameter asks of the optimiser: a learning rate above which it should not go, and no weight decay.

    Modules state hints where the parameters are born, as ``optim_hints = {"log_dt": Hint(max_lr=1e-3)}``; the keys are
    glob patterns over the module's own parameter names.
    """

    max_lr: float | None = None
    decay: bool = False


class StaysWide(nn.Module):
    """A module whose buffers stay in float32 where it becomes 16-bit: positions and angles, which would be noise."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysWide":
        wide = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in wide.items():
            now = self.get_buffer(name)
            if now.dtype.itemsize < 4 <= before.dtype.itemsize and not before.is_meta:
                setattr(self, name, before.to(now.device, torch.float32))
        return self


def optim_hints(model: nn.Module) -> dict[str, Hint]:
    """The hint of every parameter that has one, by its full name. An outer module's hint overrides an inner one's."""
    hints: dict[str, Hint] = {}
    for prefix, module in reversed(list(model.named_modules())):
        patterns: dict[str, Hint] = getattr(module, "optim_hints", {})
        for name, _ in module.named_parameters():
            for pattern, hint in patterns.items():
                if fnmatchcase(name, pattern):
                    hints[f"{prefix}.{name}" if prefix else name] = hint
    return hints


def reset(module: nn.Module) -> nn.Module:
    """(Re)draw every parameter and buffer, children before parents, so that a parent's own init is the one that stays.

    ``reset(model.to_empty(device="cpu"))`` completes a model that was built on the meta device.
    """
    for child in module.children():
        reset(child)
    redraw: Any = getattr(module, "reset_parameters", None)
    if redraw is not None:
        redraw()
    return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from all ranks where it is sharded (then every rank must call)."""
    tensor = tensor.detach()
    sharded: Any = tensor  # a DTensor, known by its method: torch.distributed.tensor takes long to import
    return (sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def checksums(module: nn.Module) -> dict[str, str]:
    """The SHA-256 of shape, dtype and values of every parameter and buffer, by its name."""
    found = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(whole(tensor).reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def positive_rate(rate: float) -> float:
    """The rate, or a ValueError where it is not positive and finite."""
    if not 0 < rate < math.inf:
        raise ValueError(f"a rate is the step between samples over that of training, > 0; got rate = {rate}")
    return rate


def step_range(dt_min: float, dt_max: float) -> tuple[float, float]:
    """(log dt_min, log dt_max), between which the logarithms of step sizes are drawn uniformly.

    Raises:
        ValueError: unless 0 < dt_min <= dt_max.
    """
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"step sizes need 0 < dt_min <= dt_max; got dt_min = {dt_min}, dt_max = {dt_max}")
    return math.log(dt_min), math.log(dt_max)


@torch.no_grad()
def draw_steps(bias: Tensor, low: float, high: float) -> None:
    """Draw a bias whose softplus is a step size: log-uniform between exp(low) and exp(high), no smaller than 1e-4."""
    dt = torch.empty_like(bias).uniform_(low, high).exp().clamp(min=1e-4)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def set_rate(module: nn.Module, rate: float) -> nn.Module:
    """Make every state space in a trained module read signals at another sampling rate; returns the module.

    Source: Gu et al. (2021) "S4", arXiv:2111.00396, sec. 4.3: the step size is the only thing that knows the rate.

    Args:
        module: anything with state spaces inside.
        rate: > 0, the step between samples over that of training: 2 for a model that was trained at 16 kHz and now
            hears 8 kHz. It replaces an earlier rate and does not multiply it.
    Raises:
        ValueError: for rate <= 0, or where nothing in the module has a rate.
    """
    found: list[Any] = [m for m in module.modules() if hasattr(m, "rate")]
    if not found:
        raise ValueError(f"nothing in {type(module).__name__} has a sampling rate: it has no state space filter")
    for part in found:
        part.rate = positive_rate(rate)
    return module


def widened(*tensors: Tensor) -> list[Tensor]:
    """Filters are computed in float32 or better whatever dtype the model is in: a**L in bfloat16 is noise."""
    return [t.to(at_least_float32(t.dtype)) for t in tensors]


_claims = threading.Lock()


def append_time(past: Tensor, new: Tensor, room: int = 0) -> Tensor:
    """past (B, t, ...) and new (B, L, ...) joined along time, in amortised O(L) where no gradient is recorded.

    The result then is a view of an allocation with room to grow, and the next append writes behind it, also where steps
    have been left out at the front since. No element that
    any tensor shows is ever changed: the allocation remembers how many steps of it are taken, and who appends to an
    earlier state, or comes second of two threads, gets a copy. What autograd has saved stays valid, since its version
    is not that of the alias through which the room is written.

    Args:
        room: how many steps an allocation has at least; who knows how many there can be never waits for a copy.
    """
    new, t, total = new.to(past.dtype), past.shape[1], past.shape[1] + new.shape[1]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (past.requires_grad or new.requires_grad)):
        return torch.cat([past, new], dim=1)
    storage: Any = past.untyped_storage()
    each, row = past.stride()[:2]
    begin = past.storage_offset() % each // row if row and past.numel() else 0  # steps that are no longer shown
    fit = each // row - begin if row and past.numel() else 0  # those that fit behind them
    fits = fit >= total and past[0, 0].is_contiguous()
    with _claims:
        claimed = fits and getattr(storage, "longwave_taken", None) == begin + t
        if claimed:
            storage.longwave_taken = begin + total
    if claimed:
        size, stride = (past.shape[0], fit, *past.shape[2:]), past.stride()
        whole = past.new_empty(0).set_(storage, past.storage_offset(), size, stride)
    else:
        whole = past.new_empty(past.shape[0], max(2 * total, 64, room), *past.shape[2:])
        whole[:, :t] = past
        claim: Any = whole.untyped_storage()
        claim.longwave_taken = total
    whole[:, t:total] = new
    return whole[:, :total]
