"""The moving average inside Mega: a few damped exponential averages a channel, weighed."""

import torch
from torch import Tensor, nn

from longwave.nn.filters.base import StateSpace, StateSpaceFilter
from longwave.nn.module import widened


class EMAFilter(StateSpaceFilter):
    """k[l] = sum_n p[n] beta[n] gamma[n] / sqrt(N) (1 - p[n] sigmoid(alpha[n]))^l,  p = sigmoid(delta).

    Source: Ma et al. (2022) "Mega: Moving Average Equipped Gated Attention", arXiv:2209.10655, sec. 3.1. Parameter
    names and initial values, beta alternating in sign, are those of github.com/facebookresearch/mega.

    Args:
        channels: C.
        d_state: N, averages a channel, all of them real.
    Raises:
        ValueError: for d_state < 1.
    """

    def __init__(self, channels: int, d_state: int = 16):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"a moving average needs d_state >= 1; got {d_state}")
        self.channels = channels
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(channels, d_state)) for _ in range(4))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.delta.normal_(std=0.2)
        self.alpha.normal_(std=0.2)
        self.beta.normal_(std=0.02).add_(1)
        self.beta[:, 1::2] -= 2
        self.gamma.normal_()

    def realize(self) -> StateSpace:
        delta, alpha, beta, gamma = widened(self.delta, self.alpha, self.beta, self.gamma)
        p = delta.sigmoid()
        halved = gamma / (2 * gamma.shape[1] ** 0.5)  # twice the real part is taken
        return StateSpace(*map(_as_complex, (1 - p * alpha.sigmoid(), p * beta, halved)))


def _as_complex(x: Tensor) -> Tensor:
    return torch.complex(x, torch.zeros_like(x))
