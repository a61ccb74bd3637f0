"""The online convolution: what it computes, what it shares between states, and how its work is spread."""

import gc
import sys
import threading
import weakref

import pytest
import torch

import longwave.nn.online_conv as online
from longwave.mixers import MIXERS
from longwave.nn import frozen
from longwave.nn.dense_conv import dense_conv
from longwave.nn.online_conv import Taps, online_conv
from longwave.ops import causal_conv
from longwave.ops.dispatch import use_backend
from longwave.ops.online_conv import Tile

T = 400
CHUNKS = {
    "steps": [1],
    "chunks": [150, 1, 1, 1, 7, 33, 64, 65, 1],  # long ones, ones within a block, ones over the end of one
    "prefill": [201, *[1] * 150],
}


@pytest.fixture(params=[4, 64], ids=["many-levels", "few-levels"])
def block(request, monkeypatch):
    monkeypatch.setattr(online, "BLOCK", request.param)


@pytest.fixture
def many_levels(monkeypatch):
    monkeypatch.setattr(online, "BLOCK", 4)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x, taps, sizes, past=None):
    """All outputs for x (B, t, C) in chunks of the sizes, over and over; and the state."""
    past, ys, t = x[:, :0] if past is None else past, [], 0
    while t < x.shape[1]:
        n = min(sizes[len(ys) % len(sizes)], x.shape[1] - t)
        y, past = online_conv(x[:, t : t + n], past, taps)
        ys.append(y)
        t += n
    return torch.cat(ys, dim=1), past


def count_parts(monkeypatch, taps, past):
    """A list that gets, of every run of a tile, its block length and how many parts it computed."""
    make = online.parts_for(past, taps.k, online.BLOCK)[0]
    original, runs = make.run, []

    def counted(self, begin, end, *inputs):
        runs.append((self.U, end - begin))
        original(self, begin, end, *inputs)

    monkeypatch.setattr(make, "run", counted)
    return runs


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("B", "C"), [(2, 3), (1, 40)])
def test_it_is_the_convolution(block, sizes, B, C):
    x, k, skip = noise(B, T, C), noise(C, T, seed=1), noise(C, seed=2)
    y, past = run(x, Taps(k, skip), sizes)
    torch.testing.assert_close(y, causal_conv(x, k, skip=skip), rtol=1e-8, atol=1e-8)
    assert torch.equal(past, x)


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_a_matrix_for_every_lag(block, sizes):
    x, k = noise(2, T, 3), noise(2, 3, T, seed=1)
    torch.testing.assert_close(run(x, Taps(k), sizes)[0], dense_conv(x, k), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("B", "C"), [(2, 3), (1, 40), (1, 65)])
