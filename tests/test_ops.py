"""The contract every op keeps: each backend is the reference, forward and backward, at every awkward size."""

import functools
import importlib
import inspect
import itertools
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from longwave.ops import (
    OPS,
    causal_conv,
    dispatch,
    linear_attention,
    linear_scan,
    rms_norm,
    selective_scan,
    short_conv,
)
from longwave.ops import attention as attention_op
from longwave.ops.dispatch import forced, use_backend
from longwave.ops.kernel import Kernel

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


def attend_near(B, L, dtype):
    """A window, over more queries than one of its chunks has."""
    return [randn(B, L, 4, 2, dtype=dtype), *(randn(B, L + 3, 2, 2, dtype=dtype) for _ in "kv")], {
        "window": 7,
        "scale": -0.7,
    }


def attend_near_cached(B, L, dtype):
    return attend_cached(B, L, dtype)[0], {"window": 4, "mask": torch.rand(B, L + 5) > 0.3}


def one_query(B, L, dtype):
    """Heads that share keys, rows of different lengths."""
    return [randn(B, 1, 6, 5, dtype=dtype), randn(B, L + 1, 4, 5, dtype=dtype), torch.randint(2, L + 2, (B,))], {}


def one_query_wide(B, L, dtype):
    return [randn(B, 1, 2, 35, dtype=dtype), randn(B, L + 1, 4, 35, dtype=dtype), torch.full((B,), 2 * L)], {
        "scale": -0.3
    }


def turns(B, L, dtype):
    start = torch.randint(1000, (B,))
    return [randn(B, L, 3, 8, dtype=dtype), start, torch.rand(3, dtype=torch.float64), 2], {}


def turns_from_the_start(B, L, dtype):
    return [randn(B, L, 2, 36, dtype=dtype), None, torch.rand(18, dtype=torch.float64), 2], {}


def retention(B, L, dtype):
    decay = (-torch.rand(B, L, 2, dtype=dtype)).requires_grad_()
    q, k, v = (randn(B, L, 2, width, dtype=dtype) for width in (3, 3, 4))
    return [q, k, v, decay, randn(B, 2, 3, 4, dtype=dtype)], {}


def retention_constant(B, L, dtype):
    """Queries and keys in groups of heads, a decay for all time."""
    q, k = (randn(B, L, 2, 3, dtype=dtype) for _ in "qk")
    return [q, k, randn(B, L, 6, 5, dtype=dtype), (-torch.rand(6, dtype=dtype)).requires_grad_()], {}


def retention_channels(B, L, dtype):
    """A decay for every key channel of two groups of two heads."""
    q, k = (randn(B, L, 2, 5, dtype=dtype) for _ in "qk")
    decay = (-3 * torch.rand(B, L, 2, 5, dtype=dtype)).requires_grad_()
    return [q, k, randn(B, L, 4, 3, dtype=dtype), decay, randn(B, 4, 5, 3, dtype=dtype)], {}


def retention_bare(B, L, dtype):
    return [randn(B, L, 1, 2, dtype=dtype) for _ in "qkv"], {}


def delta_rule(B, L, dtype):
    k = F.normalize(torch.randn(B, L, 2, 3, dtype=dtype), dim=-1).requires_grad_()
    decay = (-torch.rand(B, L, 4, dtype=dtype)).requires_grad_()
    beta, state = torch.rand(B, L, 4, dtype=dtype, requires_grad=True), randn(B, 4, 3, 5, dtype=dtype)
    return [randn(B, L, 2, 3, dtype=dtype), k, randn(B, L, 4, 5, dtype=dtype), decay, beta, state], {}


def delta_rule_bare(B, L, dtype):
    """Some steps forget all, some learn nothing."""
    q, k, v, decay, beta, _ = delta_rule(B, L, dtype)[0]
    often, never = torch.rand(2, B, L, 4) < 0.2
    decay, beta = decay.detach().masked_fill(often, -math.inf), beta.detach().masked_fill(never, 0.0)
    return [q, k, v, decay.requires_grad_(), beta.requires_grad_()], {}


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


def stored_float(B, L, dtype):
    return [randn(B, min(L, 15), 33, dtype=dtype), randn(5, 33, dtype=dtype), randn(5, dtype=dtype)], {}


def stored_bfloat16(B, L, dtype):
    return [randn(B * min(L, 15), 33, dtype=dtype), torch.randn(5, 33).bfloat16()], {}


