"""Generation equals running the whole text again each time, whatever the batch."""

import pytest
import torch
from safetensors.torch import save_file

from longwave.mixers import join, select
from longwave.models import LMSpec, Sampling, generate, load_state, save_state, stream
from longwave.models import generate as generate_function

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
    (tmp_path / "torn").write_bytes((tmp_path / "state").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"torn is not a readable safetensors file"):
        load_state(tmp_path / "torn", model)


def test_held_needs_rows_that_have_ended(model):
    tokens = stream(model, [[1], [2]], 5)
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
    message = r"prompt of 3 tokens and max_new = 9 .* filters of max_len = 10 can serve; take max_new <= 8"
    with pytest.raises(ValueError, match=message):
        stream(model, [[1, 2, 3]], 9)