def test_float32_is_as_exact_as_float32_allows(block, backend, sizes, B, C):
    x, k = noise(B, T, C, dtype=torch.float32), noise(C, T, seed=1, dtype=torch.float32)
    exact = causal_conv(x.double(), k.double())
    with use_backend(backend):
        y = run(x, Taps(k), sizes)[0]
    assert y.dtype == torch.float32
    assert (y - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("width", ["eight", "widest"])
@pytest.mark.parametrize("C", [16, 40])
def test_tiles_that_take_many_parts(monkeypatch, poisoned_memory, C, width):
    """Parts so small that one group of channels takes many of them, in memory that nobody has cleared."""
    kernels = pytest.importorskip("longwave.ops._numba.online_conv")
    monkeypatch.setattr(kernels, "GRAIN", 64)
    monkeypatch.setattr(kernels, "widest", getattr(kernels, width))
    x, k = noise(2, 3000, C, dtype=torch.float32), noise(C, 3000, seed=1, dtype=torch.float32)
    exact = causal_conv(x.double(), k.double())
    with poisoned_memory():
        y = run(x, Taps(k), [1000, *[1] * 300])[0]
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_half_precision_is_summed_in_float32():
    x, k = noise(1, T, 4).bfloat16(), noise(4, T, seed=1, dtype=torch.float32)
    y = run(x, Taps(k), [1])[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, causal_conv(x, k), rtol=2**-7, atol=1e-2)


def test_states_are_values(many_levels):
    """Any state, however old, goes on in any direction, and stays what it was."""
    x, other, k = noise(2, T, 3), noise(2, T, 3, seed=3), noise(3, T, seed=1)
    taps, states, past = Taps(k), [], x[:, :0]
    for t in range(300):
        states.append(past)
        past = online_conv(x[:, t : t + 1], past, taps)[1]
    for t in (299, 7, 128, 129, 255):
        ahead = torch.cat([x[:, :t], other[:, t:]], dim=1)
        y = run(ahead[:, t:], taps, [1, 1, 30, 1], states[t])[0]
        torch.testing.assert_close(y, causal_conv(ahead, k)[:, t:], rtol=1e-8, atol=1e-8)
    for t, state in enumerate(states):
        assert torch.equal(state, x[:, :t])


@pytest.mark.parametrize(
    "change",
    [lambda s: s[1:], lambda s: s.flip(0), torch.clone, lambda s: s.float(), lambda s: -s, lambda s: s[:, 10:]],
    ids=["a-row", "rows-swapped", "copied", "float32", "negated", "cut"],
)
def test_a_state_that_was_changed_goes_on_as_what_it_now_is(many_levels, change):
    x, k = noise(2, T, 3), noise(3, T, seed=1)
    taps = Taps(k)
    past = change(run(x[:, :200], taps, [1])[1])
    u = noise(len(past), 100, 3, seed=3)
    y, _ = run(u, taps, [1], past)
    exact = causal_conv(torch.cat([past.double(), u], dim=1), k)[:, past.shape[1] :]
    torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-6 if past.dtype == torch.float32 else 1e-8)


