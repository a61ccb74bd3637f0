"""ListOps and Pathfinder: drawn as the authors' programs draw them, and kept in files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longwave import cli
from longwave.tasks import ListOps, Pathfinder, shards
from longwave.tasks._numba import listops, pathfinder
from longwave.tasks.base import random_stream
from longwave.tasks.lra import CLOSE, LONGEST, MAX, MED, MIN, SHORTEST, SUM, SYMBOLS

OFFICIAL = {path.stem: np.load(path) for path in (Path(__file__).parent / "golden/lra").glob("*.npz")}


def parse(symbols):
    """The tree that symbols say, each list as (operator, its arguments); an error where they say none."""
    first, *rest = symbols
    if first < CLOSE:
        return first, rest
    arguments = []
    while rest[0] != CLOSE:
        argument, rest = parse(rest)
        arguments.append(argument)
    return (first, arguments), rest[1:]


def value(tree):
    if not isinstance(tree, tuple):
        return tree
    operator, arguments = tree
    values = [value(argument) for argument in arguments]
    return {MAX: max, MIN: min, SUM: lambda v: sum(v) % 10, MED: lambda v: int(np.median(v))}[operator](values)


def depth(tree):
    return 1 + (max(map(depth, tree[1])) if isinstance(tree, tuple) else 0)


def lists(tree):
    if isinstance(tree, tuple):
        yield tree
        for argument in tree[1]:
            yield from lists(argument)


def drawn_lists(count):
    symbols = np.zeros(LONGEST, np.uint8)
    for number in range(count):
        length, answer = listops.draw(random_stream(1, 0, number), symbols)
        yield symbols[:length].tolist(), answer


def test_official_lists_come_to_what_they_say():
    sample = OFFICIAL["listops_official_20"]
    number = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    for source, target, length in zip(sample["source"], sample["target"], sample["length"]):
        symbols = [number["X" if word == "]" else word] for word in source.split() if word not in "()"]
        tree, rest = parse(symbols)
        assert (len(symbols), value(tree), rest) == (length, target, [])


def test_lists_are_drawn_by_the_rules():
    for symbols, answer in drawn_lists(300):
        tree, rest = parse(symbols)
        assert not rest
        assert value(tree) == answer
        assert depth(tree) <= 10
        assert SHORTEST <= len(symbols) <= LONGEST
        assert all(2 <= len(arguments) <= 10 for _, arguments in lists(tree))


def naive_length(random, level=1):
    """Symbols of a tree, by the authors' recursion without its symbols."""
    if level == 10 or random.random() > 0.25:
        return 1
    return 2 + sum(naive_length(random, level + 1) for _ in range(random.integers(2, 11)))


def test_lists_have_the_lengths_operators_and_answers_of_the_authors():
    trees = [(len(symbols), symbols, answer) for symbols, answer in drawn_lists(3000)]
    lengths = np.sort([length for length, _, _ in trees])
    random, naive = np.random.default_rng(0), []
    while len(naive) < 600:
        length = naive_length(random)
        naive += [length] if SHORTEST <= length <= LONGEST else []
    apart = np.abs(np.searchsorted(lengths, naive) / 3000 - np.argsort(np.argsort(naive)) / 600).max()
    assert apart < 1.63 * np.sqrt(1 / 3000 + 1 / 600)  # Kolmogorov and Smirnov at 1 %
    answers = np.bincount([answer for _, _, answer in trees], minlength=10) / 3000
    published = [0.171, 0.091, 0.077, 0.078, 0.090, 0.088, 0.077, 0.076, 0.077, 0.173]  # of 3,000 official ones
    assert np.abs(answers - published).max() < 4 * np.sqrt(2 * 0.17 * 0.83 / 3000)
    every = np.bincount(np.concatenate([symbols for _, symbols, _ in trees]), minlength=15)
    assert np.ptp(every[MAX:]) / every[MAX:].mean() < 0.02
    assert np.ptp(every[:10]) / every[:10].mean() < 0.02


def pictures(size, paddles, count):
    return [pathfinder.draw(random_stream(2, 0, number), size, paddles) for number in range(count)]


