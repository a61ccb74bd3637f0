"""HiPPO matrices and their normal-plus-low-rank form, in float64.

Sources: Gu et al. (2020) "HiPPO", arXiv:2008.07669; Gu et al. (2022) "How to Train Your HiPPO", arXiv:2206.12037,
sec. 3 (fourier) and app. A; the NPLR form: Gu et al. (2021) "S4", arXiv:2111.00396, theorem 1. Scales are those of the
authors' code (github.com/state-spaces/s4), in which legt is halved.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longwave.errors import choose


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


def legsd(N: int) -> tuple[Tensor, Tensor]:
    """The normal part of legs, with half of its B: what is left without the low rank part."""
    A, B = legs(N)
    return A + 0.5 * B[:, None] * B[None], 0.5 * B


def lmu(N: int) -> tuple[Tensor, Tensor]:
    """Legendre memory unit (Voelker et al. 2019): legt in another normalisation, over a window of length 1."""
    n = torch.arange(N, dtype=torch.float64)
    width = 2 * n + 1
    sign = (-1.0) ** n
    return torch.where(n[:, None] < n[None], -1.0, -sign[:, None] * sign[None]) * width[:, None], sign * width


def lagt(N: int) -> tuple[Tensor, Tensor]:
    """Translated Laguerre: an exponentially fading past."""
    ones = torch.ones(N, N, dtype=torch.float64)
    return 0.5 * torch.eye(N, dtype=torch.float64) - torch.tril(ones), ones[0]


def tlagt(N: int) -> tuple[Tensor, Tensor]:
    """Tilted Laguerre, with no tilt: lagt without the fading of what is remembered."""
    A, B = lagt(N)
    return A - 0.5 * torch.eye(N, dtype=torch.float64), B


def glagt(N: int) -> tuple[Tensor, Tensor]:
    """Generalised Laguerre with alpha = 0, beta = 0.01."""
    beta = 0.01
    A, B = lagt(N)
    return A - beta / 2 * torch.eye(N, dtype=torch.float64), beta**0.5 * B


def fourier(N: int) -> tuple[Tensor, Tensor]:
    """Truncated Fourier (fout): a sliding window in sines and cosines; N even, as for all Fourier measures."""
    B = _waves(N)
    return _turning(N) - B[:, None] * B[None], B


def fourier_decay(N: int) -> tuple[Tensor, Tensor]:
    """Fourier, whose past fades instead of leaving a window."""
    B = _waves(N)
    return _turning(N) - 0.5 * B[:, None] * B[None], 0.5 * B


def fourier_double(N: int) -> tuple[Tensor, Tensor]:
    """Fourier over a window of half the length."""
    B = _waves(N)
    return 2 * (_turning(N) - B[:, None] * B[None]), 2 * B


def foud(N: int) -> tuple[Tensor, Tensor]:
    """Diagonal Fourier: sines and cosines that fade, each by itself."""
    B = _waves(N)
    return 2 * _turning(N) - 0.5 * torch.eye(N, dtype=torch.float64), B


def _waves(N: int) -> Tensor:
    """(N,) the value of each cosine and sine at the end of the window."""
    _require_even("a Fourier measure", N)
    B = torch.zeros(N, dtype=torch.float64)
    B[0::2] = 2**0.5
    B[0] = 1.0
    return B


def _turning(N: int) -> Tensor:
    """(N, N) what turns cosine into sine, n half turns a unit of time."""
    frequency = torch.stack([torch.zeros(N // 2), torch.arange(N // 2)], dim=1).flatten()[1:].double()
    return torch.pi * (torch.diag(frequency, -1) - torch.diag(frequency, 1))


Measure = Callable[[int], tuple[Tensor, Tensor]]

MEASURES: dict[str, Measure] = {
    "legs": legs,
    "legsd": legsd,
    "legt": legt,
    "lagt": lagt,
    "fourier": fourier,
    "fout": fourier,
    "fourier_decay": fourier_decay,
    "fourier_double": fourier_double,
    "foud": foud,
}
WITHOUT_NPLR: dict[str, Measure] = {"lmu": lmu, "tlagt": tlagt, "glagt": glagt}


def hippo(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """The system  x' = A x + B u  whose state holds the coefficients of u's past under a measure.

    Args:
        measure: legs | legsd | legt | lmu | lagt | tlagt | glagt | fourier (also called fout) | fourier_decay |
            fourier_double | foud.
        N: state size, >= 1 (even for the Fourier measures).
    Returns:
        A: (N, N) float64.
        B: (N,) float64.
    Raises:
        ValueError: for an unknown measure or a size that it does not have.
    """
    system = choose("HiPPO measure", measure, {**MEASURES, **WITHOUT_NPLR})
    if N < 1:
        raise ValueError(f"a HiPPO matrix needs N >= 1; got {N}")
    return system(N)


def _legt_rank(N: int) -> Tensor:
    n = torch.arange(N, dtype=torch.float64)
    P = (0.5 + n).sqrt()
    even = torch.where(n % 2 == 0, P, 0.0)
    return torch.stack([P - even, even])


# P (r, N) of each measure in MEASURES.
LOW_RANK: dict[str, Callable[[int], Tensor]] = {
    "legs": lambda N: (0.5 + torch.arange(N, dtype=torch.float64)).sqrt()[None],
    "legsd": lambda N: torch.zeros(1, N, dtype=torch.float64),
    "legt": _legt_rank,
    "lagt": lambda N: torch.full((1, N), 0.5**0.5, dtype=torch.float64),
    "fourier": lambda N: _waves(N)[None],
    "fout": lambda N: _waves(N)[None],
    "fourier_decay": lambda N: 0.5**0.5 * _waves(N)[None],
    "fourier_double": lambda N: 2**0.5 * _waves(N)[None],
    "foud": lambda N: torch.zeros(1, N, dtype=torch.float64),
}


def low_rank(measure: str, N: int) -> Tensor:
    """P (r, N) that makes  A + P^T P  normal: rank 2 for legt, 1 for the others. Float64.

    Raises:
        ValueError: for a measure that is unknown or has no such form.
    """
    return choose("HiPPO measure with a normal plus low rank form", measure, LOW_RANK)(N)


def nplr(measure: str, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The HiPPO system in the basis that makes it diagonal plus low rank, one half of each conjugate pair.

    Args:
        measure: legs | legsd | legt | lagt | fourier (fout) | fourier_decay | fourier_double | foud.
        N: even state size.
    Returns:
        Lambda: (N/2,) complex128 with Im <= 0, most negative first;  A = 2 Re(V diag(Lambda) V^*) - P^T P.
        P: (r, N/2) = V^* P.
        B: (N/2,) = V^* B.
        V: (N, N/2) eigenvectors; their phases are arbitrary.
    Raises:
        ValueError: for a measure that is unknown or has no such form, or an odd N.
    """
    _require_even("the NPLR form", N)
    P = low_rank(measure, N)
    A, B = hippo(measure, N)
    normal = A + P.T @ P
    imag, V = torch.linalg.eigh(-1j * normal)  # the symmetric part is a multiple of the identity; ascending
    V = V[:, : N // 2].clone()
    if imag[N // 2 - 1].abs() < 1e-4:  # a Fourier measure has one real pair, whose basis eigh leaves open
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 2**-0.5, 2**-0.5 * 1j
    Lambda = torch.complex(normal.diagonal().mean().expand(N // 2), imag[: N // 2])
    adjoint = V.conj().T
    return Lambda, P.to(V.dtype) @ adjoint.T, adjoint @ B.to(V.dtype), V


def normal_hippo(N: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues and eigenvectors of HiPPO-N, the normal part of HiPPO-LegS:  -1/2 + its skew part.

    Source: Smith et al. (2022) "S5", arXiv:2208.04933, app. B.

    Args:
        N: >= 1.
    Returns:
        Lambda: (N,) complex128, by growing imaginary part: the first half are the conjugates of the second.
        V: (N, N), unitary; its phases are arbitrary.
    """
    A, _ = hippo("legs", N)
    imag, V = torch.linalg.eigh(-0.5j * (A - A.T))
    return torch.complex(torch.full_like(imag, -0.5), imag), V


def _require_even(what: str, N: int) -> None:
    if N % 2:
        raise ValueError(f"{what} needs an even state size; got N = {N}")