def stored_int8(B, L, dtype):
    """The rounding of x has no derivative; test_weight_only.py has its gradient."""
    weight = torch.randint(-127, 128, (5, 33), dtype=torch.int8)
    return [torch.randn(B, min(L, 15), 33, dtype=dtype), weight, randn(5, dtype=dtype)], {
        "scale": randn(5, 3, dtype=dtype)
    }


def diagonal_step(B, L, dtype):
    C, N, c = 3, 4, to_complex(dtype)
    tensors = [stable(C, N, dtype=c), randn(C, N, dtype=c), randn(C, N, dtype=c), randn(B, C, N, dtype=c)]
    return [randn(B, C, dtype=dtype), *tensors], {"skip": randn(C, dtype=dtype)}


def diagonal_step_odd(B, L, dtype):
    C, N, c = 2, 3, to_complex(dtype)
    tensors = [stable(C, N, dtype=c), randn(C, N, dtype=c), randn(C, N, dtype=c), randn(B, C, N, dtype=c)]
    return [randn(B, C, dtype=dtype), *tensors], {}


def low_rank_step(B, L, dtype, half=8):
    S, C, R, N = 2, 4, 2, 2 * half
    low_rank = [randn(S, R, N, dtype=dtype), randn(S, R, N, dtype=dtype)]
    maps = [randn(S, N, dtype=dtype), randn(C, N, dtype=dtype), randn(B, C, N, dtype=dtype)]
    diagonal = [randn(S, half, dtype=dtype), randn(S, half, dtype=dtype)]
    return [randn(B, C, dtype=dtype), *diagonal, *low_rank, *maps], {"skip": randn(C, dtype=dtype)}


def low_rank_step_odd(B, L, dtype):
    return low_rank_step(B, L, dtype, half=3)[0], {}


def rows(B, L, dtype):
    return [randn(B, L, 37, dtype=dtype), randn(37, dtype=dtype), 1e-3], {}


def rows_short(B, L, dtype):
    return [randn(B * L, 5, dtype=dtype), randn(5, dtype=dtype)], {}


def rows_grouped(B, L, dtype):
    return [randn(B, L, 3, 5, dtype=dtype), randn(3, 5, dtype=dtype)], {}


def gate_and_value(B, L, dtype):
    return [randn(B, L, 2, 37, dtype=dtype)], {}


def gate_and_value_short(B, L, dtype):
    return [randn(B * L, 2, 5, dtype=dtype)], {}


INPUTS = {
    "state_space_step": [diagonal_step, diagonal_step_odd],
    "dplr_step": [low_rank_step, low_rank_step_odd],
    "causal_conv": [conv, conv_fused, conv_two_sided],
    "short_conv": [short, short_bare, short_silu],
    "linear_scan": [scan, scan_complex],
    "selective_scan": [s6, s6_complex_groups],
    "vandermonde": [vander],
    "vandermonde_transpose": [vander_transpose],
    "cauchy": [poles],
    "linear_attention": [retention, retention_constant, retention_channels, retention_bare],
    "gated_delta_rule": [delta_rule, delta_rule_bare],
    "wkv": [average, average_fresh],
    "attention": [attend, attend_cached, attend_all, attend_near, attend_near_cached],
    "attention_step": [one_query, one_query_wide],
    "rotary": [turns, turns_from_the_start],
    "blockdiag_multiply": [block_diagonal, block_diagonal_complex],
    "monarch": [monarch_rank_two, monarch_complex],
    "butterfly": [butterfly_pairs, butterfly_blocks, butterfly_complex],
    "rms_norm": [rows, rows_short, rows_grouped],
    "swiglu": [gate_and_value, gate_and_value_short],
    "weight_only_linear": [stored_float, stored_bfloat16, stored_int8],
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


def flat(op, args, kwargs):
    """All arguments of a call, in the order of the signature, without their histories."""
    bound = op.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in bound.arguments.values()]


def is_differentiable(x):
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


KERNELS = [case for case in CASES if isinstance(case.values[0].backends[case.values[1]], Kernel)]


