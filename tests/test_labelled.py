"""Tasks that read the user's own files: texts, pictures, sound, DNA and time series."""

import gzip
import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from longwave.contract.tasks import CONTRACT
from longwave.models import LMSpec
from longwave.tasks import (
    DNA,
    IGNORE,
    TASKS,
    Audio,
    AudioTokens,
    DNALabels,
    DocumentPairs,
    Documents,
    Forecast,
    Images,
    SeriesLabels,
    Species,
    TokenizedText,
    audio,
    dna,
    series,
)

RANDOM = np.random.default_rng(0)


def put(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def documents(folder):
    for part, count in (("train", 15), ("test", 4)):
        for name in ("bad", "good"):
            for i in range(count):
                put(folder / part / name / f"{i}.txt", f"{name} " * (3 + i))
    return Documents(folder=str(folder), length=40)


def documents_in_lines(folder):
    for part, count in (("train", 30), ("test", 4)):
        lines = [json.dumps({"text": "é" * i, "label": i % 3}) for i in range(count)]
        put(folder / f"{part}.jsonl", "\n".join(lines))
    return Documents(folder=str(folder), held_out="test")


def document_pairs(folder):
    for part in ("train", "eval", "test"):
        put(folder / f"aan.{part}.tsv", "".join(f"{i % 2}.0\ta{i}\tb{i}\t{'x' * (i + 1)}\tyy\n" for i in range(12)))
    return DocumentPairs(folder=str(folder), length=8)


def pictures(folder):
    for part, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = RANDOM.integers(256, size=(8, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return Images(images=str(folder), order="patches", patch=4)


def cifar(folder):
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = RANDOM.integers(256, size=(4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return Images(images=str(folder), grey=True, order="permuted", held_out="test")


def mnist(folder):
    folder.mkdir()
    for part, count in (("train", 20), ("t10k", 5)):
        images, labels = RANDOM.integers(256, size=(count, 6, 5), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            with gzip.open(folder / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    return Images(images=str(folder), order="rows")


def sound(file, samples, rate=8000, channels=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    x = (np.sin(np.arange(samples) * 0.3) * 20000).astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.repeat(x, channels).tobytes())
    return file


def clips(folder):
    for name in ("zero", "one"):
        for i in range(12):
            sound(folder / name / f"{i}.wav", 100 + 40 * i)
    return Audio(folder=str(folder), seconds=0.05)


def clips_in_a_table(folder):
    files = [sound(folder / f"{i}.wav", 200, channels=2).name for i in range(20)]
    lines = [f"{name},{'ab'[i % 2]},{'test' if i > 15 else 'train'}" for i, name in enumerate(files)]
    put(folder / "labels.csv", "\n".join(["file,label,split", *lines]))
    return Audio(folder=str(folder), rate=4000, held_out="test")


def recordings(folder):
    for i in range(3):
        sound(folder / f"{i}.wav", 700 + i)
    return AudioTokens(files=[str(folder)], length=50, levels=64)


def recordings_apart(folder):
    return recordings(folder).model_copy(update={"held_out": "files", "share": 0.3})


def fasta(file, *lengths):
    """Write records of random bases in lines of 60; returned in upper case."""
    records = ["".join(RANDOM.choice(list("ACGTacgtN"), length)) for length in lengths]
    lines = ["\n".join(record[i : i + 60] for i in range(0, len(record), 60)) for record in records]
    text = "".join(f">chr{i} of a test\n{line}\n" for i, line in enumerate(lines)).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return [record.upper() for record in records]


def bases(folder):
    fasta(folder / "one.fa", 700, 90)
    fasta(folder / "two.fa.gz", 400)
    return DNA(files=[str(folder)], length=50)


def intervals(folder):
    fasta(folder / "one.fa", 700, 300)
    put(folder / "parts.bed", "chr0\t10\t400\ttrain\nchr0\t400\t600\tvalid\n\nchr1\t0\t300\ttest\n")
    return DNA(files=[str(folder / "one.fa")], intervals=str(folder / "parts.bed"), length=64, held_out="test")


def junctions(folder):
    lines = [f"{'ACGTRN'[i % 6] * (5 + i % 3)},{'xyz'[i % 3]}" for i in range(40)]
    return DNALabels(table=put(folder / "table.csv", "\n".join(["sequence,label", *lines])))


def species(folder):
    for name in ("ecoli", "human"):
        fasta(folder / f"{name}.fa.gz", 600, 500)
    return Species(folder=str(folder), length=40, eval_examples=45)


def table(folder, rows=200, gap=-17, name="t.csv"):
    values = [f"{i * 0.5},{gap if i == 17 else -i}" for i in range(rows)]
    times = [f"2016-07-{1 + i // 24:02} {i % 24:02}:00:00" for i in range(rows)]
    return put(folder / name, "\n".join(["date,a,b", *(f"{t},{v}" for t, v in zip(times, values))]))


def forecast(folder):
    return Forecast(file=table(folder), context=20, horizon=5, calendar=True)


def forecast_with_gaps(folder):
    options = {"context": 9, "horizon": 3, "missing": "hold", "gaps": True, "predict": ["b"], "held_out": "test"}
    return Forecast(file=table(folder, gap="nan"), **options)


def heartbeats(folder):
    folder.mkdir()
    x, y = RANDOM.normal(size=(40, 30, 2)), np.arange(40) % 3 + 1
    x[3, 20:] = np.nan
    np.savez(folder / "x.npz", x_train=x, y_train=y)
    return SeriesLabels(series=str(folder / "x.npz"))


def ucr(folder):
    for part in ("TRAIN", "TEST"):
        lines = ["\t".join(map(str, [1 - 2 * (i % 2), *range(i, i + 9)])) for i in range(20)]
        put(folder / f"Toy_{part}.tsv", "\n".join(lines))
    return SeriesLabels(series=str(folder), held_out="test")


MAKERS = [
    documents, documents_in_lines, document_pairs, pictures, cifar, mnist, clips, clips_in_a_table, recordings,
    recordings_apart, bases, intervals, junctions, species, forecast, forecast_with_gaps, heartbeats, ucr,
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tasks = {}

    def make(maker):
        if maker not in tasks:
            tasks[maker] = maker(tmp_path_factory.mktemp("files") / "of")
            tasks[maker].prepare()
        return tasks[maker]

    return make


def test_every_task_is_put_through_the_contract(made):
    assert {type(made(maker)) for maker in MAKERS} >= {
        task
        for task in TASKS.values()
        if not task.examples and task is not TokenizedText  # in test_corpus.py
    }


@pytest.mark.parametrize("clause", CONTRACT)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_contract(maker, clause, made):
    CONTRACT[clause](made(maker))


@pytest.mark.parametrize("maker", [documents, pictures, mnist, heartbeats, junctions])
def test_what_is_for_validation_is_never_trained_on(maker, made):
    task = made(maker)
    count = len(task._sets.train)
    held = {tuple(np.ravel(task.eval_row(i).inputs).tolist()) for i in range(task.eval_rows)}
    seen = [tuple(np.ravel(task.train_row(7, i).inputs).tolist()) for i in range(count - task.eval_rows)]
    assert task.eval_rows == count // 10
    if maker in (pictures, mnist, heartbeats):  # no two rows are alike
        assert not held & set(seen)
        assert len(set(seen)) == len(seen)


def test_documents_are_their_bytes(made):
    task = made(documents)
    assert task.classes == ["bad", "good"]
    row = task.eval_row(0)
    assert bytes(row.inputs) == ((task.classes[row.targets] + " ") * 18).encode()[: len(row.inputs)]
    assert made(documents_in_lines).classes == ["0", "1", "2"]
    assert bytes(made(documents_in_lines).eval_row(3).inputs).decode() == "ééé"


def test_pixels_are_read_in_every_order(made, tmp_path):
    pixels = RANDOM.integers(256, size=(30, 4, 6), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.zeros(30, np.int64))
    orders = ("pixels", "permuted", "rows", "patches")
    rows = {order: Images(images=str(tmp_path / "x.npz"), order=order, patch=2) for order in orders}
    for task in rows.values():
        task.prepare()
    x = {order: task.train_row(0, 0).inputs for order, task in rows.items()}
    picture = x["pixels"].reshape(4, 6)
    assert np.array_equal(x["rows"], picture)
    assert np.array_equal(x["patches"][4], picture[2:4, 2:4].ravel())
    assert sorted(x["permuted"].ravel()) == sorted(picture.ravel())
    assert not np.array_equal(x["permuted"], x["pixels"])
    for order in ("pixels", "rows", "patches"):
        assert np.array_equal(rows[order].image(torch.from_numpy(x[order]))[..., 0], picture)
    every = np.concatenate([rows["pixels"].row(item).inputs for item in rows["pixels"]._sets.train])
    assert abs(every.mean()) < 1e-5
    assert abs(every.std() - 1) < 1e-5


def test_grey_is_what_the_eye_sees(made):
    task = made(cifar)
    raw = np.fromfile(f"{task.images}/test_batch.bin", np.uint8).reshape(-1, 3073)[0]
    red, green, blue = raw[1:].reshape(3, 32, 32).astype(float)
    assert np.abs(task.picture(task._sets.test[0])[..., 0] - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 1e-3


def test_sound_is_resampled_and_channels_are_averaged(made):
    task = made(clips_in_a_table)
    assert task.steps_per_second == 4000
    assert task.eval_row(0).inputs.shape == (100, 1)
    whole, rate = audio.read(task._sets.test[0][0])
    assert rate == 8000
    middle = slice(30, 70)
    assert np.abs(task.eval_row(0).inputs[middle, 0] - whole[::2][middle]).max() < 0.01


def test_tokens_of_sound_become_sound_again(made, tmp_path):
    task = made(recordings)
    row = task.eval_row(0)
    task.save(row.inputs, tmp_path / "x.wav")
    x, rate = audio.read(tmp_path / "x.wav")
    assert (len(x), rate) == (len(row.inputs), 8000)
    levels = torch.tensor(x).sign() * torch.log1p(63 * torch.tensor(x).abs()) / np.log1p(63)
    assert (torch.floor(63 * (levels + 1) / 2 + 0.5).long() == row.inputs).all()
    with pytest.raises(ValueError, match=r"x.mp3 must end in one of .wav"):
        task.save(row.inputs, tmp_path / "x.mp3")


def test_bases_are_read_from_both_strands(tmp_path):
    (record,) = fasta(tmp_path / "x.fa", 500)
    task = DNA(files=[str(tmp_path / "x.fa")], length=30)
    task.prepare()
    train, held = record[:450], record[450:]
    other = train[::-1].translate(str.maketrans("ACGT", "TGCA"))
    strands = []
    for number in range(40):
        row = task.train_row(0, number)
        text = "".join(dna.LETTERS[i] for i in row.inputs)
        strands.append((text in train, text in other))
        assert [t for t, i in zip(row.targets[:-1], row.inputs[1:]) if t != i] == [IGNORE] * text[1:].count("N")
    assert {(True, False), (False, True)} <= set(strands)
    assert all(map(any, strands))
    inputs = [dna.LETTERS[i] for number in range(task.eval_rows) for i in task.eval_row(number).inputs]
    assert "".join(inputs) == held[:-1]


@pytest.mark.parametrize("make", [bases, intervals, junctions, species], ids=lambda make: make.__name__)
def test_bases_have_the_ids_of_hyena_dna(make, made):
    plain = made(make)
    task = plain.model_copy(update={"ids": "hyenadna"})
    task.prepare()
    CONTRACT["batches_have_the_forms_it_says"](task)
    for number in range(5):
        for ours, other in zip(task.train_row(0, number), plain.train_row(0, number)):
            if isinstance(ours, np.ndarray):
                assert ours.tolist() == np.where(other == IGNORE, IGNORE, other.astype(int) + 7).tolist()
    assert task.tokenizer.decode(task.eval_row(0).inputs.tolist()) == plain.tokenizer.decode(plain.eval_row(0).inputs)
    assert [task.names[i] for i in task.eval_row(0).inputs] == [plain.names[i] for i in plain.eval_row(0).inputs]


@pytest.mark.parametrize("name", ["x.fa", "x.fa.gz"])
def test_a_window_has_a_million_bases(name, tmp_path):
    (record,) = fasta(tmp_path / name, 1_300_000)
    task = DNA(files=[str(tmp_path / name)], length=1_000_000, tail=0.2, both_strands=False)
    task.prepare()
    row = task.train_row(3, 10**9)
    text = np.frombuffer(dna.LETTERS.encode(), np.uint8)[row.inputs].tobytes().decode()
    assert (len(text), task.longest, len(row.targets)) == (10**6, 10**6, 10**6)
    assert text in record[:1_040_000]
    assert task.eval_rows == 1


@pytest.mark.slow
def test_a_model_is_trained_on_a_million_bases(tmp_path):
    fasta(tmp_path / "x.fa", 1_300_000)
    task = DNA(files=[str(tmp_path / "x.fa")], length=1_000_000, tail=0.2)
    model = LMSpec(d_model=4, pattern=["s4d"], layers=1, channel=None).serving(task).build()
    score = model.score(*task.train_batch(1, 0, 0))
    (score.loss / score.total).backward()
    assert (score.loss / score.total).item() == pytest.approx(np.log(4), abs=1.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_genome_is_the_same_plain_and_packed(tmp_path):
    (record,) = fasta(tmp_path / "x.fa", 333)
    with gzip.open(tmp_path / "y.fa.gz", "wb") as file:
        file.write((tmp_path / "x.fa").read_bytes())
    plain, packed = (dna.genome(tmp_path / name) for name in ("x.fa", "y.fa.gz"))
    assert plain.lengths == packed.lengths == {"chr0": 333}
    for start, stop in ((0, 333), (59, 61), (120, 200)):
        assert np.array_equal(plain.read("chr0", start, stop), packed.read("chr0", start, stop))
        assert "".join(dna.LETTERS[i] for i in plain.read("chr0", start, stop)) == record[start:stop]


def test_forecasts_follow_the_protocol(made):
    task = made(forecast)
    assert (task.targets.steps, task.targets.width, task.inputs.features) == (5, 2, 6)
    row, first = task.eval_row(0), 140 - 20  # the context of validation lies in the training part
    raw = np.stack([np.arange(200) * 0.5, -np.arange(200.0)], axis=1)
    scaled = (raw - raw[:140].mean(0)) / raw[:140].std(0)
    assert np.allclose(row.inputs[:20, :2], scaled[first : first + 20], atol=1e-6)
    assert (row.inputs[20:, :2] == 0).all()
    assert np.allclose(row.targets, scaled[first + 20 : first + 25], atol=1e-6)
    assert np.allclose(row.inputs[:, 2], np.arange(first, first + 25) % 24 / 23 - 0.5)
    assert task.eval_rows == 20 - 5 + 1
    starts = {float(task.train_row(0, number).inputs[0, 0]) for number in range(116)}
    assert len(starts) == 140 - 25 + 1


def test_what_is_missing_is_held_and_not_scored(made):
    task = made(forecast_with_gaps)
    rows = [task._row(start) for start in range(17 - 11, 18)]
    assert sum(np.isnan(row.targets).sum() for row in rows) == 3  # the gap is at each of three steps of the future
    seen = next(row.inputs for row in rows if row.inputs[8, 3] == 1)
    assert seen[8, 1] == seen[7, 1]
    assert task.inputs.features == 2 + 2 + 1


def test_calendar():
    times = np.array(["2016-07-04T00:00:00", "2016-12-31T23:00:00"], "datetime64[s]")
    assert np.allclose(series.calendar(times) + 0.5, [[0, 0, 3 / 30, 185 / 365], [1, 5 / 6, 1, 1]])


def broken_picture(folder):
    pictures(folder)
    file = folder / "train/cat/3.png"
    file.write_bytes(file.read_bytes()[:60])
    for i in range(12):
        if i != 3:
            (folder / f"train/cat/{i}.png").unlink()
    return Images(images=str(folder))


def odd_picture(folder):
    pictures(folder)
    Image.new("RGB", (9, 9)).save(folder / "test/cat/0.png")
    return Images(images=str(folder), held_out="test")


def after(*steps):
    return steps[-1]


def of_texts(folder, name, text):
    return after(put(folder / name, text), Documents(folder=str(folder)))


def of_arrays(folder, **arrays):
    folder.mkdir()
    return after(np.savez(folder / "a.npz", **arrays), Images(images=str(folder / "a.npz")))


def of_bases(folder, *lengths, bed=None, **options):
    fasta(folder / "a.fa", *lengths)
    return DNA(files=[str(folder / "a.fa")], intervals=bed and put(folder / "b.bed", bed), **options)


def of_rows(folder, text, **options):
    return Forecast(file=put(folder / "t.csv", text), context=9, horizon=2, **options)


def of_table(folder, gap=-17, **options):
    return Forecast(**{"file": table(folder, gap=gap), "context": 9, "horizon": 2, **options})


def bad_clips(folder, name, write):
    clips(folder)
    for i in range(12):
        write(folder / name / f"{i}.wav")
    return Audio(folder=str(folder))


REFUSED = {
    "there is no folder 'nosuch'; the Long Range Arena's are the reviews": lambda f: Documents(folder="nosuch"),
    "has 1 folders, and there must be one a class": lambda f: of_texts(f, "a/x.txt", "x"),
    "the class .*b has no file": lambda f: after(put(f / "b/.hidden", ""), of_texts(f, "a/x", "x")),
    "line 2 is not JSON": lambda f: of_texts(f, "train.jsonl", '{"text": "a", "label": 1}\n{"te'),
    'line 1 must be {"text"': lambda f: of_texts(f, "train.jsonl", '{"text": 3, "label": 1}'),
    "there are 2 rows to train on, and at least 10": lambda f: after(put(f / "a/x", "x"), of_texts(f, "b/x", "x")),
    r"must have one \*train.tsv, and has none": lambda f: after(f.mkdir(), DocumentPairs(folder=str(f))),
    "line 1 must be label 0 or 1": lambda f: after(
        *(put(f / f"x.{part}.tsv", "3\ta\tb\tc\td\n") for part in ("train", "eval", "test")),
        DocumentPairs(folder=str(f)),
    ),
    "3.png is not a whole picture": broken_picture,
    "0.png has 81 steps of 3 numbers and others have 96": odd_picture,
    "it needs x_train and y_train": lambda f: of_arrays(f, z=np.ones(3)),
    "is not a readable .npz": lambda f: Images(images=put(f / "a.npz", "no")),
    "has labels -1..0, and they lie in": lambda f: of_arrays(
        f, images=np.zeros((2, 3, 3), np.uint8), labels=np.array([0, -1])
    ),
    "has 100 bytes, no multiple of the 3,073": lambda f: after(
        put(f / "data_batch_1.bin", "x" * 100), Images(images=str(f))
    ),
    "patch = 5 does not divide pictures of 8 x 12": lambda f: pictures(f).model_copy(update={"patch": 5}),
    "is not a whole WAV, FLAC": lambda f: bad_clips(f, "one", lambda file: file.write_bytes(b"RIFF")),
    "has 16000 samples a second and others 8000; set rate": lambda f: bad_clips(
        f, "zero", lambda file: sound(file, 300, 16000)
    ),
    "labels.csv, line 3: there is no file 'b.wav'": lambda f: after(
        sound(f / "a.wav", 9), put(f / "labels.csv", "file,label\na.wav,x\nb.wav,y"), Audio(folder=str(f))
    ),
    "there is no WAV": lambda f: after(f.mkdir(), AudioTokens(files=[str(f)])),
    "there are no 8001 samples in a row": lambda f: AudioTokens(files=[str(sound(f / "a.wav", 900))]),
    "has 'J' at base 3": lambda f: DNALabels(table=put(f / "t.csv", "sequence,label\nACJ,x")),
    "has the columns .*, and needs sequence and label": lambda f: DNALabels(table=put(f / "t.csv", "a,b\n1,2")),
    "there is no file 'nosuch.fa'": lambda f: DNA(files=["nosuch.fa"]),
    "a.fa is not a FASTA file that can be indexed": lambda f: DNA(files=[put(f / "a.fa", "\n")]),
    "b.fa.gz has no record of a FASTA file": lambda f: after(
        f.mkdir(), (f / "b.fa.gz").write_bytes(gzip.compress(b"")), DNA(files=[str(f / "b.fa.gz")])
    ),
    "is not a whole gzip file": lambda f: DNA(files=[put(f / "a.fa.gz", "no")]),
    "the longest stretch to train on has 90 bases, and 201 are needed": lambda f: of_bases(f, 100, length=200),
    "line 1: no file has a record 'chrX'": lambda f: of_bases(f, 100, bed="chrX\t0\t9\ttrain"),
    "line 1: 5 to 500 is no part of chr0, which has 100": lambda f: of_bases(f, 100, bed="chr0\t5\t500\ttrain"),
    "has 1 species, and at least two": lambda f: after(fasta(f / "a.fa", 100), Species(folder=str(f))),
    "row 19, column b has no finite number; fill it, or set missing: hold": lambda f: of_table(f, gap="nan"),
    "row 19, column b: 'x' is no number": lambda f: of_table(f, gap="x"),
    "row 3 has 1 columns and the header has 2": lambda f: of_rows(f, "a,b\n1,2\n3"),
    "has no column 'c'; it has a, b": lambda f: of_table(f, columns=["c"]),
    "row 4: the date is before that of the row above": lambda f: of_rows(
        f, "date,a\n2020-01-01,1\n2020-01-03,1\n2020-01-02,1"
    ),
    "the validation part has 45 rows with its context, and a window has 60": lambda f: of_table(
        f, context=40, horizon=20, parts=[150, 5, 45]
    ),
    "must be fractions up to 1 in all": lambda f: of_table(f, parts=[0.9, 0.2, 0.2]),
    "there is no test set": lambda f: heartbeats(f).model_copy(update={"held_out": "test"}),
    r"must have one \*_TRAIN.tsv": lambda f: after(f.mkdir(), SeriesLabels(series=str(f))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_named(message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        REFUSED[message](tmp_path / "of").prepare()
    assert len(str(caught.value).splitlines()) <= 2


def test_parquet_is_as_csv(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = table(tmp_path)
    read = series.read_table(tmp_path / "t.csv", None)
    columns = {"date": [str(time) for time in read.times], "a": read.values[:, 0], "b": read.values[:, 1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    one, other = (Forecast(file=name, context=9, horizon=2) for name in (file, str(tmp_path / "t.parquet")))
    assert np.array_equal(one.eval_row(3).inputs, other.eval_row(3).inputs)


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"needs the package soundfile: pip install .*'.\[data\]'"):
        clips(tmp_path / "of").prepare()


def test_irregular_steps_of_series_are_a_channel(tmp_path):
    t = np.array([[0.0, 1, 3, 7, np.nan], [5.0, 6, 6.5, 9, 10]])
    x = np.where(np.isnan(t), np.nan, 2 * t)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=[0, 1], t_train=t)
    task = SeriesLabels(series=str(tmp_path / "x.npz"))
    rows = [np.asarray(task.row(item).inputs) for item in task._sets.train]
    assert [len(row) for row in rows] == [4, 5]
    gaps = np.concatenate([[2, 1, 2, 4], [1.0, 1, 0.5, 2.5, 1]])
    told = np.concatenate([row[:, 1] for row in rows])
    np.testing.assert_allclose(told, (gaps - gaps.mean()) / gaps.std(), rtol=1e-5)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=[0, 1], t_train=t[:, :3])
    with pytest.raises(ValueError, match=r"must have t_train \(n, L\) for x_train; it has .*t_train \(2, 3\)"):
        SeriesLabels(series=str(tmp_path / "x.npz")).prepare()
