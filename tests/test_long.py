"""Long sequences: chunks equal the parallel form far out, in memory that depends on the chunk and not on the length."""

import copy
import inspect
import math
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from longwave.bench import bench_memory
from longwave.bench import memory as memory_module
from longwave.bench.ops import peak
from longwave.mixers import MIXERS, state_bytes
from longwave.models import SashimiSpec
from longwave.nn import FILTERS, StateSpaceFilter, frozen, longest
from longwave.ops.dispatch import use_backend

D = 8
MIXER_CASES = [(f"{name}-{i}", name, kw) for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]


def build_mixer(name, kw):
    return lambda: MIXERS[name](D, **kw)


def build_sashimi(**kw):
    """SaShiMi's stack without its embedding and head: it obeys the mixers' rule."""
    return lambda: SashimiSpec(d_model=D, layers=1, vocab=2, **kw).build().backbone


def keeps_its_size(build):
    """Whether the bytes of state are the same before the first step and after each of two, and it goes on for ever."""
    with torch.device("meta"):
        layer = build()
        states = [layer.init_state(1)]
        for _ in range(2):
            states.append(layer(torch.zeros(1, 1, D), states[-1])[1])
    return len({state_bytes(state) for state in states}) == 1 and longest(layer) is None


CAUSAL = {key: build_mixer(name, kw) for key, name, kw in MIXER_CASES if MIXERS[name].causal}
CAUSAL |= {"sashimi-0": build_sashimi(), "sashimi-1": build_sashimi(pattern=["s4"], pool=[3])}
RECURRENT = {key: build for key, build in CAUSAL.items() if keeps_its_size(build)}
recurrent = pytest.mark.parametrize("build", RECURRENT.values(), ids=RECURRENT)


def make(build, dtype):
    torch.manual_seed(0)
    return build().to(dtype)


def noise(index, steps, dtype):
    """Chunk ``index`` of an endless signal."""
    return torch.randn(1, steps, D, dtype=dtype, generator=torch.Generator().manual_seed(index))


@torch.no_grad()
def walk(layer, length, chunk, dtype, prefix=0):
    """The outputs of the first ``prefix`` steps, the state after ``length``, its bytes on the way; keeps no more."""
    state, ys, sizes = layer.init_state(1), [], set()
    for index, start in enumerate(range(0, length, chunk)):
        y, state = layer(noise(index, min(chunk, length - start), dtype), state)
        ys += [y] if start < prefix else []
        sizes.add(state_bytes(state))
    return torch.cat(ys, dim=1) if ys else None, state, sizes


def assert_equals_parallel(layer, ys, chunk, dtype, tolerance):
    """Of the largest magnitude. Each output is compared with the parallel form in float64."""
    x = torch.cat([noise(index, chunk, dtype) for index in range(math.ceil(ys.shape[1] / chunk))], dim=1)
    with torch.no_grad():
        whole = copy.deepcopy(layer).double()(x[:, : ys.shape[1]].double())[0]
    assert (ys.double() - whole).abs().max() <= tolerance * whole.abs().max()


def peak_of(run):
    memory = peak(run)
    if math.isnan(memory):
        pytest.skip("this system does not tell peak memory")
    return memory


def test_what_is_recurrent_is_found():
    assert {"s4-0", "s4d-0", "s5-0", "dss-0", "gss-0", "h3-0", "liquid_s4-0", "mamba-0", "lstm-0"} <= set(RECURRENT)
    assert {"sashimi-0", "sashimi-1"} <= set(RECURRENT)
    assert not {"attention-0", "hyena-0", "long_conv-0"} & set(RECURRENT)


