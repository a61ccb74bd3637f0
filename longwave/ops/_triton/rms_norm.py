# mypy: no-check-untyped-defs
"""Root mean square normalisation: a row is read once, also in the backward pass."""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import launch, size, tuned

WIDEST = 2**15  # numbers of a row, which is held in registers
PROGRAMS = size(512, 2)  # of the backward pass, each with a sum of its own for the weights


def why_not(x, weight, eps):
    """The reason, or None."""
    D = x.shape[-1]
    return f"x has rows of D = {D} numbers; at most {WIDEST} are held in registers" if D > WIDEST else None


def forward(x, weight, eps):
    """y (..., D)."""
    y, x, weight = x.new_empty(x.shape), x.contiguous(), weight.contiguous()
    D = x.shape[-1]
    launch(_forward, x.numel() // D, y, x, weight, eps, D, weight.numel() // D, triton.next_power_of_2(D))
    return y


def backward(needed, dy, x, weight, eps):
    """A program takes every so many rows of one group."""
    shape, x, dy, D = x.shape, x.contiguous(), dy.contiguous(), x.shape[-1]
    G, count = weight.numel() // D, x.numel() // D
    programs = min(PROGRAMS, triton.cdiv(count, G))
    dx, sums = x.new_empty(shape), x.new_empty(programs, *weight.shape, dtype=torch.float32)
    launch(
        _backward, programs * G, dx, sums, dy, x, weight.contiguous(), eps, count, D, G, programs,
        triton.next_power_of_2(D),
    )  # fmt: skip
    return {"x": dx, "weight": sums.sum(0)}


@tuned(["D"], {"num_warps": 4}, {"num_warps": 1}, {"num_warps": 8}, {"num_warps": 16})
def _forward(y, x, weight, eps, D, G, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.load(weight + row % G * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(value * value) / D + eps)
    tl.store(y + row * D + d, value * scale * w, mask=d < D)


@tuned(["D"], {"num_warps": 4}, {"num_warps": 1}, {"num_warps": 8}, {"num_warps": 16})
def _backward(dx, sums, dy, x, weight, eps, count, D, G, programs, BLOCK: tl.constexpr):
    group, first = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + group * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(first * G + group, count, programs * G):
        value = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt_rn(tl.sum(value * value) / D + eps)
        value *= scale
        total += grad * value
        grad *= w
        tl.store(dx + row * D + d, scale * (grad - value * (tl.sum(grad * value) / D)), mask=d < D)
    tl.store(sums + (first * G + group) * D + d, total, mask=d < D)