def test_other_taps_do_not_see_what_was_computed_ahead(many_levels):
    x, k = noise(1, T, 3), noise(3, T, seed=1)
    past = run(x[:, :200], Taps(k), [1])[1]
    y, _ = run(x[:, 200:], Taps(-2 * k), [1], past)
    torch.testing.assert_close(y, causal_conv(x, -2 * k)[:, 200:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_threads_go_on_from_one_state(many_levels, dtype):
    x, k = noise(1, T, 16, dtype=dtype), noise(16, T, seed=1, dtype=dtype)
    taps, results = Taps(k), {}
    past = run(x[:, :130], taps, [1])[1]
    ahead = [torch.cat([x[:, :130], noise(1, T - 130, 16, seed=10 + i, dtype=dtype)], dim=1) for i in range(4)]
    barrier = threading.Barrier(4)

    def go_on(i):
        barrier.wait()
        results[i] = run(ahead[i][:, 130:], taps, [1], past)[0]

    threads = [threading.Thread(target=go_on, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        exact = causal_conv(ahead[i].double(), k.double())[:, 130:]
        assert (results[i] - exact).norm() <= 1e-6 * exact.norm()


def test_every_part_is_computed_once_and_branches_share_them(many_levels, monkeypatch):
    x, k = noise(1, T, 3), noise(3, T, seed=1)
    taps, past = Taps(k), x[:, :0]
    runs = count_parts(monkeypatch, taps, past)
    past = run(x[:, :256], taps, [1])[1]
    first = run(x[:, 256:300], taps, [1], past)[0]
    before = list(runs)
    second = run(x[:, 256:300], taps, [1], past)[0]
    assert torch.equal(first, second)
    again = sum(parts for _, parts in runs[len(before) :])
    assert again < sum(parts for _, parts in before) / 4
    assert max(U for U, _ in runs[len(before) :]) <= 32  # the longer tiles of these steps were still there


def test_work_is_spread_over_the_steps(monkeypatch):
    """Whatever the step, few parts are computed at it: blocks end at powers of two without a pause."""
    kernels = pytest.importorskip("longwave.ops._numba.online_conv")
    monkeypatch.setattr(kernels, "GRAIN", 512)
    x, k = noise(1, 2048, 64, dtype=torch.float32), noise(64, 4096, seed=1, dtype=torch.float32)
    taps, past, at = Taps(k), x[:, :0], []
    runs = count_parts(monkeypatch, taps, past)
    for t in range(2048):
        before = len(runs)
        past = online_conv(x[:, t : t + 1], past, taps)[1]
        at.append(sum(parts for _, parts in runs[before:]))
    assert sum(at[1024:]) > 1024
    assert max(at) <= 10 * sum(at[1024:]) / 1024


def test_the_past_is_never_copied_again(many_levels):
    x, taps = noise(1, T, 3), Taps(noise(3, T, seed=1))
    past = run(x[:, :1], taps, [1])[1]
    place = past.data_ptr()
    assert run(x[:, 1:], taps, [1], past)[1].data_ptr() == place


LAYERS = [
    ("hyena", {"order": 3, "width": 8, "emb_dim": 5}),
    ("long_conv", {"channels": 2, "squash": 0.0}),
    ("dss_softmax", {"d_state": 6}),
    ("ckconv", {"filter": {"kind": "ckconv", "width": 8, "omega": 10.0}}),
]


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("name", "options"), LAYERS, ids=[name for name, _ in LAYERS])
def test_layers_without_a_state_space_decode_with_it(many_levels, monkeypatch, name, options, sizes):
    torch.manual_seed(0)
    layer, x = MIXERS[name](4, max_len=300, **options).double(), noise(2, 300, 4)
    exact, runs, original = layer(x)[0].detach(), [], Tile.run
    monkeypatch.setattr(Tile, "run", lambda self, *args: (runs.append(self), original(self, *args)))
    with torch.no_grad(), frozen(layer):
        state, ys, t = layer.init_state(2), [], 0
        while t < 300:
            n = min(sizes[len(ys) % len(sizes)], 300 - t)
            y, after = layer(x[:, t : t + n], state)
            layer(-x[:, t : t + n], state)  # a branch that nobody follows
            ys.append(y)
            state, t = after, t + n
        with pytest.raises(ValueError, match=r"max_len = 300"):
            layer(x[:, :1], state)
    torch.testing.assert_close(torch.cat(ys, dim=1), exact, rtol=1e-8, atol=1e-8)
    assert runs
    y, _ = layer(x[:, :10], layer.init_state(2))
    torch.testing.assert_close(y.detach(), exact[:, :10], rtol=1e-8, atol=1e-8)
    assert y.requires_grad


@pytest.mark.parametrize(("name", "options"), LAYERS, ids=[name for name, _ in LAYERS])
def test_rows_of_different_lengths_go_on(many_levels, name, options):
    """A padded prompt, then steps: each row is as it is alone."""
    torch.manual_seed(0)
    layer, x = MIXERS[name](4, max_len=300, **options).double(), noise(2, 240, 4)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 90:] = False
    with torch.no_grad(), frozen(layer):
        y, state = layer(x[:, :200], layer.init_state(2), mask=mask)
        steps = []
        for t in range(200, 240):
            y, state = layer(x[:, t : t + 1], state)
            steps.append(y)
        alone = torch.cat([x[1:, :90], x[1:, 200:]], dim=1)
        exact = torch.cat([layer(x[:1])[0][:, 200:], layer(alone)[0][:, 90:]])
    torch.testing.assert_close(torch.cat(steps, dim=1), exact, rtol=1e-8, atol=1e-8)


def test_more_taps_are_prepared_as_they_are_needed(monkeypatch):
    monkeypatch.setitem(vars(sys.modules["longwave.nn.long_conv"]), "PREPARED", 4)  # the function has its name
    layer, x = MIXERS["long_conv"](2, max_len=2000, squash=0.0).double(), noise(1, 1200, 2)
    lengths, original = [], Taps.__init__
    monkeypatch.setattr(Taps, "__init__", lambda self, k: (lengths.append(k.shape[1]), original(self, k))[1])
    with torch.no_grad(), frozen(layer):
        state, ys = layer.init_state(1), []
        for chunk in x.split([200, 1, 60, 1, 900, 38], dim=1):
            y, state = layer(chunk, state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, dim=1), layer(x)[0], rtol=1e-8, atol=1e-8)
    assert lengths == [256, 1024, 2000]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_does_not_keep_the_taps(many_levels, dtype):
    x, taps = noise(1, T, 16, dtype=dtype), Taps(noise(16, T, seed=1, dtype=dtype))
    past = run(x[:, :100], taps, [1])[1]
    held = weakref.ref(taps)
    del taps
    gc.collect()
    assert past.shape[1] == 100
    assert held() is None
