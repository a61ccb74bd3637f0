"""What the contract in test_ops.py does not reach: odd sizes, strides, infinities, threads and long sums."""

import math

import pytest
import torch
import torch.nn.functional as F

from longwave.ops import gated_delta_rule, linear_attention, short_conv, vandermonde, vandermonde_transpose, wkv


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


def run(op, inputs, backend, dtype=torch.float32, **keywords):
    """Outputs and gradients of every input, the weights of the outputs being fixed by a seed."""
    tensors = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = op(*tensors, backend=backend, **keywords)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(dtype)).sum() for y in outputs if y.numel())
    return [*outputs, *torch.autograd.grad(loss, [x for x in tensors if x is not None], allow_unused=True)]


def largest_error(ours, exact):
    """Relative to the largest magnitude of each tensor; NaN where there is one."""
    pairs = [(a.double(), e) for a, e in zip(ours, exact, strict=True) if a is not None and a.numel()]
    return torch.stack([(a - e).abs().max() / e.abs().max().clamp(min=1e-30) for a, e in pairs]).max().item()


def short_inputs(B, L, C, K, bias=True, state=True):
    torch.manual_seed(0)
    return [draw(B, L, C), draw(C, K), draw(C) if bias else None, draw(B, K - 1, C) if state else None]


def wkv_inputs(B, L, C):
    torch.manual_seed(0)
    state = torch.stack([torch.randn(B, C), 0.5 + torch.rand(B, C), torch.randn(B, C)], dim=1)
    return [draw(B, L, C), draw(B, L, C), -torch.rand(C).exp(), draw(C), state]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("B", "L", "C", "K"),
    [(2, 70, 1, 4), (1, 5, 9, 1), (3, 1, 65, 3), (2, 130, 72, 5), (1, 33, 130, 70), (2, 1100, 3, 4), (1, 1500, 8, 200)],
)
def test_short_conv_at_odd_sizes(B, L, C, K, silu, poisoned_memory):
    inputs = short_inputs(B, L, C, K)
    with poisoned_memory():
        ours = run(short_conv, inputs, "numba", silu=silu)
    exact = run(short_conv, inputs, "torch", torch.float64, silu=silu)
    assert largest_error(ours, exact) < 2e-6


@pytest.mark.parametrize(("bias", "state"), [(True, False), (False, True), (False, False)])
def test_short_conv_without_bias_or_state(bias, state):
    inputs = short_inputs(2, 20, 11, 4, bias, state)
    exact = run(short_conv, inputs, "reference", torch.float64, silu=True)
    assert largest_error(run(short_conv, inputs, "numba", silu=True), exact) < 2e-6


def test_short_conv_reads_strided_inputs_in_place():
    torch.manual_seed(0)
    both, weight = draw(2, 40, 26), draw(13, 4)
    for u in (
        both[..., 13:],
        both[:, ::2, :13],
        both.transpose(1, 2)[:, :13].transpose(1, 2),
        both[:, :1, :13].expand(2, 40, 13),
    ):
        for reduce in (torch.sum, lambda y: y.transpose(1, 2).square().sum()):  # gradients of stride 0 and transposed
            ours, exact = (
                torch.autograd.grad(reduce(short_conv(u, weight, backend=name)[0]), (both, weight))
                for name in ("numba", "reference")
            )
            for a, e in zip(ours, exact):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_where_it_belongs(value):
    inputs = short_inputs(1, 80, 10, 4)
    inputs[0].data[0, 40, 3] = value
    for silu in (False, True):
        same_kinds(short_conv, inputs, silu=silu)
    inputs = wkv_inputs(1, 70, 10)
    inputs[1].data[0, 40, 3] = value
    same_kinds(wkv, inputs)
    inputs = wkv_inputs(1, 70, 10)
    inputs[0].data[0, 40, 3] = value
    (y, state), (exact, exact_state) = (wkv(*inputs, backend=name) for name in ("numba", "reference"))
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert torch.equal(state[:, :2].isfinite(), exact_state[:, :2].isfinite())


def same_kinds(op, inputs, **keywords):
    """NaN, inf and -inf are in the same places as in the reference."""
    for a, e in zip(run(op, inputs, "numba", **keywords), run(op, inputs, "reference", **keywords), strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.isinf(), e.isinf())


