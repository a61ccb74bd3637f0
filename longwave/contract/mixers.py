"""The contract that every mixer keeps: clauses that take the name of one and options of it."""

import contextlib
import copy
import fnmatch
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from longwave.contract.clauses import Contract, refused
from longwave.mixers import MIXERS, Mixer, join, select
from longwave.mixers.states import grows
from longwave.nn import StateSpaceFilter, frozen, optim_hints, reset
from longwave.ops.dispatch import use_backend

EVERY, STATES = Contract(), Contract()  # of all mixers, and of those that do not look ahead
Options = dict[str, Any]

B, L, D = 2, 13, 8  # L is prime: no chunk size divides it
ANY = torch.export.Dim.DYNAMIC
INDUCTOR = "aot_eager_decomp_partition"  # as torch.compile's own backend begins: traced, decomposed, parted


@contextlib.contextmanager
def inference(layer: Mixer) -> Iterator[None]:
    """As text is generated: nothing is recorded, and what follows from weights is derived once."""
    with torch.inference_mode(), frozen(layer):
        yield


WITHIN: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "grad": lambda layer: torch.enable_grad(),
    "no-grad": lambda layer: torch.no_grad(),
    "frozen": inference,
}


def close(ours: Any, theirs: Any) -> None:
    """Equal to 1e-8."""
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def build(name: str, kw: Options) -> Any:
    """A layer in float64, always drawn alike."""
    torch.manual_seed(0)
    return MIXERS[name](D, **kw).double()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_in_chunks(layer: Any, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """All outputs, and the state at the end."""
    state, ys = layer.init_state(len(x)), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    for chunk, m in zip(x.split(sizes, dim=1), masks):
        y, state = layer(chunk, state, mask=m)
        ys.append(y)
    return torch.cat(ys, dim=1), state


# Where padding stands, by row: at its start, at its end, here and there, and over more than half of it.
PLACES = {"left": [[0, 1, 2, 3], []], "right": [[], [13, 14, 15, 16]], "inside": [[1, 5, 6, 16], [0, 9, 10, 11]]}


def with_padding(x: Tensor, place: str, filling: float = math.nan) -> tuple[Tensor, Tensor]:
    """The rows of x (2, 13, D) spread over 17 steps, what is between them NaN or infinite; and the mask. A row of which
    no place is given has its padding behind."""
    mask = torch.ones(B, L + 4, dtype=torch.bool)
    for row, steps in zip(mask, PLACES[place]):
        row[steps or slice(L, None)] = False
    padded = torch.full((B, L + 4, D), filling, dtype=x.dtype)
    padded[mask] = x.flatten(0, 1)
    return padded, mask


def real(y: Tensor, mask: Tensor) -> Tensor:
    """The outputs (2, 13, D) at real tokens."""
    return y[mask].view(B, L, -1)


def parameter_gradients(layer: Any, y: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output differently."""
    parameters = dict(layer.named_parameters())
    if not parameters:
        return {}
    loss = (y * noise(*y.shape, seed=7).to(y.dtype)).sum()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def in_bfloat16(layer: Any, x: Tensor) -> tuple[Any, Tensor]:
    """The layer in bfloat16, and four times the error that rounding its weights and inputs alone makes."""
    low = copy.deepcopy(layer).bfloat16()
    floor = (copy.deepcopy(low).double()(x.bfloat16().double())[0] - layer(x)[0]).abs().max()
    return low, 4 * floor + 2e-2


def near(ours: Tensor, exact: Tensor) -> None:
    """In float32, and equal to 1e-4 of the largest."""
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


def called(name: str) -> str:
    """A mixer's name in its errors, as a pattern."""
    return re.escape(MIXERS[name].name)


def contract_of(name: str) -> Contract:
    """All that a mixer keeps."""
    return Contract({**EVERY, **STATES}) if MIXERS[name].causal else EVERY


@EVERY.clause
def no_state_in_no_state_out(name: str, kw: Options) -> None:
    """Outputs are of the shape and dtype of x; without a state none comes out."""
    x = noise(B, L, D)
    y, state = build(name, kw)(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert state is None


@EVERY.clause
def causal(name: str, kw: Options) -> None:
    """No output sees the future, unless it says so; the present is seen."""
    layer, x = build(name, kw), noise(B, L, D)
    future = torch.cat([x[:, :6], noise(B, L - 6, D, seed=2)], dim=1)  # a norm does not see a constant
    change = (layer(future)[0] - layer(x)[0]).abs().amax(dim=(0, 2))
    assert (change[:6] <= 1e-8).all() == layer.causal
    assert (change[6:] > 1e-8).any()


@EVERY.clause
def rows_of_a_batch_are_independent(name: str, kw: Options) -> None:
    """A row alone gives what it gives among others."""
    layer, x = build(name, kw), noise(B, L, D)
    close(layer(x)[0][:1], layer(x[:1])[0])


@EVERY.clause(place=[*PLACES])
def padding_is_invisible(name: str, kw: Options, place: Any) -> None:
    """Outputs at real tokens are as if padding were not there, whatever it holds; those at padding are finite."""
    layer, x = build(name, kw), noise(B, L, D)
    padded, mask = with_padding(x, place)
    y = layer(padded, mask=mask)[0]
    close(real(y, mask), layer(x)[0])
    assert torch.isfinite(y).all()


@EVERY.clause(filling=[math.nan, math.inf])
def padding_has_no_gradients(name: str, kw: Options, filling: float) -> None:
    """Neither of parameters nor of x."""
    layer, x = build(name, kw), noise(B, L, D).requires_grad_()
    padded, mask = with_padding(x.detach(), "inside", filling)
    padded.requires_grad_()
    y = layer(x)[0]
    close(parameter_gradients(layer, real(layer(padded, mask=mask)[0], mask)), parameter_gradients(layer, y))
    (of_padded,) = torch.autograd.grad(real(layer(padded, mask=mask)[0], mask).square().sum(), padded)
    (of_x,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    close(real(of_padded, mask), of_x)
    assert not of_padded[~mask].any()


@EVERY.clause
def a_mask_of_integers_is_a_mask(name: str, kw: Options) -> None:
    """0 and 1 are False and True."""
    layer = build(name, kw)
    padded, mask = with_padding(noise(B, L, D), "inside")
    assert torch.equal(layer(padded, mask=mask.long())[0], layer(padded, mask=mask)[0])
    assert torch.equal(layer(padded, mask=mask.to(torch.uint8))[0], layer(padded, mask=mask)[0])


@EVERY.clause
def refuses_what_does_not_fit(name: str, kw: Options) -> None:
    """x and masks of other shapes and dtypes, in the words of all mixers."""
    layer, x = build(name, kw), noise(B, L, D)
    takes = rf"^{called(name)} takes x \(B, L, 8\), floating, B >= 1 and L >= 1; got "
    for wrong in (noise(B, L, D + 1), noise(B, L, 1), noise(L, D), noise(0, L, D), noise(B, 0, D), x.long()):
        with refused(takes + re.escape(f"{tuple(wrong.shape)} {wrong.dtype}")):
            layer(wrong)
    on = torch.ones(B, L, dtype=torch.bool)
    for wrong in (on[:1], on[:, :1], on[:, :, None], on[0], on.double(), on.to(torch.complex64)):
        with refused(r"^a mask is \(B, L\) = \(2, 13\) on cpu, bool or integers 0 and 1.* got"):
            layer(x, mask=wrong)
    with refused(r"0 at padding and 1 at real tokens; got values 2..2"):
        layer(x, mask=on + on.long())


@EVERY.clause
def gradients(name: str, kw: Options) -> None:
    """Are those of finite differences."""
    layer, x = build(name, kw), noise(1, 5, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x, fast_mode=True)


@EVERY.clause
def forward_mode_is_reverse_mode(name: str, kw: Options) -> None:
    """In float32, which kernels and libraries take that know no forward mode."""
    layer, x, dx = build(name, kw).float(), noise(1, 5, D).float(), noise(1, 5, D, seed=2).float()
    y, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (dx,))  # type: ignore[misc]
    (gradient,) = torch.func.vjp(lambda x: layer(x)[0], x)[1](y)
    torch.testing.assert_close((y * tangent).sum(), (gradient * dx).sum(), rtol=1e-3, atol=1e-4)


@EVERY.clause
def every_parameter_is_trained(name: str, kw: Options) -> None:
    """Each has a gradient that is not zero."""
    layer = build(name, kw)
    layer(noise(B, L, D).requires_grad_())[0].square().sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


@EVERY.clause
def saves_and_loads(name: str, kw: Options) -> None:
    """A state_dict makes another layer the same, and so does a copy."""
    layer, x = build(name, kw), noise(B, L, D)
    other = MIXERS[name](D, **kw).double()
    other.load_state_dict(layer.state_dict(), strict=True)
    close(other(x)[0], layer(x)[0])
    close(copy.deepcopy(layer)(x)[0], layer(x)[0])


@EVERY.clause
def compiles_whole(name: str, kw: Options) -> None:
    """torch.compile sees one graph, forwards and backwards, with a mask too."""
    torch._dynamo.reset()
    layer, (x, padding) = build(name, kw), with_padding(noise(B, L, D), "inside", 0.0)
    mask = None if layer.causal else padding  # masks of the others are compiled with a state
    compiled = torch.compile(layer, fullgraph=True, backend=INDUCTOR)
    y, exact = compiled(x, mask=mask)[0], layer(x, mask=mask)[0]
    close(y, exact)
    close(parameter_gradients(layer, y), parameter_gradients(layer, exact))


@EVERY.clause
@torch.no_grad()
def exports_with_any_batch_and_length(name: str, kw: Options) -> None:
    """torch.export takes both as they come."""
    layer = build(name, kw)
    program = torch.export.export(layer, (noise(B, L, D),), dynamic_shapes={"x": {0: ANY, 1: ANY}}).module()
    for shape in ((3, 17), (B, 5)):
        x = noise(*shape, D, seed=4)
        close(program(x)[0], layer(x)[0])


@EVERY.clause
def builds_on_meta_bit_for_bit(name: str, kw: Options) -> None:
    """On the meta device and drawn later, weights are those of a layer that is made at once."""
    torch.manual_seed(0)
    direct = MIXERS[name](D, **kw)
    with torch.device("meta"):
        ghost = MIXERS[name](D, **kw)
    torch.manual_seed(0)
    drawn = reset(ghost.to_empty(device="cpu"))
    for key, value in direct.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[key]), key


@EVERY.clause
def bfloat16_is_as_good_as_bfloat16_allows(name: str, kw: Options) -> None:
    """Weights and inputs in bfloat16 cost their rounding and little more."""
    layer, x = build(name, kw), noise(B, L, D)
    low, limit = in_bfloat16(layer, x)
    assert (low(x.bfloat16())[0].double() - layer(x)[0]).abs().max() <= limit


@EVERY.clause
def autocast_is_as_good_as_bfloat16_allows(name: str, kw: Options) -> None:
    """As in bfloat16."""
    layer, x = build(name, kw), noise(B, L, D)
    limit, exact, layer = in_bfloat16(layer, x)[1], layer(x)[0], layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())[0]
    assert (y.double() - exact).abs().max() <= limit


@EVERY.clause
def optim_hints_name_parameters(name: str, kw: Options) -> None:
    """Every pattern is of a parameter that there is."""
    layer = build(name, kw)
    hints, names = optim_hints(layer), dict(layer.named_parameters())
    assert set(hints) <= set(names)
    for pattern in layer.optim_hints:
        assert fnmatch.filter(names, pattern), pattern


@STATES.clause(sizes={"steps": [1] * L, "prefill": [L], "1-7-5": [1, 7, 5], "5-1-7": [5, 1, 7]}, within=[*WITHIN])
def chunked_is_parallel(name: str, kw: Options, sizes: list[int], within: Any) -> None:
    """In chunks of any sizes as in parallel."""
    layer, x = build(name, kw), noise(B, L, D)
    with WITHIN[within](layer):
        close(run_in_chunks(layer, x, sizes)[0], layer(x)[0])


@STATES.clause
def state_does_not_depend_on_the_chunking(name: str, kw: Options) -> None:
    """After the same tokens it is the same."""
    layer, x = build(name, kw), noise(B, L, D)
    states = [run_in_chunks(layer, x, sizes)[1] for sizes in ([L], [4, 9], [1] * L)]
    close(tree_leaves(states[0]), tree_leaves(states[1]))
    close(tree_leaves(states[0]), tree_leaves(states[2]))


@STATES.clause(within=[*WITHIN])
def state_is_never_modified(name: str, kw: Options, within: Any) -> None:
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


@STATES.clause
def state_is_batch_first(name: str, kw: Options) -> None:
    """Rows of it go on alone."""
    layer = build(name, kw)
    _, state = layer(noise(3, L, D), layer.init_state(3))
    assert all(len(t) == 3 for t in tree_leaves(state))
    rows = tree_map(lambda t: t[1:2], state)
    x = noise(3, 4, D, seed=2)
    close(layer(x[1:2], rows)[0], layer(x, state)[0][1:2])


@STATES.clause(place=[*PLACES], sizes={"17": [17], "3-14": [3, 14], "6-9-2": [6, 9, 2], "steps": [1] * 17})
def padding_takes_no_time(name: str, kw: Options, place: Any, sizes: list[int]) -> None:
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


@STATES.clause
def a_chunk_of_padding_leaves_the_state(name: str, kw: Options) -> None:
    """It is as if there had been none."""
    layer, x = build(name, kw), noise(B, L, D)
    _, state = layer(x, layer.init_state(B))
    off = torch.zeros(B, 2, dtype=torch.bool)
    y, after = layer(torch.full((B, 2, D), math.nan, dtype=x.dtype), state, mask=off)
    assert torch.isfinite(y).all()
    close(layer(x[:, :3], after)[0], layer(x[:, :3], state)[0])


@STATES.clause(sizes={"5-1-7": [5, 1, 7], "steps": [1] * L})
def gradients_in_chunks_are_parallel(name: str, kw: Options, sizes: list[int]) -> None:
    """Of parameters too, though the x of training needs none; through states, to the first chunk."""
    layer, x = build(name, kw), noise(B, L, D)
    close(parameter_gradients(layer, run_in_chunks(layer, x, sizes)[0]), parameter_gradients(layer, layer(x)[0]))


@STATES.clause
def gradients_are_finite_where_modes_underflow(name: str, kw: Options) -> None:
    """And those in chunks are those in parallel there too."""
    layer, x = build(name, kw), noise(B, L, D)
    for part in layer.modules():
        if isinstance(part, StateSpaceFilter):
            part.rate = 1e6  # type: ignore[assignment]  # exp(dt A) is 0 then
    in_chunks = parameter_gradients(layer, run_in_chunks(layer, x, [5, 1, 7])[0])
    assert all(torch.isfinite(gradient).all() for gradient in in_chunks.values())
    close(in_chunks, parameter_gradients(layer, layer(x)[0]))


@STATES.clause
def what_autograd_saved_survives_a_branch(name: str, kw: Options) -> None:
    """Going on from a state twice spoils no gradient."""
    layer, x = build(name, kw), noise(B, L, D)
    ys, state = [], layer.init_state(B)
    for chunk in x.split([5, 1, 7], dim=1):
        y, state = layer(chunk, state)
        ys.append(y)
        with torch.no_grad():
            _, branch = layer(chunk[:, :1], state)
            layer(chunk[:, :1], branch)
    close(parameter_gradients(layer, torch.cat(ys, dim=1)), parameter_gradients(layer, layer(x)[0]))


@STATES.clause
def a_state_of_inference_mode_can_be_trained_on(name: str, kw: Options) -> None:
    """What generation made, training may go on from."""
    layer, x = build(name, kw), noise(B, L, D)
    with torch.inference_mode():
        _, state = layer(x[:, :5], layer.init_state(B))
    y, after = layer(x[:, 5:], state)
    close(y, layer(x)[0][:, 5:])
    parameter_gradients(layer, y)
    layer(x[:, 5:6], after)


@STATES.clause
def threads_may_continue_one_state(name: str, kw: Options) -> None:
    """Several at once, from one state."""
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


@STATES.clause
def refuses_a_state_that_does_not_fit(name: str, kw: Options) -> None:
    """Of other rows, types and sizes."""
    layer, x = build(name, kw), noise(B, L, D)
    _, state = layer(x, layer.init_state(B))
    kind = type(state).__name__
    with refused(rf"^{called(name)}: the state is of 2 sequences, x of 3$"):
        layer(noise(3, L, D), state)
    with refused(rf"^{called(name)}: the state is of 1 sequences, x of 2$"):
        layer(x, tree_map(lambda t: t[:1], state))
    for wrong in ((), tuple(state), [*state], x):
        with refused(rf"^{called(name)} goes on from a {kind}, .*; got a {type(wrong).__name__}"):
            layer(x, wrong)
    wider = tree_map(lambda t: torch.cat([t, t], dim=-1), state)
    with refused(rf"^{called(name)} of d_model = 8 has a state of .* a sequence; got one of .*"):
        layer(x, wider)


@STATES.clause
def refuses_the_state_of_another_mixer(name: str, kw: Options) -> None:
    """By the name of what it goes on from."""
    layer, x = build(name, kw), noise(B, L, D)
    for cls in list(MIXERS.values()):
        if cls.causal and not issubclass(type(layer), cls) and not issubclass(cls, type(layer)):
            with refused(rf"^{called(name)} goes on from a "):
                layer(x, cls(D, **cls.examples[0]).double().init_state(B))


@STATES.clause
@torch.no_grad()
def a_state_does_not_hold_the_memory_of_a_chunk(name: str, kw: Options) -> None:
    """But for what grows: no views of long tensors."""
    layer, held = build(name, kw), []
    for length in (1, 6, L):
        state = layer(noise(B, length, D), layer.init_state(B))[1]
        fields = [getattr(state, field) for field, growing in grows(type(state)).items() if not growing]  # type: ignore[arg-type]
        held.append([t.untyped_storage().nbytes() for t in tree_leaves(fields)])
    assert held[0] == held[1] == held[2]


@STATES.clause
def states_of_any_lengths_are_joined(name: str, kw: Options) -> None:
    """Rows that have come differently far go on together."""
    layer, x = build(name, kw), noise(B, L, D)
    states = [layer(x[:1, :n], layer.init_state(1))[1] for n in (3, L)]
    y, _ = layer(x[:, :2], join([select(states[0], [0]), states[1]]))
    close(y, torch.cat([layer(x[i : i + 1, :2], state)[0] for i, state in enumerate(states)]))


@STATES.clause
def states_of_other_sizes_are_not_joined(name: str, kw: Options) -> None:
    """What grows along time is declared, so that nothing else can be taken for it."""
    layer, x = build(name, kw), noise(B, L, D)
    short, long = (layer(x[:, :n], layer.init_state(B))[1] for n in (3, L))
    for field, growing in grows(type(short)).items():  # type: ignore[arg-type]
        sizes = [[t.shape for t in tree_leaves(getattr(state, field))] for state in (short, long)]
        assert (sizes[0] != sizes[1]) == growing, field
    narrow, wide = (MIXERS[name](d, **kw).init_state(1) for d in (D, 2 * D))
    if [t.shape for t in tree_leaves(narrow)] != [t.shape for t in tree_leaves(wide)]:
        with refused(r"states of one model are joined; got some of sizes .* a row"):
            join([narrow, wide])


@STATES.clause
def gradients_of_a_carried_state(name: str, kw: Options) -> None:
    """Flow through it to what came before."""
    layer, x = build(name, kw), noise(B, L, D)
    u = x[:1, 3:8].clone().requires_grad_()  # other tokens than before: of two equal ones, neither is the largest
    _, state = layer(x[:1, :3], layer.init_state(1))
    state = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex()), state)
    carried = [t for t in tree_leaves(state) if t.requires_grad]

    def resumed(u, *tensors):
        given = dict(zip(map(id, carried), tensors))
        y, after = layer(u, tree_map(lambda t: given.get(id(t), t), state))
        return (y, *(t for t in tree_leaves(after) if t.requires_grad))

    assert torch.autograd.gradcheck(resumed, (u, *carried), fast_mode=True)


