"""What a block puts before its parts."""

from torch import Tensor, nn

from longwave.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm of the last axis, forward and backward in one pass each on a CPU.

    Args:
        d_model: D.
        eps: > 0, added to the mean square.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__(d_model, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)
