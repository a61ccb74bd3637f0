"""Tasks: the authors' sequences, batches that depend on their number alone, every held-out byte scored once."""

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from longwave.contract.tasks import CONTRACT
from longwave.tasks import (
    IGNORE,
    TASKS,
    AssociativeRecall,
    Corpus,
    Errors,
    InductionHeads,
    MaskedText,
    Score,
    SelectiveCopying,
    Task,
    Text,
)
from longwave.tasks import text as text_module
from longwave.tasks.base import random_stream

OFFICIAL = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "golden/data").glob("icl_*")}

SYNTHETIC = [
    AssociativeRecall(),
    AssociativeRecall(vocab_size=11, length=41, keys_per_query=2, allow_dot=True),
    AssociativeRecall(vocab_size=4, length=7, keys_per_query=3, mask_train=True),
    AssociativeRecall(length=21, eval_length=64, train_examples=50, eval_examples=33),
    InductionHeads(),
    InductionHeads(vocab_size=16, length=256, eval_length=1024),
    InductionHeads(vocab_size=12, length=25, triggers=3, copy_length=2, mask_train=True),
    InductionHeads(length=3, vocab_size=3, eval_examples=5),
    SelectiveCopying(length=64),
    SelectiveCopying(length=5, copy_length=5, vocab_size=3, eval_length=9, train_examples=3),
]


def names(task):
    options = task.model_dump(exclude_defaults=True)
    return "-".join([task.kind, *(f"{name}{value}" for name, value in options.items())])


def official_task(sample):
    config = sample["config"]
    shared = {"vocab_size": config["vocab_size"], "length": config["input_seq_len"]}
    if config["copy_method"] == "assoc_recall":
        return AssociativeRecall(**shared)
    optional = {"induction_num_triggers": "triggers", "induction_len": "copy_length"}
    return InductionHeads(**shared, **{ours: config[theirs] for theirs, ours in optional.items() if theirs in config})


def legal_recall(task, length, sequence):
    """Whether a sequence is pairs of keys and values, the prefix, a key and its value."""
    width, last_key, prefix = task.keys_per_query, (task.vocab_size - 2) // 2, task.vocab_size - 1
    body, query = sequence[: -width - 2], sequence[-width - 2 :]
    pairs = [(tuple(body[i : i + width]), body[i + width]) for i in range(0, len(body), width + 1)]
    value_of = dict(pairs)
    key, answer = tuple(query[1:-1]), query[-1]
    return (
        len(pairs) == length // (width + 1)
        and all(1 <= token <= last_key for key, _ in pairs for token in key)
        and all(last_key < value < prefix and value_of[key] == value for key, value in pairs)
        and query[0] == prefix
        and (answer == value_of[key] if key in value_of else task.allow_dot and answer == 0)
    )


def legal_induction(task, length, sequence):
    """Whether the special token occurs, and the same tokens come after it every time."""
    special, copied = task.vocab_size - 1, task.copy_length
    body, answer = sequence[:length], sequence[length + 1 :]
    places = [i for i, token in enumerate(body) if token == special]
    return (
        1 <= len(places) <= task.triggers
        and places[-1] <= length - 2 - copied
        and all(later - place > copied for place, later in pairwise(places))
        and all(body[place + 1 : place + 1 + copied] == answer for place in places)
        and sequence[length] == special
        and len(answer) == copied
        and all(1 <= token <= special for token in sequence)
    )


def legal(task, length, inputs, targets, answers_only):
    """Whether one row of a batch is a sequence of the task with the targets it should have."""
    inputs, targets = list(inputs), list(targets)
    if isinstance(task, SelectiveCopying):
        data = [token for token in inputs[:length] if token != 0]
        marker = task.vocab_size - 1
        return (
            all(0 < token < marker for token in data)
            and len(data) == task.copy_length
            and inputs[length:] == [marker] * task.copy_length
            and targets == [IGNORE] * length + data
        )
    sequence = [*inputs, targets[-1]]
    recall = isinstance(task, AssociativeRecall)
    answers = 1 if recall else task.copy_length
    if answers_only:
        shown = targets == [IGNORE] * (len(inputs) - answers) + sequence[-answers:]
    else:
        shown = targets == sequence[1:]
    return shown and (legal_recall if recall else legal_induction)(task, length, sequence)