@STATES.clause
def compiles_whole_with_a_state(name: str, kw: Options) -> None:
    """torch.compile sees one graph."""
    torch._dynamo.reset()
    layer, x = build(name, kw), noise(B, L, D)
    state = layer(x, layer.init_state(B))[1]
    compiled = torch.compile(layer, fullgraph=True, backend=INDUCTOR)
    mask = torch.tensor([[True, True, True], [False, True, False]])  # of what all rows miss, a graph keeps the silence
    (y, after), (exact, state) = compiled(x[:, :3], state, mask=mask), layer(x[:, :3], state, mask=mask)
    close(y[mask], exact[mask])
    close(tree_leaves(after), tree_leaves(state))


@STATES.clause
@torch.no_grad()
def exports_a_step_of_any_batch_and_past(name: str, kw: Options) -> None:
    """torch.export takes a step at any time of any batch."""
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


@STATES.clause
def bfloat16_resumes_as_well_as_bfloat16_allows(name: str, kw: Options) -> None:
    """In chunks as in parallel."""
    layer, x = build(name, kw), noise(B, L, D)
    low, limit = in_bfloat16(layer, x)
    stepped, _ = run_in_chunks(low, x.bfloat16(), [6, 1, 6])
    assert (stepped.double() - layer(x)[0]).abs().max() <= limit


