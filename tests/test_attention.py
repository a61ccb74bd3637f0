"""Attention: windows, grouped heads, positions and their scaling, and the language models that are made of it."""

import math
import re

import pytest
import torch
from official import golden
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longwave.inspection import state_growth
from longwave.mixers import MIXERS, join, select, state_bytes
from longwave.models import LMSpec, generate, load, save
from longwave.nn import Rotary
from longwave.official import SYSTEMS, from_official
from longwave.ops import attention, attention_step


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def layer(**options):
    torch.manual_seed(0)
    return MIXERS["attention"](16, **{"heads": 4, **options}).double().eval()


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 600])
def test_a_window_is_a_band(window):
    """Over lengths of several chunks of queries, with gradients."""
    inputs = [noise(1, 700, 2, 4, seed=i).requires_grad_() for i in range(3)]
    lag = torch.arange(700)[:, None] - torch.arange(700)
    logits = torch.einsum("blhp,bthp->bhlt", *inputs[:2]) / 2
    logits = logits.masked_fill((lag < 0) | (lag >= window), -math.inf)
    exact = torch.einsum("bhlt,bthp->blhp", logits.softmax(-1), inputs[2])
    y = attention(*inputs, window=window)
    close(y, exact)
    weight = noise(*y.shape, seed=9)
    close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (y, exact)))


class Written(TorchDispatchMode):
    """Counts the numbers that all operations within it give, and remembers the largest of them."""

    def __init__(self):
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return results


def test_a_window_costs_as_much_at_each_token():
    """Forwards and back, in numbers that are written; nothing has all pairs of tokens."""

    def written(length):
        q = torch.randn(1, length, 1, 8, requires_grad=True)
        with Written() as count:
            attention(q, q, q, window=32).sum().backward()
        return count

    short, long = written(1024), written(4096)
    assert long.total < 4.2 * short.total
    assert long.largest == 4 * short.largest == 4096 * 8


@torch.no_grad()
def test_the_state_of_a_window_is_bounded_in_bytes_and_in_memory():
    mixer, x = layer(window=9), noise(2, 300, 16)
    state = mixer(x, mixer.init_state(2))[1]
    assert state_bytes(state) <= 2 * (8 * 2 * 16 * 8 + 8)
    for t in range(100):
        assert state.kv.untyped_storage().nbytes() <= 2 * 8 * 2 * 16 * max(4 * 9, 64)
        y, state = mixer(x[:, t : t + 1], state)
    close(y[:, 0], mixer(torch.cat([x, x[:, :100]], dim=1))[0][:, -1])
    first, growth, million = state_growth(layer(window=9).to("meta"))
    assert million == first + 7 * growth == state_bytes(select(state, [0]))
    assert state.length.tolist() == [400, 400]


def test_grouped_heads_are_repeated_heads():
    few, many = layer(kv_heads=2), layer()
    q, k, v = few.Wqkv.weight.detach().split([16, 8, 8])
    again = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v)]
    q_bias, k_bias, v_bias = few.Wqkv.bias.detach().split([16, 8, 8])
    biases = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten() for t in (k_bias, v_bias)]
    many.load_state_dict(
        {**few.state_dict(), "Wqkv.weight": torch.cat([q, *again]), "Wqkv.bias": torch.cat([q_bias, *biases])}
    )
    x = noise(2, 11, 16)
    close(few(x)[0], many(x)[0])
    assert state_bytes(few(x, few.init_state(2))[1]) < 0.6 * state_bytes(many(x, many.init_state(2))[1])