def kernel_case(op, name, make, L=9):
    """The kernel and its arguments, in the widest dtype that it takes."""
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        args, kwargs = make(2, L, dtype)
        if not (reason := op.why_not(name, *args, **kwargs)):
            return op.backends[name], flat(op, args, kwargs)
    return pytest.skip(reason)


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
    if reason := op.why_not(name, *args, **kwargs):
        pytest.skip(reason)
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
    results = []
    for run in (compiled, functools.partial(op, backend=name)):
        result = outputs(run(*args, **kwargs))
        results.append([*result, *gradients(result, leaves(args, kwargs), [torch.ones_like(t) for t in result])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("op", "name", "make"), CASES)
def test_exports_for_any_length(op, name, make):
    class Module(torch.nn.Module):
        def forward(self, args, kwargs):
            return op(*args, backend=name, **kwargs)

    def inputs(L, dtype):
        return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, make(2, L, dtype))

    for dtype in (torch.float64, torch.float32):
        args, kwargs = inputs(9, dtype)
        if not (reason := op.why_not(name, *args, **kwargs)):
            break
    else:
        pytest.skip(reason)
    sizes = tree_map(
        lambda t: dict.fromkeys(range(t.ndim), Dim.AUTO) if isinstance(t, torch.Tensor) else None, [args, kwargs]
    )
    program = torch.export.export(Module(), (args, kwargs), dynamic_shapes=sizes).module()
    for L in (9,) if op.__name__ == "vandermonde" else (9, 14):  # its length is a number, and stays as it was
        args, kwargs = inputs(L, dtype)
        for ours, theirs in zip(
            outputs(program(args, kwargs)), outputs(op(*args, backend=name, **kwargs)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_what_is_exported_runs_where_no_op_was_called_before(name, tmp_path):
    class Module(torch.nn.Module):
        def forward(self, u, k):
            return causal_conv(u, k, backend=name)

    u, k = torch.randn(1, 7, 3), torch.randn(3, 7)
    torch.export.save(torch.export.export(Module(), (u, k)), tmp_path / "conv.pt2")
    torch.save({"u": u, "k": k, "y": causal_conv(u, k, backend=name)}, tmp_path / "values.pt")
    code = (
        "import sys, torch, longwave.ops\n"
        "values = torch.load(sys.argv[2])\n"
        "y = torch.export.load(sys.argv[1]).module()(values['u'], values['k'])\n"
        "torch.testing.assert_close(y, values['y'])\n"
    )
    files = [str(tmp_path / file) for file in ("conv.pt2", "values.pt")]
    run = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("op", "name", "make"), KERNELS)
def test_custom_ops_are_registered_right(op, name, make):
    kernel, inputs = kernel_case(op, name, make)
    differentiable = [x.requires_grad_() if is_differentiable(x) else x for x in inputs]
    torch.library.opcheck(kernel.op, (*differentiable, True))
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    *results, saved = kernel.op(*inputs, True)
    given = dict(zip(op.arguments, inputs))
    tensors = [given.pop(tensor) for tensor in op.declaration.arguments]
    first = [i == 0 for i in range(len(tensors))]
    for needed in ([is_differentiable(x) for x in tensors], first):
        grads = [torch.randn_like(result) for result in results]
        torch.library.opcheck(kernel.backward_op, (grads, tensors, results, saved, needed, *given.values()))


@pytest.mark.parametrize(("op", "name", "make"), CASES)
def test_results_are_as_declared(op, name, make):
    torch.manual_seed(0)
    for dtypes in ([torch.float64], [torch.float32], [torch.float32, torch.bfloat16], [torch.float16, torch.float32]):
        kinds = itertools.cycle(dtypes)

        def cast(t, kinds=kinds):
            real = isinstance(t, torch.Tensor) and t.is_floating_point()
            return t.detach().to(next(kinds)) if real else t

        args, kwargs = make(2, 9, torch.promote_types(dtypes[0], torch.float32))
        args, kwargs = tree_map(cast, (args, kwargs))
        if op.why_not(name, *args, **kwargs):
            continue
        declared = op.declaration.results(dict(zip(op.arguments, flat(op, args, kwargs))))
        for result in (op(*args, backend=name, **kwargs), op(*args, backend="reference", **kwargs)):
            for ours, wanted in zip(outputs(result), declared, strict=True):
                assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize(("op", "name", "make"), KERNELS)
def test_autocast_does_not_reach_the_gradients(op, name, make):
    """Where backward is called under it, as it should not be."""
    kernel, inputs = kernel_case(op, name, make)
    tensors = [x.requires_grad_() for x in inputs if is_differentiable(x)]
    loss = sum(t.abs().sum() for t in outputs(kernel.recorded(*inputs)))
    exact = torch.autograd.grad(loss, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize(("op", "name", "make"), KERNELS)
def test_only_the_gradients_that_are_needed_are_asked_for(op, name, make, monkeypatch):
    """Each alone is what it is among all, and the kernel is told so."""
    kernel, inputs = kernel_case(op, name, make)
    asked = []
    signature, backward = inspect.signature(kernel.module.backward), kernel.module.backward

    def watch(**known):
        asked.append(known["needed"])
        return backward(**known)

    watch.__signature__ = signature
    monkeypatch.setattr(kernel.module, "backward", watch)
    tensors = {n: x for n, x in zip(op.arguments, inputs) if is_differentiable(x)}

    def grads(names):
        given = {n: x.requires_grad_(n in names) if n in tensors else x for n, x in zip(op.arguments, inputs)}
        result = kernel(*given.values())
        torch.manual_seed(1)
        return dict(
            zip(names, gradients(result, [given[n] for n in names], [torch.randn_like(t) for t in outputs(result)]))
        )

    together = grads(list(tensors))
    for tensor in tensors:
        alone = grads([tensor])[tensor]
        torch.testing.assert_close(alone, together[tensor], rtol=1e-5, atol=1e-6)
    assert asked == [set(tensors), *({tensor} for tensor in tensors)]


@pytest.mark.parametrize(("op", "name", "make"), KERNELS)
def test_each_result_alone_has_its_gradients(op, name, make):
    """A kernel is told of results that nothing depends on by None."""
    kernel, inputs = kernel_case(op, name, make)
    tensors = [x.requires_grad_() for x in inputs if is_differentiable(x)]
    for i in range(len(op.declaration.returns)):
        ours, theirs = (
            torch.autograd.grad(outputs(backend(*inputs))[i].abs().sum(), tensors, allow_unused=True)
            for backend in (kernel, op.backends["reference"])
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, 1e-9 if tensors[0].real.dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize(("op", "name", "make"), KERNELS)
def test_storages_of_inputs_may_be_resized_afterwards(op, name, make):
    """As FSDP2 does with the parameters that it has gathered."""
    kernel, inputs = kernel_case(op, name, make)
    tensors = [x.requires_grad_() for x in inputs if is_differentiable(x)]
    for t in outputs(kernel(*inputs)):
        (t.abs().sum()).backward(retain_graph=True)
    with torch.no_grad():
        kernel.direct(*inputs)
    for t in tensors:
        t.untyped_storage().resize_(0)


def differentiable(args, kwargs):
    """A function of the leaves, and these."""
    tensors = leaves(args, kwargs)

    def swapped(values):
        given = dict(zip(map(id, tensors), values))
        return tree_map(lambda t: given.get(id(t), t), (args, kwargs))

    return swapped, [t.detach() for t in tensors]


@pytest.mark.parametrize(("op", "make"), [(op, make) for op in OPS.values() for make in INPUTS[op.__name__]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tangents_are_those_of_the_reference(op, make, dtype):
    """By differences in float64; torch.func.jvp, and forward mode with inputs that also want a gradient."""
    torch.manual_seed(0)
    swapped, values = differentiable(*make(2, 7, torch.float64))
    directions = [0.1 * torch.randn_like(t) for t in values]

    def run(*values):
        args, kwargs = swapped(values)
        return tuple(outputs(op(*args, **kwargs)))

    step = 1e-6
    ahead, behind = (run(*(t + s * d for t, d in zip(values, directions))) for s in (step, -step))
    exact = [(a - b) / (2 * step) for a, b in zip(ahead, behind)]
    if dtype == torch.float32:
        values, directions = (
            [t.to(torch.complex64 if t.is_complex() else dtype) for t in tensors] for tensors in (values, directions)
        )
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    found = [torch.func.jvp(run, tuple(values), tuple(directions))[1]]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), d) for t, d in zip(values, directions)]
        found.append([forward_ad.unpack_dual(t).tangent for t in run(*duals)])
    for tangents in found:
        for ours, e in zip(tangents, exact, strict=True):
            assert ours.shape == e.shape
            assert ((ours.to(e.dtype) - e).abs() <= tolerance * (1 + e.abs())).all()


@pytest.mark.parametrize(("op", "make"), [(op, make) for op in OPS.values() for make in INPUTS[op.__name__]])
def test_transforms_of_torch_func_are_right(op, make):
    """grad, vmap, vmap of grad, and gradients through vmap."""
    torch.manual_seed(0)
    swapped, values = differentiable(*make(2, 5, torch.float32))

    def loss(*values):
        args, kwargs = swapped(values)
        return sum(t.abs().square().sum() for t in outputs(op(*args, **kwargs)))

    def by_autograd(values):
        values = [t.clone().requires_grad_() for t in values]
        return torch.autograd.grad(loss(*values), values)

    def assert_same(ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))

    every = tuple(range(len(values)))
    other = [t * 0.9 for t in values]
    both = [torch.stack(pair) for pair in zip(values, other)]
    wanted = [torch.stack(pair) for pair in zip(by_autograd(values), by_autograd(other))]
    assert_same(torch.func.grad(loss, every)(*values), by_autograd(values))
    assert_same([torch.func.vmap(loss)(*both)], [torch.stack([loss(*values), loss(*other)])])
    assert_same(torch.func.vmap(torch.func.grad(loss, every))(*both), wanted)
    both = [t.requires_grad_() for t in both]
    assert_same(torch.autograd.grad(torch.func.vmap(loss)(*both).sum(), both), wanted)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.__name__)
