"""Corpora: text to tokens, and windows over them."""

import json
import os

import numpy as np
import pytest

from longwave.contract.tasks import CONTRACT
from longwave.tasks import TokenizedText, corpus
from longwave.tokenizer import find

TEXTS = [f"{'abc ' * (3 + i % 7)}document {i} ends here é." for i in range(40)]


def as_files(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"{i // 10}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i // 10}/{i % 10}.txt").write_text(text)


def as_lines(folder, texts=TEXTS):
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


def as_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=7)


def as_datasets(folder):
    """As the datasets package saves them: Arrow streams and descriptions."""
    import pyarrow

    folder.mkdir()
    (folder / "state.json").write_text("{}")
    for number in range(2):
        table = pyarrow.table({"text": TEXTS[20 * number : 20 * number + 20]})
        with pyarrow.ipc.new_stream(str(folder / f"data-{number}.arrow"), table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize("put", [as_files, as_lines, as_parquet, as_datasets], ids=lambda put: put.__name__)
@pytest.mark.parametrize("tokenizer", [None, 300])
def test_documents_are_read_back(put, tokenizer, tmp_path):
    put(tmp_path / "in")
    corpus.tokenize([str(tmp_path / "in")], tmp_path / "out", tokenizer, jobs=2)
    files, words = corpus.TokenFiles(tmp_path / "out"), find(tmp_path / "out")
    starts = [0, *files.ends[:-1].tolist()]
    read = [files.read(start, stop) for start, stop in zip(starts, files.ends.tolist())]
    assert [words.decode(ids.tolist()) for ids in read] == TEXTS
    assert all(ids[-1] == files.end and files.end not in ids[:-1] for ids in read)
    assert files.vocab == words.vocab == (tokenizer or 257)
    assert files.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert files.read(5, 400).tolist() == np.concatenate(read)[5:400].tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    as_files(folder / "in")
    as_lines(folder / "other", [text.upper() for text in TEXTS])
    corpus.tokenize([str(folder / "in")], folder / "one")
    corpus.tokenize([str(folder / "other")], folder / "two")
    return [str(folder / "one"), str(folder / "two")]


def tasks(folders):
    yield TokenizedText(folders=folders[:1], length=32)
    yield TokenizedText(folders=folders, weights=[3, 1], length=20, held_out="documents", share=0.2)
    yield TokenizedText(folders=folders, length=64, documents="apart", held_out="documents", share=0.2)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("clause", CONTRACT)
def test_contract(clause, number, folders):
    task = list(tasks(folders))[number]
    task.prepare()
    CONTRACT[clause](task)


@pytest.mark.parametrize("documents", ["joined", "apart"])
@pytest.mark.parametrize("held_out", ["tail", "documents"])
def test_every_token_is_asked_for_once(documents, held_out, folders):
    """Of what is held out, and in an epoch of the rest; none of one is in the other."""
    task = TokenizedText(folders=folders[:1], length=16, documents=documents, held_out=held_out, share=0.2)
    files, train, held = task._corpora[0]
    asked, began = {}, 0
    for name, windows in (("train", train), ("held", held)):
        part, found = windows.stretches, []
        places = np.concatenate([np.arange(a, a + n) for a, n in zip(part.starts, np.diff(part.ends, prepend=0))])
        for i in range(len(windows)):
            ids, (start, stop) = windows[i], windows.place(i)
            assert 2 <= len(ids) <= 17
            if documents == "apart":
                assert files.end not in ids[:-1]
            assert ids.tolist() == [int(files.read(place, place + 1)[0]) for place in places[start:stop]]
            found += places[start + 1 : stop].tolist()
        assert len(set(found)) == len(found)
        asked[name] = set(found)
        began += len(windows.borders)
    assert not asked["train"] & asked["held"]
    assert len(asked["train"]) + len(asked["held"]) == len(files) - began  # the first of each has nothing before it
    assert began == 2 if documents == "joined" else began >= len(files.ends)
    assert 0.1 < len(asked["held"]) / len(files) < 0.3
    seen = [tuple(task.train_row(5, number).inputs.tolist()) for number in range(len(train))]
    assert sorted(seen) == sorted(tuple(train[i][:-1].tolist()) for i in range(len(train)))


def test_corpora_are_drawn_by_their_weights(folders):
    task = TokenizedText(folders=[folders[0], folders[1]], weights=[3, 1], length=16)
    first = {tuple(task._corpora[0][1][i][:-1].tolist()) for i in range(len(task._corpora[0][1]))}
    drawn = np.mean([tuple(task.train_row(0, number).inputs.tolist()) in first for number in range(400)])
    assert 0.68 < drawn < 0.82


def test_bits_per_byte_counts_the_bytes_of_what_is_held_out(tmp_path):
    from longwave.tasks import Score

    texts = [text if i % 3 else 9 * "日本語" for i, text in enumerate(TEXTS)]  # which have more bytes a token, or fewer
    as_lines(tmp_path / "in", texts)
    corpus.tokenize([str(tmp_path / "in")], tmp_path / "out", 300)
    files = corpus.TokenFiles(tmp_path / "out")
    lengths, score = np.diff(files.ends, prepend=0), Score(10 * np.log(2.0), 3, 10)
    task = TokenizedText(folders=[str(tmp_path / "out")], length=8, held_out="documents", share=0.2)
    part = task._corpora[0][2].stretches
    out = np.array([any(a <= end - 1 < b for a, b in zip(part.starts, part.stops)) for end in files.ends])
    named = task.metrics(score)
    assert named["bits_per_byte"] == pytest.approx(lengths[out].sum() / files.bytes[out].sum())
    assert abs(named["bits_per_byte"] / (lengths.sum() / files.bytes.sum()) - 1) > 0.01
    assert named["perplexity"] == pytest.approx(2)
    tail = TokenizedText(folders=[str(tmp_path / "out")], length=8, share=1 - (files.ends[29] + 1.5) / len(files))
    count = len(tail._corpora[0][2].stretches)
    within = count - lengths[30:].sum()
    assert -3 < within < 0
    expected = files.bytes[30:].sum() + within / lengths[30] * files.bytes[30]
    assert tail.metrics(score)["bits_per_byte"] == pytest.approx(count / expected)


def test_tokenizing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    as_lines(tmp_path / "in")
    (tmp_path / "in/b.jsonl").write_text('{"text": "x"}\n{"te\n')
    with pytest.raises(ValueError, match=r"b.jsonl, line 2 is no JSON with a field 'text'"):
        corpus.tokenize([str(tmp_path / "in")], tmp_path / "out")
    with pytest.raises(ValueError, match="does not hold all of its tokens"):
        corpus.TokenFiles(tmp_path / "out")
    first = (tmp_path / "out/000000.safetensors").stat()
    (tmp_path / "in/b.jsonl").write_text('{"text": "x"}\n')
    corpus.tokenize([str(tmp_path / "in")], tmp_path / "out")
    assert (tmp_path / "out/000000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert len(corpus.TokenFiles(tmp_path / "out").ends) == 41
    before = corpus.TokenFiles(tmp_path / "out").hash
    (tmp_path / "in/b.jsonl").write_text('{"text": "y"}\n')
    os.utime(tmp_path / "in/b.jsonl", ns=(1, 1))
    corpus.tokenize([str(tmp_path / "in")], tmp_path / "out")
    assert corpus.TokenFiles(tmp_path / "out").hash != before
    assert not list((tmp_path / "out").glob("*.half"))


def of(tmp_path, **options):
    as_lines(tmp_path / "in")
    corpus.tokenize([str(tmp_path / "in")], tmp_path / "out", **options)
    return str(tmp_path / "out")


REFUSED = {
    "there is no file or folder 'nosuch'": lambda f: corpus.tokenize(["nosuch"], f / "out"),
    "vocab = 100 must be at least 257": lambda f: of(f, tokenizer=100),
    "line 1 is no JSON with a field 'body'": lambda f: of(f, field="body"),
    "is not empty and was not made by longwave tokenize": lambda f: ((f / "out").mkdir(), (f / "out/x").touch(), of(f)),
    "holds no tokens: manifest.json cannot be read": lambda f: TokenizedText(folders=[str(f)]).prepare(),
    "weights = .* must be 1 numbers above 0": lambda f: TokenizedText(folders=[of(f)], weights=[1, 2]),
    "is missing or cut short": lambda f: (
        os.truncate(of(f) + "/000000.safetensors", 100),
        TokenizedText(folders=[str(f / "out")]).prepare(),
    ),
    "corpora must be of one tokenizer": lambda f: (
        (f / "a").mkdir(),
        (f / "b").mkdir(),
        TokenizedText(folders=[of(f / "a"), of(f / "b", tokenizer=300)], length=8).prepare(),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_named(message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        REFUSED[message](tmp_path)
    assert len(str(caught.value).splitlines()) <= 2


def test_text_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text: invalid start byte at byte 5"):
        corpus.tokenize([str(tmp_path / "a.txt")], tmp_path / "out")
