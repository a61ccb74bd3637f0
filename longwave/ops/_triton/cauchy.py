# mypy: no-check-untyped-defs
"""Sums of simple poles: a tile of nodes in registers goes through all poles, which no (C, N, L) tensor holds."""

import torch
import triton
import triton.language as tl

from longwave.ops._triton.device import launch, size, tuned

NODES = size(256, 8)  # a tile in the backward pass
POLES = size(16, 4)
ROWS = size(64, 2)  # of the batch times channels, whose gradients for the nodes a program adds up


def forward(v, z, w):
    """k (B, C, L)."""
    (B, C, N), L = v.shape, len(z)
    k = v.new_empty(B, C, L)
    grid = lambda meta: B * C * triton.cdiv(L, meta["BL"])  # noqa: E731
    launch(_forward, grid, torch.view_as_real(k), *_numbers(v, z, w), C, N, L)
    return k


def backward(needed, dk, v, z, w):
    """One kernel sums over the nodes, for weights and poles; another over the poles, where the nodes want it."""
    (B, C, N), L = v.shape, len(z)
    tensors = _numbers(dk, v, z, w)
    grads = {}
    if needed & {"v", "w"}:
        dv, dw = v.new_empty(B, C, N), w.new_empty(B, C, N)
        grid = B * C * triton.cdiv(N, POLES)
        launch(_of_poles, grid, *map(torch.view_as_real, (dv, dw)), *tensors, C, N, L, POLES, NODES)
        grads = {"v": dv, "w": dw.sum(0)}
    if "z" in needed:
        parts = triton.cdiv(B * C, ROWS)
        dz = z.new_empty(parts, L)
        launch(_of_nodes, parts * triton.cdiv(L, NODES), torch.view_as_real(dz), *tensors, B * C, C, N, L, ROWS, NODES)
        grads["z"] = dz.sum(0)
    return grads


def _numbers(*tensors):
    return [torch.view_as_real(x.resolve_conj().contiguous()) for x in tensors]


@triton.jit
def _load(x, at, mask):
    return tl.load(x + 2 * at, mask=mask, other=0.0), tl.load(x + 2 * at + 1, mask=mask, other=0.0)


@triton.jit
def _store(x, at, real, imaginary, mask):
    tl.store(x + 2 * at, real, mask=mask)
    tl.store(x + 2 * at + 1, imaginary, mask=mask)


@triton.jit
def _over(zr, zi, wr, wi, mask):
    """1 / (z - w), and 0 outside of the mask."""
    dr, di = zr - wr, zi - wi
    size = tl.where(mask, dr * dr + di * di, 1.0)
    return tl.where(mask, dr / size, 0.0), tl.where(mask, -di / size, 0.0)


@tuned(
    ["N"],
    {"BL": size(256, 8), "num_warps": 4},
    {"BL": 512, "num_warps": 4},
    {"BL": 1024, "num_warps": 4},
    {"BL": 256, "num_warps": 2},
)
def _forward(k, v, z, w, C, N, L, BL: tl.constexpr):
    tiles = tl.cdiv(L, BL)
    row = tl.program_id(0).to(tl.int64) // tiles
    l = tl.program_id(0) % tiles * BL + tl.arange(0, BL)
    inside = l < L
    zr, zi = _load(z, l, inside)
    kr, ki = tl.zeros((BL,), tl.float32), tl.zeros((BL,), tl.float32)
    for n in range(N):
        vr, vi = _load(v, row * N + n, True)
        wr, wi = _load(w, row % C * N + n, True)
        pr, pi = _over(zr, zi, wr, wi, inside)
        qr, qi = _over(zr, zi, wr, -wi, inside)
        kr += vr * (pr + qr) - vi * (pi - qi)
        ki += vr * (pi + qi) + vi * (pr - qr)
    _store(k, row * L + l, kr, ki, inside)


@tuned(["N"], {"num_warps": 4}, {"num_warps": 8})
def _of_poles(dv, dw, dk, v, z, w, C, N, L, BN: tl.constexpr, BL: tl.constexpr):
    """dv = sum_l conj(p) dk + q conj(dk), dw = sum_l conj(v p^2) dk + conj(v) q^2 conj(dk), p and q the two poles."""
    blocks = tl.cdiv(N, BN)
    row = tl.program_id(0).to(tl.int64) // blocks
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)[:, None]
    some = n < N
    vr, vi = _load(v, row * N + n, some)
    wr, wi = _load(w, row % C * N + n, some)
    sum_vr, sum_vi = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    sum_wr, sum_wi = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    for start in range(0, L, BL):
        l = start + tl.arange(0, BL)[None, :]
        inside = some & (l < L)
        zr, zi = _load(z, l, l < L)
        gr, gi = _load(dk, row * L + l, l < L)
        pr, pi = _over(zr, zi, wr, wi, inside)
        qr, qi = _over(zr, zi, wr, -wi, inside)
        sum_vr += gr * (pr + qr) + gi * (pi + qi)
        sum_vi += gi * (pr - qr) - gr * (pi - qi)
        pr, pi = pr * pr - pi * pi, 2 * pr * pi
        qr, qi = qr * qr - qi * qi, 2 * qr * qi
        sum_wr += gr * (pr + qr) + gi * (pi + qi)
        sum_wi += gi * (pr - qr) - gr * (pi - qi)
    _store(dv, row * N + n, tl.sum(sum_vr, 1)[:, None], tl.sum(sum_vi, 1)[:, None], some)
    ar, ai = tl.sum(sum_wr, 1)[:, None], tl.sum(sum_wi, 1)[:, None]
    _store(dw, row * N + n, vr * ar + vi * ai, vr * ai - vi * ar, some)


@tuned(["N"], {"num_warps": 4}, {"num_warps": 2}, {"num_warps": 8})
def _of_nodes(dz, dk, v, z, w, rows, C, N, L, BR: tl.constexpr, BL: tl.constexpr):
    """dz = - sum over some rows and all n of conj(v p^2 + conj(v) q^2) dk."""
    tiles = tl.cdiv(L, BL)
    part = tl.program_id(0).to(tl.int64) // tiles
    l = tl.program_id(0) % tiles * BL + tl.arange(0, BL)
    inside = l < L
    zr, zi = _load(z, l, inside)
    sum_r, sum_i = tl.zeros((BL,), tl.float32), tl.zeros((BL,), tl.float32)
    for row in range(part * BR, tl.minimum(part * BR + BR, rows)):
        ar, ai = tl.zeros((BL,), tl.float32), tl.zeros((BL,), tl.float32)
        for n in range(N):
            vr, vi = _load(v, row * N + n, True)
            wr, wi = _load(w, row % C * N + n, True)
            pr, pi = _over(zr, zi, wr, wi, inside)
            qr, qi = _over(zr, zi, wr, -wi, inside)
            pr, pi = pr * pr - pi * pi, 2 * pr * pi
            qr, qi = qr * qr - qi * qi, 2 * qr * qi
            ar += vr * (pr + qr) - vi * (pi - qi)
            ai += vr * (pi + qi) + vi * (pr - qr)
        gr, gi = _load(dk, row * L + l, inside)
        sum_r -= ar * gr + ai * gi
        sum_i -= ar * gi - ai * gr
    _store(dz, part * L + l, sum_r, sum_i, inside)
