"""The transpose of vandermonde, on the same tables."""

from torch import Tensor

from longwave.ops._torch.vandermonde import blocks, grid, modes_of_sum, sum_of_modes, tables


def forward(x: Tensor, u: Tensor) -> Tensor:
    """m (B, C, N)."""
    B, C, L = u.shape
    m = x.new_empty(B, C, x.shape[1])
    for s in blocks(x, B, L):
        m[:, s] = modes_of_sum(*tables(x[s], L), grid(u[:, s], L, x.real.dtype)).transpose(0, 1)
    return m


def backward(needed: set[str], dm: Tensor, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """du[l] = Re sum_n x^l conj(dm), and dx through l x^(l-1)."""
    L = u.shape[2]
    dx, du = x.new_empty(x.shape), u.new_empty(u.shape)
    for s in blocks(x, 2 * len(u), L):
        fine, coarse = tables(x[s], L)
        if "u" in needed:
            du[:, s] = sum_of_modes(fine, coarse, dm[:, s].conj_physical() / 2)[..., :L].transpose(0, 1)
        if "x" in needed:
            slopes = modes_of_sum(fine, coarse, grid(u[:, s], L, x.real.dtype, derivative=True))[:, len(u) :]
            dx[s] = (slopes.conj_physical() * dm[:, s].transpose(0, 1)).sum(1)
    return {"x": dx, "u": du}
