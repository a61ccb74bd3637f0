"""What a recipe will cost, before anything is allocated: operations and memory against those counted by hand."""

import copy

import pytest
import torch

from longwave.inspection import state_growth
from longwave.mixers import mixer, state_bytes
from longwave.ops import OPS
from longwave.ops.flops import FORMULAS, flops, seen
from longwave.train.config import make_recipe
from longwave.train.cost import cost, describe, measure

TREE = {
    "task": {"kind": "induction_heads", "vocab_size": 16, "length": 62},
    "model": {"kind": "lm", "d_model": 32, "pattern": ["attention"], "layers": 2, "channel": {"kind": "mlp"}},
    "steps": 10, "batch": 8, "lr": 1e-3, "threads": 1, "accelerator": "cpu",
}  # fmt: skip


def recipe(*changes):
    return make_recipe(copy.deepcopy(TREE), changes)


def test_every_op_says_what_it_costs():
    assert FORMULAS.keys() == OPS.keys()
    for name, op in OPS.items():
        given = dict.fromkeys(op.arguments) | op.declaration.samples("cpu") | {"length": 4, "causal": True}
        assert flops(name, {key: value for key, value in given.items() if key in op.arguments}) >= 0


@pytest.mark.parametrize("window", [None, 1, 3, 6, 9, 100])
@pytest.mark.parametrize(("L", "T"), [(7, 7), (3, 9), (1, 6)])
def test_pairs_that_attention_weighs(L, T, window):
    brute = sum(min(window or T, T - L + i + 1) for i in range(L))
    assert seen(L, T, True, window) == brute
    assert seen(L, T, False, None) == L * T


def test_operations_of_attention_are_those_counted_by_hand():
    known = cost(recipe())
    D, L, layers, vocab = 32, known.row, 2, 17
    assert L in (62, 63)
    products = layers * (4 * D * D + 2 * 4 * D * D) + D * vocab
    pairs = L * (L + 1) // 2
    assert known.flops == pytest.approx(6 * L * products + layers * 3 * 4 * D * pairs, rel=0.02)
    assert known.by_op["attention"] == pytest.approx(layers * 12 * D * pairs / known.flops)


def test_operations_of_a_row_do_not_depend_on_the_batch_and_grow_as_they_must():
    short, wide = cost(recipe()), cost(recipe("batch=16"))
    assert short.flops == pytest.approx(wide.flops)
    assert wide.activations == pytest.approx(2 * short.activations, rel=0.01)
    long = cost(recipe("task.length=2000"))
    assert long.flops / long.row > 2 * short.flops / short.row  # the quadratic part
    linear = [cost(recipe("model.pattern.0=mamba", f"task.length={length}")) for length in (62, 2000)]
    assert linear[0].flops / linear[0].row == pytest.approx(linear[1].flops / linear[1].row, rel=0.01)


@pytest.mark.parametrize("kind", ["attention", "s4d", "mamba", "h3", "rwkv4"])
def test_memory_is_what_a_step_keeps(kind):
    """Against the tensors that autograd keeps in a real forward pass."""
    made = recipe(f"model.pattern.0={kind}")
    known = cost(made)
    model, batch = made.model.build(), made.task.train_batch(8, 0, 0)
    assert known.weights == sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    assert known.optimiser == 2 * known.gradients == 8 * known.parameters
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch.inputs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    logits = 8 * batch.inputs.numel() * model.vocab
    assert 0.7 * real < known.activations - logits < 1.6 * real


def test_processes_and_precision_share_what_they_share():
    one, all_ = cost(recipe("batch=64")), cost(recipe("batch=64", "devices=8", "strategy=fsdp2"))
    assert all_.weights == one.weights // 8
    assert all_.optimiser == one.optimiser // 8
    assert all_.rows == 8
    assert cost(recipe("batch=64", "accumulate=8")).activations == all_.activations
    assert cost(recipe("precision=bf16-mixed")).activations < 0.8 * cost(recipe()).activations


def test_what_is_evaluated_at_other_lengths_costs_what_it_trains_on():
    assert cost(recipe("task.eval_length=5000")).row == cost(recipe()).row


def test_state_after_so_many_tokens():
    layer = mixer("attention", heads=2, window=10).build(16).to("meta")
    x = torch.zeros(1, 30, 16, device="meta")
    _, state = layer(x, layer.init_state(1))
    assert state_growth(layer, 30)[2] == state_bytes(state)


def test_time_is_measured_where_it_takes_seconds():
    made = recipe()
    known = cost(made)
    seconds = measure(made, known)
    assert 0 < seconds < 60
    assert "about" in describe(made, known, seconds)
    large = recipe("model.d_model=2560", "model.layers=32", "task.length=2046")
    known = cost(large)
    assert known.parameters > 2e9
    said = describe(large, known, measure(large, known))
    assert "not measured: " in said