def test_complex_numbers_are_refused_or_computed(op):
    """Never half of them: every tensor argument in turn is made complex."""
    for make in INPUTS[op.__name__]:
        torch.manual_seed(0)
        args, kwargs = make(2, 6, torch.float32)
        plain = flat(op, args, kwargs)
        for i, (argument, x) in enumerate(zip(op.arguments, plain)):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            inputs = [*plain[:i], torch.complex(x.float(), torch.randn_like(x.float())), *plain[i + 1 :]]
            given = dict(zip(op.arguments, inputs))
            if op.declaration.arguments[argument][1] in ("real", "stored", "wide"):
                with pytest.raises(
                    ValueError, match=rf"{op.__name__}: {argument} must be floating point.*; got torch.c"
                ):
                    op(**given)
                continue
            with pytest.raises(
                ValueError, match=rf"{op.__name__}: {argument} must be .*; got torch.complex32; convert it"
            ):
                op(**given | {argument: inputs[i].to(torch.complex32)})
            exact = outputs(op(**given, backend="reference"))
            for name in op.backends:
                if not op.why_not(name, **given):
                    for ours, e in zip(outputs(op(**given, backend=name)), exact, strict=True):
                        assert_near(ours, e, 2e-5)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.__name__)
def test_a_batch_of_none_is_refused(op):
    for make in INPUTS[op.__name__]:
        args, kwargs = make(0, 5, torch.float32)
        for name in op.backends:
            with pytest.raises(ValueError, match=rf"{op.__name__}: \w+ has .* = 0; at least 1 is needed"):
                op(*args, backend=name, **kwargs)