@pytest.mark.parametrize(("B", "L", "C"), [(2, 33, 1), (1, 70, 8), (3, 31, 13), (1, 5, 45), (2, 64, 32)])
def test_wkv_at_odd_sizes(B, L, C, poisoned_memory):
    inputs = wkv_inputs(B, L, C)
    with poisoned_memory():
        ours = run(wkv, inputs, "numba")
    assert largest_error(ours, run(wkv, inputs, "reference", torch.float64)) < 2e-6


def test_wkv_is_the_direct_sum():
    """The definition with plain exponentials, which a short sequence of small keys allows."""
    k, v, w, u, _ = (x.detach().double() for x in wkv_inputs(2, 12, 3))
    ys = []
    for t in range(12):
        s = torch.arange(t)
        weights = torch.cat([((t - 1 - s)[:, None] * w + k[:, :t]).exp(), (u + k[:, t : t + 1]).exp()], dim=1)
        ys.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    for name in ("reference", "torch"):
        torch.testing.assert_close(wkv(k, v, w, u, backend=name)[0], torch.stack(ys, dim=1), rtol=1e-12, atol=1e-12)


def test_wkv_with_keys_and_decays_too_large_for_plain_exponentials():
    torch.manual_seed(0)
    k, v = 300 * torch.randn(1, 200, 9), torch.randn(1, 200, 9)
    w, u = -torch.logspace(-4, 4, 9), 100 * torch.randn(9)
    exact = run(wkv, [k, v, w, u], "reference", torch.float64)
    theirs = largest_error(run(wkv, [k, v, w, u], "reference"), exact)
    for name in ("torch", "numba"):
        assert largest_error(run(wkv, [k, v, w, u], name), exact) < 2 * theirs


def test_sums_over_long_sequences_do_not_drift():
    """Parameter gradients of 20,000 steps, against float64: no worse than twice the torch form's."""
    torch.manual_seed(0)
    cases = [(short_conv, short_inputs(1, 20_000, 8, 4), {"silu": True}), (wkv, wkv_inputs(1, 20_000, 8), {})]
    for op, inputs, keywords in cases:
        exact = run(op, inputs, "torch", torch.float64, **keywords)
        theirs = largest_error(run(op, inputs, "torch", **keywords), exact)
        assert largest_error(run(op, inputs, "numba", **keywords), exact) <= max(2 * theirs, 5e-7)


def test_results_do_not_depend_on_threads():
    cases = [(short_conv, short_inputs(2, 1100, 130, 4), {"silu": True}), (wkv, wkv_inputs(3, 40, 70), {})]
    for op, inputs, keywords in cases:
        alone = run(op, inputs, "numba", **keywords)
        torch.set_num_threads(2)
        try:
            together = run(op, inputs, "numba", **keywords)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("op", [short_conv, wkv], ids=["short_conv", "wkv"])