@torch.no_grad()
def test_rows_of_unequal_lengths_go_on_together_in_float32():
    """The kernel of one step reads as many keys of a row as it has."""
    mixer, x, more = layer(kv_heads=2).float(), noise(3, 9, 16).float(), noise(3, 4, 16, seed=2).float()
    alone = [mixer(x[i : i + 1, : 3 * i + 3], mixer.init_state(1))[1] for i in range(3)]
    together = join(alone)
    for t in range(4):
        y, together = mixer(more[:, t : t + 1], together)
        for i in range(3):
            own, alone[i] = mixer(more[i : i + 1, t : t + 1], alone[i])
            torch.testing.assert_close(y[i : i + 1], own, rtol=1e-5, atol=1e-6)
    y, _ = mixer(more[:2], select(together, [2, 0]))
    torch.testing.assert_close(y[1:], mixer(more[1:2], alone[0])[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=["all", "window"])
def test_exports_for_lengths_above_a_chunk(options):
    """With a state behind it too: nothing of the 512 queries that are computed at a time is in the program."""
    mixer, any_length = layer(**options), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(mixer, (noise(2, 13, 16),), dynamic_shapes={"x": any_length}).module()
    x = noise(1, 1100, 16)
    close(program(x)[0], mixer(x)[0])
    if options:
        return
    state = mixer(x[:, :30], mixer.init_state(1))[1]
    two = torch.cat([x, x])
    start = mixer(two[:, :30], mixer.init_state(2))[1]
    shapes = {"x": any_length, "state": type(start)(any_length, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})}
    program = torch.export.export(mixer, (two[:, :7], start), dynamic_shapes=shapes).module()
    for ours, exact in zip(tree_leaves(program(x[:, 30:], state)), tree_leaves(mixer(x[:, 30:], state))):
        close(ours, exact)


def test_linear_scaling_divides_positions():
    x = noise(1, 7, 1, 8)
    slow = Rotary(8, base=100.0, scaling={"kind": "linear", "factor": 3.0})(x, torch.tensor([6]), 1)
    close(slow[:, 0], Rotary(8, base=100.0)(x, torch.tensor([2]), 1)[:, 0])


