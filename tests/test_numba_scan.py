"""The CPU kernels of both scans beyond the contract of tests/test_ops.py: odd sizes, tails, strips, threads, NaN."""

import pytest
import torch

from longwave.ops import linear_scan, selective_scan
from longwave.ops._torch.linear_scan import scan

OPTIONAL = ("D", "state", "z", "dt_bias")


def make(B, L, E, N, G=None, without=(), dtype=torch.float32):
    torch.manual_seed(0)
    maps = (B, L, N) if G is None else (B, L, G, N)
    tensors = {
        "u": torch.randn(B, L, E, dtype=dtype),
        "dt": torch.randn(B, L, E, dtype=dtype) - 2,
        "A": -4 * torch.rand(E, N, dtype=dtype),
        "B": torch.randn(maps, dtype=dtype),
        "C": torch.randn(maps, dtype=dtype),
        "D": torch.randn(E, dtype=dtype),
        "state": torch.randn(B, E, N, dtype=dtype),
        "z": torch.randn(B, L, E, dtype=dtype),
        "dt_bias": torch.randn(E, dtype=dtype),
    }
    return {name: x.requires_grad_() for name, x in tensors.items() if name not in without}


def outputs_and_gradients(tensors, backend, softplus=True):
    """y, the last state and all gradients, of float64 inputs if ``backend`` is None."""
    if backend is None:
        tensors = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    out = selective_scan(**tensors, softplus=softplus, backend=backend or "torch")
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, list(tensors.values()), weights)]


