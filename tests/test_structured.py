"""Monarch and butterfly matrices, the layers and transforms made of them, and the convolutions of these transforms."""

import cmath
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import Case, error, golden, load, series
from torch import Tensor

from longwave.mixers import ButterflyConv, LongConvMixer
from longwave.nn import (
    BlockdiagLinear,
    ButterflyLinear,
    MonarchFFT,
    MonarchLinear,
    block_fft,
    fourier_factors,
    monarch_conv,
    monarch_fft,
    monarch_sizes,
    reset,
)
from longwave.nn.block_fft import dft_matrices, roots_of_unity
from longwave.official import from_official
from longwave.ops import blockdiag_multiply, butterfly, causal_conv, monarch, monarch_project


def piece(stem: str) -> Case:
    """A reference file that is no module: parts of an algorithm, or a module without gradients."""
    return load(Path(__file__).parent / "golden" / "pieces" / f"{stem}.safetensors")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("stem", ["flashfftconv__monarch2_16x16", "flashfftconv__monarch2_8x4"])
def test_the_pieces_of_flashfftconv(stem):
    case = piece(stem)
    N1, N2 = case.config["N1"], case.config["N2"]
    x = torch.view_as_complex(case.tensors["input.x"])
    first, second = fourier_factors((N1, N2))
    twiddle = roots_of_unity(N1, N2, N1 * N2).to(torch.complex64)
    outer = first @ x.view(-1, N1, N2) * twiddle
    ours = {
        "fft_matrix_N1": first,
        "fft_matrix_N2": second,
        "twiddle_N1_N2": twiddle,
        "output.outer_dft": outer,
        "output.permuted_spectrum": outer @ second,
        "output.fft": monarch_fft(x, [first, second]),
    }
    for key, theirs in ((key, t) for key, t in case.tensors.items() if key != "input.x"):
        assert error(torch.view_as_real(ours[key]), theirs) < 1e-5, key