def test_an_unknown_backend_is_named():
    args, _ = conv(1, 3, torch.float32)
    with pytest.raises(
        ValueError, match=r"causal_conv has no backend 'cuda'; it has (triton, )?numba, torch, reference"
    ):
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


def test_a_misspelt_forced_backend_is_refused():
    args, _ = scan(1, 3, torch.float32)
    with (
        use_backend("nubma"),
        pytest.raises(ValueError, match=r"LONGWAVE_BACKEND: no .*'nubma'; .*did you mean 'numba'\?"),
    ):
        linear_scan(*args)


def test_a_backend_is_named_for_ones_own_thread():
    with use_backend("reference"), ThreadPoolExecutor(1) as thread:
        assert forced() == "reference"
        assert thread.submit(forced).result() == os.environ.get("LONGWAVE_BACKEND", "auto")
        inside = threading.Barrier(2, timeout=60)

        def other():
            with use_backend("torch"):
                inside.wait()
                inside.wait()

        beside = thread.submit(other)
        inside.wait()
        assert forced() == "reference"
        inside.wait()
        beside.result()
        assert forced() == "reference"


def test_a_kernel_differentiated_twice_refuses():
    args, _ = scan(1, 3, torch.float64)
    (first,) = torch.autograd.grad(linear_scan(*args, backend="torch").square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_arguments_are_those_of_a_python_function():
    u, weight = torch.ones(1, 3, 2), torch.ones(2, 2)
    assert torch.equal(short_conv(weight=weight, u=u)[0], short_conv(u, weight)[0])
    for args, options, words in (
        ((u,), {}, "missing a required argument: 'weight'"),
        ((u, weight, None, None, True), {}, "too many positional arguments"),
        ((u, weight), {"u": u}, "multiple values for argument 'u'"),
        ((u, weight), {"sliu": True}, "unexpected keyword argument 'sliu'"),
    ):
        with pytest.raises(TypeError, match=f"short_conv: .*{words}"):
            short_conv(*args, **options)


def test_what_an_op_remembers_of_its_calls_is_bounded(monkeypatch):
    """And it is a matter of shapes, dtypes, options and gradients, not of values."""
    monkeypatch.setattr(dispatch, "KINDS", 8)
    linear_scan._known.clear()
    for L in range(1, 30):
        a, b = torch.rand(1, L, 2), torch.ones(1, L, 2)
        for h0 in (torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)):
            exact = linear_scan(a, b, h0, backend="reference")
            for ours in (linear_scan(a, b, h0), linear_scan(a.double(), b.double(), h0.double()).float()):
                torch.testing.assert_close(ours, exact)
                assert ours.requires_grad == h0.requires_grad
    assert 0 < len(linear_scan._known) <= 8


