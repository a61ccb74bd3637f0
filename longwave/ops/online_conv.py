"""The parts of an online convolution: the nearest taps, and tiles of the others, which can be computed bit by bit.

Time is cut into blocks of U steps. Tile (U, S) is what earlier inputs add to the outputs of block S: those of block
S - 2, and of block S - 3 too where S is odd. Its first output is wanted U steps after its last input came.
"""

from typing import Any

import torch
from torch import Tensor

from longwave.ops import _numba
from longwave.ops.dispatch import forced

GRAIN = 1 << 15  # samples times channels of a part of a tile


class Tile:
    """One tile of every row of a batch.

    Args:
        k: (T, C) taps, or (T, E, D) of a matrix for every lag; the kernels take the former. Only its sizes are kept.
        U: steps of a block, even.
        S: which block, >= 2.
        B: rows.
    Attributes:
        parts: how many there are to compute.
        at: the first step of the block.
    """

    def __init__(self, k: Tensor, U: int, S: int, B: int):
        self.U = U
        self.P = U * (1 + S % 2)
        self.first, self.at = (S - 1) * U - self.P, S * U
        self.span = max(1, GRAIN // (self.P + U))  # channels of a part
        self.parts = -(-k.shape[1] // self.span)
        self.y = k.new_empty(B, U, k.shape[1])
        self.inputs: Tensor | None = None

    def run(self, begin: int, end: int, past: Tensor, k: Tensor, spectra: dict) -> None:
        """Compute parts ``begin`` to ``end`` - 1, each once and in order.

        Args:
            past: (B, t, C) or (B, t, D) inputs from the first step on, t >= (S - 1) U; at every call the same as far
                as that.
            k: the taps.
            spectra: what other tiles with these taps have left for it, and it for them.
        """
        n, dense = self.P + self.U, k.ndim == 3
        x = past[:, self.first : self.first + self.P].to(self.y.dtype)
        for part in range(begin, end):
            c = slice(part * self.span, (part + 1) * self.span)
            key = self.U, n, part
            if (k_f := spectra.get(key)) is None:  # made by whoever comes first
                taps = k[self.U : self.U + n, c].to(self.y.dtype)
                k_f = spectra[key] = torch.fft.rfft(taps.movedim(0, -1).contiguous(), n)
            if dense:
                if self.inputs is None:
                    self.inputs = torch.fft.rfft(x.mT.contiguous(), n)
                y_f = torch.einsum("bdf,edf->bef", self.inputs, k_f)
            else:
                y_f = torch.fft.rfft(x[..., c].mT.contiguous(), n) * k_f
            self.y[..., c] = torch.fft.irfft(y_f, n)[..., self.P :].mT
        if end == self.parts:
            self.inputs = None


def ready(tiles: list[Tile]) -> Any:
    """Tiles that are computed, as :func:`near` wants them."""
    return tiles


def near(past: Tensor, k: Tensor, tiles: Any, t: int, n: int, start: int) -> Tensor:
    """The outputs of n steps from t on:  y[i] = sum_{start <= j <= t + i} k[t + i - j] past[j] + what tiles add.

    Args:
        past: (B, T, C) or (B, T, D) inputs from the first step on, T >= t + n.
        k: (K, C) or (K, E, D) taps, K > t + n - 1 - start.
        tiles: what :func:`ready` says of the tiles of the blocks in which these steps are.
    Returns:
        (B, n, C) or (B, n, E).
    """
    work, layout = torch.promote_types(past.dtype, k.dtype), "bjc,jc->bc" if k.ndim == 2 else "bjd,jed->be"
    x, k, ys = past[:, start : t + n].to(work), k[: t + n - start].to(work), []
    for s in range(t, t + n):
        lags = s - start + 1
        y = torch.einsum(layout, x[:, :lags], k[:lags].flip(0))
        for tile in tiles:
            y = y + tile.y[:, s - tile.at]
        ys.append(y)
    return torch.stack(ys, dim=1)


def parts_for(past: Tensor, k: Tensor, block: int) -> tuple[Any, Any, Any]:
    """(Tile, ready, near) for inputs and taps of these dtypes and layouts: the CPU kernels where they can run.

    Args:
        block: the least U.
    """
    kernels = forced() in ("auto", "numba") and _numba.why_not(past, k) is None
    if kernels and k.ndim == 2 and past.dtype == k.dtype == torch.float32:
        from longwave.ops._numba import online_conv as numba

        numba.begin(k, block)
        return numba.Tile, numba.ready, numba.near
    return Tile, ready, near