@pytest.mark.parametrize("stem", ["flashfftconv__circ_256", "flashfftconv__causal_128_256"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_convolution_of_flashfftconv(stem, order):
    case = piece(stem)
    inputs = {key: t.requires_grad_() for key, t in case.inputs(torch.float64).items()}
    u, k, n = inputs["u"].transpose(1, 2), inputs["k"], case.config["n"]
    y = monarch_conv(u, k, monarch_sizes(n, order))
    assert error(y.transpose(1, 2), case.tensors["output.y"]) < 1e-5
    if n >= u.shape[1] + k.shape[1]:
        assert error(causal_conv(u, k), y) < 1e-12
    (y.transpose(1, 2) * case.tensors["cotangent"]).sum().backward()
    for key, t in inputs.items():
        assert error(t.grad, case.tensors[f"grad.input.{key}"]) < 1e-5


@pytest.mark.parametrize("sizes", [(64,), (8, 8), (4, 4, 4), (5, 6, 7), (3, 40)])
def test_fixed_factors_are_the_causal_convolution(sizes):
    u, k, skip = series(2, 30, 3), drawn(3, 30), drawn(3)
    gates = {"gate_in": drawn(2, 30, 3, seed=1), "gate_out": drawn(2, 30, 3, seed=2)}
    ours = monarch_conv(u, k, sizes, skip=skip, **gates)
    assert error(ours, causal_conv(u, k, skip=skip, **gates)) < 1e-12
    low = monarch_conv(u.bfloat16(), k.bfloat16(), sizes)
    assert low.dtype == torch.bfloat16
    assert error(low.double(), causal_conv(u, k)) < 2e-2


@pytest.mark.parametrize("sizes", [(2,), (7,), (4, 8), (3, 5, 2), (2, 2, 2, 2)])
def test_fourier_factors_are_the_fourier_transform(sizes):
    n = math.prod(sizes)
    x = torch.complex(drawn(2, 3, n), drawn(2, 3, n, seed=1))
    assert error(monarch_fft(x, fourier_factors(sizes, torch.complex128)), torch.fft.fft(x)) < 1e-13


def test_any_factors_by_their_formula():
    """X[j1 + n1 j2] = sum_i2 B[j2, i2] w^(j1 i2) sum_i1 A[j1, i1] x[i1 n2 + i2],  w = exp(-2 pi i / n)."""
    H, n1, n2 = 2, 3, 4
    A, B = (torch.complex(drawn(H, n, n), drawn(H, n, n, seed=1)) for n in (n1, n2))
    x, n = drawn(H, 10), n1 * n2
    expected = torch.zeros(H, n, dtype=torch.complex128)
    padded = F.pad(x, (0, 2))
    for h in range(H):
        for j1 in range(n1):
            for j2 in range(n2):
                for i2 in range(n2):
                    inner = sum(A[h, j1, i1] * padded[h, i1 * n2 + i2] for i1 in range(n1))
                    w = cmath.exp(-2j * math.pi * j1 * i2 / n)
                    expected[h, j1 + n1 * j2] += B[h, j2, i2] * w * inner
    assert error(monarch_fft(x, [A, B]), expected) < 1e-12


def test_the_block_transform_is_a_monarch_transform():
    matrices = {n: torch.complex(drawn(3, n, n), drawn(3, n, n, seed=1)) for n in dft_matrices(4)}
    x = drawn(2, 3, 30)
    assert torch.equal(block_fft(x, 30, matrices), monarch_fft(x, [matrices[4], matrices[4], matrices[2]]))


def test_a_learned_transform():
    fresh = MonarchFFT(3, (4, 8))
    x = series(2, 3, 20).float()
    assert error(fresh(x), torch.fft.fft(x, 32)) < 1e-6
    shared = MonarchFFT(1, (4, 8), noise=0.1)
    assert shared(x).shape == (2, 3, 32)
    assert error(shared(x), torch.fft.fft(x, 32)) > 1e-2
    shared(x).abs().sum().backward()
    assert all(p.grad.any() for p in shared.parameters())
    assert fresh.bfloat16()(x.bfloat16()).dtype == torch.complex64
    with pytest.raises(ValueError, match=r"x has 3 features; the matrices have 2"):
        MonarchFFT(2, (4, 8))(x)
    for sizes, noise in [((), 0.0), ((1, 4), 0.0), ((4,), -1.0)]:
        with pytest.raises(ValueError, match=r"sizes >= 2 and noise >= 0; got sizes"):
            MonarchFFT(1, sizes, noise=noise)


def test_sizes_of_a_decomposition():
    assert monarch_sizes(256, 2) == (16, 16)
    assert monarch_sizes(300, 3) == (8, 8, 8)
    assert monarch_sizes(33, 4) == (4, 4, 2, 2)
    assert monarch_sizes(1, 1) == (1,)
    with pytest.raises(ValueError, match=r"got length = 4, order = 0"):
        monarch_sizes(4, 0)
    with pytest.raises(ValueError, match=r"sizes = \(2, 4\) make a circle of 8 steps; L = 9 and 3 taps"):
        monarch_conv(series(1, 9, 2), drawn(2, 3), (2, 4))
    with pytest.raises(ValueError, match=r"square; got shape \(2, 3\)"):
        monarch_fft(drawn(2, 4), [torch.zeros(2, 3, dtype=torch.complex64)])


def test_a_butterfly_convolution_starts_as_the_long_convolution():
    ours, theirs = ButterflyConv(4, 16, noise=0.0, decay=True), LongConvMixer(4, 16)
    theirs.load_state_dict({key: t for key, t in ours.state_dict().items() if not key.startswith("block_fft")})
    x = series(2, 16, 4).float()
    assert error(ours(x)[0], theirs(x)[0]) < 1e-5


def test_what_a_butterfly_convolution_refuses():
    with pytest.raises(ValueError, match=r"max_len = 16 cannot serve a sequence of 17; build it with max_len >= 17"):
        ButterflyConv(4, 16)(torch.zeros(1, 17, 4))
    with pytest.raises(ValueError, match=r"max_len = 4 is too short for transforms of order = 4"):
        ButterflyConv(4, 4, order=4)


@pytest.mark.parametrize(("k", "l", "rank"), [(4, 4, 1), (2, 3, 2), (3, 2, 1)])
def test_projection_onto_monarch_finds_a_monarch_matrix(k, l, rank):
    w1, w2 = drawn(k, rank * l, 4), drawn(l, 5, k * rank, seed=1)
    dense = monarch(torch.eye(4 * k, dtype=torch.float64), w1, w2).T
    found = monarch_project(dense, (k, l), rank)
    assert [f.shape for f in found] == [w1.shape, w2.shape]
    assert error(monarch(torch.eye(4 * k, dtype=torch.float64), *found).T, dense) < 1e-12


def test_projection_against_the_authors():
    case = piece("monarch__projection")
    for n, name in ((16, "M_monarch16"), (36, "M_dense36")):
        w1, w2 = monarch_project(case.tensors[f"input.{name}"])
        recon = monarch(torch.eye(n), w1, w2).T
        assert error(recon, case.tensors[f"output.recon_{n}"]) < 1e-5
        assert [w1.shape, w2.shape] == [case.tensors[f"output.w{i}_{n}"].shape for i in (1, 2)]


def test_the_fourier_transform_is_a_monarch_matrix():
    n, k, l = 24, 6, 4
    turned = torch.arange(n).view(l, k).T.flatten()
    dft = torch.fft.fft(torch.eye(n, dtype=torch.complex128)).T
    w1, w2 = monarch_project(dft[:, turned])
    assert w1.shape == (k, l, l)
    x = torch.complex(drawn(3, n), drawn(3, n, seed=1))
    assert error(monarch(x[:, turned], w1, w2), torch.fft.fft(x)) < 1e-12
    pairs = {f"w{i}_bfly": torch.view_as_real(w) for i, w in ((1, w1), (2, w2))}
    module = from_official("monarch", {"n": n, "direction": "fft"}, {"perm": turned, **pairs})
    assert error(module(x=x), torch.fft.fft(x)) < 1e-12
    assert error(module(x=torch.view_as_real(x)), torch.view_as_real(torch.fft.fft(x))) < 1e-12
    with pytest.raises(ValueError, match="'perm' is not the transposition"):
        from_official("monarch", {"n": n}, {"perm": torch.arange(n), **pairs})


def test_bad_structured_matrices_are_named():
    x = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"x has 6 features; 2 blocks of \(3, 4\) take 8"):
        blockdiag_multiply(x, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"w1 \(2, 3, 3\) give 6 features; those of w2 \(2, 5, 4\) take 8"):
        monarch(x, torch.zeros(2, 3, 3), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"twiddle must be \(S, D, log2 n, n/2, 2, 2\) or .*got shape \(1, 1, 3, 3"):
        butterfly(x[:, None], torch.zeros(1, 1, 3, 3, 2, 2))
    with pytest.raises(ValueError, match=r"x has 6 features; 3 factors with blocks of 1 take 8"):
        butterfly(x[:, None], torch.zeros(1, 1, 3, 4, 2, 2))
    with pytest.raises(ValueError, match=r"blocks = \(4, 2\) do not divide 6 columns and 2 rows"):
        monarch_project(x, (4, 2))
    with pytest.raises(ValueError, match=r"blocks of 1 x 3 have no rank 2"):
        monarch_project(x, (2, 2), rank=2)
    with pytest.raises(ValueError, match=r"must be \(m, n\); got shape \(6,\)"):
        monarch_project(x[0])
    for build in (BlockdiagLinear, MonarchLinear, ButterflyLinear):
        with pytest.raises(ValueError, match=r">= 1; got in_features = 0"):
            build(0, 4)


def butterfly_matrix(twiddle: Tensor, increasing: bool) -> Tensor:
    """The matrix of one stack, twiddle (D, log n, n/2, 2, 2), written out entry by entry."""
    levels = twiddle.shape[1]
    product = torch.eye(2**levels, dtype=twiddle.dtype)
    for d in range(len(twiddle)):
        strides = [2**i for i in range(levels)]
        for level, stride in enumerate(strides if increasing == (d % 2 == 0) else strides[::-1]):
            factor = torch.zeros_like(product)
            pairs = [i for i in range(2**levels) if i // stride % 2 == 0]
            for number, i in enumerate(pairs):
                rows = torch.tensor([i, i + stride])
                factor[rows[:, None], rows] = twiddle[d, level, number]
            product = factor @ product
    return product


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize(
    "call", [{}, {"transpose": True}, {"transpose": True, "conjugate": True}, {"subtwiddle": True}], ids=str
)
@pytest.mark.parametrize("complex", [True, False])
@pytest.mark.parametrize("nblocks", [1, 2])
def test_official_butterflies_by_their_matrices(increasing, call, complex, nblocks):
    size, out = 8, 12
    pair = (2, 2, 2) if complex else (2, 2)
    state = {"twiddle": drawn(2, nblocks, 3, 4, *pair), "bias": drawn(out, *pair[2:], seed=1)}
    config = {"in_size": size, "out_size": out, "complex": complex, "increasing_stride": increasing, "nblocks": nblocks}
    module = from_official("butterfly", {**config, **call}, state)
    twiddle, bias = state["twiddle"], state["bias"]
    x = drawn(3, 4 if call.get("subtwiddle") else size, seed=2)
    if complex:
        twiddle, bias, x = torch.view_as_complex(twiddle), torch.view_as_complex(bias), torch.complex(x, x.flip(0))
    if call.get("subtwiddle"):
        twiddle = (twiddle[:, :, :2] if increasing else twiddle[:, :, -2:])[:, :, :, :2]
    matrices = [butterfly_matrix(t, increasing) for t in twiddle]
    matrices = [m.conj() if call.get("conjugate") else m for m in matrices]
    expected = torch.cat([x @ (m if call.get("transpose") else m.T) for m in matrices], dim=1)
    expected = expected[:, : 8 if call.get("subtwiddle") else out]
    expected = expected + bias[: expected.shape[1]]
    assert error(module(x=x), expected) < 1e-12
    if complex:
        assert error(module(x=torch.view_as_real(x)), torch.view_as_real(expected)) < 1e-12


def test_the_transposed_butterfly_against_the_authors():
    case = golden("butterfly__real_16_16")
    module = from_official(case.system, {**case.config, "transpose": True}, case.state(torch.float64))
    assert error(module(**case.inputs(torch.float64)), case.tensors["output.transpose"]) < 1e-6


def test_a_unitary_butterfly_is_unitary():
    state = {"twiddle": drawn(1, 2, 3, 4, 4)}
    module = from_official("butterfly", {"in_size": 8, "out_size": 8, "bias": False, "nblocks": 2}, state)
    matrix = module(x=torch.eye(8, dtype=torch.complex128))
    assert error(matrix @ matrix.mH, torch.eye(8, dtype=torch.complex128)) < 1e-12
    phi, alpha, psi, chi = state["twiddle"].unbind(-1)
    i = torch.tensor(1j, dtype=torch.complex128)
    a, b = phi.cos() * torch.exp(i * (alpha + psi)), phi.sin() * torch.exp(i * (alpha + chi))
    c, d = -phi.sin() * torch.exp(i * (alpha - chi)), phi.cos() * torch.exp(i * (alpha - psi))
    twiddle = torch.stack([a, b, c, d], dim=-1).unflatten(-1, (2, 2))
    assert error(matrix.T, butterfly_matrix(twiddle[0], True)) < 1e-12


@pytest.mark.parametrize(("stem", "kind"), [("butterfly__fft16", "fft"), ("butterfly__dct16", "dct2")])
def test_transforms_against_the_authors(stem, kind):
    case = piece(stem)
    module = from_official("butterfly", {**case.config, "kind": kind}, case.state(torch.float64))
    y = module(**case.inputs(torch.float64))
    assert error(y, case.tensors["output.y"]) < 1e-6
    assert error(y, case.tensors["output.reference"]) < 1e-6


def test_the_other_order_of_a_fourier_transform():
    """Decimation in frequency: the transpose of the inverse's conjugate, and the permutation comes last."""
    n, first = 8, piece("butterfly__fft16").tensors
    levels = []
    for level in range(3):
        size = 2 ** (level + 1)
        w = torch.polar(torch.ones(size // 2).double(), -2 * math.pi * torch.arange(size // 2).double() / size)
        one = torch.ones_like(w)
        pairs = torch.stack([torch.stack([one, w], -1), torch.stack([one, -w], -1)], -2)
        levels.append(pairs.repeat(n // size, 1, 1))
    twiddle = torch.stack(levels)[None, None]
    reversed_bits = torch.tensor([int(f"{i:03b}"[::-1], 2) for i in range(n)])
    x = torch.complex(drawn(2, n), drawn(2, n, seed=1))
    for br_first, names in ((True, ("0.permutation", "1.twiddle")), (False, ("1.permutation", "0.twiddle"))):
        t = twiddle if br_first else twiddle.transpose(-1, -2).flip(2)
        state = dict(zip(names, (reversed_bits, torch.view_as_real(t.contiguous()))))
        module = from_official("butterfly", {"kind": "fft", "n": n, "br_first": br_first}, state)
        assert error(module(x=x), torch.fft.fft(x)) < 1e-12
    assert first["state.0.permutation"].tolist() == [int(f"{i:04b}"[::-1], 2) for i in range(16)]


def test_a_circulant_matrix_against_the_authors():
    case = piece("butterfly__circulant13")
    up, diagonal, down = (
        torch.view_as_complex(case.tensors[f"state.{key}"]) for key in ("1.twiddle", "2.diagonal", "3.twiddle")
    )
    x = F.pad(case.tensors["input.x"], (0, 19))[:, None]
    y = butterfly(butterfly(x, up, increasing=False) * diagonal, down)[:, 0, :13].real
    assert error(y, case.tensors["output.y"]) < 1e-5


def test_linear_layers():
    x = series(2, 5, 12).float()
    for layer in (
        BlockdiagLinear(12, 7, 3),
        MonarchLinear(12, 30, 4),
        MonarchLinear(12, 7, 4, bias=False),
        ButterflyLinear(12, 40, 2),
        ButterflyLinear(12, 9, complex=True),
        ButterflyLinear(12, 5, increasing=False, bias=False),
    ):
        y = layer(x)
        assert y.shape == (2, 5, layer.out_features)
        y.abs().square().sum().backward()
        assert all(p.grad.any() for p in layer.parameters())
        torch.manual_seed(0)
        reset(layer)
        state = {key: t.clone() for key, t in layer.state_dict().items()}
        torch.manual_seed(0)
        reset(layer)
        assert all(torch.equal(t, state[key]) for key, t in layer.state_dict().items())


@pytest.mark.parametrize("complex", [True, False])
def test_a_butterfly_layer_starts_orthogonal(complex):
    layer = ButterflyLinear(8, 8, 3, bias=False, complex=complex).double()
    matrix = layer(torch.eye(8, dtype=torch.float64))
    assert error(matrix @ matrix.mH, torch.eye(8, dtype=matrix.dtype)) < 1e-6


def test_a_shuffled_block_diagonal_layer():
    state = {"weight": drawn(2, 3, 4), "bias": drawn(5, seed=1)}
    config = {"in_features": 7, "out_features": 5, "nblocks": 2, "shuffle": True}
    x = series(3, 7)
    turned = F.pad(x, (0, 1)).view(3, 2, 4).transpose(1, 2).reshape(3, 2, 4)
    expected = torch.cat([turned[:, i] @ state["weight"][i].T for i in range(2)], dim=1)[:, :5] + state["bias"]
    assert error(from_official("monarch", config, state)(x=x), expected) < 1e-12


def test_bad_official_matrices_are_named():
    with pytest.raises(ValueError, match=r"^monarch: the option 'out_features' is missing"):
        from_official("monarch", {"in_features": 4}, {})
    with pytest.raises(ValueError, match=r"^monarch: there is no option 'nblock' .*did you mean 'nblocks'"):
        from_official("monarch", {"in_features": 4, "out_features": 4, "nblock": 2}, {})
    with pytest.raises(ValueError, match=r"^butterfly: the option kind = 'dft' is not carried over"):
        from_official("butterfly", {"kind": "dft", "n": 4}, {})
    with pytest.raises(ValueError, match=r"^butterfly: the option n = 6 is no power of two"):
        from_official("butterfly", {"kind": "fft", "n": 6}, {})
    with pytest.raises(ValueError, match=r"output_size = 20 is above the 16 features"):
        from_official("butterfly", {"nstacks": 1, "nblocks": 1, "log_n": 3, "block_size": 2, "output_size": 20}, {})