def test_every_file_of_kernels_is_a_backend():
    files = list(Path(dispatch.__file__).parent.glob("_*/*.py"))
    found = {(path.parent.name[1:], path.stem) for path in files if path.stem in OPS}
    kernels = {
        (name, op.__name__) for op in OPS.values() for name, kind in op.backends.items() if isinstance(kind, Kernel)
    }
    assert found == kernels
    assert {folder for folder, _ in found} <= set(dispatch.FOLDERS)


NEW_OP = """
from torch import Tensor
from longwave.ops.dispatch import Op

@Op(x="B L C", w="C", returns={"y": "B L C : x"})
def scaled(x: Tensor, w: Tensor) -> Tensor:
    "y = w x."
    return (x * w).to(x.dtype)
"""
NEW_BACKEND = """
def forward(x, w):
    return (x * w).to(x.dtype)

def backward(needed, dy, x, w):
    return {"x": dy * w, "w": (dy * x).sum((0, 1))}
"""
NEW_BACKEND_OF_AN_OLD_OP = """
import torch

def forward(a, b, h0):
    h = [h0]
    for t in range(a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h[1:], 1)

def backward(needed, dh, a, h0, h):
    db, carry = torch.empty_like(h), torch.zeros_like(h[:, 0])
    for t in reversed(range(a.shape[1])):
        db[:, t] = dh[:, t] + carry
        carry = a[:, t].conj_physical() * db[:, t]
    before = torch.cat([h0[:, None], h[:, :-1]], 1)
    return {"a": db * before.conj_physical(), "b": db, "h0": carry}
"""


def scaled_inputs(B, L, dtype):
    return [randn(B, L, 5, dtype=dtype), randn(5, dtype=dtype)], {}


def test_what_a_new_op_and_a_new_backend_cost(tmp_path, monkeypatch, poisoned_memory):
    """Nothing but what is in these strings, and the contract holds for them."""
    (tmp_path / "toys").mkdir()
    texts = {"__init__": "", "scaled": NEW_BACKEND, "linear_scan": NEW_BACKEND_OF_AN_OLD_OP, "op": NEW_OP}
    for file, text in texts.items():
        (tmp_path / "toys" / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    new = importlib.import_module("toys.op").scaled
    try:
        for op, makes in ((new, [scaled_inputs]), (linear_scan, [scan, scan_complex])):
            op.kernel("toy", f"toys.{op.__name__}")
            for make in makes:
                for L in (1, 7, 65):
                    test_backend_is_the_reference(op, "toy", make, L, poisoned_memory)
                test_gradcheck(op, "toy", make)
                test_compiles_whole(op, "toy", make)
                test_exports_for_any_length(op, "toy", make)
                test_custom_ops_are_registered_right(op, "toy", make)
                test_each_result_alone_has_its_gradients(op, "toy", make)
                test_tangents_are_those_of_the_reference(op, make, torch.float64)
        with pytest.raises(ValueError, match=r"scaled: w must be \(C\) with C = 4 as in x; got shape \(5,\)"):
            new(torch.ones(1, 2, 4), torch.ones(5))
    finally:
        del OPS["scaled"]
        linear_scan.backends.pop("toy", None)
        linear_scan._known.clear()


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
    with pytest.raises(ValueError, match=r"weight \(G, D\) = \(2, 4\) takes x \(..., G, D\); got shape \(5, 4\)"):
        rms_norm(torch.zeros(5, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"G = 2 groups, which must divide the H = 3 heads of v"):
        linear_attention(*(torch.zeros(1, 5, 2, 4) for _ in "qk"), torch.zeros(1, 5, 3, 4))
    with pytest.raises(ValueError, match=r"decay must be \(H\) or \(B, L, H\) or .* got shape \(1, 5, 2, 3\)"):
        linear_attention(*(torch.zeros(1, 5, 2, 4) for _ in "qkv"), torch.zeros(1, 5, 2, 3))
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