@pytest.mark.parametrize(
    ("sample", "size", "paddles"),
    [("pathfinder32_cl14_official200", 32, 14), ("pathfinder128_cl6_official100", 128, 6)],
)
def test_pictures_have_the_ink_of_the_authors(sample, size, paddles):
    theirs = OFFICIAL[sample]["images"]
    ours = np.stack([one.image for one in pictures(size, paddles, 300 if size == 32 else 100)])
    assert ours.shape[1:] == theirs.shape[1:]
    for measure in (np.mean, lambda x, axis: (x > 64).mean(axis), lambda x, axis: (x > 200).mean(axis)):
        a, b = measure(ours, axis=(1, 2)), measure(theirs, axis=(1, 2))
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert 0.6 < a.std() / b.std() < 1.6
    rings = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) // (size / 8)
    for ring in range(4):  # as far from the middle
        a, b = (x[:, rings == ring].mean(axis=1) for x in (ours, theirs))
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / len(a) + b.var() / len(b))


@pytest.mark.parametrize(
    ("size", "paddles", "starts", "placed"),
    [(32, 6, 27, 3.1), (32, 14, 397, 1.2), (128, 6, 1.7, 17.0), (128, 14, 287, 7.5)],
)
def test_snakes_find_place_as_often_as_the_authors(size, paddles, starts, placed):
    """The starts it took and the distractors that found place, as their program counted them."""
    many = pictures(size, paddles, 150 if size == 32 else 30)
    assert 0.6 < np.mean([one.starts for one in many]) / starts < 1.5
    assert abs(np.mean([one.placed for one in many]) - placed) < 0.5
    assert 0.25 < np.mean([one.connected for one in many]) < 0.75


def spots(on):
    """The pixels of each 8-connected spot."""
    left = set(map(tuple, np.argwhere(on)))
    while left:
        spot, todo = [], [left.pop()]
        while todo:
            y, x = todo.pop()
            spot.append((y, x))
            near = {(v, w) for v in (y - 1, y, y + 1) for w in (x - 1, x, x + 1)} & left
            left -= near
            todo += near
        yield np.array(spot, float)


def traced(image):
    """Whether the discs of a picture of 128 x 128 are connected, by following dashes straight on."""
    around = np.argwhere(np.hypot(*np.mgrid[-2:3, -2:3]) <= 2) - 2
    bright = np.pad(image >= 235, 2)
    full = np.all([bright[2 + y : 130 + y, 2 + x : 130 + x] for y, x in around], axis=0)
    discs = [spot.mean(0) for spot in spots(full)]
    on = image > 90
    for disc in discs:
        on &= np.hypot(*(np.mgrid[:128, :128] - disc[:, None, None])) > 3.5
    ends, owner, out = [], [], []
    for number, spot in enumerate(spot for spot in spots(on) if len(spot) > 2):
        middle = spot.mean(0)
        along = np.linalg.svd(spot - middle)[2][0]
        reach = (spot - middle) @ along
        for sign, far in ((1, reach.max()), (-1, reach.min())):
            ends, owner, out = [*ends, middle + far * along], [*owner, number], [*out, sign * along]
    ends, owner, out = np.array(ends), np.array(owner), np.array(out)
    gap = ends[None] - ends[:, None]
    far = np.maximum(np.hypot(gap[..., 0], gap[..., 1]), 1e-9)
    ahead = np.einsum("ijk,ik->ij", gap, out) / far
    facing = np.minimum(ahead, ahead.T)
    cost = np.where((owner[:, None] == owner) | (far > 11) | (facing < 0.55), np.inf, far * (5 - 2 * (ahead + ahead.T)))
    snake, taken = list(range(len(ends))), set()
    for i, j in sorted(np.argwhere(np.isfinite(cost)).tolist(), key=lambda ij: cost[tuple(ij)]):
        if not {i, j} & taken:
            taken |= {i, j}
            old, new = snake[owner[i]], snake[owner[j]]
            snake = [new if one == old else one for one in snake]
    found = []
    for disc in discs:
        away = np.maximum(np.hypot(*(disc - ends).T), 1e-9)
        towards = ((disc - ends) * out).sum(1) / away
        found.append(snake[owner[np.argmin(away * (5 - 4 * towards) + 6 * np.isin(np.arange(len(ends)), [*taken]))]])
    return len(discs) == 2 and found[0] == found[1]


