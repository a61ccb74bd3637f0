"""What all backends share: any shape, stride and dtype, any thread and process, and machines that lack something."""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import INPUTS, gradients, leaves, outputs
from torch.utils._pytree import tree_map

from longwave.ops import OPS
from longwave.ops.dispatch import use_backend

KERNELS = [op for op in OPS.values() if "numba" in op.backends]
LOW = {torch.float32: 3e-5, torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-9}


def restrided(t, how):
    """The same numbers in another layout: as they are, with gaps, permuted in memory, or broadcast from one row."""
    if not isinstance(t, torch.Tensor) or t.ndim < 2:
        return t
    t = t.detach()
    if how == "gaps":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "permuted":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "shifted":
        flat = t.new_full((t.numel() + 3,), 7)
        flat[3:] = t.flatten()
        return flat[3:].view(t.shape)
    return t


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.__name__)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    B=st.integers(1, 4),
    L=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 200])),
    dtype=st.sampled_from(list(LOW)),
    how=st.sampled_from(["plain", "gaps", "permuted", "shifted"]),
)
def test_any_shape_stride_and_dtype(op, data, B, L, dtype, how):
    make = data.draw(st.sampled_from(INPUTS[op.__name__]))
    torch.manual_seed(B * 1000 + L)
    args, kwargs = make(B, L, torch.float64)
    if any(t.is_complex() for t in leaves(args, kwargs)) and dtype.itemsize < 4:
        return

    def cast(t):
        if not floating(t):
            return t
        wanted = torch.promote_types(dtype, torch.complex64) if t.is_complex() else dtype
        return restrided(t.detach().to(wanted), how)

    args, kwargs = tree_map(cast, (args, kwargs))
    for t in filter(floating, [*args, *kwargs.values()]):
        t.requires_grad_()
    exact_args, exact_kwargs = tree_map(
        lambda t: t.detach().to(torch.promote_types(t.dtype, torch.float64)).requires_grad_() if floating(t) else t,
        (args, kwargs),
    )
    exact = op(*exact_args, backend="reference", **exact_kwargs)
    weights = [torch.randn_like(t) for t in outputs(exact)]
    exact_grads = gradients(exact, leaves(exact_args, exact_kwargs), weights)
    for name in op.backends:
        if name == "reference" or op.why_not(name, *args, **kwargs):
            continue
        ours = op(*args, backend=name, **kwargs)
        for a, e in zip(outputs(ours), outputs(exact), strict=True):
            assert_close(a, e, LOW[dtype])
        grads = gradients(ours, leaves(args, kwargs), [w.to(t.dtype) for w, t in zip(weights, outputs(ours))])
        for a, e in zip(grads, exact_grads, strict=True):
            if e is not None:
                assert_close(a, e, 8 * LOW[dtype])


def floating(t):
    return isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())


def assert_close(ours, exact, tolerance):
    assert ours.shape == exact.shape
    if ours.numel():
        assert (ours.to(exact.dtype) - exact).abs().max() <= tolerance * (exact.abs().max() + 1e-3)


def results(op):
    torch.manual_seed(3)
    found = []
    for make in INPUTS[op.__name__]:
        args, kwargs = make(3, 130, torch.float32)
        if op.why_not("numba", *args, **kwargs):
            continue
        ours = op(*args, backend="numba", **kwargs)
        found += outputs(ours)
        found += gradients(ours, leaves(args, kwargs), [torch.ones_like(t) for t in outputs(ours)])
    return [t.detach() for t in found]


def test_several_python_threads_at_once():
    """Each thread has its own inputs and its own scratch, and all share the pool."""
    prepared = []  # before the threads start: torch's generator is shared
    for op in KERNELS:
        for make in INPUTS[op.__name__]:
            torch.manual_seed(3)
            args, kwargs = make(3, 130, torch.float32)
            if op.why_not("numba", *args, **kwargs):
                args, kwargs = make(1, 7, torch.float32)  # some kernels are for a few rows
            if not op.why_not("numba", *args, **kwargs):
                once = outputs(op(*args, backend="numba", **kwargs))
                prepared.append((op, args, kwargs, [t.detach() for t in once]))
    failures = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work(k):
        for turn in range(12):
            op, args, kwargs, once = prepared[(k + turn) % len(prepared)]
            with torch.no_grad():
                again = outputs(op(*args, backend="numba", **kwargs))
            failures.extend(op.__name__ for a, b in zip(again, once) if not torch.equal(a, b))

    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert {op.__name__ for op, *_ in prepared} == {op.__name__ for op in KERNELS}
    assert failures == []


