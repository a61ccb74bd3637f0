"""On a CUDA device every mixer is what it is on the CPU. Run on such a machine: pytest -m gpu"""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from longwave.mixers import MIXERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
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