@STATES.clause
def resumes_from_a_state_of_another_dtype(name: str, kw: Options) -> None:
    """Outputs keep the dtype of x."""
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


@STATES.clause
def float32_resumes_as_well_as_float32_allows(name: str, kw: Options) -> None:
    """In chunks as in parallel."""
    layer, x = build(name, kw).float(), noise(B, L, D).float()
    torch.testing.assert_close(run_in_chunks(layer, x, [5, 1, 7])[0], layer(x)[0], rtol=1e-4, atol=1e-4)


@EVERY.clause(backend=["torch", "numba"])
def backend_parallel(name: str, kw: Options, backend: str) -> None:
    """In float32, by a backend, what float64 does."""
    layer, x = build(name, kw), noise(B, L, D)
    exact = layer(x)[0]
    with use_backend(backend):
        near(layer.float()(x.float())[0], exact)


@STATES.clause(within=[*WITHIN], backend=["torch", "numba"])
def backend_chunks(name: str, kw: Options, backend: str, within: Any) -> None:
    """As in parallel, in chunks."""
    layer, x = build(name, kw), noise(B, L, D)
    exact = layer(x)[0]
    layer = layer.float()
    with use_backend(backend), WITHIN[within](layer):
        near(run_in_chunks(layer, x.float(), [5, 1, 1, 6])[0], exact)