def assert_as_near_as_torch(ours, theirs, exact, factor=2.0):
    """The error against float64 is at most ``factor`` times that of the portable form, plus a rounding."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.shape == e.shape
        scale = max(e.norm().item(), 1e-30)
        error, portable = (((x.to(e.dtype) - e).norm() / scale).item() for x in (a, b))
        assert error <= factor * portable + 1.2e-7, (error, portable)


@pytest.mark.parametrize(
    ("B", "L", "E", "N", "G"),
    [
        (1, 1, 1, 1, None),
        (2, 5, 7, 3, None),
        (1, 33, 17, 2, 1),
        (3, 31, 8, 5, None),
        (2, 32, 9, 4, 3),  # groups of three channels, fewer than the lanes
        (1, 97, 22, 6, 2),  # eleven: a whole block and a tail in each group
        (2, 64, 12, 1, 12),  # every channel its own group
        (1, 40, 150, 2, None),  # three strips, the last with a tail
        (1, 70, 66, 33, 1),
    ],
)
def test_any_size(B, L, E, N, G, poisoned_memory):
    tensors = make(B, L, E, N, G)
    with poisoned_memory():
        ours = outputs_and_gradients(tensors, "numba")
    assert_as_near_as_torch(ours, outputs_and_gradients(tensors, "torch"), outputs_and_gradients(tensors, None))


@pytest.mark.parametrize("without", [OPTIONAL, *[(name,) for name in OPTIONAL]])
@pytest.mark.parametrize("softplus", [True, False])
def test_any_option(without, softplus):
    tensors = make(2, 35, 11, 4, without=without)
    if not softplus:  # steps are positive all the same, or the state explodes
        for name in {"dt", "dt_bias"} & set(tensors):
            tensors[name] = tensors[name].detach().abs().requires_grad_()
    ours, theirs, exact = (outputs_and_gradients(tensors, backend, softplus) for backend in ("numba", "torch", None))
    assert_as_near_as_torch(ours, theirs, exact)


def test_long_sums_are_as_exact_as_the_portable_form():
    tensors = make(2, 3000, 40, 8)
    ours, theirs, exact = (outputs_and_gradients(tensors, backend) for backend in ("numba", "torch", None))
    assert_as_near_as_torch(ours, theirs, exact)


def test_slow_decays_are_as_exact_as_the_portable_form():
    tensors = make(1, 4000, 16, 4)
    tensors["A"] = (tensors["A"].detach() * 1e-2).requires_grad_()
    ours, theirs, exact = (outputs_and_gradients(tensors, backend) for backend in ("numba", "torch", None))
    assert_as_near_as_torch(ours, theirs, exact)


def test_a_masked_step_leaves_the_state_exactly_as_it_was():
    tensors = make(1, 80, 9, 4)
    masked = torch.zeros(80, dtype=torch.bool)
    masked[[0, 5, 31, 32, 33, 63, 79]] = True
    dt = tensors["dt"].detach().masked_fill(masked[:, None], float("-inf")).requires_grad_()
    y, h = selective_scan(**{**tensors, "dt": dt}, softplus=True, backend="numba")
    short = {name: x[:, ~masked] if name in ("u", "dt", "B", "C", "z") else x for name, x in tensors.items()}
    y_short, h_short = selective_scan(**short, softplus=True, backend="numba")
    assert torch.equal(y[:, ~masked], y_short)
    assert torch.equal(h, h_short)
    grads = torch.autograd.grad((y.sum() + h.sum()), [dt, tensors["B"], tensors["A"], tensors["dt_bias"]])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, masked].any()
    assert not grads[1][:, masked].any()


@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "z", "state", "A", "D", "dt_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_go_where_they_go_in_the_reference(name, value):
    tensors = {key: x.detach() for key, x in make(2, 40, 11, 4).items()}
    place = {1: (3,), 2: (3, 1), 3: (1, 2, 3)}[tensors[name].ndim]
    tensors[name][place] = -value if name == "A" else value
    ours = selective_scan(**tensors, softplus=True, backend="numba")
    for a, b in zip(ours, selective_scan(**tensors, softplus=True, backend="reference"), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a[b.isfinite()], b[b.isfinite()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "z", "state"])
def test_nan_reaches_the_gradients_that_it_reaches_in_the_portable_form(name):
    tensors = make(2, 40, 11, 4)
    with torch.no_grad():
        tensors[name][1, 2, 3] = float("nan")
    for a, b in zip(outputs_and_gradients(tensors, "numba"), outputs_and_gradients(tensors, "torch"), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_threads_change_nothing():
    tensors, (a, b, h0) = make(2, 70, 200, 4, 2), decays(2, 50, 300, torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            h = linear_scan(a, b, h0, backend="numba")
            scans = [h, *torch.autograd.grad(h.sin().sum(), [a, b, h0])]
            results.append([*outputs_and_gradients(tensors, "numba"), *scans])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs():
    """A gate that is half of a wider tensor is read in place; what lies otherwise is copied."""
    tensors = make(2, 37, 12, 4)
    plain = outputs_and_gradients(tensors, "numba")
    strided = dict(tensors)
    wide = torch.cat([tensors["u"], tensors["z"]], dim=-1).detach()
    strided["u"], strided["z"] = (x.requires_grad_() for x in wide.chunk(2, dim=-1))
    strided["dt"] = tensors["dt"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided["A"] = tensors["A"].detach().T.contiguous().T.requires_grad_()
    strided["B"] = tensors["B"].detach().repeat(1, 1, 2)[..., :4].requires_grad_()
    assert not any(strided[name].is_contiguous() for name in ("u", "z", "dt", "A", "B"))
    for a, b in zip(plain, outputs_and_gradients(strided, "numba"), strict=True):
        assert torch.equal(a, b)
    one = {name: x.detach()[:1] if name in ("B", "C") else x.detach() for name, x in tensors.items()}
    one["B"], one["C"] = (one[name].expand(2, -1, -1) for name in "BC")
    ours, theirs = (selective_scan(**one, softplus=True, backend=backend)[0] for backend in ("numba", "torch"))
    torch.testing.assert_close(ours, theirs)


def test_states_are_kept_only_for_a_gradient(monkeypatch):
    from longwave.ops._numba import selective_scan as kernels

    kept = []
    forward = kernels.forward

    def watch(*args):
        result = forward(*args)
        kept.append(result[1].numel())
        return result

    monkeypatch.setattr(kernels, "forward", watch)
    bound = vars(selective_scan.backends["numba"])  # where forward may be kept as it was
    monkeypatch.setitem(bound, "direct", lambda *inputs: watch(*inputs, False)[0])
    tensors = make(1, 64, 8, 4)
    with torch.no_grad():
        selective_scan(**tensors, softplus=True, backend="numba")
    selective_scan(**{name: x.detach() for name, x in tensors.items()}, softplus=True, backend="numba")
    selective_scan(**tensors, softplus=True, backend="numba")
    assert kept == [0, 0, 2 * 8 * 4]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_both_scans_compile_whole_with_gradients(mode):
    torch._dynamo.reset()
    tensors, (a, b, h0) = make(2, 40, 9, 3), decays(2, 9, 5, torch.complex64)

    def both(tensors, a, b, h0):
        return *selective_scan(**tensors, softplus=True, backend="numba"), linear_scan(a, b, h0, backend="numba")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, both):
        with mode():
            out = run(tensors, a, b, h0)
        if out[0].requires_grad:
            loss = sum((x.abs() ** 2).sum() for x in out)
            out = [*out, *torch.autograd.grad(loss, [*tensors.values(), a, b, h0])]
        results.append(out)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_gradients_have_the_dtype_of_their_inputs():
    tensors = {name: x.detach().bfloat16().requires_grad_() for name, x in make(1, 33, 5, 3).items()}
    grads = outputs_and_gradients(tensors, "numba")
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 9]
    exact = outputs_and_gradients(tensors, None)
    for a, e in zip(grads, exact, strict=True):
        assert (a.double() - e).norm() <= 0.01 * e.norm()


def test_the_kernels_say_what_they_cannot_take():
    tensors = make(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"a tensor is complex; the kernel computes in real numbers"):
        selective_scan(**{**tensors, "A": tensors["A"] * 1j}, backend="numba")
    with pytest.raises(ValueError, match=r"a tensor is torch.float64; the kernels compute in float32"):
        selective_scan(**{**tensors, "u": tensors["u"].double()}, backend="numba")
    a, b, h0 = decays(1, 3, 2, torch.float32)
    with pytest.raises(ValueError, match=r"some tensors are real and some complex"):
        linear_scan(a, b * 1j, h0, backend="numba")


def decays(B, L, C, dtype):
    torch.manual_seed(0)
    size = 0.5 + 0.499 * torch.rand(B, L, C)
    a = size if not dtype.is_complex else torch.polar(size, 6 * torch.rand(B, L, C))
    return [x.requires_grad_() for x in (a, torch.randn(B, L, C, dtype=dtype), torch.randn(B, C, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(
    ("B", "L", "C"), [(1, 1, 1), (2, 9, 3), (3, 50, 8), (1, 33, 13), (2, 1000, 21), (1, 5, 2100), (2, 17, 0), (0, 4, 3)]
)
def test_linear_scan_at_any_size(B, L, C, dtype, poisoned_memory):
    inputs = decays(B, L, C, dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = [x.detach().to(wide).requires_grad_() for x in inputs]
    torch.manual_seed(1)
    weight = torch.randn(B, L, C, dtype=dtype)

    def run(inputs, backend, weight):
        h, _ = linear_scan.backends[backend].op(*inputs, True)
        return [h, *torch.autograd.grad(h, inputs, weight)]

    with poisoned_memory():
        ours = run(inputs, "numba", weight)
    assert_as_near_as_torch(ours, run(inputs, "torch", weight), run(exact, "torch", weight.to(wide)))


@pytest.mark.parametrize(("B", "L", "C"), [(1, 1, 1), (2, 9, 3), (1, 50, 8), (2, 17, 0), (0, 4, 3)])
def test_a_scan_reversed_is_that_of_the_sequence_reversed(B, L, C):
    a, b, h0 = (x.detach().to(torch.complex128) for x in decays(B, L, C, torch.complex64))
    ours = scan(a, b, h0, reverse=True)
    torch.testing.assert_close(ours, scan(a.flip(1), b.flip(1), h0).flip(1), rtol=1e-12, atol=1e-12)


def test_linear_scan_of_views():
    a, b, h0 = (x.detach() for x in decays(2, 12, 10, torch.complex64))
    assert torch.equal(linear_scan(a.conj(), b, h0, backend="numba"), linear_scan(a.conj().resolve_conj(), b, h0))
    imaginary = a.conj().imag  # torch keeps a sign to be applied later
    assert torch.equal(
        linear_scan(imaginary, b.real, h0.real, backend="numba"),
        linear_scan(imaginary.clone(), b.real.contiguous(), h0.real.contiguous(), backend="numba"),
    )
    late = a.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear_scan(late, b, h0, backend="numba"), linear_scan(a, b, h0, backend="numba"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_linear_scan_passes_nan_and_infinity(value):
    a, b, h0 = (x.detach() for x in decays(2, 12, 11, torch.float32))
    b[1, 5, 9] = value
    ours, theirs = (linear_scan(a, b, h0, backend=backend) for backend in ("numba", "reference"))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not ours[1, 5:, 9].isfinite().any()