@recurrent
def test_chunks_equal_the_parallel_form(build):
    layer = make(build, torch.float64)
    ys, state, sizes = walk(layer, 20_000, 1024, torch.float64, prefix=20_000)
    assert ys.shape == (1, 20_000, D)
    assert_equals_parallel(layer, ys, 1024, torch.float64, 1e-9)
    assert sizes == {state_bytes(layer.init_state(1))}
    assert all(torch.isfinite(t).all() for t in tree_leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@recurrent
def test_a_million_steps(build, dtype):
    chunk, prefix, steps = 8192, 65_536, 1_000_000
    layer = make(build, dtype)
    ys, state, sizes = walk(layer, steps, chunk, dtype, prefix)
    assert_equals_parallel(layer, ys, chunk, dtype, 1e-4 if dtype == torch.float32 else 1e-9)
    assert sizes == {state_bytes(layer.init_state(1))}
    assert all(torch.isfinite(t).all() for t in tree_leaves(state))
    some, more = (peak_of(lambda n=n: walk(layer, n, chunk, dtype)) for n in (262_144, steps))
    assert more <= 1.25 * some + 4  # MB, of a heap with gaps; the steps between take 23 or 45 in the input alone


C, N, LENGTH = 8, 64, 2**18
ALL_MODES = C * N * LENGTH * 4 / 2**20  # MB of one (C, N, L) in float32, or of one half of each pair in complex64


def build_filter(name):
    known, wanted = inspect.signature(FILTERS[name].__init__).parameters, {"d_state": N, "max_len": LENGTH}
    return FILTERS[name](C, **{key: value for key, value in wanted.items() if key in known})


@pytest.mark.parametrize("name", FILTERS)
def test_taps_are_made_without_all_modes_of_all_steps(name):
    filter = build_filter(name)
    limit = ALL_MODES / 2 if isinstance(filter, StateSpaceFilter) else ALL_MODES  # a network has its hidden layers
    with torch.no_grad():
        filter(LENGTH // 64)  # warm up
        assert peak_of(lambda: filter(LENGTH)) < limit


@pytest.mark.parametrize("name", [name for name, cls in FILTERS.items() if issubclass(cls, StateSpaceFilter)])
def test_state_spaces_are_trained_and_resumed_without_all_modes_of_all_steps(name):
    system, x = build_filter(name).realize(), torch.randn(1, LENGTH, C)

    def resume(length):
        return system.response(system.advance(system.rest(1), x[:, :length]), length)

    def train(length):
        torch.autograd.grad(system.taps(length).sum(), system.c, retain_graph=True)

    for run in (resume, train):
        run(LENGTH // 64)  # warm up
        assert peak_of(lambda run=run: run(LENGTH)) < ALL_MODES / 4


def test_the_measure_sees_all_modes_of_all_steps():
    filter = build_filter("s4d")
    with use_backend("reference"), torch.no_grad():
        assert peak_of(lambda: filter(LENGTH // 8)) > ALL_MODES / 8


def test_the_bench_tells_memory(monkeypatch):
    monkeypatch.setattr(memory_module, "PATIENCE", 0.0)
    rows = list(bench_memory(["s4d", "hyena"], lengths=(512, 1024), chunk=128))
    assert [(row["op"], row["L"]) for row in rows] == [(name, L) for name in ("s4d", "hyena") for L in (512, 1024)]
    short, long, grown, left_out = rows
    assert short["state_bytes"] == long["state_bytes"]
    assert short["note"] is None
    assert all(row["ms"] > 0 and row["parallel_ms"] > 0 for row in (short, long, grown))
    assert grown["note"] == "state grows"
    assert "ms" not in left_out
    assert left_out["note"].startswith("left out: about")
    with pytest.raises(ValueError, match=r"no causal mixer is called 'two_sided'"):
        next(bench_memory(["two_sided"]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@recurrent
@torch.inference_mode()
def test_a_million_tokens_leave_nothing_behind(build):
    """Step by step: the state has one size, and the process does not grow."""
    layer, x = make(build, torch.float32), noise(0, 64, torch.float32).unbind(1)
    held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # noqa: E731
    sizes, memory, state = [], [], layer.init_state(1)
    with frozen(layer):
        for count in (20_000, 1_000_000):
            for i in range(count):
                _, state = layer(x[i % 64][:, None], state)
            sizes.append(state_bytes(state))
            memory.append(held())
    assert sizes[0] == sizes[1]
    assert memory[1] - memory[0] < 2**20
