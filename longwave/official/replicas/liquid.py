"""The late convolution and the liquid terms of github.com/raminmh/liquid-s4 (commit 06031dc), as its layer has them."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwave.nn.module import widened
from longwave.official.s4_kernel import StateSpaceConv
from longwave.ops import causal_conv

CONTRACTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "tanh": torch.tanh,
    "lecun": lambda x: 1.7159 * torch.tanh(0.666 * x),
}


class LateConv(nn.Module):
    """The convolution of the authors' ``shift``, which is a step late:  y[t] = sum_s k[s] u[t-1-s] + skip u[t].

    Args:
        conv: whose filter is taken.
    """

    def __init__(self, conv: StateSpaceConv):
        super().__init__()
        self.conv = conv

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, None]:
        """u (B, L, C) -> y (B, L, C)."""
        L, support = u.shape[1], self.conv.support
        if state is not None:
            raise ValueError("shift = True has no state: the official one is not late")
        if support is not None and support < L:
            raise ValueError(f"with shift = True, L = {L} must not exceed l_max = {support}")
        return causal_conv(u, F.pad(self.conv.filter(L), (1, 0)), skip=skip), None


class Correlations(nn.Module):
    """Products of 2, 3, ... inputs as the authors take them, in reversed order of time.

    Args:
        degree: of the last product.
        all_combinations: of q inputs, the last L combinations of steps near the end, in lexicographic order, rather
            than the product of degree q - 1 and its own predecessor in time.
        contraction: what is applied to the products.
    """

    def __init__(self, degree: int, all_combinations: bool, contraction: Callable[[Tensor], Tensor]):
        super().__init__()
        self.degree, self.all_combinations, self.contraction = degree, all_combinations, contraction

    def forward(self, u: Tensor) -> list[Tensor]:
        """u (B, H, L) -> one (B, H, L) a degree."""
        products, v, L = [], u, u.shape[2]
        for q in range(2, self.degree + 1):
            v = u[..., self._steps(q, L, u.device)].prod(-1) if self.all_combinations else v * F.pad(v, (1, -1))
            products.append(self.contraction(v).flip(-1))
        return products

    def _steps(self, q: int, L: int, device: torch.device) -> Tensor:
        """(L, q) steps: combinations of the last n, the fewest of which there are L."""
        n = next((n for n in range(2, L) if math.comb(n, q) >= L), None)
        if n is None:
            raise ValueError(f"liquid_degree = {self.degree} with allcombs = True needs a longer input than L = {L}")
        skipped = math.comb(n, q) - L
        chosen = itertools.islice(itertools.combinations(range(L - n, L), q), skipped, None)
        return torch.tensor(list(chosen), device=device)


class Stash(nn.Module):
    """The tensors that the authors' liquid terms take: (C, A, B, dt) as they were drawn, and never trained.

    Args:
        features, systems, modes, rows: H, S (1 or H), P, and how many C there are of each feature.
    """

    B: Tensor
    C: Tensor
    w: Tensor
    log_dt: Tensor

    def __init__(self, features: int, systems: int, modes: int, rows: int):
        super().__init__()
        self.register_buffer("B", torch.zeros(systems, modes, 2))
        self.register_buffer("C", torch.zeros(rows, features, modes, 2))
        self.register_buffer("w", torch.zeros(systems, modes, 2))
        self.register_buffer("log_dt", torch.zeros(features))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The discrete input map (H, P), of the diagonal part of A alone, and C (rows, H, P)."""
        B, C, w, log_dt = widened(self.B, self.C, self.w, self.log_dt)
        dt = log_dt.exp()[:, None]
        b = dt / (1 - dt / 2 * torch.view_as_complex(w)) * torch.view_as_complex(B)
        return b, torch.view_as_complex(C)


class PolyB(nn.Module):
    """The authors' liquid term ``polyb``:  y[t] += v_q[t] 2 Re sum_n C_n b_qn,  b_q = b_{q-1} 2 Re sum_n b_{q-1,n}.

    Args:
        stash: gives b = b_1 and C, whose second row, where there is one, takes the products backwards.
    """

    def __init__(self, stash: Stash):
        super().__init__()
        self.stash = stash

    def forward(self, products: list[Tensor], conv: StateSpaceConv) -> Tensor:
        """Products (B, H, L) -> what they add to y (B, H, L)."""
        b, C = self.stash()
        y = torch.zeros_like(products[0])
        for v in products:
            b = b * 2 * b.real.sum(1, keepdim=True)
            weights = 2 * (C * b).real.sum(2)[..., None]  # (1 or 2, H, 1)
            y = y + v * weights[0] + (v.flip(-1) * weights[1] if len(weights) == 2 else 0)
        return y


class KB(nn.Module):
    """The authors' liquid term ``kb``: products meet the kernel in two different sets of frequencies.

    The spectrum of the kernel, (2 Re sum_n b_n)^(q-1) times, is a transform of n//2 + 1 points; that of the products
    has as many bins, but of a transform of n points. What comes of it is no convolution.

    Args:
        stash: gives b.
    """

    def __init__(self, stash: Stash):
        super().__init__()
        self.stash = stash

    def forward(self, products: list[Tensor], conv: StateSpaceConv) -> Tensor:
        """Products (B, H, L) -> what they add to y (B, K H, L)."""
        b, _ = self.stash()
        H, L = products[0].shape[1:]
        k = conv.kernel(L)
        n = k.shape[1] + L
        if conv.bidirectional:
            behind, ahead = k.chunk(2)
            k = F.pad(behind, (0, L)) + F.pad(ahead.flip(-1), (L, 0))
        scale = 2 * b.real.sum(1)[:, None]
        kernel = torch.fft.fft(k.unflatten(0, (-1, H)) * scale, n=n // 2 + 1)  # (K, H, n//2 + 1)
        total = torch.zeros((), dtype=kernel.dtype, device=k.device)
        for i, v in enumerate(products):
            total = total + torch.fft.rfft(v.to(scale.dtype), n=n)[:, None] * kernel * scale**i
        return torch.fft.irfft(total, n=n)[..., :L].flatten(1, 2)


class LiquidConv(nn.Module):
    """A convolution and a liquid term of the authors, which looks ahead.

    Args:
        conv: of the state space.
        correlations: products of inputs.
        term: what they add.
    """

    def __init__(self, conv: StateSpaceConv, correlations: Correlations, term: PolyB | KB):
        super().__init__()
        self.conv, self.correlations, self.term = conv, correlations, term

    def forward(self, u: Tensor, skip: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """u (B, L, K H), K equal copies -> y (B, L, K H) and the state, of which the liquid term is no part."""
        y, state = self.conv(u, skip, state)
        H = self.term.stash.log_dt.shape[0]
        products = self.correlations(u[..., :H].transpose(1, 2))
        return (y + self.term(products, self.conv).transpose(1, 2)).to(u.dtype), state
