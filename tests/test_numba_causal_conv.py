"""The FFT convolution kernels where the op contract does not reach: plans, tails, accuracy, memory, threads."""

import pytest
import torch

pytest.importorskip("numba")

from longwave.ops import causal_conv
from longwave.ops._numba import causal_conv as kernels


def inputs(B, L, C, K, F=0, gates=True, dtype=torch.float32):
    torch.manual_seed(0)
    keywords = {"skip": torch.randn(C, dtype=dtype)}
    if gates:
        keywords |= {name: torch.randn(B, L, C, dtype=dtype) for name in ("gate_in", "gate_out")}
    if F:
        keywords["k_future"] = torch.randn(C, F, dtype=dtype)
    return {"u": torch.randn(B, L, C, dtype=dtype), "k": torch.randn(C, K, dtype=dtype), **keywords}


def results(given, backend, dtype=torch.float32):
    """y and all gradients."""
    tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
    y = causal_conv(**tensors, backend=backend)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), dy)]


def error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("L", [*range(1, 40), 255, 256, 257, 1000, 4099, 2**20, 2**22])
def test_the_plan_is_long_enough_and_not_much_longer(L):
    for K, F in {(L, 0), (1, 0), ((L + 1) // 2, 0), (L, L - 1), (1, L - 1), (min(3, L), min(5, L - 1))}:
        M, radix = kernels.plan(L, K, F)
        assert 2 * M >= L + K - 1
        assert 2 * M >= L + F
        assert M % radix == 0
        assert (M // radix).bit_count() == 1
        least = (L + max(K - 1, F) + 1) // 2
        assert max(3, least * 4 / 3) >= M


@pytest.mark.parametrize(
    ("B", "L", "C", "K", "F"),
    [
        *((2, L, 3, L, 0) for L in (1, 2, 3, 4, 5, 6, 8, 9, 11, 13)),
        *((1, L, 8, L, L - 1) for L in (2, 3, 5, 16, 17)),
        (3, 97, 9, 1, 0),  # the shortest filter: half of the samples are imaginary parts
        (2, 211, 17, 40, 0),
        (2, 211, 16, 3, 90),
        (1, 640, 24, 700, 900),  # radix 5, taps beyond both ends
        (2, 384, 31, 384, 1),  # radix 3
        (1, 1025, 33, 1025, 0),  # a little over a power of two
    ],
)
def test_every_size_is_as_exact_as_torch(B, L, C, K, F):
    given = inputs(B, L, C, K, F)
    exact = results(given, "torch", torch.float64)
    for ours, theirs, right in zip(results(given, "numba"), results(given, "torch"), exact, strict=True):
        assert ours.shape == right.shape
        if right.any():
            assert error(ours, right) <= 2 * error(theirs, right) + 3e-7
        else:
            assert not ours.any()


@pytest.mark.parametrize("L", [4096, 5003, 70001])
def test_long_sequences_are_within_twice_the_error_of_torch(L):
    given = inputs(2 if L < 6000 else 1, L, 8, L, gates=L < 6000)
    ours, theirs, exact = (results(given, *how) for how in (("numba",), ("torch",), ("torch", torch.float64)))
    assert torch.equal(ours[3], ours[2][:, 0])  # of skip and of tap 0: the largest error of eight numbers is chance
    for i in (0, 1, 2, *range(4, len(ours))):
        assert error(ours[i], exact[i]) <= 2 * error(theirs[i], exact[i])


def test_an_impulse_shows_every_tap():
    """Against wrapping: no tap may leak round the end, however it is loaded."""
    for L in (48, 61, 64):
        k, future = torch.randn(3, L), torch.randn(3, L - 1)
        for place in (0, 7, L // 2, L - 1):
            u = torch.zeros(1, L, 3)
            u[0, place] = 1
            y = causal_conv(u, k, k_future=future, backend="numba")[0].T
            whole = torch.cat([future.flip(1), k], dim=1)[:, L - 1 - place : 2 * L - 1 - place]
            torch.testing.assert_close(y, whole, atol=2e-6, rtol=0)


def test_nan_and_inf_stay_in_their_row_and_channel():
    given = inputs(2, 70, 19, 70)
    clean = causal_conv(**given, backend="numba")
    for bad in (float("nan"), float("inf")):
        spoilt = {**given, "u": given["u"].clone()}
        spoilt["u"][1, 69, 17] = bad
        y = causal_conv(**spoilt, backend="numba")
        assert not torch.isfinite(y[1, :, 17]).any()
        y[1, :, 17] = clean[1, :, 17]
        assert torch.equal(y, clean)


def test_inputs_may_be_views():
    given = inputs(2, 50, 11, 50, 20)
    views = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items()}
    assert not views["u"].is_contiguous()
    for ours, theirs in zip(results(views, "numba"), results(given, "numba"), strict=True):
        assert torch.equal(ours, theirs)


def test_results_do_not_depend_on_threads():
    given = inputs(5, 300, 27, 300)
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            runs.append(results(given, "numba"))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*runs, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_nothing_outside_the_tensors_is_written(monkeypatch):
    """Outputs are cut out of larger buffers, whose margins must stay as they are."""
    buffers = []

    def margins(*shape):
        size = torch.Size(shape).numel()
        buffers.append((torch.full((size + 64,), 7.0), size))
        return buffers[-1][0][32 : 32 + size].view(shape)

    given = inputs(2, 45, 13, 45, 9)
    monkeypatch.setattr(kernels.pool, "empty", margins)
    dy = given["u"].clone()
    kernels.forward(**given)
    kernels.backward(set(given), dy, **given)
    assert len(buffers) == 5
    for buffer, size in buffers:
        assert (buffer[:32] == 7).all()
        assert (buffer[32 + size :] == 7).all()
        assert torch.isfinite(buffer).all()
        assert (buffer[32 : 32 + size] != 7).all()


def test_other_dtypes():
    given = inputs(1, 33, 5, 33)
    assert "float64" in causal_conv.why_not("numba", given["u"].double(), given["k"])
    half = results({name: t.bfloat16() for name, t in given.items()}, "numba", torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in half)
    mixed = causal_conv(given["u"].half(), given["k"], backend="numba")
    assert mixed.dtype == torch.float16