def test_kernels_compile_whole_with_their_gradients(op):
    torch._dynamo.reset()
    inputs = short_inputs(2, 9, 5, 3) if op is short_conv else wkv_inputs(2, 9, 5)
    inputs = [x.detach().requires_grad_() for x in inputs]
    compiled = torch.compile(lambda *x: op(*x, backend="numba"), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda *x: op(*x, backend="numba")):
        y, state = function(*inputs)
        results.append([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", [(3,), (2, 150, 3), (2, 150, 3, 4)], ids=["constant", "heads", "channels"])
def test_linear_attention_is_the_quadratic_form(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 150, 3, 4, dtype=torch.float64) for _ in "qkv")
    decay = -torch.rand(kind, dtype=torch.float64)
    each = decay if len(kind) == 4 else decay.expand(2, 150, 3)[..., None].expand(q.shape)
    total = each.cumsum(1).permute(0, 2, 3, 1)
    between = (total[..., :, None] - total[..., None, :]).exp().tril()
    exact = torch.einsum("blhn,bshn,bhnls,bshp->blhp", q, k, between, v)
    torch.testing.assert_close(linear_attention(q, k, v, decay)[0], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [(), (3,)], ids=["heads", "channels"])
@pytest.mark.parametrize("size", [1e-6, 30.0, 1e4, float("inf")])
def test_linear_attention_at_extreme_decays(size, channels):
    """Some steps forget nothing, others nearly or wholly everything; no exponent overflows, none loses its digits."""
    torch.manual_seed(0)
    decay = torch.where(torch.rand(2, 200, 2, *channels) < 0.1, -size, -1e-3)
    inputs = [*(draw(2, 200, 2, 3) for _ in "qkv"), decay, draw(2, 2, 3, 3)]
    exact = run(linear_attention, inputs, "reference", torch.float64)
    for backend, dtype, tolerance in (("torch", torch.float64, 1e-10), ("torch", torch.float32, 3e-5)):
        assert largest_error(run(linear_attention, inputs, backend, dtype), exact) < tolerance
    assert largest_error(run(linear_attention, inputs, "numba", torch.float32), exact) < 3e-5


@pytest.mark.parametrize(
    ("L", "G", "H", "N", "P", "decay"),
    [
        (300, 1, 6, 17, 20, (6,)),
        (700, 2, 2, 32, 64, (1, 700, 2)),
        (40, 2, 12, 5, 130, (1, 40, 12)),
        (530, 2, 12, 20, 3, (1, 530, 2, 20)),
        (33, 1, 1, 1, 1, (1, 33, 1, 1)),
    ],
)
def test_linear_attention_at_odd_sizes(L, G, H, N, P, decay, poisoned_memory):
    torch.manual_seed(0)
    inputs = [draw(1, L, G, N), draw(1, L, G, N), draw(1, L, H, P), -0.3 * torch.rand(decay), draw(1, H, N, P)]
    with poisoned_memory():
        ours = run(linear_attention, inputs, "numba")
    assert largest_error(ours, run(linear_attention, inputs, "torch", torch.float64)) < 2e-5


def test_vandermonde_over_blocks_of_channels_and_a_million_steps():
    """Several blocks, and powers so high that a phase in float32 would be noise."""
    torch.manual_seed(0)
    C, N, L = 5, 3, 1_000_000
    x = torch.exp(torch.complex(-1e-5 * torch.rand(C, N).double(), 3 * torch.rand(C, N).double()))
    u, c = torch.randn(1, C, L), torch.randn(1, C, N, dtype=torch.complex64)
    for dtype, tolerance in ((torch.complex64, 2e-6), (torch.complex128, 1e-10)):
        nodes, weights = x.to(dtype).requires_grad_(), c.to(dtype).requires_grad_()
        exact = [t.detach().to(torch.complex128) for t in (nodes, weights)]
        steps = torch.arange(L, dtype=torch.float64)
        powers = torch.exp(exact[0].log()[..., None] * steps)
        k = vandermonde(nodes, weights, L)
        dx, dc = torch.autograd.grad((k * u).sum(), (nodes, weights))
        m = vandermonde_transpose(nodes, u.to(nodes.real.dtype))
        wanted = torch.einsum("bcl,cnl->bcn", u.to(torch.complex128), powers)
        slope = torch.einsum("bcl,cnl->cn", (u * steps).to(torch.complex128), powers) / exact[0]
        pairs = [
            (k, 2 * torch.einsum("bcn,cnl->bcl", exact[1], powers).real),
            (m, wanted),
            (dc, 2 * wanted.conj()),
            (dx, 2 * (exact[1][0] * slope).conj()),
        ]
        for ours, e in pairs:
            assert (ours - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize(
    ("L", "G", "H", "N", "P", "often"),
    [(33, 1, 2, 16, 24, 0.0), (300, 1, 2, 20, 40, 0.2), (600, 2, 2, 64, 32, 0.0)],
)
def test_delta_rule_over_spans(L, G, H, N, P, often):
    """As often as that a step forgets all, and another learns nothing."""
    torch.manual_seed(0)
    q, k, v = draw(2, L, G, N), F.normalize(draw(2, L, G, N), dim=-1), draw(2, L, H, P)
    forget, skip = torch.rand(2, 2, L, H) < often
    decay, beta = -torch.rand(2, L, H).masked_fill(forget, math.inf), torch.rand(2, L, H).masked_fill(skip, 0)
    inputs = [q, k, v, decay, beta, draw(2, H, N, P)]
    exact = run(gated_delta_rule, inputs, "torch", torch.float64)
    assert largest_error(run(gated_delta_rule, inputs, "numba"), exact) < 2e-6
