"""HiPPO matrices and their normal-plus-low-rank form, in float64.

Sources: Gu et al. (2020) "HiPPO", arXiv:2008.07669; Gu et al. (2022) "How to Train Your HiPPO", arXiv:2206.12037,
sec. 3 (fourier) and app. A; the NPLR form: Gu et al. (2021) "S4", arXiv:2111.00396, theorem 1. Scales are those of the
authors' code (github.com/state-spaces/s4), in which legt is halved.
"""

import difflib

import torch
from torch import Tensor


def legs(N: int) -> tuple[Tensor, Tensor]:
    """Scaled Legendre: all of the past, uniformly. A (N, N), B (N,), as for every measure."""
    root = (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()
    A = -torch.tril(root[:, None] * root[None], -1) - torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    return A, root


def legt(N: int) -> tuple[Tensor, Tensor]:
    """Translated Legendre: a sliding window."""
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    sign = torch.where(n[:, None] < n[None], (-1.0) ** (n[:, None] - n[None]), 1.0)
    return -0.5 * root[:, None] * sign * root[None], 0.5 * root


def lagt(N: int) -> tuple[Tensor, Tensor]:
    """Translated Laguerre: an exponentially fading past."""
    ones = torch.ones(N, N, dtype=torch.float64)
    return 0.5 * torch.eye(N, dtype=torch.float64) - torch.tril(ones), ones[0]


def fourier(N: int) -> tuple[Tensor, Tensor]:
    """Truncated Fourier (fout): a sliding window in sines and cosines; N even."""
    _require_even("fourier", N)
    frequency = torch.stack([torch.zeros(N // 2), torch.arange(N // 2)], dim=1).flatten()[1:].double()
    B = torch.zeros(N, dtype=torch.float64)
    B[0::2] = 2**0.5
    B[0] = 1.0
    skew = torch.pi * (torch.diag(frequency, -1) - torch.diag(frequency, 1))
    return skew - B[:, None] * B[None], B


MEASURES = {"legs": legs, "legt": legt, "lagt": lagt, "fourier": fourier}


def hippo(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """The system  x' = A x + B u  whose state holds the coefficients of u's past under a measure.

    Args:
        measure: legs | legt | lagt | fourier.
        N: state size, >= 1 (even for fourier).
    Returns:
        A: (N, N) float64.
        B: (N,) float64.
    Raises:
        ValueError: for an unknown measure or a size that it does not have.
    """
    if measure not in MEASURES:
        near = difflib.get_close_matches(measure, MEASURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no HiPPO measure is called {measure!r}; there are {', '.join(MEASURES)}{hint}")
    if N < 1:
        raise ValueError(f"a HiPPO matrix needs N >= 1; got {N}")
    return MEASURES[measure](N)


def low_rank(measure: str, N: int) -> Tensor:
    """P (r, N) that makes  A + P^T P  normal: rank 2 for legt, 1 for the others. Float64."""
    n = torch.arange(N, dtype=torch.float64)
    if measure == "legt":
        P = (1 + 2 * n).sqrt()
        even = torch.where(n % 2 == 0, P, 0.0)
        return torch.stack([even, P - even]) * 0.5**0.5
    if measure == "legs":
        return (0.5 + n).sqrt()[None]
    if measure == "lagt":
        return torch.full((1, N), 0.5**0.5, dtype=torch.float64)
    return fourier(N)[1][None]


def nplr(measure: str, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The HiPPO system in the basis that makes it diagonal plus low rank, one half of each conjugate pair.

    Args:
        measure: legs | legt | lagt | fourier.
        N: even state size.
    Returns:
        Lambda: (N/2,) complex128 with Im <= 0, most negative first;  A = 2 Re(V diag(Lambda) V^*) - P^T P.
        P: (r, N/2) = V^* P.
        B: (N/2,) = V^* B.
        V: (N, N/2) eigenvectors; their phases are arbitrary.
    Raises:
        ValueError: for an unknown measure or an odd N.
    """
    A, B = hippo(measure, N)
    _require_even("the NPLR form", N)
    P = low_rank(measure, N)
    normal = A + P.T @ P
    imag, V = torch.linalg.eigh(-1j * normal)  # the symmetric part is a multiple of the identity; ascending
    V = V[:, : N // 2].clone()
    if imag[N // 2 - 1].abs() < 1e-4:  # fourier has one pair of zero eigenvalues, whose basis eigh leaves open
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 2**-0.5, 2**-0.5 * 1j
    Lambda = torch.complex(normal.diagonal().mean().expand(N // 2), imag[: N // 2])
    adjoint = V.conj().T
    return Lambda, P.to(V.dtype) @ adjoint.T, adjoint @ B.to(V.dtype), V


def _require_even(what: str, N: int) -> None:
    if N % 2:
        raise ValueError(f"{what} needs an even state size; got N = {N}")
