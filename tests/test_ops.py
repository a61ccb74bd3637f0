"""The contract every op keeps: each backend is the reference, forward and backward, at every awkward size."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from longwave.ops import OPS, causal_conv, linear_scan, selective_scan
from longwave.ops import attention as attention_op

LENGTHS = [1, 2, 7, 63, 64, 65, 1000]


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def stable(*shape, dtype):
    """Numbers of modulus below 1, so that no recurrence or power explodes."""
    modulus = 0.2 + 0.7 * torch.rand(*shape, dtype=dtype)
    if not dtype.is_complex:
        return modulus.requires_grad_()
    return torch.polar(modulus.real, 6 * torch.rand(*shape, dtype=modulus.real.dtype)).detach().requires_grad_()


def to_complex(dtype):
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def conv(B, L, dtype):
    return [randn(B, L, 5, dtype=dtype), randn(5, L + 2, dtype=dtype)], {}


def conv_fused(B, L, dtype):
    keywords = ("gate_in", "gate_out")
    return [randn(B, L, 5, dtype=dtype), randn(5, max(1, L // 2), dtype=dtype)], {
        "skip": randn(5, dtype=dtype),
        **{name: randn(B, L, 5, dtype=dtype) for name in keywords},
    }


def conv_two_sided(B, L, dtype):
    u, k = conv(B, L, dtype)[0]
    return [u, k], {"k_future": randn(5, L + 1, dtype=dtype), "skip": randn(5, dtype=dtype)}


def short(B, L, dtype):
    return [
        randn(B, L, 3, dtype=dtype),
        randn(3, 4, dtype=dtype),
        randn(3, dtype=dtype),
        randn(B, 3, 3, dtype=dtype),
    ], {}


def short_bare(B, L, dtype):
    return [randn(B, L, 3, dtype=dtype), randn(3, 1, dtype=dtype)], {}


def short_silu(B, L, dtype):
    return short(B, L, dtype)[0], {"silu": True}


def scan(B, L, dtype):
    return [stable(B, L, 3, dtype=dtype), randn(B, L, 3, dtype=dtype), randn(B, 3, dtype=dtype)], {}


def scan_complex(B, L, dtype):
    return scan(B, L, to_complex(dtype))


def s6(B, L, dtype):
    E, N, keywords = 4, 3, {"dt_bias": randn(4, dtype=dtype), "z": randn(B, L, 4, dtype=dtype), "softplus": True}
    A = (-torch.rand(E, N, dtype=dtype)).requires_grad_()
    tensors = [
        randn(B, L, E, dtype=dtype),
        randn(B, L, E, dtype=dtype),
        A,
        *(randn(B, L, N, dtype=dtype) for _ in "BC"),
    ]
    return [*tensors, randn(E, dtype=dtype), randn(B, E, N, dtype=dtype)], keywords


def s6_complex_groups(B, L, dtype):
    E, N, G, c = 4, 3, 2, to_complex(dtype)
    A = torch.complex(-torch.rand(E, N, dtype=dtype), torch.randn(E, N, dtype=dtype)).requires_grad_()
    dt = torch.rand(B, L, E, dtype=dtype, requires_grad=True)
    return [randn(B, L, E, dtype=dtype), dt, A, *(randn(B, L, G, N, dtype=c) for _ in "BC")], {}


def vander(B, L, dtype):
    c = to_complex(dtype)
    return [stable(3, 4, dtype=c), randn(B, 3, 4, dtype=c), L], {}


def vander_transpose(B, L, dtype):
    return [stable(3, 4, dtype=to_complex(dtype)), randn(B, 3, L, dtype=dtype)], {}


def poles(B, L, dtype):
    c = to_complex(dtype)
    nodes = (3 + stable(L, dtype=c)).detach().requires_grad_()
    return [randn(B, 3, 4, dtype=c), nodes, stable(3, 4, dtype=c)], {}


def attend(B, L, dtype):
    return [randn(B, L, 4, 2, dtype=dtype), randn(B, L, 2, 2, dtype=dtype), randn(B, L, 2, 3, dtype=dtype)], {}


def attend_cached(B, L, dtype):
    mask = torch.rand(B, L + 5) > 0.3
    return [randn(B, L, 2, 4, dtype=dtype), *(randn(B, L + 5, 2, 4, dtype=dtype) for _ in "kv")], {"mask": mask}


def attend_all(B, L, dtype):
    return [randn(B, L, 2, 4, dtype=dtype), *(randn(B, L, 2, 4, dtype=dtype) for _ in "kv")], {
        "causal": False,
        "mask": torch.rand(B, L) > 0.3,
        "scale": 0.7,
    }


def retention(B, L, dtype):
    decay = (-torch.rand(B, L, 2, dtype=dtype)).requires_grad_()
    q, k, v = (randn(B, L, 2, width, dtype=dtype) for width in (3, 3, 4))
    return [q, k, v, decay, randn(B, 2, 3, 4, dtype=dtype)], {}


def retention_bare(B, L, dtype):
    return [randn(B, L, 1, 2, dtype=dtype) for _ in "qkv"], {}


def average(B, L, dtype):
    state = torch.stack([torch.randn(B, 3), 0.5 + torch.rand(B, 3), torch.randn(B, 3)], dim=1).to(dtype)
    w = (-torch.rand(3, dtype=dtype)).requires_grad_()
    k, v = (randn(B, L, 3, dtype=dtype) for _ in "kv")
    return [k, v, w, randn(3, dtype=dtype), state.requires_grad_()], {}


def average_fresh(B, L, dtype):
    return average(B, L, dtype)[0][:4], {}


def block_diagonal(B, L, dtype):
    return [randn(B, L, 6, dtype=dtype), randn(3, 4, 2, dtype=dtype)], {}


def block_diagonal_complex(B, L, dtype):
    return [randn(B * L, 6, dtype=dtype), randn(3, 4, 2, dtype=to_complex(dtype))], {}


def monarch_rank_two(B, L, dtype):
    return [randn(B, L, 6, dtype=dtype), randn(2, 6, 3, dtype=dtype), randn(3, 5, 4, dtype=dtype)], {}


def monarch_complex(B, L, dtype):
    c = to_complex(dtype)
    return [randn(B * L, 6, dtype=c), randn(3, 2, 2, dtype=c), randn(2, 3, 3, dtype=c)], {}


def butterfly_pairs(B, L, dtype):
    return [randn(B * L, 2, 8, dtype=dtype), randn(2, 3, 3, 4, 2, 2, dtype=dtype)], {}


def butterfly_blocks(B, L, dtype):
    return [randn(B * L, 1, 12, dtype=dtype), randn(1, 2, 2, 2, 2, 2, 3, 3, dtype=dtype)], {"increasing": False}


def butterfly_complex(B, L, dtype):
    return [randn(B * L, 2, 4, dtype=dtype), randn(2, 1, 2, 2, 2, 2, dtype=to_complex(dtype))], {}


INPUTS = {
    "causal_conv": [conv, conv_fused, conv_two_sided],
    "short_conv": [short, short_bare, short_silu],
    "linear_scan": [scan, scan_complex],
    "selective_scan": [s6, s6_complex_groups],
    "vandermonde": [vander],
    "vandermonde_transpose": [vander_transpose],
    "cauchy": [poles],
    "linear_attention": [retention, retention_bare],
    "wkv": [average, average_fresh],
    "attention": [attend, attend_cached, attend_all],
    "blockdiag_multiply": [block_diagonal, block_diagonal_complex],
    "monarch": [monarch_rank_two, monarch_complex],
    "butterfly": [butterfly_pairs, butterfly_blocks, butterfly_complex],
}
CASES = [
    pytest.param(op, name, make, id=f"{op.__name__}-{name}-{make.__name__}")
    for op in OPS.values()
    for name in op.backends
    if name != "reference"
    for make in INPUTS.get(op.__name__, [])
]


def outputs(result):
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def gradients(result, tensors, weights):
    loss = sum((w * t).sum().real for w, t in zip(weights, outputs(result)))
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def leaves(args, kwargs):
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]


def assert_near(ours, theirs, tolerance):
    """Relative to the largest magnitude of the tensor: a sum's error follows its largest terms."""
    if theirs is None or ours is None:
        assert not any(grad.any() for grad in (ours, theirs) if grad is not None)
        return
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.isfinite(torch.view_as_real(ours) if ours.is_complex() else ours).all()
    if ours.numel():
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + tolerance * 1e-3