def rows_of(batch):
    return zip(batch.inputs.tolist(), batch.targets.tolist())


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def evaluation(task, size):
    return [task.eval_batch(size, index) for index in range(task.eval_batches(size))]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sequences_are_legal_and_wrong_ones_are_not(name):
    sample = OFFICIAL[name]
    task = official_task(sample)
    assert {token: i for i, token in enumerate(task.tokens())} == sample["v2id"]
    assert task.inputs.vocab == sample["vocab_len"]
    for part, answers_only in (("train", False), ("test", True)):
        assert len(sample[f"{part}_inputs"]) == 12
        for inputs, targets in zip(sample[f"{part}_inputs"], sample[f"{part}_labels"]):
            assert legal(task, task.length, inputs, targets, answers_only)
            wrong = targets[-1] % (task.vocab_size - 2) + 1
            assert not legal(task, task.length, inputs, [*targets[:-1], wrong], answers_only)
            assert not legal(task, task.length, inputs, targets, not answers_only)
    ours = task.eval_batch(12, 0)
    assert ours.inputs.shape == torch.tensor(sample["test_inputs"]).shape
    assert torch.equal(ours.targets == IGNORE, torch.tensor(sample["test_labels"]) == IGNORE)
    assert not (task.train_batch(12, 0, 0).targets == IGNORE).any()


@pytest.mark.parametrize("task", SYNTHETIC, ids=names)
def test_our_sequences_are_legal(task):
    train = task.train_batch(64, 1, 2)
    assert train.inputs.dtype == train.targets.dtype == torch.int64
    assert train.inputs.max() < task.inputs.vocab
    assert all(legal(task, task.length, *row, getattr(task, "mask_train", False)) for row in rows_of(train))
    batches = evaluation(task, 7)
    assert sum(len(batch.inputs) for batch in batches) == task.eval_examples
    for batch in batches:
        assert all(legal(task, task.eval_length or task.length, *row, True) for row in rows_of(batch))