@EVERY.clause(backend=["torch", "numba"])
def backend_padding(name: str, kw: Options, backend: str) -> None:
    """As in parallel, with padding."""
    layer, x = build(name, kw), noise(B, L, D)
    exact = layer(x)[0]
    padded, mask = with_padding(x, "inside")
    with use_backend(backend):
        near(real(layer.float()(padded.float(), mask=mask)[0], mask), exact)


@STATES.clause(backend=["torch", "numba"])
def backend_padding_in_chunks(name: str, kw: Options, backend: str) -> None:
    """As in parallel, with padding and in chunks."""
    layer, x = build(name, kw), noise(B, L, D)
    exact = layer(x)[0]
    padded, mask = with_padding(x, "inside")
    with use_backend(backend):
        y, state = run_in_chunks(layer.float(), padded[:, :14].float(), [6, 1, 7], mask[:, :14])
        y = torch.cat([y, layer(padded[:, 14:].float(), state, mask=mask[:, 14:])[0]], dim=1)
    near(real(y, mask), exact)


@EVERY.clause(backend=["torch", "numba"])
def backend_gradients(name: str, kw: Options, backend: str) -> None:
    """Those of float64."""
    layer, x = build(name, kw), noise(B, L, D)

    def gradients(layer, x):
        x = x.clone().requires_grad_()
        (layer(x)[0] * noise(B, L, D, seed=2).to(x.dtype)).sum().backward()
        return {"input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

    exact = gradients(copy.deepcopy(layer), x)
    with use_backend(backend):
        ours = gradients(layer.float(), x.float())
    for key, gradient in exact.items():
        near(ours[key], gradient)