def test_every_op_has_inputs():
    assert set(INPUTS) == set(OPS)


@pytest.mark.parametrize(("op", "name", "make"), CASES)
@pytest.mark.parametrize("L", LENGTHS)
def test_backend_is_the_reference(op, name, make, L, poisoned_memory):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        torch.manual_seed(0)
        args, kwargs = make(2, L, dtype)
        if op.why_not(name, *args, **kwargs):
            continue
        theirs = op(*args, backend="reference", **kwargs)
        with poisoned_memory():
            ours = op(*args, backend=name, **kwargs)
            weights = [torch.randn_like(t) for t in outputs(theirs)]
            our_grads = gradients(ours, leaves(args, kwargs), weights)
        for a, b in zip(outputs(ours), outputs(theirs), strict=True):
            assert_near(a, b, tolerance)
        their_grads = gradients(theirs, leaves(args, kwargs), weights)
        for a, b in zip(our_grads, their_grads, strict=True):
            assert_near(a, b, 10 * tolerance)


@pytest.mark.parametrize(("op", "name", "make"), CASES)
def test_autocast_does_not_reach_inside(op, name, make):
    args, kwargs = make(2, 65, torch.float32)
    if reason := op.why_not(name, *args, **kwargs):
        pytest.skip(reason)
    exact = outputs(op(*args, **kwargs, backend=name))
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs(op(*args, **kwargs, backend=name))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize(("op", "name", "make"), CASES)
def test_gradcheck(op, name, make):
    torch.manual_seed(0)
    args, kwargs = make(1, 4, torch.float64)
    if reason := op.why_not(name, *args, **kwargs):
        pytest.skip(reason)
    tensors = leaves(args, kwargs)

    def run(*values):
        given = dict(zip(map(id, tensors), values))
        swapped_args, swapped_kwargs = tree_map(lambda t: given.get(id(t), t), (args, kwargs))
        return tuple(outputs(op(*swapped_args, backend=name, **swapped_kwargs)))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize(("op", "name", "make"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(op, name, make, dtype):
    """The kernel's error is at most twice that of the reference run on the same rounded inputs, plus one rounding."""
    torch.manual_seed(0)
    if any(t.is_complex() for t in leaves(*make(1, 4, torch.float64))):
        pytest.skip("complex inputs have no 16-bit form")
    args, kwargs = make(2, 65, torch.float64)
    real = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()  # noqa: E731
    args, kwargs = tree_map(lambda t: t.detach().to(dtype) if real(t) else t, (args, kwargs))
    wide_args, wide_kwargs = tree_map(lambda t: t.double() if real(t) else t, (args, kwargs))
    exact = outputs(op(*wide_args, backend="reference", **wide_kwargs))
    ours = outputs(op(*args, backend=name, **kwargs))
    theirs = outputs(op(*args, backend="reference", **kwargs))
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        if a.numel() == 0:
            continue
        floor = torch.finfo(dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= 2 * (b.double() - e).abs().max() + 2 * floor


@pytest.mark.parametrize(("op", "name", "make"), CASES)
def test_compiles_whole(op, name, make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    args, kwargs = make(2, 9, torch.float64)
    tolerance = 1e-10
    if op.why_not(name, *args, **kwargs):
        args, kwargs = make(2, 9, torch.float32)
        tolerance = 1e-5
    if reason := op.why_not(name, *args, **kwargs):
        pytest.skip(reason)
    compiled = torch.compile(lambda *a, **k: op(*a, backend=name, **k), fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs(compiled(*args, **kwargs)), outputs(op(*args, backend=name, **kwargs)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_custom_ops_are_registered_right():
    for make, name in ((conv_fused, "causal_conv"), (scan, "linear_scan")):
        args, kwargs = make(2, 5, torch.float64)
        if name == "causal_conv":
            args = [*args, kwargs["skip"], kwargs["gate_in"], kwargs["gate_out"], None]
        torch.library.opcheck(getattr(torch.ops.longwave, name).default, tuple(args))


def test_an_unknown_backend_is_named():
    args, _ = conv(1, 3, torch.float32)
    with pytest.raises(ValueError, match=r"causal_conv has no backend 'cuda'; it has numba, torch, reference"):
        causal_conv(*args, backend="cuda")


def test_a_backend_that_cannot_run_says_why():
    args, _ = scan(1, 3, torch.float32)
    linear_scan.backend("tiny", why_not=lambda a, b, h0: f"L = {a.shape[1]} is above 2")(lambda a, b, h0: b)
    try:
        with pytest.raises(ValueError, match=r"linear_scan: backend 'tiny' cannot run this call: L = 3 is above 2"):
            linear_scan(*args, backend="tiny")
        torch.testing.assert_close(linear_scan(*args), linear_scan(*args, backend="torch"))
    finally:
        del linear_scan.backends["tiny"]


def test_wrong_shapes_are_named():
    u = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"causal_conv: k must be \(C, K\) with C = 3 as in u; got shape \(4, 5\)"):
        causal_conv(u, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"causal_conv: u must be \(B, L, C\); got shape \(5, 3\)"):
        causal_conv(u[0], torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"u has L = 0; at least 1"):
        causal_conv(u[:, :0], torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"u must be a tensor; got list"):
        causal_conv([1.0], torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"k is on meta and u on cpu"):
        causal_conv(u, torch.zeros(3, 5, device="meta"))
    with pytest.raises(ValueError, match=r"B has 2 groups and C 2.*divides E = 3"):
        selective_scan(u, u, torch.zeros(3, 4), torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 4))
    with pytest.raises(ValueError, match=r"T = 3 keys for L = 5 queries"):
        attention_op(torch.zeros(1, 5, 2, 4), torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4))


def test_attention_memory_is_linear_in_length():
    """No (L, T) tensor with masks and cached keys: at 4,096 keys each of them would be 16 MB or more."""
    q, k = torch.randn(1, 3000, 1, 8), torch.randn(1, 4096, 1, 8, requires_grad=True)
    largest = 0

    def pack(t):
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention_op(q, k, k, mask=torch.ones(1, 4096, dtype=torch.bool)).sum().backward()
    assert largest <= 512 * 4096