def test_memory_of_results_is_used_again_and_never_while_it_is_seen():
    from longwave.ops._numba import pool

    pool.release()
    first = pool.empty(3, 2**18)
    first.fill_(1)
    place, view = first.data_ptr(), first[1]
    del first
    other = pool.empty(3, 2**18)
    assert other.data_ptr() != place  # the view still shows it
    assert (view == 1).all()
    del view
    assert pool.empty(2**18, 3).data_ptr() == place
    kept = [pool.empty(2**24) for _ in range(12)]  # 64 MB each
    del kept, other
    assert sum(m.nbytes for m in pool._results.kept) <= pool._Results.LIMIT
    pool.release()
    assert pool._results.kept == []


OF_TORCH = {"attention_step"}  # whose gradients torch computes, and its threads survive no fork


def results_of_all():
    found = {}
    for op in KERNELS:
        torch.set_num_threads(1 if op.__name__ in OF_TORCH else 2)
        found[op.__name__] = [t.tolist() for t in results(op)]
    return found


def child(pipe):
    pipe.send(results_of_all())
    pipe.close()


def test_after_a_fork():
    """As in a data loader's worker: the pool's threads do not exist in the child, which makes its own."""
    before = torch.get_num_threads()
    try:
        expected = results_of_all()
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        process.start()
        assert here.poll(120), "the child hangs"
        found = here.recv()
        process.join(30)
    finally:
        torch.set_num_threads(before)
    assert process.exitcode == 0
    assert found == expected


def run_python(code, **environment):
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=240)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 CPU")
def test_lanes_are_those_that_numba_compiles_for():
    code = "from longwave.ops._numba import simd; print(simd.widest.lanes)"
    assert run_python(code, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma").stdout == "8\n"
    assert run_python(code, NUMBA_CPU_NAME="skylake-avx512", NUMBA_CPU_FEATURES="+avx2,+avx512f").stdout == "16\n"


def test_kernels_may_be_met_first_while_a_graph_is_made():
    code = (
        "import torch; from longwave.mixers import MIXERS; layer = MIXERS['s4d'](8).double()\n"
        "x = torch.randn(1, 5, 8, dtype=torch.float64)\n"
        "y = torch.compile(layer, fullgraph=True, backend='eager')(x)[0]; print(torch.equal(y, layer(x)[0]))"
    )
    done = run_python(code)
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_without_numba_the_portable_forms_serve_and_say_why():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'numba' else found(name, *a)\n"
        "import torch; from longwave.ops import OPS, causal_conv; from longwave.mixers import MIXERS\n"
        "u, k = torch.ones(1, 5, 3), torch.ones(3, 5)\n"
        "print(causal_conv(u, k).sum().item(), causal_conv.why_not('numba', u, k))\n"
        "print(MIXERS['mamba'](8)(torch.zeros(1, 4, 8))[0].shape)\n"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "45.0 numba is not installed; pip install numba"


@pytest.mark.parametrize("why", ["read-only", "a file"])
def test_where_nothing_can_be_cached_the_kernels_still_run(why, tmp_path):
    base = tmp_path / "cache"
    if why == "a file":
        base.write_text("")
    elif os.geteuid() == 0:
        base = "/proc/longwave"  # root may write anywhere else
    else:
        base.mkdir(mode=0o500)
    code = (
        "import torch; from longwave.ops import short_conv\n"
        "u, w = torch.ones(1, 5, 3), torch.ones(3, 2)\n"
        "print(short_conv(u, w, None, None, backend='numba')[0].sum().item())\n"
    )
    run = run_python(code, XDG_CACHE_HOME=str(base))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "27.0"
    assert "compiling CPU kernels, once" in run.stderr


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.__name__)
def test_nothing_is_done_to_nothing(op):
    args, kwargs = INPUTS[op.__name__][0](1, 5, torch.float32)
    empty = args[0].detach()[..., :0]
    with pytest.raises(ValueError, match=rf"{op.__name__}: .*(= 0; at least 1 is needed|got shape)"):
        op(empty, *args[1:], **kwargs)


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.__name__)
def test_integers_are_refused(op):
    args, kwargs = INPUTS[op.__name__][0](1, 5, torch.float32)
    with pytest.raises(ValueError, match=rf"{op.__name__}: .* must be floating point( or complex)?; got torch.int64"):
        op(args[0].detach().long(), *args[1:], **kwargs)


def test_a_forced_backend_is_taken_everywhere():
    args, kwargs = INPUTS["causal_conv"][0](1, 5, torch.float64)
    with use_backend("numba"), pytest.raises(ValueError, match=r"backend 'numba' cannot run .* torch.float64"):
        OPS["causal_conv"](*args, **kwargs)
