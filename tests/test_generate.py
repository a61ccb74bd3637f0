"""Generation equals running the whole text again each time, whatever the batch."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longwave.mixers import join, mixer, select
from longwave.models import LMSpec, Sampling, SashimiSpec, generate, load_state, save_state, stream
from longwave.models import generate as generate_function
from longwave.nn import longest

generate_module = __import__("sys").modules["longwave.models.generate"]

PATTERNS = {
    "recurrent": ["s4d", "mamba", "lstm"],
    "hybrid": ["h3", {"kind": "attention", "heads": 2}, {"kind": "hyena", "max_len": 100, "width": 8}],
}


@pytest.fixture(params=PATTERNS)
def model(request):
    torch.manual_seed(5)
    model = (
        LMSpec(vocab=20, d_model=8, pattern=PATTERNS[request.param], norm="layer", tied=False).build().double().eval()
    )
    model.head.weight.data.mul_(3)  # sharp enough that the next token depends on the text
    return model


def greedy_by_hand(model, prompt, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_greedy_is_the_whole_model_again(model):
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3]]
    rows = [generate(model, [prompt], 8)[0] for prompt in prompts]
    assert rows == [greedy_by_hand(model, prompt, 8) for prompt in prompts]
    assert len({tuple(row) for row in rows}) > 1


def test_ragged_prompts_are_as_alone(model):
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    assert generate(model, prompts, 9) == [generate(model, [p], 9)[0] for p in prompts]


def test_right_padded_prompts_go_on_as_alone(model):
    """The same texts from a state after right padding, by the logits of each row's last real token."""
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in prompts])
    logits, state = model(ids, model.init_state(3), mask=torch.arange(7) < torch.tensor([[1], [7], [3]]), last=True)
    rows = []
    for _ in range(9):
        token = logits[:, -1].argmax(-1)
        rows.append(token.tolist())
        logits, state = model(token[:, None], state)
    assert [list(row) for row in zip(*rows)] == generate(model, prompts, 9)


def test_long_prompts_go_in_chunks(model, monkeypatch):
    prompts = [list(range(20)) * 2, [7] * 11]
    whole = generate(model, prompts, 6)
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", 8)
    assert generate(model, prompts, 6) == whole


def test_seed_reproduces_and_temperature_matters(model):
    draw = lambda **kw: generate(model, [[1, 2, 3]], 20, temperature=2.0, **kw)[0]  # noqa: E731
    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1, top_k=1) == generate(model, [[1, 2, 3]], 20)[0]
    assert draw(seed=1, top_p=1e-9) == generate(model, [[1, 2, 3]], 20)[0]


