"""The contract every mixer keeps. A new mixer is tested by existing: nothing here names one."""

import contextlib
import copy
import fnmatch
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from longwave.mixers import MIXERS, join, mixer, select, state_bytes
from longwave.mixers.states import grows
from longwave.nn import StateSpaceFilter, frozen, optim_hints, reset
from longwave.ops.dispatch import use_backend

B, L, D = 2, 13, 8  # L is prime: no chunk size divides it
CASES = [pytest.param(name, kw, id=f"{name}-{i}") for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]
CAUSAL = [case for case in CASES if MIXERS[case.values[0]].causal]
TWO_SIDED = [case for case in CASES if not MIXERS[case.values[0]].causal]
ANY = torch.export.Dim.DYNAMIC
INDUCTOR = "aot_eager_decomp_partition"  # as torch.compile's own backend begins: traced, decomposed, parted
CHUNKINGS = [[1] * L, [L], [1, 7, 5], [5, 1, 7]]


@contextlib.contextmanager
def inference(layer):
    """As text is generated: nothing is recorded, and what follows from weights is derived once."""
    with torch.inference_mode(), frozen(layer):
        yield


WITHIN = {
    "grad": lambda layer: torch.enable_grad(),
    "no-grad": lambda layer: torch.no_grad(),
    "frozen": inference,
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def build(name, kw):
    torch.manual_seed(0)
    return MIXERS[name](D, **kw).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_in_chunks(layer, x, sizes, mask=None):
    state, ys = layer.init_state(len(x)), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    for chunk, m in zip(x.split(sizes, dim=1), masks):
        y, state = layer(chunk, state, mask=m)
        ys.append(y)
    return torch.cat(ys, dim=1), state


# Where padding stands, by row: at its start, at its end, here and there, and over more than half of it.
PLACES = {"left": [[0, 1, 2, 3], []], "right": [[], [13, 14, 15, 16]], "inside": [[1, 5, 6, 16], [0, 9, 10, 11]]}


def with_padding(x, place, filling=math.nan):
    """The rows of x (2, 13, D) spread over 17 steps, what is between them NaN or infinite; and the mask. A row of which
    no place is given has its padding behind."""
    mask = torch.ones(B, L + 4, dtype=torch.bool)
    for row, steps in zip(mask, PLACES[place]):
        row[steps or slice(L, None)] = False
    padded = torch.full((B, L + 4, D), filling, dtype=x.dtype)
    padded[mask] = x.flatten(0, 1)
    return padded, mask


def real(y, mask):
    """The outputs (2, 13, D) at real tokens."""
    return y[mask].view(B, L, -1)


def parameter_gradients(layer, y):
    """Of a loss that weighs every output differently."""
    parameters = dict(layer.named_parameters())
    if not parameters:
        return {}
    loss = (y * noise(*y.shape, seed=7).to(y.dtype)).sum()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def in_bfloat16(layer, x):
    """The layer in bfloat16, and four times the error that rounding its weights and inputs alone makes."""
    low = copy.deepcopy(layer).bfloat16()
    floor = (copy.deepcopy(low).double()(x.bfloat16().double())[0] - layer(x)[0]).abs().max()
    return low, 4 * floor + 2e-2


@pytest.mark.parametrize(("name", "kw"), CASES)
class TestContract:
    def test_no_state_in_no_state_out(self, name, kw):
        x = noise(B, L, D)
        y, state = build(name, kw)(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert state is None

    def test_causal(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        future = x.clone()
        future[:, 6:] += 1.0
        change = (layer(future)[0] - layer(x)[0]).abs().amax(dim=(0, 2))
        assert (change[:6] <= 1e-8).all() == layer.causal
        assert (change[6:] > 1e-8).any()

    def test_rows_of_a_batch_are_independent(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        close(layer(x)[0][:1], layer(x[:1])[0])

    @pytest.mark.parametrize("place", PLACES)
    def test_padding_is_invisible(self, name, kw, place):
        layer, x = build(name, kw), noise(B, L, D)
        padded, mask = with_padding(x, place)
        y = layer(padded, mask=mask)[0]
        close(real(y, mask), layer(x)[0])
        assert torch.isfinite(y).all()

    @pytest.mark.parametrize("filling", [math.nan, math.inf])
    def test_padding_has_no_gradients(self, name, kw, filling):
        layer, x = build(name, kw), noise(B, L, D).requires_grad_()
        padded, mask = with_padding(x.detach(), "inside", filling)
        padded.requires_grad_()
        y = layer(x)[0]
        close(parameter_gradients(layer, real(layer(padded, mask=mask)[0], mask)), parameter_gradients(layer, y))
        (of_padded,) = torch.autograd.grad(real(layer(padded, mask=mask)[0], mask).square().sum(), padded)
        (of_x,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
        close(real(of_padded, mask), of_x)
        assert not of_padded[~mask].any()

    def test_a_mask_of_integers_is_a_mask(self, name, kw):
        layer = build(name, kw)
        padded, mask = with_padding(noise(B, L, D), "inside")
        assert torch.equal(layer(padded, mask=mask.long())[0], layer(padded, mask=mask)[0])
        assert torch.equal(layer(padded, mask=mask.to(torch.uint8))[0], layer(padded, mask=mask)[0])

    def test_refuses_what_does_not_fit(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        takes = rf"^{name} takes x \(B, L, 8\), floating, B >= 1 and L >= 1; got "
        for wrong in (noise(B, L, D + 1), noise(B, L, 1), noise(L, D), noise(0, L, D), noise(B, 0, D), x.long()):
            with pytest.raises(ValueError, match=takes + re.escape(f"{tuple(wrong.shape)} {wrong.dtype}")):
                layer(wrong)
        on = torch.ones(B, L, dtype=torch.bool)
        for wrong in (on[:1], on[:, :1], on[:, :, None], on[0], on.double(), on.to(torch.complex64)):
            with pytest.raises(
                ValueError, match=r"^a mask is \(B, L\) = \(2, 13\) on cpu, bool or integers 0 and 1.* got"
            ):
                layer(x, mask=wrong)
        with pytest.raises(ValueError, match=r"0 at padding and 1 at real tokens; got values 2..2"):
            layer(x, mask=on + on.long())

    def test_gradients(self, name, kw):
        layer, x = build(name, kw), noise(1, 5, D).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: layer(x)[0], x, fast_mode=True)

    def test_forward_mode_is_reverse_mode(self, name, kw):
        """In float32, which kernels and libraries take that know no forward mode."""
        layer, x, dx = build(name, kw).float(), noise(1, 5, D).float(), noise(1, 5, D, seed=2).float()
        y, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (dx,))
        (gradient,) = torch.func.vjp(lambda x: layer(x)[0], x)[1](y)
        torch.testing.assert_close((y * tangent).sum(), (gradient * dx).sum(), rtol=1e-3, atol=1e-4)

    def test_every_parameter_is_trained(self, name, kw):
        layer = build(name, kw)
        layer(noise(B, L, D).requires_grad_())[0].square().sum().backward()
        assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_saves_and_loads(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        other = MIXERS[name](D, **kw).double()
        other.load_state_dict(layer.state_dict(), strict=True)
        close(other(x)[0], layer(x)[0])
        close(copy.deepcopy(layer)(x)[0], layer(x)[0])

    def test_compiles_whole(self, name, kw):
        torch._dynamo.reset()
        layer, (x, mask) = build(name, kw), with_padding(noise(B, L, D), "inside", 0.0)
        mask = None if layer.causal else mask  # masks of the others are compiled with a state
        compiled = torch.compile(layer, fullgraph=True, backend=INDUCTOR)
        y, exact = compiled(x, mask=mask)[0], layer(x, mask=mask)[0]
        close(y, exact)
        close(parameter_gradients(layer, y), parameter_gradients(layer, exact))

    @torch.no_grad()
    def test_exports_with_any_batch_and_length(self, name, kw):
        layer = build(name, kw)
        program = torch.export.export(layer, (noise(B, L, D),), dynamic_shapes={"x": {0: ANY, 1: ANY}}).module()
        for shape in ((3, 17), (B, 5)):
            x = noise(*shape, D, seed=4)
            close(program(x)[0], layer(x)[0])

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
    def test_compiles_with_inductor(self, name, kw):
        torch._dynamo.reset()
        layer, x = build(name, kw), noise(B, L, D)
        y, exact = torch.compile(layer, fullgraph=True)(x)[0], layer(x)[0]
        close(y, exact)
        close(parameter_gradients(layer, y), parameter_gradients(layer, exact))

    def test_builds_on_meta_bit_for_bit(self, name, kw):
        torch.manual_seed(0)
        direct = MIXERS[name](D, **kw)
        with torch.device("meta"):
            ghost = MIXERS[name](D, **kw)
        torch.manual_seed(0)
        drawn = reset(ghost.to_empty(device="cpu"))
        for key, value in direct.state_dict().items():
            assert torch.equal(value, drawn.state_dict()[key]), key

    def test_bfloat16_is_as_good_as_bfloat16_allows(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        low, limit = in_bfloat16(layer, x)
        assert (low(x.bfloat16())[0].double() - layer(x)[0]).abs().max() <= limit

    def test_autocast_is_as_good_as_bfloat16_allows(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        limit, exact, layer = in_bfloat16(layer, x)[1], layer(x)[0], layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.float())[0]
        assert (y.double() - exact).abs().max() <= limit

    def test_optim_hints_name_parameters(self, name, kw):
        layer = build(name, kw)
        hints, names = optim_hints(layer), dict(layer.named_parameters())
        assert set(hints) <= set(names)
        for pattern in layer.optim_hints:
            assert fnmatch.filter(names, pattern), pattern

    def test_docstring_has_a_source(self, name, kw):
        assert "Source" in sys.modules[MIXERS[name].__module__].__doc__


@pytest.mark.parametrize(("name", "kw"), CAUSAL)
class TestStates:
    @pytest.mark.parametrize("sizes", CHUNKINGS, ids=["steps", "prefill", "1-7-5", "5-1-7"])
    @pytest.mark.parametrize("within", WITHIN)
    def test_chunked_is_parallel(self, name, kw, sizes, within):
        layer, x = build(name, kw), noise(B, L, D)
        with WITHIN[within](layer):
            close(run_in_chunks(layer, x, sizes)[0], layer(x)[0])

    def test_state_does_not_depend_on_the_chunking(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        states = [run_in_chunks(layer, x, sizes)[1] for sizes in ([L], [4, 9], [1] * L)]
        close(tree_leaves(states[0]), tree_leaves(states[1]))
        close(tree_leaves(states[0]), tree_leaves(states[2]))

    @pytest.mark.parametrize("within", WITHIN)
    def test_state_is_never_modified(self, name, kw, within):
        """Two continuations of one state: neither sees the other, and the state stays what it was."""
        layer, x = build(name, kw), noise(B, L, D)
        with WITHIN[within](layer):
            _, state = layer(x[:, :5], layer.init_state(B))
            before = tree_map(torch.clone, state)
            _, one = layer(x[:, 5:9], state)
            kept = tree_map(torch.clone, one)
            _, other = layer(-x[:, 5:9], state)
            layer(x[:, 9:], other)
            close(tree_leaves(state), tree_leaves(before))
            close(tree_leaves(one), tree_leaves(kept))
            close(layer(x[:, 9:], one)[0], layer(x)[0][:, 9:])

    def test_state_is_batch_first(self, name, kw):
        layer = build(name, kw)
        _, state = layer(noise(3, L, D), layer.init_state(3))
        assert all(len(t) == 3 for t in tree_leaves(state))
        rows = tree_map(lambda t: t[1:2], state)
        x = noise(3, 4, D, seed=2)
        close(layer(x[1:2], rows)[0], layer(x, state)[0][1:2])

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("sizes", [[17], [3, 14], [6, 9, 2], [1] * 17], ids=["17", "3-14", "6-9-2", "steps"])
    def test_padding_takes_no_time(self, name, kw, place, sizes):
        """Outputs, the state, and what comes after it, in chunks too, some of which are padding alone in a row."""
        layer, x, more = build(name, kw), noise(B, L, D), noise(B, 2, D, seed=3)
        padded, mask = with_padding(x, place)
        y, after = run_in_chunks(layer, padded, sizes, mask)
        exact, state = layer(x, layer.init_state(B))
        close(real(y, mask), exact)
        for t, unpadded in zip(tree_leaves(after), tree_leaves(state), strict=True):
            if t.shape == unpadded.shape:  # it does not grow
                close(t, unpadded)
        y, after = layer(more, after)
        exact, state = layer(more, state)
        close(y, exact)
        close(layer(more[:, :1], after)[0], layer(more[:, :1], state)[0])

    def test_a_chunk_of_padding_leaves_the_state(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        _, state = layer(x, layer.init_state(B))
        off = torch.zeros(B, 2, dtype=torch.bool)
        y, after = layer(torch.full((B, 2, D), math.nan, dtype=x.dtype), state, mask=off)
        assert torch.isfinite(y).all()
        close(layer(x[:, :3], after)[0], layer(x[:, :3], state)[0])

    @pytest.mark.parametrize("sizes", [[5, 1, 7], [1] * L], ids=["5-1-7", "steps"])
    def test_gradients_in_chunks_are_parallel(self, name, kw, sizes):
        """Of parameters too, though the x of training needs none; through states, to the first chunk."""
        layer, x = build(name, kw), noise(B, L, D)
        close(parameter_gradients(layer, run_in_chunks(layer, x, sizes)[0]), parameter_gradients(layer, layer(x)[0]))

    def test_gradients_are_finite_where_modes_underflow(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        for part in layer.modules():
            if isinstance(part, StateSpaceFilter):
                part.rate = 1e6  # exp(dt A) is 0 then
        in_chunks = parameter_gradients(layer, run_in_chunks(layer, x, [5, 1, 7])[0])
        assert all(torch.isfinite(gradient).all() for gradient in in_chunks.values())
        close(in_chunks, parameter_gradients(layer, layer(x)[0]))

    def test_what_autograd_saved_survives_a_branch(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        ys, state = [], layer.init_state(B)
        for chunk in x.split([5, 1, 7], dim=1):
            y, state = layer(chunk, state)
            ys.append(y)
            with torch.no_grad():
                _, branch = layer(chunk[:, :1], state)
                layer(chunk[:, :1], branch)
        close(parameter_gradients(layer, torch.cat(ys, dim=1)), parameter_gradients(layer, layer(x)[0]))

    def test_a_state_of_inference_mode_can_be_trained_on(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        with torch.inference_mode():
            _, state = layer(x[:, :5], layer.init_state(B))
        y, after = layer(x[:, 5:], state)
        close(y, layer(x)[0][:, 5:])
        parameter_gradients(layer, y)
        layer(x[:, 5:6], after)

    def test_threads_may_continue_one_state(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        ends = [noise(B, 1, D, seed=10 + i) for i in range(8)]
        with torch.no_grad(), ThreadPoolExecutor(8) as pool:
            _, state = layer(x, layer.init_state(B))
            exact = [layer(x[:, :2], layer(end, state)[1])[0] for end in ends]

            def continued(end):
                with torch.no_grad(), frozen(layer):
                    return layer(x[:, :2], layer(end, state)[1])[0]

            for _ in range(5):
                _, state = layer(x, layer.init_state(B))  # with room behind it that nobody has claimed
                for y, wanted in zip(pool.map(continued, ends), exact):
                    close(y, wanted)

    def test_refuses_a_state_that_does_not_fit(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        _, state = layer(x, layer.init_state(B))
        kind = type(state).__name__
        with pytest.raises(ValueError, match=rf"^{name}: the state is of 2 sequences, x of 3$"):
            layer(noise(3, L, D), state)
        with pytest.raises(ValueError, match=rf"^{name}: the state is of 1 sequences, x of 2$"):
            layer(x, tree_map(lambda t: t[:1], state))
        for wrong in ((), tuple(state), [*state], x):
            with pytest.raises(ValueError, match=rf"^{name} goes on from a {kind}, .*; got a {type(wrong).__name__}"):
                layer(x, wrong)
        wider = tree_map(lambda t: torch.cat([t, t], dim=-1), state)
        with pytest.raises(ValueError, match=rf"^{name} of d_model = 8 has a state of .* a sequence; got one of .*"):
            layer(x, wider)

    def test_refuses_the_state_of_another_mixer(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        for case in CAUSAL:
            other, options = case.values
            if other != name:
                with pytest.raises(ValueError, match=rf"^{name} goes on from a "):
                    layer(x, MIXERS[other](D, **options).double().init_state(B))

    @torch.no_grad()
    def test_a_state_does_not_hold_the_memory_of_a_chunk(self, name, kw):
        """But for what grows: no views of long tensors."""
        layer, held = build(name, kw), []
        for length in (1, 6, L):
            state = layer(noise(B, length, D), layer.init_state(B))[1]
            fields = [getattr(state, field) for field, growing in grows(type(state)).items() if not growing]
            held.append([t.untyped_storage().nbytes() for t in tree_leaves(fields)])
        assert held[0] == held[1] == held[2]

    def test_states_of_any_lengths_are_joined(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        states = [layer(x[:1, :n], layer.init_state(1))[1] for n in (3, L)]
        y, _ = layer(x[:, :2], join([select(states[0], [0]), states[1]]))
        close(y, torch.cat([layer(x[i : i + 1, :2], state)[0] for i, state in enumerate(states)]))

    def test_states_of_other_sizes_are_not_joined(self, name, kw):
        """What grows along time is declared, so that nothing else can be taken for it."""
        layer, x = build(name, kw), noise(B, L, D)
        short, long = (layer(x[:, :n], layer.init_state(B))[1] for n in (3, L))
        for field, growing in grows(type(short)).items():
            sizes = [[t.shape for t in tree_leaves(getattr(state, field))] for state in (short, long)]
            assert (sizes[0] != sizes[1]) == growing, field
        narrow, wide = (MIXERS[name](d, **kw).init_state(1) for d in (D, 2 * D))
        if [t.shape for t in tree_leaves(narrow)] != [t.shape for t in tree_leaves(wide)]:
            with pytest.raises(ValueError, match=r"states of one model are joined; got some of sizes .* a row"):
                join([narrow, wide])

    def test_gradients_of_a_carried_state(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        u = x[:1, :5].clone().requires_grad_()
        _, state = layer(x[:1, :3], layer.init_state(1))
        state = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex()), state)
        carried = [t for t in tree_leaves(state) if t.requires_grad]

        def resumed(u, *tensors):
            given = dict(zip(map(id, carried), tensors))
            y, after = layer(u, tree_map(lambda t: given.get(id(t), t), state))
            return (y, *(t for t in tree_leaves(after) if t.requires_grad))

        assert torch.autograd.gradcheck(resumed, (u, *carried), fast_mode=True)

    def test_compiles_whole_with_a_state(self, name, kw):
        torch._dynamo.reset()
        layer, x = build(name, kw), noise(B, L, D)
        state = layer(x, layer.init_state(B))[1]
        compiled = torch.compile(layer, fullgraph=True, backend=INDUCTOR)
        mask = torch.tensor([[True, False], [False, False]])
        (y, after), (exact, state) = compiled(x[:, :2], state, mask=mask), layer(x[:, :2], state, mask=mask)
        close(y[mask], exact[mask])
        close(tree_leaves(after), tree_leaves(state))

    @torch.no_grad()
    def test_exports_a_step_of_any_batch_and_past(self, name, kw):
        layer, (x, more) = build(name, kw), (noise(B, L, D), noise(3, 18, D, seed=4))
        start, state = layer.init_state(B), layer(x, layer.init_state(B))[1]

        def sizes(t, before):
            return {0: ANY} | {i: ANY for i in range(1, t.ndim) if t.shape[i] != before.shape[i]}

        shapes = {"x": {0: ANY}, "state": tree_map(sizes, state, start)}
        program = torch.export.export(layer, (x[:, :1], state), dynamic_shapes=shapes).module()
        _, state = layer(more[:, :17], layer.init_state(3))
        (y, after), (exact, wanted) = program(more[:, 17:], state), layer(more[:, 17:], state)
        close(y, exact)
        close(tree_leaves(after), tree_leaves(wanted))

    def test_bfloat16_resumes_as_well_as_bfloat16_allows(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        low, limit = in_bfloat16(layer, x)
        stepped, _ = run_in_chunks(low, x.bfloat16(), [6, 1, 6])
        assert (stepped.double() - layer(x)[0]).abs().max() <= limit

    def test_resumes_from_a_state_of_another_dtype(self, name, kw):
        layer, x = build(name, kw), noise(B, L, D)
        exact = layer(x)[0]
        wide = layer(x[:, :5], layer.init_state(B))[1]
        low = layer.float()(x[:, :5].float(), layer.init_state(B))[1]
        y, _ = layer(x[:, 5:].float(), wide)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, exact[:, 5:].float(), rtol=1e-4, atol=1e-4)
        y, _ = layer.double()(x[:, 5:], low)
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, exact[:, 5:], rtol=1e-4, atol=1e-4)

    def test_float32_resumes_as_well_as_float32_allows(self, name, kw):
        layer, x = build(name, kw).float(), noise(B, L, D).float()
        torch.testing.assert_close(run_in_chunks(layer, x, [5, 1, 7])[0], layer(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "numba"])
class TestBackends:
    """In float32, which the CPU kernels take too, each backend does what the parallel form does in float64."""

    every = pytest.mark.parametrize(("name", "kw"), CASES)
    resumable = pytest.mark.parametrize(("name", "kw"), CAUSAL)

    def close(self, ours, exact):
        assert ours.dtype == torch.float32
        assert (ours.double() - exact).abs().max() <= 1e-4 * exact.abs().max()

    @every
    def test_parallel(self, name, kw, backend):
        layer, x = build(name, kw), noise(B, L, D)
        exact = layer(x)[0]
        with use_backend(backend):
            self.close(layer.float()(x.float())[0], exact)

    @resumable
    @pytest.mark.parametrize("within", WITHIN)
    def test_chunks(self, name, kw, backend, within):
        layer, x = build(name, kw), noise(B, L, D)
        exact = layer(x)[0]
        layer = layer.float()
        with use_backend(backend), WITHIN[within](layer):
            self.close(run_in_chunks(layer, x.float(), [5, 1, 1, 6])[0], exact)

    @every
    def test_padding(self, name, kw, backend):
        layer, x = build(name, kw), noise(B, L, D)
        exact = layer(x)[0]
        padded, mask = with_padding(x, "inside")
        with use_backend(backend):
            self.close(real(layer.float()(padded.float(), mask=mask)[0], mask), exact)

    @resumable
    def test_padding_in_chunks(self, name, kw, backend):
        layer, x = build(name, kw), noise(B, L, D)
        exact = layer(x)[0]
        padded, mask = with_padding(x, "inside")
        with use_backend(backend):
            y, state = run_in_chunks(layer.float(), padded[:, :14].float(), [6, 1, 7], mask[:, :14])
            y = torch.cat([y, layer(padded[:, 14:].float(), state, mask=mask[:, 14:])[0]], dim=1)
        self.close(real(y, mask), exact)

    @every
    def test_gradients(self, name, kw, backend):
        layer, x = build(name, kw), noise(B, L, D)

        def gradients(layer, x):
            x = x.clone().requires_grad_()
            (layer(x)[0] * noise(B, L, D, seed=2).to(x.dtype)).sum().backward()
            return {"input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

        exact = gradients(copy.deepcopy(layer), x)
        with use_backend(backend):
            ours = gradients(layer.float(), x.float())
        for key, gradient in exact.items():
            self.close(ours[key], gradient)


@pytest.mark.parametrize(("name", "kw"), TWO_SIDED)
def test_what_looks_ahead_has_no_state(name, kw):
    layer = build(name, kw)
    with pytest.raises(ValueError, match=f"{name} looks ahead, so it has no state"):
        layer.init_state(B)
    with pytest.raises(ValueError, match=f"{name} looks ahead"):
        layer(noise(B, L, D), ())


def test_a_misspelt_mixer_or_option_is_suggested():
    with pytest.raises(ValueError, match=r"no mixer is called 's4dd'; there are .*did you mean 's4d'"):
        mixer("s4dd")
    with pytest.raises(ValueError, match=r"mixer 's4d' has no option 'd_stat'; did you mean 'd_state'"):
        mixer("s4d", d_stat=4)
    with pytest.raises(ValueError, match=r"mixer 'hyena' needs the option 'max_len'"):
        mixer("hyena")
    assert mixer("s4d", d_state=4).build(8).d_model == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"heads": 3}, r"heads = 3 does not divide d_model = 8"),
        ("attention", {"heads": 8}, r"rotary positions need an even head width; got 1"),
        ("attention", {"heads": 4, "kv_heads": 3}, r"kv_heads = 3 does not divide heads = 4"),
        ("attention", {"heads": 4, "kv_heads": 0}, r"kv_heads = 0 does not divide heads = 4"),
        ("attention", {"heads": 4, "window": 0}, r"attention needs window >= 1; got 0"),
        ("attention", {"heads": 3, "head_dim": 0}, r"attention needs head_dim >= 1; got 0"),
        ("attention", {"heads": 4, "positions": {"kind": "rotary", "dim": 4}}, r"dim must be even, 2 to 2, .*; got 4"),
        ("attention", {"heads": 4, "positions": "rotery"}, r"no kind of positions is called 'rotery'.*mean 'rotary'"),
        ("attention", {"heads": 4, "qk_norm": "rns"}, r"no norm is called 'rns'.*did you mean 'rms'"),
        ("h3", {"head_dim": 3}, r"head_dim = 3 does not divide d_model = 8"),
        ("s4d", {"d_state": 5}, r"d_state must be even, >= 2; got 5"),
        ("s4d", {"init": "linn"}, r"no S4D init is called 'linn'; there are lin, .*did you mean 'lin'"),
        ("s4d", {"discretization": "zho"}, r"no discretization is called 'zho'.*did you mean 'zoh'"),
        ("s4d", {"dt_min": 1.0}, r"0 < dt_min <= dt_max; got dt_min = 1.0, dt_max = 0.1"),
        ("s4d", {"systems": 3}, r"systems = 3 does not divide channels = 8"),
        ("hyena", {"max_len": 8, "order": 1}, r"order >= 2 and d_conv >= 1; got order = 1, d_conv = 3"),
        (
            "attention",
            {"heads": 2, "positions": {"kind": "rotary", "base": 0.0}},
            r"rotary positions need base > 0; got 0.0",
        ),
        ("bigs", {"expand": 0.0}, r"expand \* d_model >= 1; got 0.0 \* 8"),
        ("hyena", {"max_len": 8, "width": 0}, r"width >= 1 and inner_layers >= 0; got width = 0"),
        ("hyena", {"max_len": 8, "target": 0.0}, r"target, slowest and fastest > 0; got target = 0.0"),
        ("s4", {"rate": math.inf}, r"> 0; got rate = inf"),
        ("long_conv", {"max_len": 8, "squash": math.nan}, r"squash >= 0; got nan"),
        ("hyena", {"max_len": 0}, r"max_len >= 1; got 0"),
        ("hyena", {"max_len": 8, "emb_dim": 4}, r"odd, >= 3; got 4"),
        ("hyena_two_sided", {"max_len": 8, "order": 1}, r"order >= 2 .*; got order = 1"),
        ("long_conv", {"max_len": 8, "smooth": 4}, r"odd width >= 1; got 4"),
        ("mamba", {"d_conv": 0}, r"mamba needs d_conv >= 1; got 0"),
        ("mamba", {"dt_min": 0.0}, r"0 < dt_min <= dt_max; got dt_min = 0.0, dt_max = 0.1"),
        ("mamba2", {"groups": 3, "head_dim": 4}, r"groups = 3 does not divide the 4 heads"),
        ("mamba2", {"head_dim": 3}, r"head_dim = 3 does not divide expand \* d_model = 16"),
        ("mamba2", {"d_state": 0}, r"mamba2 needs d_state >= 1; got 0"),
        ("mamba2", {"dt_low": 0.2, "dt_high": 0.1}, r"0 <= dt_low <= dt_high; got dt_low = 0.2, dt_high = 0.1"),
        ("mamba2", {"norm": "norm_gat"}, r"no gated norm is called 'norm_gat'; .*did you mean 'norm_gate'"),
        ("long_conv", {"max_len": 8, "channels": 0}, r"channels >= 1; got 0"),
        ("s4d", {"rate": 0.0}, r"> 0; got rate = 0.0"),
        ("ckconv", {"max_len": 8, "filter": "flexcon"}, r"no continuous filter is called 'flexcon'.*mean 'flexconv'"),
        ("butterfly_conv", {"max_len": 4, "order": 4}, r"max_len = 4 is too short for transforms of order = 4"),
        ("two_sided", {"filter": "s4dd"}, r"no filter is called 's4dd'.*did you mean 's4d'"),
        ("bidirectional", {"inner": "two_sided"}, r"'two_sided' looks ahead already"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](8, **options)


@pytest.mark.parametrize("name", ["hyena", "long_conv", "ckconv", "learned_positions"])
def test_a_sequence_above_max_len_is_refused(name):
    layer = MIXERS[name](8, max_len=16)
    with pytest.raises(ValueError, match=r"max_len = 16.*17.*max_len >= 17"):
        layer(torch.zeros(1, 17, 8))
    _, state = layer(torch.zeros(1, 16, 8), layer.init_state(1))
    with pytest.raises(ValueError, match=r"max_len = 16"):
        layer(torch.zeros(1, 1, 8), state)


@pytest.mark.parametrize("name", ["hyena", "long_conv", "ckconv"])
def test_padding_is_no_part_of_max_len(name):
    """Nor is it in chunks, where one row waits for the other."""
    layer = MIXERS[name](D, **{"max_len": L, **({"order": 3} if name == "hyena" else {})}).double()
    x = noise(B, L, D)
    for place in PLACES:
        padded, mask = with_padding(x, place)
        close(real(layer(padded, mask=mask)[0], mask), layer(x)[0])
        for sizes in ([17], [6, 9, 2], [1] * 17):
            close(real(run_in_chunks(layer, padded, sizes, mask)[0], mask), layer(x)[0])
    first = torch.arange(B) == torch.tensor([[0], [1]])  # one row, then the other
    turns = torch.cat([first, first, ~first, ~first] * 5, dim=1)[:, : 2 * L - 6]
    count = int(turns.sum(1).min())
    taken = torch.zeros(*turns.shape, D, dtype=torch.float64)
    taken[turns] = torch.cat([row[: int(n)] for row, n in zip(x, turns.sum(1))])
    y = run_in_chunks(layer, taken, [2] * (turns.shape[1] // 2), turns)[0]
    for row, outputs, on in zip(x, y, turns):
        close(outputs[on][:count], layer(row[None, :count])[0][0])


@pytest.mark.parametrize("name", ["s4d", "s5", "h3", "liquid_s4", "mamba", "mamba2", "lstm"])
def test_recurrent_states_do_not_grow(name):
    layer = MIXERS[name](8)
    sizes = [state_bytes(layer(torch.zeros(1, L, 8), layer.init_state(1))[1]) for L in (100, 1000)]
    assert sizes[0] == sizes[1]
