"""The GPU kernels without a GPU: in Triton's interpreter (TRITON_INTERPRET=1 pytest tests/test_triton.py) they are the
reference, and without it they compile (pytest -m slow tests/test_triton.py)."""

import itertools
import os

import numpy as np
import pytest
import torch
from test_ops import CASES, assert_near, flat, leaves, outputs

from longwave.ops import OPS
from longwave.ops._triton import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set")
CASES = [pytest.param(op, make, id=case.id) for case in CASES for op, name, make in [case.values] if name == "triton"]


@pytest.fixture
def scans_of_arrays(monkeypatch):
    """The interpreter scans number by number, which takes minutes; so, as on a GPU, it is in a tree."""
    from triton.runtime.interpreter import ScanOps

    def scan(self, inputs):
        values, dtypes, step = [x.handle.data for x in inputs], [x.dtype for x in inputs], 1
        while step < values[0].shape[self.axis]:
            sides = [np.roll(x, step, self.axis) for x in values] + values
            later = self.combine_fn.fn(*(self.to_tensor(x, dtype) for x, dtype in zip(sides, 2 * dtypes)))
            parts = [
                (x.take(range(step), self.axis), np.delete(y.handle.data, range(step), self.axis))
                for x, y in zip(values, later)
            ]
            values = [np.concatenate(pair, self.axis) for pair in parts]
            step *= 2
        return [self.to_tensor(x, dtype) for x, dtype in zip(values, dtypes)]

    monkeypatch.setattr(ScanOps, "generic_scan", scan)


@interpreted
@pytest.mark.usefixtures("scans_of_arrays")
@pytest.mark.parametrize(("op", "make"), CASES)
@pytest.mark.parametrize("L", [1, 16, 21])
def test_kernel_is_the_reference(op, make, L, poisoned_memory):
    """Values, and gradients of all results together and of each alone."""
    torch.manual_seed(L)
    args, kwargs = make(2, L, torch.float32)
    if reason := op.why_not("triton", *args, **kwargs):
        pytest.skip(reason)
    theirs = outputs(op(*args, backend="reference", **kwargs))
    with poisoned_memory():
        ours = outputs(op(*args, backend="triton", **kwargs))
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, 2e-5)
        weights = [torch.randn_like(t) for t in theirs]
        alone = [(i, i + 1) for i in range(len(ours))] if L == 21 else []
        for some in {(0, len(ours)), *alone}:
            grads = (
                gradients(results[slice(*some)], args, kwargs, weights[slice(*some)]) for results in (ours, theirs)
            )
            for a, b in zip(*grads, strict=True):
                assert_near(a, b, 2e-4)


def gradients(results, args, kwargs, weights):
    loss = sum((w * t).sum().real for w, t in zip(weights, results))
    return torch.autograd.grad(loss, leaves(args, kwargs), allow_unused=True, retain_graph=True)


@interpreted
def test_the_interpreter_runs_where_it_is_named_and_in_float32(monkeypatch):
    op = OPS["short_conv"]
    module, u, weight = op.backends["triton"].module, torch.randn(1, 9, 3), torch.randn(3, 4)
    monkeypatch.setattr(module, "forward", lambda *inputs: 1 / 0)
    op._known.clear()
    op(u, weight)
    with pytest.raises(ValueError, match=r"Triton interprets float32 on the CPU alone; a tensor is torch.bfloat16"):
        op(u.bfloat16(), weight, backend="triton")


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
EVERY = "LONGWAVE_EVERY_TARGET" in os.environ
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]


def compiled(kernel, arguments, options, target):
    """What Triton makes of a launch, without launching it."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = {parameter.name for parameter in kernel.params}
    known = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {n: x for n, x in arguments.items() if n in known or x is None or (type(x) is int and x == 1)}
    signature = {}
    for name, x in arguments.items():
        kind = f"*{TYPES[x.dtype]}" if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
        signature[name] = "constexpr" if name in constants else kind
    pointers = [i for i, name in enumerate(signature) if signature[name].startswith("*")]
    source = triton.compiler.ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    return triton.compile(
        source, target=GPUTarget(*target), options={n: x for n, x in options.items() if n not in names}
    )


@pytest.fixture
def launches(monkeypatch):
    """Kernels, arguments and options of all launches, none of which takes place; every choice of tuned ones."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found = []

    def note(kernel, *args, grid, warmup, **options):
        names = [parameter.name for parameter in kernel.params]
        arguments = {**dict(zip(names, args)), **{name: options[name] for name in names if name in options}}
        found.append((kernel, arguments, options))

    def choices(tuner, *args, **options):
        for config in tuner.configs[: None if EVERY else 1]:
            tuner.fn.run(*args, **options, **config.all_kwargs())

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(Autotuner, "run", choices)
    return found


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize(("op", "make"), CASES)
@pytest.mark.slow
def test_kernels_compile(op, make, launches, monkeypatch):
    """For Ampere and Hopper, in bfloat16 where there is such a form; given LONGWAVE_EVERY_TARGET every choice of tuned
    ones, and for an AMD GPU as well."""
    kernel = op.backends["triton"]
    args, kwargs = make(2, 70, torch.float32)
    inputs = [x.bfloat16() if real(x) else x for x in flat(op, args, kwargs)]
    if reason := hasattr(kernel.module, "why_not") and kernel.module.why_not(*inputs):
        pytest.skip(reason)
    given = dict(zip(op.arguments, inputs))
    *results, saved = kernel._forward(*inputs, True)
    known = (
        given
        | dict(zip(op.declaration.returns, results))
        | {f"d{n}": x for n, x in zip(op.declaration.returns, results)}
    )
    needed = {n for n, x in given.items() if isinstance(x, torch.Tensor)}
    kernel.module.backward(**{n: (known | {"saved": saved, "needed": needed})[n] for n in kernel._wanted})
    assert launches
    for launch, target in itertools.product(launches, TARGETS[: None if EVERY else 2]):
        assert compiled(*launch, target).asm


def real(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()