def test_labels_are_what_another_algorithm_sees():
    """It is right in some six of seven pictures of the authors, and of ours."""
    sample = OFFICIAL["pathfinder128_cl6_official100"]
    theirs = np.mean([traced(image) == bool(label) for image, label in zip(sample["images"], sample["labels"])])
    ours = np.mean([traced(one.image) == one.connected for one in pictures(128, 6, 100)])
    assert theirs > 0.8
    assert ours > 0.8


def test_discs_lie_on_the_tips_that_the_label_says():
    for one in pictures(64, 6, 20):
        ends = {tuple(tip) for tip in one.tips.reshape(4, 2).tolist()}
        lit = [tip for tip in ends if one.image[tip] > 200]
        (a, b), snakes = lit, [{tuple(tip) for tip in pair.reshape(2, 2).tolist()} for pair in one.tips]
        assert any({a, b} == snake for snake in snakes) == one.connected


def put(task, folder, count=25, jobs=2):
    task.write(folder, {"train": count, "validation": 8}, jobs)
    return type(task)(**{**task.model_dump(), "folder": str(folder), "eval_examples": 8, "train_examples": count})


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 10)


@pytest.mark.parametrize("task", [ListOps(), Pathfinder(paddles=6)], ids=lambda task: task.kind)
def test_what_is_read_is_what_is_drawn(task, tmp_path, short):
    read = put(task, tmp_path / "out")
    read.prepare()
    drawn = type(task)(**{**task.model_dump(), "eval_examples": 8, "train_examples": 25})
    for batch in ("train_batch(5, 3, 2)", "eval_batch(8, 0)"):
        a, b = (eval(f"task.{batch}", {"task": one}) for one in (read, drawn))
        assert a.inputs.equal(b.inputs)
        assert a.targets.equal(b.targets)
    assert len(list((tmp_path / "out").iterdir())) == 5  # three of training, one of validation, one that says so


def test_writing_goes_on_where_it_was_killed(tmp_path, short):
    task, seen = ListOps(), []

    def stopped(split, number):
        if number == 13:
            raise KeyboardInterrupt
        return task.example(split, number)

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "out", task.about(), {"train": 25}, stopped)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "train-000000.safetensors"]

    def counted(split, number):
        seen.append(number)
        return task.example(split, number)

    shards.write(tmp_path / "out", task.about(), {"train": 25}, counted)
    assert seen == list(range(10, 25))
    whole = [(tmp_path / "out" / name).read_bytes() for name in sorted(p.name for p in (tmp_path / "out").iterdir())]
    shards.write(tmp_path / "at once", task.about(), {"train": 25}, task.example, jobs=3)
    assert whole == [path.read_bytes() for path in sorted((tmp_path / "at once").iterdir())]


def test_a_shard_that_changed_is_refused_and_mended(tmp_path, short):
    task = put(ListOps(), tmp_path / "out")
    file = tmp_path / "out/train-000001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train-000001.safetensors has changed since it was written"):
        task.prepare()
    file.write_bytes(raw[:-100])
    with pytest.raises(ValueError, match=r"train-000001.safetensors is missing or cut short"):
        task.prepare()
    put(ListOps(), tmp_path / "out").prepare()


def test_folders_of_others_are_refused(tmp_path, short):
    task = put(Pathfinder(paddles=6), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds other examples: .*'paddles': 6.*, not .*'paddles': 9"):
        put(Pathfinder(paddles=9), tmp_path / "out")
    with pytest.raises(ValueError, match="holds other examples"):
        Pathfinder(paddles=9, folder=str(tmp_path / "out")).prepare()
    with pytest.raises(ValueError, match="has 8 examples of the validation set and the task asks for 9"):
        task.model_copy(update={"eval_examples": 9}).prepare()
    with pytest.raises(ValueError, match="was not made by longwave data"):
        ListOps(folder=str(tmp_path)).prepare()
    with pytest.raises(ValueError, match="is not empty"):
        put(ListOps(), tmp_path)
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "longwave_shards": 9}))
    with pytest.raises(ValueError, match="has format 9 and this longwave reads 1"):
        task.prepare()


def test_examples_to_look_at_lie_beside_the_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["longwave", "data", "pathfinder", "--count", "30", "--out", str(tmp_path / "out")]
    )
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    with Image.open(tmp_path / "out/sample.png") as picture:
        assert picture.width == 1000
    assert not list(tmp_path.glob("out/*half*"))