@pytest.mark.parametrize(
    ("task", "length"),
    [
        (AssociativeRecall(vocab_size=8, length=6), 6),
        (InductionHeads(vocab_size=8, length=6), 6),
        (SelectiveCopying(vocab_size=6, length=8, copy_length=3), 8),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_example_in_the_docstring_is_legal(task, length):
    lines = [line.split() for line in type(task).__doc__.splitlines()]
    inputs, targets = (
        [IGNORE if token == "-" else int(token) for token in next(line for line in lines if line[:1] == [name])[1:]]
        for name in ("inputs", "targets")
    )
    assert legal(task, length, inputs, targets, answers_only=False)


def close_to_uniform(counts):
    """Whether counts are within 5 standard deviations of equal."""
    expected = counts.sum() / len(counts)
    return (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_induction_trigger_is_anywhere_and_so_is_every_token():
    task = InductionHeads(length=20)
    inputs = task.train_batch(20_000, 0, 0).inputs
    places = (inputs[:, :20] == 19).int().argmax(dim=1)
    assert close_to_uniform(torch.bincount(places, minlength=18))
    assert len(torch.bincount(places)) == 18  # the last place is length - 2 - copy_length
    assert close_to_uniform(torch.bincount(inputs[:, 19], minlength=19)[1:])


def test_half_of_the_sequences_have_several_triggers():
    inputs = InductionHeads(length=5000, triggers=3).train_batch(400, 0, 0).inputs
    triggers = (inputs[:, :-1] == 19).sum(dim=1)
    assert 150 < (triggers == 1).sum() < 250
    assert 150 < (triggers == 3).sum() < 250


def test_recall_asks_every_key_that_occurs_as_often_however_rare_it_is():
    inputs = AssociativeRecall(vocab_size=6, length=12).train_batch(20_000, 0, 0).inputs
    rare = inputs[((inputs[:, :12:2] == 1).sum(dim=1)) == 1]  # key 1 once, key 2 five times
    assert close_to_uniform(torch.bincount(rare[:, -1], minlength=3)[1:])
    assert set(inputs[:, :12:2].flatten().tolist()) == {1, 2}
    assert set(inputs[:, 1:12:2].flatten().tolist()) == {3, 4}


def test_recall_of_absent_keys_needs_allow_dot():
    options = {"vocab_size": 20, "length": 8}
    assert (AssociativeRecall(**options).train_batch(500, 0, 0).targets[:, -1] != 0).all()
    absent = (AssociativeRecall(**options, allow_dot=True).train_batch(5000, 0, 0).targets[:, -1] == 0).double().mean()
    assert absent.item() == pytest.approx((8 / 9) ** 4, abs=0.03)


def test_selective_copying_puts_data_anywhere():
    task = SelectiveCopying(length=40, copy_length=4)
    batch = task.train_batch(20_000, 0, 0)
    assert close_to_uniform((batch.inputs[:, :40] != 0).sum(dim=0))
    assert close_to_uniform(torch.bincount(batch.targets[:, 40], minlength=15)[1:])


WHOLE = [task for i, task in enumerate(SYNTHETIC) if i not in (2, 7, 9)]  # those have few sequences
EXAMPLES = [*(cls(**options) for cls in TASKS.values() for options in cls.examples), *WHOLE, Text(length=31, stride=7)]


@pytest.mark.parametrize("task", EXAMPLES, ids=names)
@pytest.mark.parametrize("clause", CONTRACT)
def test_contract(clause, task):
    CONTRACT[clause](task)


@pytest.mark.parametrize("task", [*SYNTHETIC, InductionHeads(length=40, shortest=3, eval_length=20)], ids=names)
def test_no_batch_is_longer_than_it_says(task):
    trained = {task.train_batch(1, 0, index).inputs.shape[1] for index in range(200)}
    assert task.longest == max(*trained, *(batch.inputs.shape[1] for batch in evaluation(task, 100)))


def test_streams_of_random_numbers_share_nothing():
    near = [(s, t, i) for s in (0, 1, 2**32, 2**64 - 1) for t in (0, 1, 2) for i in (0, 1, 2**32, 2**64 - 1)]
    drawn = [tuple(random_stream(*triple).integers(2**63, size=16)) for triple in near]
    assert len({number for numbers in drawn for number in numbers}) == 16 * len(near)


def test_a_fixed_training_set_is_visited_once_an_epoch():
    task = InductionHeads(length=30, train_examples=20)
    rows = [tuple(row) for index in range(20) for row in task.train_batch(7, 0, index).inputs.tolist()]
    epochs = [rows[start : start + 20] for start in range(0, 140, 20)]
    assert all(len(set(epoch)) == 20 and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert not set(rows) & {tuple(row) for row in task.train_batch(20, 8, 0).inputs.tolist()}
    assert not set(rows) & {tuple(row) for batch in evaluation(task, 100) for row in batch.inputs.tolist()}


@pytest.mark.parametrize("kind", ["associative_recall", "induction_heads", "selective_copying"])
def test_long_sequences_are_quick(kind):
    task = TASKS[kind](length=1000, eval_length=2**20, eval_examples=2)
    start = time.perf_counter()
    assert len(task.train_batch(64, 0, 0).inputs) == 64
    batch = task.eval_batch(1, 1)
    assert time.perf_counter() - start < 1.0
    assert batch.inputs.shape[1] > 2**20
    assert 1 <= (batch.targets != IGNORE).sum() <= 16


@pytest.mark.parametrize("vocab_size", [10, 20, 30, 40])
def test_recall_of_the_hyena_paper_is_legal_at_131k(vocab_size):
    task = AssociativeRecall(vocab_size=vocab_size, length=2**17, eval_examples=2)
    task.prepare()
    assert all(legal(task, 2**17, *row, False) for row in rows_of(task.train_batch(2, 0, 0)))
    assert all(legal(task, 2**17, *row, True) for row in rows_of(task.eval_batch(2, 0)))


@pytest.fixture
def files(tmp_path):
    """Writes files of the given contents and returns their names."""

    def write(*contents):
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.bin").write_bytes(content)
        return [str(tmp_path / f"{number}.bin") for number in range(len(contents))]

    return write


def noise(length, seed=0):
    return np.random.default_rng(seed).bytes(length)


@pytest.mark.parametrize(
    ("length", "stride"),
    [(n, stride) for n in (1, 2, 7, 64, 98, 99, 100, 500) for stride in (None, 1, 3, n) if (stride or 1) <= n],
)
def test_every_held_out_byte_is_scored_once_after_what_came_before(files, length, stride):
    content = noise(1000)
    held = list(content[900:])
    task = Text(files=files(content), length=length, stride=stride)
    step = stride or max(1, length // 2)
    scored, windows = [], [row for batch in evaluation(task, 4) for row in rows_of(batch)]
    for number, (inputs, targets) in enumerate(windows):
        new = [target for target in targets if target != IGNORE]
        scored += new
        end = 1 + len(scored)  # of the window's targets in the held-out part; its inputs end one earlier
        assert inputs == held[end - 1 - len(inputs) : end - 1]
        assert targets == [IGNORE] * (len(targets) - len(new)) + new
        assert len(inputs) == min(length, 99)
        assert len(new) == (len(inputs) if number == 0 else step) or (
            number == len(windows) - 1 and 1 <= len(new) < step
        )
    assert scored == held[1:]


def test_training_windows_lie_in_the_training_part_and_reach_all_of_it(files):
    task = Text(files=files(bytes(range(100)), bytes(range(100, 200))), length=9, share=0.25)
    whole = [*range(75), *range(100, 175)]
    batch = task.train_batch(3000, 0, 0)
    starts = {whole.index(start) for start in batch.inputs[:, 0].tolist()}
    assert starts == set(range(141))
    for inputs, targets in rows_of(batch):
        start = whole.index(inputs[0])
        assert (inputs, targets) == (whole[start : start + 9], whole[start + 1 : start + 10])


def held_and_trained(task):
    """The bytes of the two parts."""
    train, held = task.parts
    return bytes(held.read(0, len(held))), bytes(train.read(0, len(train)))


def test_what_is_held_out_is_the_end_of_every_file_or_single_files_or_documents(files):
    names = files(*(bytes([number]) * 20 for number in range(10)), noise(1000))
    held, train = held_and_trained(Text(files=names, length=4, share=0.1))
    assert held == b"".join(bytes([number, number]) for number in range(10)) + noise(1000)[900:]
    assert len(train) == 10 * 18 + 900
    held, train = held_and_trained(Text(files=names, length=4, held_out="files", share=0.2))
    assert len(set(held)) == len(held) // 20 == 2
    assert not set(held) & set(train[: 8 * 20])
    assert held_and_trained(Text(files=names[:2], length=4, held_out="files", share=0.01)) == (b"\1" * 20, b"\0" * 20)
    content = b"".join(b"<%d" % number * 9 + b";" for number in range(20))
    held, train = held_and_trained(
        Text(files=files(content, b"end" * 9), length=4, held_out="documents", separator=";")
    )
    documents = content.split(b";")[:-1]
    assert 1 <= held.count(b";") <= 3
    assert set(held.split(b";")[:-1]) | set(train.split(b";")[:-1]) == set(documents)
    assert sorted(held + train) == sorted(content + b"end" * 9)


def test_corpus_reads_across_files(files):
    contents = [noise(size, size) for size in (1, 5, 3, 40, 2)]
    corpus, whole = Corpus(files(*contents)), b"".join(contents)
    assert len(corpus) == 51
    for start in range(52):
        for stop in range(start, 52):
            assert corpus.read(start, stop).tobytes() == whole[start:stop]


def test_more_files_than_may_be_open_at_once(files):
    contents = [bytes([number % 256, number // 256]) for number in range(400)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
    try:
        assert Corpus(files(*contents)).read(1, 799).tobytes() == b"".join(contents)[1:-1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_large_files_are_not_loaded(tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(3 * 2**30)
        stream.seek(2**31)
        stream.write(b"x")
    task = Text(files=[str(tmp_path / "large")], length=1024)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task.prepare()
    assert task.parts[0].read(2**31 - 1, 2**31 + 2).tolist() == [0, ord("x"), 0]
    assert task.eval_batch(4, task.eval_batches(4) - 1).inputs.shape[1] == 1024
    seconds = []
    for index in range(5):
        start = time.perf_counter()
        assert task.train_batch(16, 0, index).inputs.shape == (16, 1024)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**18  # KiB


def test_a_folder_is_its_files_by_relative_path(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.txt", ".hidden", ".git/config", "a/.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + "\n")
    (tmp_path / "empty").touch()
    task = Text(files=[str(tmp_path), str(tmp_path / "b.txt")], length=4, share=0.4)
    corpus = task.parts[0].source
    assert corpus.read(0, len(corpus)).tobytes() == b"a/c.txt\na/z.txt\nb.txt\nb.txt\n"


def test_prepare_sees_files_that_changed(files):
    task = Text(files=files(noise(50)), length=4)
    task.prepare()
    files(noise(80))
    task.prepare()
    assert sum(map(len, task.parts)) == 80


def test_a_task_that_was_used_is_still_only_its_options():
    task = Text(length=16)
    task.prepare()
    assert Text(**task.model_dump()) == task
    assert task.model_dump(exclude_defaults=True) == {"kind": "text", "length": 16}
    assert len(pickle.dumps(task)) < 1000
    assert task.model_copy(update={"files": [__file__]}).parts[0].source.paths == [Path(__file__)]


@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("xz")), reason="gzip or xz is not installed")
def test_baselines_are_those_of_the_commands(tmp_path):
    task = Text(share=0.05)
    corpus, train = task.parts[0].source, len(task.parts[0])
    total = len(corpus)
    sizes = {}
    for name, span in {"held": (train, total), "all": (0, total), "train": (0, train)}.items():
        (tmp_path / name).write_bytes(corpus.read(*span).tobytes())
        for command in ("gzip", "xz"):
            done = subprocess.run([command, "-9", "-c", str(tmp_path / name)], capture_output=True, check=True)
            sizes[command, name] = len(done.stdout)
    bits = task.baselines()
    for command in ("gzip", "xz"):
        alone, added = sizes[command, "held"], sizes[command, "all"] - sizes[command, "train"]
        assert bits.pop(f"{command} -9") * (total - train) / 8 == pytest.approx(alone, abs=20)
        assert bits.pop(f"{command} -9 given the training text") * (total - train) / 8 == pytest.approx(added, abs=20)
    assert not bits


def test_baselines_of_a_large_corpus_use_the_end_of_the_training_text(files, monkeypatch):
    monkeypatch.setattr(text_module, "_HISTORY", 500)
    monkeypatch.setattr(text_module, "_CHUNK", 64)
    content = noise(500) + noise(500, 1) + noise(500)[:111]
    task = Text(files=files(content), length=4)
    assert len(task.parts[0]) == 1000

    def size(part):
        return len(zlib.compress(part, 9, wbits=31))

    added = task.baselines()["gzip -9 given the training text"] * 111 / 8
    assert added == size(content[500:]) - size(content[500:1000])
    assert added != size(content) - size(content[:1000])


def test_metrics():
    assert Text().metrics(Score(math.log(2) * 30, 4, 10)) == {
        "loss": pytest.approx(3 * math.log(2)),
        "accuracy": 0.4,
        "bits_per_byte": pytest.approx(3),
    }
    assert InductionHeads().metrics(Score(5.0, 5, 10)) == {"loss": 0.5, "accuracy": 0.5}
    assert InductionHeads().metrics(Errors(5.0, 6.0, 10)) == {"loss": 0.5, "mse": 0.5, "mae": 0.6}


def test_masked_text_hides_some_bytes_and_asks_for_what_stood_there():
    task, text = MaskedText(length=100), Text(length=100)
    batch, whole = task.train_batch(2000, 0, 0), text.train_batch(2000, 0, 0).inputs
    asked = batch.targets != IGNORE
    assert (asked.sum(dim=1) == 15).all()
    assert torch.equal(batch.targets[asked], whole[asked])
    assert torch.equal(batch.inputs[~asked], whole[~asked])
    shown, stood = batch.inputs[asked], whole[asked]
    assert (shown == 256).double().mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == stood).double().mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    assert close_to_uniform(asked.sum(dim=0))
    assert len(torch.unique(shown)) == 257
    assert not torch.equal(task.train_batch(2000, 0, 1).targets != IGNORE, asked)
    assert (MaskedText(length=2).train_batch(9, 0, 0).targets != IGNORE).sum(dim=1).tolist() == [1] * 9


def test_masked_text_is_evaluated_on_the_held_out_part(files):
    content = noise(1000)
    task = MaskedText(files=files(content), length=30)
    batch = task.eval_batch(1000, 0)
    original = torch.where(batch.targets == IGNORE, batch.inputs, batch.targets)
    starts = [900, 930, 960, 969]
    assert original.tolist() == [list(content[start : start + 30]) for start in starts]


def test_table_has_every_task_and_only_whole_ones():
    assert {"text": Text, "masked_text": MaskedText, "selective_copying": SelectiveCopying}.items() <= TASKS.items()
    assert all(cls.name == kind and issubclass(cls, Task) for kind, cls in TASKS.items())
    with pytest.raises(TypeError, match="abstract"):
        Task()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("text", {"length": 0}, ["length", "0", "greater than or equal to 1"]),
        ("text", {"share": 1.0}, ["share", "1.0", "less than 1"]),
        ("text", {"share": 0}, ["share", "0", "greater than 0"]),
        ("text", {"share": float("nan")}, ["share", "nan", "finite number"]),
        ("text", {"held_out": 0.1}, ["held_out", "0.1", "'tail', 'files' or 'documents'"]),
        ("text", {"files": []}, ["files", "at least 1"]),
        ("text", {"stride": 0}, ["stride", "0", "greater than or equal to 1"]),
        ("text", {"length": 8, "stride": 9}, ["stride 9", "length 8", "set stride to 8 or less"]),
        ("text", {"lenght": 8}, ["lenght", "did you mean 'length'"]),
        ("masked_text", {"hidden": 0.0}, ["hidden", "0.0", "greater than 0"]),
        ("associative_recall", {"vocab_size": 3}, ["vocab_size", "3", "greater than or equal to 4"]),
        ("associative_recall", {"length": 1}, ["length 1 is too short", "set it to 2 or more"]),
        ("associative_recall", {"length": 9, "eval_length": 2, "keys_per_query": 2}, ["eval_length 2", "set it to 3"]),
        ("associative_recall", {"vocab_size": 100, "keys_per_query": 9}, ["49 key tokens", "65536", "lower"]),
        ("induction_heads", {"vocab_size": 2}, ["vocab_size", "2", "greater than or equal to 3"]),
        ("induction_heads", {"length": 11, "copy_length": 10}, ["length 11 is too short", "set it to 12 or more"]),
        ("induction_heads", {"triggers": 0}, ["triggers", "0", "greater than or equal to 1"]),
        ("selective_copying", {"length": 15}, ["length 15 is too short", "set it to 16 or more"]),
        ("selective_copying", {"eval_length": 7, "copy_length": 8}, ["eval_length 7", "set it to 8 or more"]),
        ("selective_copying", {"vocab_size": 2}, ["vocab_size", "2", "greater than or equal to 3"]),
        ("selective_copying", {"train_examples": 0}, ["train_examples", "0", "greater than or equal to 1"]),
    ],
)
def test_bad_options_are_refused(kind, options, says):
    with pytest.raises(ValueError) as refusal:
        TASKS[kind](**options)
    assert all(part in str(refusal.value) for part in says), refusal.value


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        (11, {"length": 10}, ["training part has 10 of 11 bytes", "length 10 needs 11", "more files", "lower"]),
        (19, {"length": 4}, ["held-out part has 1 of 19 bytes", "at least 2", "more files", "share above 0.1"]),
    ],
)
def test_a_corpus_too_short_is_refused_on_any_use(files, size, options, says):
    task = Text(files=files(noise(size)), **options)
    for use in (task.prepare, lambda: task.train_batch(1, 0, 0), lambda: task.eval_batches(1), task.baselines):
        with pytest.raises(ValueError) as refusal:
            use()
        assert all(part in str(refusal.value) for part in says), refusal.value


@pytest.mark.parametrize(("size", "options"), [(12, {"length": 9, "share": 0.2}), (20, {"length": 17})])
def test_the_shortest_corpus_is_enough(files, size, options):
    content = noise(size)
    task = Text(files=files(content), **options)
    task.prepare()
    assert task.train_batch(1, 0, 0).inputs.tolist() == [list(content[: task.length])]
    assert task.eval_batch(1, 0).targets.tolist() == [[content[-1]]]


def test_bad_files_are_refused(tmp_path, files):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/.hidden").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for bad, says in {
        str(tmp_path / "missing"): ["no file", "missing", "correct its name"],
        str(tmp_path / "folder"): ["folder", "holds no file", "put text in it"],
        str(tmp_path / "pipe"): ["pipe", "regular file"],
        files(b"")[0]: ["0.bin", "is empty", "leave it out"],
        "book:ema": ["no book is called 'book:ema'", "emma", "did you mean 'book:emma'?"],
        "book:xyzzy": ["no book is called 'book:xyzzy'", "there are book:emma"],
        "book:../base": ["no book is called 'book:../base'"],
    }.items():
        with pytest.raises(ValueError) as refusal:
            Text(files=["book:emma", bad]).prepare()
        assert all(part in str(refusal.value) for part in says), refusal.value
        assert str(refusal.value).count("\n") < 2


@pytest.mark.parametrize("folder", [False, True])
def test_files_that_may_not_be_read_are_refused(tmp_path, folder):
    locked = tmp_path / "locked"
    if folder:
        locked.mkdir()
    else:
        locked.write_text("x")
    locked.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\); change its permissions"):
            Text(files=[str(locked)]).prepare()
    finally:
        if root:
            os.seteuid(0)
        locked.chmod(0o700)


def test_fresh_batches_of_many_lengths():
    """Log-uniform between shortest and length, one length a batch, a pure function of (seed, index)."""
    task = InductionHeads(length=256, shortest=16)
    lengths = [task.train_batch(2, 0, i).inputs.shape[1] for i in range(400)]
    assert min(lengths) >= 17
    assert max(lengths) <= 257
    below_64 = sum(length <= 65 for length in lengths) / 400
    assert 0.42 < below_64 < 0.58
    assert lengths[:5] == [task.train_batch(2, 0, i).inputs.shape[1] for i in range(5)]
    assert task.eval_batch(2, 0).inputs.shape[1] == 257
    with pytest.raises(ValueError, match="shortest 300 must not exceed length 256"):
        InductionHeads(length=256, shortest=300)
    with pytest.raises(ValueError, match="leave train_examples out"):
        InductionHeads(length=256, shortest=16, train_examples=10)
