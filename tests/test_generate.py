"""Generation equals running the whole text again each time, whatever the batch."""

import math

import pytest
import torch

from longwave.models import LMSpec, generate, stream
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
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20_000, 4)
    g = torch.Generator().manual_seed(0)
    share = lambda k, p: torch.bincount(generate_module._draw(logits, 1.0, k, p, g), minlength=4) / 20_000  # noqa: E731
    near = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), rtol=0, atol=0.02)  # noqa: E731
    near(share(None, 1.0), [0.5, 0.25, 0.15, 0.1])
    near(share(2, 1.0), [2 / 3, 1 / 3, 0, 0])
    near(share(None, 0.7), [2 / 3, 1 / 3, 0, 0])
    near(share(None, 0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])


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


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 20]], {}, r"prompt 0 has token id 20; the model knows 0..19"),
        ([[1]], {"temperature": -1.0}, "temperature must be >= 0.*got -1.0"),
        ([[1]], {"top_k": 0}, r"top_k must lie in 1..20; got 0"),
        ([[1]], {"top_p": 1.5}, r"top_p must lie in \(0, 1\]; got 1.5"),
        ([[1]], {"temperature": math.nan}, r"temperature must be >= 0 .*; got nan"),
        ([[1]], {"stop": [[1, 2]]}, r"stop takes single token ids in 0\.\.\d+, such as \[10\]; got \[1, 2\]"),
        ([[1]], {"stop": ["ab"]}, r"stop takes single token ids .*; got 'ab'"),
        ([[1]], {"stop": [1000]}, r"stop takes single token ids .*; got 1000"),
    ],
)
def test_bad_input_is_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_function(model, prompts, 3, **options)