def test_draws_follow_the_probabilities():
    """top-k and top-p cut exactly the tokens they should, and the rest keep their proportions."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log().expand(20_000, 4)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def share(top_k, top_p, min_p=0.0):
        tokens = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p).draw(logits, draws)
        return torch.bincount(tokens, minlength=4) / 20_000

    near = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), rtol=0, atol=0.02)  # noqa: E731
    near(share(None, 1.0), [0.5, 0.25, 0.15, 0.1])
    near(share(2, 1.0), [2 / 3, 1 / 3, 0, 0])
    near(share(None, 0.7), [2 / 3, 1 / 3, 0, 0])
    near(share(None, 0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    near(share(None, 1.0, 0.4), [2 / 3, 1 / 3, 0, 0])


def test_stop_ends_a_row_and_not_the_others(model):
    prompts = [[3, 1], [4, 1, 5]]
    free = generate(model, prompts, 15)
    stop = free[0][2]
    rows = generate(model, prompts, 15, stop=[stop])
    for row, whole in zip(rows, free):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]


def test_stream_yields_as_it_goes(model):
    tokens = stream(model, [[1, 2]], 5)
    first = next(tokens)
    assert first == [generate(model, [[1, 2]], 1)[0][0]]
    assert len(list(tokens)) == 4
    assert generate(model, [[1, 2]], 0) == [[]]


def test_the_number_of_tokens_is_whole(model):
    with pytest.raises(ValueError, match=r"max_new must be a whole number; got 3.5"):
        generate(model, [[1]], 3.5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 20]], {}, r"prompt 0 has token id 20; the model knows 0..19"),
        ([[1]], {"temperature": -1.0}, "temperature must be >= 0.*got -1.0"),
        ([[1]], {"top_k": 0}, r"top_k must lie in 1..20; got 0"),
        ([[1]], {"top_p": 1.5}, r"top_p must lie in \(0, 1\]; got 1.5"),
        ([[1]], {"min_p": -0.1}, r"min_p must lie in \[0, 1\]; got -0.1"),
        ([[1]], {"temperature": float("nan")}, r"temperature must be >= 0 .* and finite; got nan"),
        ([[1]], {"repetition_penalty": 0.0}, r"repetition_penalty must be > 0 and finite; got 0.0"),
        ([[1]], {"stop": [[]]}, r"a stop sequence is empty"),
        ([[1]], {"stop": ["ab"]}, r"stop takes token ids in 0\.\.19 or sequences of them, .*; got 'ab'"),
        ([[1]], {"stop": [1000]}, r"stop takes token ids .*; got 1000"),
        ([[1]], {"stop": [[1, 2], [3, 20]]}, r"stop takes token ids .*; got \[3, 20\]"),
        ([[1]], {"seed": -1}, r"seed must lie in 0\.\.2\^63-1; got -1"),
        ([[1]], {"seed": [1, 2]}, r"seed has 2 entries for 1 rows"),
        ([[1]], {"slots": 0}, r"slots must be >= 1, .*got 0"),
        ([[1]], {"seed": 1.5}, r"seed must lie in 0\.\.2\^63-1; got 1.5"),
        ([[1]], {"top_k": 2.5}, r"top_k must be a whole number; got 2.5"),
        ([[1], [2.9]], {}, r"a prompt is a row of token ids, whole numbers; prompt 1 is \[2.9\]"),
        (torch.tensor([[1.0]]), {}, r"a prompt is a row of token ids, whole numbers; prompt 0 is \[1.0\]"),
        ([1, 2], {}, r"a prompt is a row of token ids, whole numbers; prompt 0 is 1"),
        ([["a"]], {}, r"a prompt is a row of token ids, whole numbers; prompt 0 is \['a'\]"),
        ([[1]], {"temprature": 1.0}, r"no option of generation is called 'temprature'; .*did you mean 'temperature'"),
        ([[1]], {"max_length": 1}, r"no option of generation is called 'max_length'; there are stop, seed, .*, top_k"),
        (None, {"state": (1, 2)}, r"state is a Held: .*; got tuple"),
        (None, {}, "there is no prompt"),
    ],
)
def test_bad_input_is_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_function(model, prompts, 3, **options)


def test_a_row_draws_the_same_alone_and_in_any_batch(model):
    """Rows that end early, other rows and slots beside it change nothing, in float64."""
    prompts, seeds = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9], [1]], [7, 3, 7, 1, 0]
    options = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2, "stop": [4]}
    alone = [generate(model, [p], 12, seed=[s], **options)[0] for p, s in zip(prompts, seeds)]
    assert generate(model, prompts, 12, seed=seeds, **options) == alone
    assert generate(model, prompts, 12, seed=seeds, slots=2, **options) == alone
    assert len({len(row) for row in alone}) > 1
    assert (
        generate(model, prompts, 9, seed=5, temperature=1.0)[2]
        == (generate(model, prompts[2:3], 9, seed=7, temperature=1.0)[0])
    )


def test_numbers_of_numpy_are_numbers(model):
    exact = generate(model, [[3, 1]], 4, temperature=1.0, seed=7)
    assert generate(model, np.array([[3, 1]]), np.int64(4), temperature=1.0, seed=np.int64(7)) == exact
    assert generate(model, [np.array([3, 1])], 4, temperature=1.0, seed=[np.int64(7)]) == exact
    assert generate(model, torch.tensor([[3, 1]]), 4, temperature=1.0, seed=7) == exact


@pytest.mark.parametrize("slots", [None, 2])
def test_an_interrupted_step_loses_nothing(model, slots, monkeypatch):
    """Whatever ends a call, the next one goes on as if it had not been."""
    prompts, options = [[3, 1, 4], [1], [5, 9]], {"temperature": 1.0, "seed": 3, "slots": slots}
    exact, calls = generate(model, prompts, 5, **options), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) in (1, 3, 6, 9):
            raise KeyboardInterrupt

    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda *args: interrupt() or draw(*args))
    tokens = stream(model, prompts, 5, progress=interrupt, **options)
    rows, interrupts = [[], [], []], 0
    while True:
        try:
            step = next(tokens)
        except KeyboardInterrupt:
            interrupts += 1
        except StopIteration:
            break
        else:
            for row, token in zip(rows, step):
                row += [] if token is None else [token]
    assert interrupts == 4
    assert rows == exact


def test_stop_sequences_end_a_row(model):
    write = lambda **kw: generate(model, [[3, 1]], 15, temperature=2.0, seed=0, **kw)[0]  # noqa: E731
    free = write()
    assert len(set(free[:6])) > 3
    assert write(stop=[free[3:6]]) == free[:6]
    assert write(stop=[[free[5], 3], free[2:6]]) == free[:6]


def test_repetition_penalty_moves_what_was_seen():
    logits = torch.tensor([[2.0, 1.9, -1.0]], dtype=torch.float64)
    seen = torch.tensor([[True, False, True]])
    assert Sampling(repetition_penalty=1.2).draw(logits, torch.zeros(1), seen).item() == 1
    negative = torch.tensor([[-1.0, -1.1, -9.0]], dtype=torch.float64)
    assert Sampling(repetition_penalty=1.2).draw(negative, torch.zeros(1), seen).item() == 1


def test_log_probabilities_are_the_models(model):
    tokens = stream(model, [[3, 1, 4], [1]], 4, temperature=1.0, top_k=3, seed=0, stop=[2])
    texts = [[3, 1, 4], [1]]
    for step in tokens:
        for text, token, logprob in zip(texts, step, tokens.logprobs, strict=True):
            if token is None:
                assert logprob is None
                continue
            expected = model(torch.tensor([text]))[0][0, -1].log_softmax(-1)[token].item()
            assert logprob == pytest.approx(expected, abs=1e-8)
            text.append(token)


def test_goes_on_from_what_it_holds(model, tmp_path):
    """In memory, from disk, from some of the rows in another order, and behind more of a prompt."""
    prompts, whole = [[3, 1, 4], [1]], generate(model, [[3, 1, 4], [1]], 12)
    tokens = stream(model, prompts, 5)
    first = list(zip(*tokens))
    for held in (tokens.held, saved_and_loaded(tmp_path / "held", tokens.held, model)):
        assert [[*a, *b] for a, b in zip(first, generate(model, None, 7, state=held))] == whole
    read = stream(model, prompts, 0)
    assert list(read) == []
    assert generate(model, None, 12, state=read.held) == whole
    swapped = generate(model, None, 7, state=select(tokens.held, [1, 0, 1]))
    assert swapped == [whole[1][5:], whole[0][5:], whole[1][5:]]
    more = generate(model, [[7, 7], [2]], 4, state=tokens.held)
    assert more == [generate(model, [p + list(f) + m], 4)[0] for p, f, m in zip(prompts, first, [[7, 7], [2]])]


def test_what_was_read_counts_behind_a_state(model, tmp_path):
    """For the repetition penalty: the prompt and what was written, of each row."""
    prompts, options = [[3, 1, 4], [1]], {"repetition_penalty": 3.0}
    whole = generate(model, prompts, 12, **options)
    assert whole != generate(model, prompts, 12)
    tokens = stream(model, prompts, 5, **options)
    first = [list(row) for row in zip(*tokens)]
    for held in (tokens.held, saved_and_loaded(tmp_path / "held", tokens.held, model)):
        assert held.length.tolist() == [8, 6]
        assert [a + b for a, b in zip(first, generate(model, None, 7, state=held, **options))] == whole
    swapped = generate(model, None, 7, state=select(tokens.held, [1, 0]), **options)
    assert swapped == [whole[1][5:], whole[0][5:]]


def saved_and_loaded(file, state, model):
    save_state(file, state, model, text="a note")
    again, notes = load_state(file, model)
    assert notes == {"text": "a note"}
    return again


def test_states_of_unequal_lengths_join(model):
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    states = [model(ids[:, :n], model.init_state(1))[1] for n in (2, 7, 4)]
    logits, _ = model(torch.full((3, 2), 6), join(states))
    for i, n in enumerate((2, 7, 4)):
        alone = model(torch.cat([ids[:, :n], torch.full((1, 2), 6)], dim=1))[0][:, -2:]
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="no state to join"):
        join([])
    with pytest.raises(ValueError, match="states of one model are joined; got "):
        join([states[0].layers[0], states[0].layers[1]])
    with pytest.raises(ValueError, match=r"rows are their numbers, such as \[0, 2\]; got \[True\]"):
        select(states[0], [True])
    assert len(select(states[0], torch.tensor([0, 0])).layers[0][0]) == 2


def test_states_of_others_are_refused(model, tmp_path):
    held = model(torch.tensor([[1, 2]]), model.init_state(1))[1]
    save_state(tmp_path / "state", held, model)
    torch.testing.assert_close(load_state(tmp_path / "state", model)[0], held)
    model.head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="state is the state of other weights than this model's"):
        load_state(tmp_path / "state", model)
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no state; make it again"):
        load_state(tmp_path / "other", model)
    tensors = {"state.layers": torch.ones(1), "last": torch.ones(1, 1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "old", metadata={"longwave_state": "1", "model": "", "notes": "{}"})
    with pytest.raises(
        ValueError, match=r"old has format 1 and this longwave reads 2; make it again with --save-state"
    ):
        load_state(tmp_path / "old", model)
    (tmp_path / "torn").write_bytes((tmp_path / "state").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"torn is not a readable safetensors file"):
        load_state(tmp_path / "torn", model)


def test_held_states_of_other_weights_are_refused(model, tmp_path):
    tokens = stream(model, [[1, 2]], 3)
    list(tokens)
    held, twin = tokens.held, copy.deepcopy(model)
    assert generate(twin, None, 3, state=held) == generate(model, None, 3, state=held)
    twin.head.weight.data[0, 0] += 1
    refused = r"the state is one of other weights than this model's; read the text again with this one"
    with pytest.raises(ValueError, match=refused):
        generate(twin, None, 3, state=held)
    with pytest.raises(ValueError, match=refused):
        save_state(tmp_path / "state", held, twin)


def test_held_needs_rows_that_have_ended(model):
    tokens = stream(model, [[1], [2]], 5)
    with pytest.raises(ValueError, match=r"no token has been drawn yet: take a step of the stream first"):
        _ = tokens.logprobs
    with pytest.raises(ValueError, match=r"a row has not ended yet"):
        _ = tokens.held
    next(tokens)
    with pytest.raises(ValueError, match=r"a row has not ended yet"):
        _ = tokens.held
    tokens.close()
    assert len(tokens.held.last) == 2
    with pytest.raises(ValueError, match=r"with slots the states of rows that have ended are not kept"):
        _ = stream(model, [[1]], 1, slots=1).held


def test_progress_counts_the_prompts_tokens(model, monkeypatch):
    monkeypatch.setattr(generate_module, "PREFILL_CHUNK", 8)
    seen = []
    generate(model, [[1] * 11, [2] * 11, [3] * 3], 1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 25), (16, 25), (22, 25), (25, 25)]


def test_a_filters_end_is_said_before_the_first_token():
    model = LMSpec(vocab=20, d_model=8, pattern=[{"kind": "hyena", "max_len": 10, "width": 8}]).build()
    assert len(generate(model, [[1, 2, 3]], 8)[0]) == 8
    message = r"a text of 3 tokens and max_new = 9 .* the 10 that filters .* serve; take max_new <= 8"
    with pytest.raises(ValueError, match=message):
        stream(model, [[1, 2, 3]], 9)
    tokens = stream(model, [[1, 2, 3]], 4)
    assert len(list(tokens)) == 4
    with pytest.raises(ValueError, match=r"a text of 9 tokens and max_new = 3 .*; take max_new <= 2"):
        stream(model, [[1, 2]], 3, state=tokens.held)
    assert len(generate(model, [[1, 2]], 2, state=tokens.held)[0]) == 2


def test_a_filters_end_is_where_the_model_ends():
    """Not where a part does that is cut off before, or that makes one step of many."""
    low = SashimiSpec(vocab=20, d_model=8, pattern=["s4d"], layers=1, pool=[4]).build()
    low.backbone.levels[1].blocks[0].mixer = mixer("hyena", max_len=3, width=8).build(16)
    assert longest(low) == 15
    assert len(generate(low, [[1, 2, 3]], 13)[0]) == 13
    with pytest.raises(ValueError, match=r"than the 15 that filters .*; take max_new <= 13"):
        generate(low, [[1, 2, 3]], 14)
    short = {"kind": "truncated", "filter": {"kind": "hyena", "max_len": 6, "width": 8}, "support": 5}
    cut = LMSpec(vocab=20, d_model=8, pattern=[{"kind": "conv", "filter": short}]).build()
    assert longest(cut) is None
    assert len(generate(cut, [[1, 2, 3]], 13)[0]) == 13
