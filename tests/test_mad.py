"""The tasks of MAD and Zoology: every row obeys their authors' rules, and is distributed as theirs."""

from itertools import groupby

import numpy as np
import pytest

from longwave.tasks import (
    IGNORE,
    TASKS,
    Compression,
    Copying,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    MultiQueryRecall,
    SpreadCopying,
)


def rows(task, count, train):
    made = (task.train_row(5, n) for n in range(count)) if train else (task.eval_row(n) for n in range(count))
    return [(row.inputs.tolist(), row.targets.tolist()) for row in made]


def both(task, count):
    """So many rows of training and of evaluation, and which they are."""
    return [(row, train) for train in (True, False) for row in rows(task, count, train)]


def as_expected(counts, shares):
    """Whether counts are within 5 standard deviations of what shares of their sum say."""
    expected = sum(counts) * np.asarray(shares) / np.sum(shares)
    return (np.abs(np.asarray(counts) - expected) < 5 * np.sqrt(expected) + 1e-9).all()


@pytest.mark.parametrize("others", [False, True])
def test_multi_query_recall(others):
    task = MultiQueryRecall(vocab_size=40, length=40, pairs=[2, 5], random_others=others, eval_examples=300)
    sizes = []
    for inputs, targets in rows(task, 300, False):
        asked = [i for i, target in enumerate(targets) if target != IGNORE]
        pairs = len(asked)
        sizes.append(pairs)
        value_of = dict(zip(inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(1 <= key < 20 <= value < 40 for key, value in value_of.items())
        assert {inputs[i]: targets[i] for i in asked} == value_of
        assert all(i >= 2 * pairs and i % 2 == 0 for i in asked)
        if not others:
            assert sum(token != 0 for token in inputs) == 3 * pairs
    assert as_expected([sizes.count(2), sizes.count(5)], [1, 1])


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_distances_of_multi_query_recall_follow_their_power(power):
    task = MultiQueryRecall(length=22, pairs=[1], vocab_size=8, power=power)
    places = [next(i for i, t in enumerate(targets) if t != IGNORE) // 2 - 1 for _, targets in rows(task, 3000, True)]
    assert as_expected(np.bincount(places, minlength=10), np.arange(1, 11) ** (power - 1.0))


@pytest.mark.parametrize("options", [{}, {"vocab_size": 32, "noise_vocab_size": 16, "noise": 0.2, "length": 64}])
def test_in_context_recall(options):
    task = InContextRecall(**options)
    n, noises, lasts = task.vocab_size - task.noise_vocab_size, 0, []
    for (inputs, targets), train in both(task, 300):
        whole = [*inputs, targets[-1]]
        assert len(whole) == task.length
        if train:
            assert targets == whole[1:]
            continue
        value_of, scored = {}, []
        for key, value in zip(whole[::2], whole[1::2]):
            if key >= n:
                noises += 1
                assert n <= key < task.vocab_size
                assert n <= value < task.vocab_size
                scored += [IGNORE, IGNORE]
                continue
            assert key < n // 2 <= value < n
            scored += [value if key in value_of else IGNORE, IGNORE]
            assert value_of.setdefault(key, value) == value
        assert targets == scored[: len(targets)]
        assert targets[-1] != IGNORE
        before = [key for key in whole[:-2:2] if key < n]
        lasts.append(sorted(set(before)).index(whole[-2]) / len(set(before)))
    assert noises / (300 * task.length / 2) == pytest.approx(task.noise, abs=0.03)
    assert np.mean(lasts) == pytest.approx(0.5 - 0.5 / len(set(before)), abs=0.06)


@pytest.mark.parametrize("options", [{}, {"vocab_size": 9, "length": 40, "key_size": 2, "value_size": 2}])
def test_fuzzy_recall(options):
    task = FuzzyRecall(**options)
    half, found, sizes = (task.vocab_size - 1) // 2, 0, []
    for (inputs, targets), train in both(task, 200):
        whole = [*inputs, targets[-1]]
        assert len(inputs) == task.length
        tokens = [token for token in whole if token != task.vocab_size - 1]
        assert whole[: len(whole) - len(tokens)] == [task.vocab_size - 1] * (len(whole) - len(tokens))
        parts = [tuple(part) for _, part in groupby(tokens, lambda token: token < half)]
        assert len(parts) % 2 == 0
        value_of, scored = {}, [IGNORE] * (len(whole) - len(tokens))
        for number, (key, value) in enumerate(zip(parts[::2], parts[1::2])):
            assert max(key) < half <= min(value)
            assert len(set(key)) == len(key) <= task.key_size
            assert len(set(value)) == len(value) <= task.value_size
            assert train or len(key) == task.key_size
            known, last = key in value_of, 2 * number + 2 == len(parts)
            scored += [IGNORE] * len(key) + (list(value) if known or last else [IGNORE] * len(value))
            assert value_of.setdefault(key, value) == value
            found += known and last
            sizes += [len(key)] if train else []
        assert targets == (whole[1:] if train else scored[1:])
    assert found > 300  # of 400; the others are the authors', too
    assert as_expected(np.bincount(sizes)[1:], [1] * task.key_size)


@pytest.mark.parametrize("options", [{}, {"vocab_size": 48, "noise_vocab_size": 16, "noise": 0.3}])
def test_memorization(options):
    task = Memorization(**options)
    n, value_of, noises, keys = task.vocab_size - 1 - task.noise_vocab_size, {}, 0, []
    for inputs, targets in [*rows(task, 300, True), *rows(task, 300, False)]:
        for key, mark, nothing, value in zip(inputs[::2], inputs[1::2], targets[::2], targets[1::2]):
            assert nothing == IGNORE
            if mark != task.vocab_size - 1:
                noises += 1
                assert n <= min(key, mark) <= max(key, mark) < task.vocab_size - 1
                assert value == IGNORE
                continue
            keys.append(key)
            assert key < n // 2 <= value < n
            assert value_of.setdefault(key, value) == value
    assert len(set(value_of.values())) == len(value_of) == n // 2
    assert noises / (600 * task.length / 2) == pytest.approx(task.noise * (1 - 2 / task.length), abs=0.02)
    assert as_expected(np.bincount(keys), [1] * (n // 2))
    assert (
        Memorization(map_seed=1).eval_row(0).targets.tolist() != Memorization(map_seed=2).eval_row(0).targets.tolist()
    )


@pytest.mark.parametrize("kind", [Copying, SpreadCopying])
def test_copying(kind):
    task, before = kind(length=30, copy_length=4, vocab_size=7), np.zeros(4)
    for inputs, targets in rows(task, 500, True):
        places = [i for i, token in enumerate(inputs) if token < 5]
        assert len(inputs) == 30
        assert inputs[25:] == [6, 5, 5, 5, 5]
        assert targets == [IGNORE] * 26 + [inputs[i] for i in places]
        before += np.diff([-1, *places]) - 1
        if kind is SpreadCopying:
            assert places[-1] == 24
    assert as_expected(before, [1] * 4) if kind is SpreadCopying else not before.any()


def test_compression():
    task, counts = Compression(vocab_size=7, length=12), np.zeros((11, 6))
    for (inputs, targets), _ in both(task, 500):
        assert inputs == targets
        assert len(inputs) == 12
        assert inputs[-1] == 6
        counts[np.arange(11), inputs[:-1]] += 1
    assert as_expected(counts.ravel(), np.ones(66))


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            "multi_query_recall",
            {"vocab_size": 8, "pairs": [2, 4]},
            "vocab_size 8 has 3 keys, and pairs asks for 4; .* 10",
        ),
        ("multi_query_recall", {"length": 20}, "length 20 is too short .* set it to 32 or more"),
        ("multi_query_recall", {"pairs": []}, "pairs: .* at least 1"),
        ("in_context_recall", {"length": 9}, "length 9 is odd, and sequences are of pairs; set it to 10"),
        ("in_context_recall", {"noise": 0.1}, "noise 0.1 needs token ids: set noise_vocab_size to 1 or more"),
        ("in_context_recall", {"noise_vocab_size": 15}, "leaves no key and value; set it to 17 or more"),
        ("fuzzy_recall", {"vocab_size": 6}, "vocab_size 6 has 2 tokens for keys, too few for motifs of 3; set it to 7"),
        ("copying", {"length": 33}, "length 33 is too short .* set it to 34 or more"),
    ],
)
def test_bad_options_are_told(kind, options, says):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        TASKS[kind](**options)
