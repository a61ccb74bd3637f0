"""Free modes: the filter that another one is distilled into."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import StateSpace, StateSpaceFilter, shared_systems
from longwave.nn.module import Hint, widened

SLOWEST, FASTEST = 1e-7, 0.05  # a mode loses at least the first of its size a step, and keeps at least the second
OVERSAMPLE, POWER = 8, 2  # of the search for the largest singular values
CHUNK = 2**24  # elements of the modes' powers that exist at once


class ModalFilter(StateSpaceFilter):
    """k[t] = 2 Re sum_n C[n] a[n]^t,  a = exp(-exp(log_decay) + i angle): every mode of every channel is free.

    Source: Massaroli et al. (2023) "Laughing Hyena Distillery: Extracting Compact Recurrences From Convolutions",
    arXiv:2310.18780, sec. 3.1.

    Args:
        channels: C.
        d_state: N, real state size, even; N/2 conjugate pairs are kept.
    Raises:
        ValueError: for an odd d_state.
    """

    optim_hints: ClassVar[dict[str, Hint]] = dict.fromkeys(("log_decay", "angle"), Hint(max_lr=1e-3))

    def __init__(self, channels: int, d_state: int = 16):
        super().__init__()
        shared_systems(channels, d_state, None)
        self.channels, pairs = channels, d_state // 2
        self.log_decay = nn.Parameter(torch.empty(channels, pairs))
        self.angle = nn.Parameter(torch.empty(channels, pairs))
        self.C = nn.Parameter(torch.empty(channels, pairs, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_decay.uniform_(-7, -1)
        self.angle.uniform_(0, torch.pi)
        self.C.normal_(std=0.5 * self.C.shape[1] ** -0.5)

    def realize(self) -> StateSpace:
        log_decay, angle, C = widened(self.log_decay, self.angle, self.C)
        a = torch.exp(torch.complex(-log_decay.exp(), angle))
        return StateSpace(a, torch.ones_like(a), torch.view_as_complex(C))

    @torch.no_grad()
    def fit(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Take the modes and weights nearest to the taps k (C, T), t = 0 left out: that is the skip connection's.

        Returns:
            error: (C,) of the taps 1 ... T - 1, their root mean square over that of k.
            skip: (C,) what tap 0 lacks.
        """
        k, width = k.double(), max(1, CHUNK // (k.shape[1] * 2 * self.C.shape[1]))
        fits = [fit_modes(rows, self.C.shape[1]) for rows in k.split(width)]
        a, c, error = (torch.cat(parts) for parts in zip(*fits))
        self.log_decay.copy_((-a.abs().log()).log())
        self.angle.copy_(a.angle())
        self.C.copy_(torch.view_as_real(c))
        return error, k[:, 0] - 2 * c.real.sum(1)


def fit_modes(k: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modes a and weights c, each (C, pairs) complex, with 2 Re sum_n c a^t near to k[t], t >= 1; and the error.

    Modal truncation: the poles are those of the Hankel matrix's best approximation of low rank (Kung 1978, as balanced
    truncation in arXiv:2310.18780, app. B), brought inside the unit circle, the pairs that weigh most of them; then
    the weights are those of least squares.

    Args:
        k: (C, T) float64 taps.
    """
    a = _poles(k, pairs)
    size = a.abs().clamp(max=torch.finfo(k.dtype).max)
    a = a / size.clamp(min=1e-300) * size.minimum(1 / size).clamp(FASTEST, 1 - SLOWEST)
    half = a.imag >= 0  # one of each pair; a real pole counts as one
    a = torch.where(half, a, 0.5)
    c, _ = _weights(k, a, half)
    weigh = torch.where(half, c.abs().square() / (1 - a.abs().square()), -1.0)
    best = weigh.argsort(dim=1, descending=True)[:, :pairs]
    a, half = a.gather(1, best), half.gather(1, best)
    missing = pairs - a.shape[1]
    a, half = nn.functional.pad(a, (0, missing), value=0.5), nn.functional.pad(half, (0, missing))
    c, error = _weights(k, a, half)
    return a, c, error


def _hankel(k: Tensor, v: Tensor) -> Tensor:
    """sum_j k[1 + i + j] v[j] for i < m, of k (C, 2 m) and v (C, m, r): (C, m, r)."""
    m = v.shape[1]
    product = torch.fft.rfft(k[:, 1:], 3 * m)[:, :, None] * torch.fft.rfft(v.flip(1), 3 * m, dim=1)
    return torch.fft.irfft(product, 3 * m, dim=1)[:, m - 1 : 2 * m - 1]


def _poles(k: Tensor, pairs: int) -> Tensor:
    """The eigenvalues of the shift on the largest singular vectors of the Hankel matrix of k, (C, <= 2 pairs)."""
    m = k.shape[1] // 2
    k, rank = k[:, : 2 * m], min(2 * pairs + OVERSAMPLE, m)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(k), m, rank, dtype=k.dtype, generator=generator)
    for _ in range(POWER + 1):
        q = torch.linalg.qr(_hankel(k, q))[0]
    values, vectors = torch.linalg.eigh(q.mT @ _hankel(k, q))
    largest = values.abs().argsort(dim=1, descending=True)[:, : min(2 * pairs, m - 1)]
    u = q @ vectors.gather(2, largest[:, None].expand(-1, rank, -1))
    return torch.linalg.eigvals(torch.linalg.pinv(u[:, :-1]) @ u[:, 1:])


def _weights(k: Tensor, a: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
    """The c of least squares over t >= 1, zero where a is not in use; and the relative error (C,)."""
    t = torch.arange(1, k.shape[1], dtype=k.dtype)
    powers = torch.exp(t[:, None] * a.log()[:, None]) * use[:, None]  # (C, T - 1, n)
    turns = a.imag > 1e-8 * a.abs()  # of a real pole the imaginary column is noise
    columns = torch.cat([2 * powers.real, -2 * powers.imag * turns[:, None]], dim=2)
    size = columns.norm(dim=1, keepdim=True)
    columns = columns / torch.where(size > 0, size, 1)
    gram = columns.mT @ columns
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > 1e-13 * values[:, -1:], 1 / values, 0)
    right = columns.mT @ k[:, 1:, None]
    x = vectors @ (inverse[..., None] * (vectors.mT @ right))
    x = x + vectors @ (inverse[..., None] * (vectors.mT @ (right - gram @ x)))
    left = (columns @ x)[..., 0] - k[:, 1:]
    real, imag = (x / torch.where(size > 0, size, 1).mT)[..., 0].chunk(2, dim=1)
    norm = k[:, 1:].norm(dim=1)
    return torch.complex(real, imag), left.norm(dim=1) / torch.where(norm > 0, norm, 1)
