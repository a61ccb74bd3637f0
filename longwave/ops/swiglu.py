"""The gated activation of the SwiGLU channel mixer."""

import torch.nn.functional as F
from torch import Tensor

from longwave.ops.dispatch import Op


@Op(x="... 2 H", returns={"y": "... H : x"})
def swiglu(x: Tensor) -> Tensor:
    """y = silu(x[..., 0, :]) x[..., 1, :].

    Source: Shazeer (2020) "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 5. Both factors are one tensor, as
    one matrix product makes them, so that their gradients are one too.

    Args:
        x: (..., 2, H) gates, then values.
    Returns:
        y: (..., H) in the dtype of x.
    Raises:
        ValueError: where x is of another shape.
    Cost: O(H) a row.
    """
    gate, value = x.unbind(-2)
    return F.silu(gate) * value