def test_llama3_scaling_by_its_formula():
    rotary = Rotary(16, base=500.0, scaling={"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "length": 64})
    kept, divided = 0, 0
    for i, found in enumerate(rotary.frequency(torch.device("cpu")).tolist()):
        plain = 500.0 ** (-2 * i / 16)
        wavelength = 2 * math.pi / plain
        if wavelength < 64 / 4.0:
            expected, kept = plain, kept + 1
        elif wavelength > 64 / 1.0:
            expected, divided = plain / 8.0, divided + 1
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * plain / 8.0 + smooth * plain
        assert math.isclose(found, expected, rel_tol=1e-12)
    assert 0 < kept < 8 - divided < 8


def test_sinusoids_by_their_formula():
    mixer = MIXERS["sinusoidal_positions"](5).double()
    y = mixer(torch.zeros(1, 9, 5, dtype=torch.float64))[0]
    for t in (0, 8):
        angles = [t / 10_000 ** (2 * (i // 2) / 5) for i in range(5)]
        exact = [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]
        close(y[0, t], torch.tensor(exact, dtype=torch.float64))


POSITIONED = {"vocab": 11, "d_model": 16, "pattern": [{"kind": "attention", "heads": 2, "positions": None}]}


def test_more_tokens_than_positions_are_named_before_the_first():
    model = LMSpec(**POSITIONED, positions={"kind": "learned_positions", "max_len": 12}).build()
    with pytest.raises(ValueError, match=r"learned_positions of max_len = 12 cannot serve a sequence of 13; .*>= 13"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"a text of 3 tokens and max_new = 11 are more than the 12 that"):
        generate(model, [[1, 2, 3]], 11)
    rows = generate(model, [[1, 2, 3], [4]], 10)  # the last one drawn is not read
    assert [len(row) for row in rows] == [10, 10]
    assert rows[1] == generate(model, [[4]], 10)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learned_position"}, "did you mean 'learned_positions'"),
        ({"positions": {"kind": "learned_positions", "max_len": 0}}, "learned_positions needs max_len >= 1; got 0"),
        ({"positions": "two_sided"}, "a language model predicts the next token, but two_sided sees it"),
        ({"block": "paralel"}, "block"),
        ({"channel": {"kind": "mlp", "activation": "gelo"}}, "no activation is called 'gelo'.*did you mean 'gelu'"),
    ],
)
def test_positions_and_blocks_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LMSpec(**{**POSITIONED, **options}).build()


FAMILIES = ["gpt2_hf__untied_relu", "gptneox_hf__parallel", "llama_hf__gqa"]


@pytest.mark.parametrize("stem", FAMILIES)
@torch.no_grad()
def test_published_transformers_are_ordinary_language_models(stem, tmp_path):
    """They are saved, loaded, generated from, and go on from a state exactly."""
    case = golden(stem)
    module, ids = case.module(), case.inputs(torch.float64)["input_ids"][:, :9]
    spec = SYSTEMS[case.system].read(case.config).spec()
    save(tmp_path / "model", module.model, spec)
    model, again = load(tmp_path / "model")
    assert again == spec
    close(model(ids)[0], module(input_ids=ids))
    for row, new in zip(ids.tolist(), generate(model, ids, 4)):
        for token in new:
            assert module(input_ids=torch.tensor([row]))[0, -1].argmax() == token
            row.append(token)


@pytest.mark.parametrize(
    ("stem", "change", "words"),
    [
        ("llama_hf__gqa", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type = 'yarn' is not carried over"),
        ("llama_hf__gqa", {"rope_scaling": {"type": "linear"}}, "rope_scaling: 'linear' needs the option 'factor'"),
        ("llama_hf__gqa", {"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor > 0; got 0.0"),
        ("llama_hf__gqa", {"rope_parameters": {"rope_type": "linear", "factr": 2.0}}, "'factr'.*mean 'factor'"),
        ("llama_hf__gqa", {"num_key_value_heads": 3}, "kv_heads = 3 does not divide heads = 4"),
        ("llama_hf__gqa", {"num_attention_heads": 5}, "5 heads do not divide a width of 24"),
        ("llama_hf__gqa", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("gptneox_hf__parallel", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "dim must be even"),
        ("gptneox_hf__parallel", {"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ("gpt2_hf__base", {"add_cross_attention": True}, "add_cross_attention = True is not carried over"),
        ("gpt2_hf__base", {"n_head": 5}, "5 heads do not divide a width of 24"),
        ("gpt2_hf__base", {"activation_functio": "relu"}, "did you mean 'activation_function'"),
    ],
)
def test_options_of_transformers_that_are_not_carried_over(stem, change, words):
    case = golden(stem)
    with pytest.raises(ValueError, match=f"^{case.system}: .*{words}"):
        from_official(case.system, {**case.config, **change}, case.state(torch.float32))


@torch.no_grad()
def test_older_names_of_options_and_tensors():
    """GPT-2 as it was released, Pythia's head, rotary options and buffers of before."""
    case = golden("gpt2_hf__base")
    state, ids = case.state(torch.float64), case.inputs(torch.float64)["input_ids"]
    bare = {key.removeprefix("transformer."): t for key, t in state.items() if key != "lm_head.weight"}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    close(from_official("gpt2_hf", case.config, bare)(ids), case.module()(ids))
    case = golden("gptneox_hf__parallel")
    state, ids = case.state(torch.float64), case.inputs(torch.float64)["input_ids"]
    old = {key.replace("lm_head", "embed_out"): t for key, t in state.items()}
    old |= {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1), "gpt_neox.layers.1.attention.bias": ids}
    config = {key: value for key, value in case.config.items() if key != "rope_parameters"}
    options = {**config, "rotary_pct": 0.34, "rotary_emb_base": 10000, "rope_scaling": None}
    close(from_official("gptneox_hf", options, old)(ids), case.module()(ids))


def test_other_positions_are_refused():
    case = golden("llama_hf__gqa")
    ids = case.inputs(torch.float64)["input_ids"]
    places = torch.arange(ids.shape[1])
    close(case.module()(ids, position_ids=places), case.module()(ids))
    with pytest.raises(ValueError, match=re.escape("position_ids other than 0, 1, 2, ... are not carried over")):
        case.module()(ids, position_ids=places + 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_over_a_long_past_is_exact(threads):
    """Over several blocks whose largest logits rise, of rows of different lengths, on threads that share a row."""
    rng = torch.Generator().manual_seed(0)
    q, past = torch.randn(1, 1, 8, 36, generator=rng), torch.randn(1, 1801, 8, 36, generator=rng)
    past[:, :, :4] *= torch.linspace(-6, 6, 1801)[:, None, None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seen in (1801, 1800, 65, 64, 1):
            y = attention_step(q, past, torch.tensor([seen]))
            exact = attention_step(q.double(), past[:, -seen:].double(), torch.tensor([seen]))
            torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5)
    finally:
        torch.set_num_threads(before)
