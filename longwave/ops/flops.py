"""What every op costs: floating-point operations of its forward pass, a multiplication and an addition being two.

Counted is the algorithm that is asymptotically best among the op's backends, as the peers count it. What works on every
number by itself (norms, gates, rotations) counts nothing, as in torch's own counter.
"""

import math
from collections.abc import Callable
from typing import Any

from longwave.ops.dispatch import OPS


def fft(points: int, real: bool = True) -> float:
    """Of a transform: 5 n log2 n, or half of it where the numbers are real."""
    return (2.5 if real else 5.0) * points * math.log2(max(2, points))


def seen(L: int, T: int, causal: bool, window: int | None) -> int:
    """Pairs of a query and a key that attention weighs."""
    if not causal:
        return L * T
    W, first = min(window or T, T), T - L + 1  # the first query sees so many keys
    rising = max(0, min(W, T) - first + 1)  # queries that see as many keys as there are, up to W
    return rising * (2 * first + rising - 1) // 2 + (L - rising) * W


def _attention(B: int, L: int, T: int, H: int, P: int, V: int, causal: bool, window: int | None, **_: Any) -> float:
    return 2 * B * H * (P + V) * seen(L, T, causal, window)


def _causal_conv(B: int, L: int, C: int, K: int, M: int = 0, **_: Any) -> float:
    points = L + min(K, L) + min(M, L)
    by_fft = (2 * B + 1) * C * fft(points) + 3 * B * C * points
    return min(by_fft, 2 * B * L * C * (K + M))


def _many(sizes: Any) -> int:
    return math.prod(sizes["..."])


FORMULAS: dict[str, Callable[..., float]] = {
    "attention": _attention,
    "attention_step": lambda B, T, H, P, **_: 4 * B * T * H * P,
    "butterfly": lambda B, S, D, F, G, Q=1, P=1, **_: 8 * B * S * D * F * G * Q * P,
    "cauchy": lambda B, C, N, L, **_: 16 * B * C * N * L,
    "causal_conv": _causal_conv,
    "dplr_step": lambda B, C, N, R, **_: (12 + 16 * R) * B * C * N,
    "gated_delta_rule": lambda B, L, H, N, P, **_: 7 * B * L * H * N * P,
    "linear_attention": lambda B, L, H, N, P, **_: 5 * B * L * H * N * P,
    "linear_scan": lambda B, L, C, **_: 2 * B * L * C,
    "blockdiag_multiply": lambda K, Q, P, **sizes: 2 * _many(sizes) * K * Q * P,
    "monarch": lambda K, Q, P, M, S, R, **sizes: 2 * _many(sizes) * (K * Q * P + M * S * R),
    "rms_norm": lambda **_: 0,
    "rotary": lambda **_: 0,
    "selective_scan": lambda B, L, E, N, **_: 9 * B * L * E * N,  # as Mamba's authors count it
    "short_conv": lambda B, L, C, K, **_: 2 * B * L * C * K,
    "state_space_step": lambda B, C, N, **_: 12 * B * C * N,
    "swiglu": lambda **_: 0,
    "vandermonde": lambda B, C, N, length, **_: 4 * B * C * N * length,
    "vandermonde_transpose": lambda B, C, N, L, **_: 4 * B * C * N * L,
    "weight_only_linear": lambda K, M, **sizes: 2 * _many(sizes) * K * M,
    "wkv": lambda B, L, C, **_: 12 * B * L * C,
}


def flops(op: str, inputs: dict[str, Any]) -> float:
    """Of a call.

    Args:
        op: name.
        inputs: all arguments by name.
    """
    sizes, _ = OPS[op].declaration.check(inputs)
    options = {name: value for name, value in inputs.items() if name not in OPS[op].declaration.arguments}
    return FORMULAS[op](**{**sizes, **options})
