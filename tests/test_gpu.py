"""On a CUDA device every mixer is what it is on the CPU. Run on such a machine: pytest -m gpu"""

import copy

import pytest
import torch
from test_ops import CASES as BACKENDS
from test_ops import gradients, leaves, outputs
from torch.utils._pytree import tree_leaves, tree_map

from longwave.mixers import MIXERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = [case for case in BACKENDS if case.values[1] in ("triton", "torch")]
CASES = [pytest.param(name, kw, id=f"{name}-{i}") for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_cuda_is_cpu(name, kw):
    """Output, state and gradients in float64, in parallel and resumed."""
    torch.manual_seed(0)
    layer = MIXERS[name](8, **kw).double()
    device = copy.deepcopy(layer).cuda()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    for run, at in ((layer, x), (device, x.cuda())):
        _, state = run(at[:, :6], run.init_state(2))
        y, state = run(at[:, 6:], state)
        run(at)[0].square().sum().backward()
        run.results = [y, *tree_leaves(state), *(p.grad for p in run.parameters())]
    for ours, theirs in zip(device.results, layer.results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_half_precision_trains(name, kw):
    """bf16 under autocast: finite outputs and gradients."""
    torch.manual_seed(0)
    layer = MIXERS[name](8, **kw).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = layer(torch.randn(2, 13, 8, device="cuda"))
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("L", [1, 70, 300])
@pytest.mark.parametrize(("op", "name", "make"), OPS)
def test_ops_are_the_reference(op, name, make, L, dtype, poisoned_memory):
    """Values and gradients of what runs on a GPU against the reference in float64 on the same numbers."""
    torch.manual_seed(0)

    def rounded(t):
        wanted = dtype if isinstance(t, torch.Tensor) and t.is_floating_point() else None
        return t.detach().to(wanted).double().requires_grad_() if wanted else t

    args, kwargs = tree_map(rounded, make(2, L, torch.float64))
    if dtype != torch.float32 and any(t.is_complex() for t in tree_leaves((args, kwargs)) if hasattr(t, "is_complex")):
        pytest.skip("complex inputs have no 16-bit form")

    def moved(t):
        if not isinstance(t, torch.Tensor):
            return t
        kind = torch.complex64 if t.is_complex() else dtype if t.is_floating_point() else t.dtype
        return t.detach().to("cuda", kind).requires_grad_(t.requires_grad)

    there, options = tree_map(moved, (args, kwargs))
    if reason := op.why_not(name, *there, **options):
        pytest.skip(reason)
    theirs = outputs(op(*args, backend="reference", **kwargs))
    weights = [torch.randn_like(t) for t in theirs]
    with poisoned_memory():
        ours = outputs(op(*there, backend=name, **options))
        grads = gradients(ours, leaves(there, options), [w.to(t.device, t.dtype) for w, t in zip(weights, ours)])
    exact = gradients(theirs, leaves(args, kwargs), weights)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for a, b in zip([*ours, *grads], [*theirs, *exact], strict=True):
        if b is not None and b.numel():
            assert (a.cpu().to(b.dtype) - b).abs().max() <= tolerance * (b.abs().max() + 1e-3)
