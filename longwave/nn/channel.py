"""Channel mixers: what a block does to each token on its own."""

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from longwave.errors import choose
from longwave.nn.monarch import BlockdiagLinear
from longwave.ops import swiglu


def hidden_width(expand: float, d_model: int) -> int:
    """expand * d_model, rounded, and at least 1.

    Raises:
        ValueError: unless expand > 0.
    """
    if not 0 < expand < math.inf:
        raise ValueError(f"a channel mixer needs expand > 0, its hidden width over d_model; got expand = {expand}")
    return max(1, round(expand * d_model))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x).  Source: Shazeer (2020), arXiv:2002.05202, eq. 6.

    Args:
        d_model: D.
        expand: hidden width over D, > 0; 8/3 has as many parameters as an MLP of 4.
        bias: on both maps.
    """

    def __init__(self, d_model: int, expand: float = 8 / 3, bias: bool = False):
        super().__init__()
        hidden = hidden_width(expand, d_model)
        self.up, self.down = nn.Linear(d_model, 2 * hidden, bias=bias), nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.up(x).unflatten(-1, (2, -1))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class GLU(nn.Module):
    """down(activation(gate x) * up x).  Source: Shazeer (2020), arXiv:2002.05202, eq. 5 and 6; of silu it is SwiGLU.

    Args:
        d_model: D.
        expand: hidden width over D, > 0.
        activation: gelu_tanh, gelu or relu; see :class:`MLP`.
        bias: on both maps.
    Raises:
        ValueError: for another activation, or expand <= 0.
    """

    def __init__(self, d_model: int, expand: float = 8 / 3, activation: str = "gelu_tanh", bias: bool = False):
        super().__init__()
        self.activation = choose("activation", activation, {k: f for k, f in ACTIVATIONS.items() if k != "silu"})
        hidden = hidden_width(expand, d_model)
        self.up, self.down = nn.Linear(d_model, 2 * hidden, bias=bias), nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)


class BlockdiagGLU(nn.Module):
    """down(activation(gate x) * up x), both maps block-diagonal: the channel mixer of M2-BERT.

    Source: Fu et al. (2023) "Monarch Mixer", arXiv:2310.12109, sec. 4 and app., in the authors' code.

    Args:
        d_model: D.
        expand: hidden width over D, > 0.
        blocks: of each map; 1 is dense.
        activation: of the gate, see :class:`MLP`.
    Raises:
        ValueError: for another activation, expand <= 0 or blocks < 1.
    """

    def __init__(self, d_model: int, expand: float = 4.0, blocks: int = 4, activation: str = "gelu"):
        super().__init__()
        self.activation = choose("activation", activation, ACTIVATIONS)
        hidden = hidden_width(expand, d_model)
        self.up = BlockdiagLinear(d_model, 2 * hidden, blocks, bias=False)
        self.down = BlockdiagLinear(hidden, d_model, blocks)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)


class MLP(nn.Module):
    """fc2(activation(fc1 x)).

    Args:
        d_model: D.
        expand: hidden width over D, > 0.
        activation: gelu_tanh, gelu by tanh as in GPT-2; gelu; relu; silu.
    Raises:
        ValueError: for another activation, or expand <= 0.
    """

    def __init__(self, d_model: int, expand: float = 4.0, activation: str = "gelu_tanh"):
        super().__init__()
        self.activation = choose("activation", activation, ACTIVATIONS)
        hidden = hidden_width(expand, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class OutputLinear(nn.Linear):
    """W gelu(x): what follows the convolution in DSS.

    ``OutputLinear.around(linear, x)`` is the whole; the module is the map alone, so that another may stand in its place
    (of weights in fewer bits, or with an adapter).

    Args:
        d_in: width of x.
        d_out: width of the result.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)

    @staticmethod
    def around(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """linear(gelu(x)) of what stands in the place of this."""
        return linear(F.gelu(x))


class OutputGLU(nn.Linear):
    """a * sigmoid(b),  [a | b] = W gelu(x): what follows the convolution in the blocks of S4 and its kin.

    ``OutputGLU.around(linear, x)`` is the whole; see :class:`OutputLinear`.

    Source: Gu et al. (2021), arXiv:2111.00396, with the gated linear unit of the authors' code.

    Args:
        d_in: width of x.
        d_out: width of the result.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, 2 * d_out)

    @staticmethod
    def around(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """a * sigmoid(b) with [a | b] = linear(gelu(x)) of what stands in the place of this."""
        return F.glu(linear(F.gelu(x)), dim=-1)
