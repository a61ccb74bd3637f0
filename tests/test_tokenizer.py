"""Tokenizers: what they make of any text, that others read their files alike, and that a model's folder has its own."""

import json
import math
import random
import re
import shutil

import pytest
import tokenizers
import torch
from official import golden
from transformers import PreTrainedTokenizerFast

from longwave import models, tokenizer
from longwave.models import LMSpec
from longwave.official.hyenadna import TOKENIZER
from longwave.tasks import corpus
from longwave.tasks.text import BOOKS
from longwave.tokenizer import END, MASK, Decoder, Tokenizer, characters, dna, find, learn, plain_bytes

TEXTS = [
    "Emma Woodhouse, handsome, clever, and rich,",
    " naïve 日本語 🙂\r\n\t\x00",
    "",
    f"a {END} b [SEP]",
    "\ufeff\ufffd�",
]


def fallback():
    """As Llama's: pieces with a mark for a space, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abeimnoru,", "▁a", "mm", "▁na"]
    merges = [("▁", "a"), ("m", "m"), ("▁", "n")]
    ids = {piece: i for i, piece in enumerate([*pieces, "▁n"])}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    parts = tokenizers.decoders
    made.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(made.to_str())


def pieces():
    """As BERT's."""
    ids = {
        "[PAD]": 0,
        "[UNK]": 1,
        "[CLS]": 2,
        "[SEP]": 3,
        "emma": 4,
        "wood": 5,
        "##house": 6,
        ",": 7,
        "rich": 8,
        "a": 9,
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.enable_truncation(3)
    made.enable_padding()
    return Tokenizer(made.to_str())


def unigram():
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁b", -3.0)], 0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(made.to_str())


PLAIN = {
    "bytes": plain_bytes(),
    "bytes with an end": plain_bytes(END),
    "bytes with a mask": plain_bytes(MASK),
    "dna": dna(),
    "dna with an end": dna().with_end(),
    "hyenadna": TOKENIZER,
    "protein": characters("ACDEFGHIKLMNPQRSTVWY", {}),
}
OTHER = {
    "byte pairs": learn(["Emma Woodhouse, handsome, clever, and rich, naïve 日本語" * 3], 300),
    "byte fallback": fallback(),
    "pieces": pieces(),
    "unigram": unigram(),
}
ALL = PLAIN | OTHER


def transformers_of(made, tmp_path):
    (tmp_path / "tokenizer.json").write_text(made.text)
    return PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))


def texts_of(made):
    return TEXTS if made.letters is None else ["ACGTN"[: len(made.letters)] + "\nA C\t\r\n", "", "".join(made.letters)]


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_the_file_as_we_do(name, tmp_path):
    made = ALL[name]
    theirs, some = transformers_of(made, tmp_path), random.Random(0)
    assert (made.vocab, made.special) == (len(theirs), theirs.get_added_vocab())
    if name != "pieces":  # theirs takes over truncation to 3 ids
        for text in [*texts_of(made), *made.special]:
            assert made.prompt(text.encode()) == theirs(text)["input_ids"]
            assert made.prompt(text.encode(), begins=False) == theirs(text, add_special_tokens=False)["input_ids"]
    for _ in range(100):
        ids = [some.randrange(made.vocab + 3) for _ in range(some.randrange(20))]
        assert made.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    again = Tokenizer(theirs.backend_tokenizer.to_str())  # as it is after save_pretrained
    assert repr(again) == repr(made)
    assert again.agrees(made)


def test_all_that_is_text_comes_back():
    for name in ("bytes", "bytes with an end", "byte pairs"):
        for text, ids in zip(TEXTS, ALL[name].encode(TEXTS)):
            assert ALL[name].end not in ids.tolist()  # what looks like the end is text
            assert ALL[name].decode(ids.tolist()) == text
    every = bytes(range(256)) * 2
    assert plain_bytes().prompt(every) == list(every)
    assert plain_bytes().decode(every) == every.decode(errors="replace")


def test_nothing_is_cut_to_the_length_that_a_file_says():
    assert [len(ids) for ids in OTHER["pieces"].encode(["emma, rich, woodhouse, a", "a"])] == [8, 1]


def test_letters_of_dna():
    ids = dna().encode(["ACGTNacgtn UuRyK\n"])[0].tolist()
    assert dna().decode(ids) == "ACGTNACGTNTTNNN"
    assert ids == TOKENIZER.encode(["ACGTNacgtnUuRyK"])[0].__sub__(7).tolist()


@pytest.mark.parametrize("name", ALL)
def test_pieces_of_a_text_are_the_text(name):
    """Whatever comes, and wherever the prompt ends: also in a character, or before a space."""
    made, some = ALL[name], random.Random(1)
    known = [i for text in texts_of(made) for i in made.prompt(text.encode(), begins=False)]
    for number in range(200):
        ids = [some.choice(known) if number % 2 else some.randrange(made.vocab) for _ in range(some.randrange(1, 30))]
        if name == "byte fallback":  # among bytes that are no text it makes U+FFFD also of those that are
            ids = known[number % 20 : number % 20 + len(ids)]
        decoder, whole = Decoder(made), made.decode(ids)
        said = [decoder.push(i) for i in ids]
        assert "".join(said) + decoder.rest() == whole
        assert not any(piece.endswith("\ufffd") for piece in said)
        for cut in range(len(ids)):
            decoder, begin = Decoder(made, ids[:cut]), made.decode(ids[:cut])
            rest = "".join(map(decoder.push, ids[cut:])) + decoder.rest()
            assert begin + rest == whole or (begin[-1] == "\ufffd" and begin[:-1] + rest == whole)


def test_an_end_is_found_or_added(tmp_path):
    ends = {name: made.end for name, made in ALL.items()}
    assert ends == {
        **dict.fromkeys(["bytes", "bytes with a mask", "dna", "protein", "unigram"]),
        **{"bytes with an end": 256, "dna with an end": 5, "hyenadna": 1},
        **{"byte pairs": 0, "byte fallback": 2, "pieces": 3},
    }
    for made in ALL.values():
        longer = made.with_end()
        assert longer.end == (made.vocab if made.end is None else made.end)
        assert longer.agrees(made)
        assert made.agrees(longer)
        assert longer.vocab == len(transformers_of(longer, tmp_path))
        assert longer.prompt(next(n for n, i in longer.special.items() if i == longer.end).encode(), False)[-1:] == [
            longer.end
        ]


def test_those_that_differ_do_not_agree():
    for a, one in ALL.items():
        for b, other in ALL.items():
            alike = a == b or {a, b} <= {"bytes", "bytes with an end"} or {a, b} <= {"bytes", "bytes with a mask"}
            assert one.agrees(other) == (alike or {a, b} == {"dna", "dna with an end"})


def test_plain_ones_need_no_package(monkeypatch):
    def refuse(*_):
        raise ValueError("not installed")

    monkeypatch.setattr(tokenizer, "required", refuse)
    for made in PLAIN.values():
        again = Tokenizer(json.dumps(json.loads(made.text), indent=4, sort_keys=True))  # by whoever it was written
        text = texts_of(made)[0]
        assert again.decode(again.prompt(text.encode())) == "".join(text.split() if made.letters else text)
    with pytest.raises(ValueError, match="not installed"):
        Tokenizer(OTHER["byte pairs"].text).encode(["a"])


def test_a_folder_has_the_tokenizer_of_its_model(tmp_path):
    spec = LMSpec(vocab=300, d_model=8, pattern=["s4d"])
    for made in ALL.values():
        models.save(tmp_path / "a", spec.build(), spec, made)
        models.save(tmp_path / "a", spec.build(), spec)
        assert models.tokenizer(tmp_path / "a").text == made.text == find(tmp_path / "a").text
    models.save(tmp_path / "b", spec.build(), spec)
    assert models.tokenizer(tmp_path / "b") is None
    small = LMSpec(vocab=256, d_model=8, pattern=["s4d"])
    models.save(tmp_path / "c", small.build(), small)
    assert models.tokenizer(tmp_path / "c").text == plain_bytes().text  # as before there were such files
    with pytest.raises(ValueError, match="the tokenizer has 257 ids and the model knows 256; give the one it was"):
        models.save(tmp_path / "c", small.build(), small, plain_bytes(END))
    (tmp_path / "c/tokenizer.json").write_text(OTHER["byte pairs"].text)
    with pytest.raises(ValueError, match=r"the tokenizer has 300 ids and .*c knows 256"):
        models.tokenizer(tmp_path / "c")


def unreadable(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    return find(tmp_path / "x.json")


def beside(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    return find(tmp_path)


REFUSED = {
    "there is no tokenizer at 'nosuch'; give bytes, dna, a tokenizer.json, or a folder": lambda f: find("nosuch"),
    "folder that has one; transformers makes one of vocab.json": beside,
    "x.json: it is not a tokenizer.json of the tokenizers package: JSONDecodeError": lambda f: unreadable(f, "{"),
    "x.json: it is not a tokenizer.json of the tokenizers package: KeyError: 'added_tokens'": lambda f: unreadable(
        f, '{"model_type": "gpt2"}'
    ),
    "the tokenizers package cannot read this tokenizer.json": lambda f: unreadable(
        f, '{"added_tokens": [], "normalizer": null, "post_processor": null, "model": {"type": "X", "vocab": {"a": 0}}}'
    ).encode(["a"]),
    "'B' at byte 3 is none of the characters A C D E": lambda f: PLAIN["protein"].encode(["ACB"]),
    "'é' at byte 2 is none of the characters A C G T N": lambda f: dna().prompt("Aé".encode()),
    "the text is not UTF-8: invalid start byte at byte 1": lambda f: OTHER["byte pairs"].prompt(b"a\xff"),
    "vocab = 256 must be at least 257": lambda f: learn([], 256),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_named(message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        REFUSED[message](tmp_path)
    assert len(str(caught.value).splitlines()) <= 2


# A model of subwords from text to text


TINY = "d_model: 16, pattern: [s4d, {kind: attention, heads: 2}]"
SHORT = ["steps=3", "batch=2", "eval_every=10", "checkpoint_every=2", "accelerator=cpu", "keep_memory=false"]


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    """A corpus of 400 ids of the first pages of a novel, and a run on it."""
    from longwave.train import load_recipe, train

    folder = tmp_path_factory.mktemp("novel")
    text = next(BOOKS.glob("*.txt")).read_text()[:20000]
    for number in range(10):
        (folder / "in").mkdir(exist_ok=True)
        (folder / f"in/{number}.txt").write_text(text[2000 * number : 2000 * (number + 1)])
    corpus.tokenize([str(folder / "in")], folder / "corpus", 400)
    task = f"task={{kind: tokens, folders: [{folder / 'corpus'}], length: 32, held_out: documents, share: 0.2}}"
    train(load_recipe("demo", [task, f"model={{kind: lm, {TINY}}}", *SHORT]), folder / "run")
    return folder


def test_a_run_has_the_tokenizer_of_its_corpus(novel, call, tmp_path):
    made = find(novel / "corpus")
    for step in (2, 3):
        folder = novel / f"run/checkpoints/step-{step:08d}"
        assert find(folder).text == made.text
        assert "tokenizer.json" in json.loads((folder / "manifest.json").read_text())
    shutil.copytree(novel / "run", tmp_path / "run")
    code, _, err = call("train", "--resume", tmp_path / "run", "steps=5")
    assert code == 0, err
    assert re.search(r"next: longwave generate .*run --prompt \"The \" --max-new 400", err)
    assert models.tokenizer(tmp_path / "run").text == made.text
    file = tmp_path / "run/checkpoints/step-00000005/tokenizer.json"
    file.write_text(file.read_text().replace("0", "1"))
    code, _, err = call("generate", file.parent, "--prompt", "a")
    assert code == 2
    assert "tokenizer.json is corrupt: its SHA-256 differs from the manifest" in err


def test_generation_through_subwords(novel, call, tmp_path):
    run, made = tmp_path / "run", find(novel / "corpus")
    shutil.copytree(novel / "run", run)  # where there is no corpus
    model, _ = models.load(run)
    prompt = "Emma Woodhouse, naïve"
    ids = made.prompt(prompt.encode())
    assert len(ids) < len(prompt)
    (new,) = models.generate(model, [ids], 60, temperature=0.8, seed=1, stop=[made.end])
    assert len(new) == 60
    write = ("generate", run, "--prompt", prompt, "--seed", 1, "--max-new")
    code, out, err = call(*write, 60)
    assert code == 0, err
    assert out == prompt + made.decode(new) + "\n"
    assert "60 tokens in" in err
    said = made.decode(new)
    stop = next(said[i : i + 3] for i in range(20, len(said)) if said[i : i + 3].isascii())
    code, out, err = call(*write, 60, "--stop", stop, "--save-state", tmp_path / "state")
    assert out == prompt + said[: said.index(stop) + 3] + "\n"
    written = int(re.search(r"(\d+) tokens in", err)[1])
    assert made.decode(new[: written - 1]) in said[: said.index(stop) + 2]
    code, out, _ = call(
        "generate", run, "--from-state", tmp_path / "state", "--prompt", "", "--temperature", 0, "--max-new", 9
    )
    (rest,) = models.generate(model, [ids + new[:written]], 9)
    assert out == made.decode(rest) + "\n"
    (last,) = models.generate(model, [[*ids, made.end]], 5)
    code, out, _ = call("generate", run, "--prompt", prompt + END, "--temperature", 0, "--max-new", 5)
    assert out == f"{prompt}{END}{made.decode(last)}\n"  # the name of the end is the end


def test_generation_ends_with_the_document(novel, call, tmp_path):
    model, spec = models.load(novel / "run")
    made = find(novel / "corpus")
    with torch.no_grad():  # what follows is the end, whatever there was
        model.embedding.weight.zero_()
        model.embedding.weight[made.end] = 1
    models.save(tmp_path / "a", model, spec, made)
    state = model.init_state(1)
    bias = model(torch.tensor([[5]]), state)[0][0, -1]
    if bias.argmax() != made.end:
        model.embedding.weight.data.neg_()
        models.save(tmp_path / "a", model, spec, made)
    code, out, err = call("generate", tmp_path / "a", "--prompt", "Emma", "--temperature", 0)
    assert (code, out) == (0, "Emma\n")
    assert "1 tokens in" in err
    assert "to the end of the document" in err


def test_a_model_of_subwords_is_evaluated_on_text_that_it_tokenizes(novel, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = next(BOOKS.glob("*.txt")).read_text()[20000:26000] + "é🙂"
    (tmp_path / "my.txt").write_text(text)
    run = novel / "run"
    code, _, err = call("eval", run, "task={kind: text, files: [my.txt], length: 32}")
    assert code == 2
    assert f"{run} was trained on BPE of 400 ids, and the task text has bytes of 256 ids" in err
    command, task = re.search(r"; longwave (.*), and '(.*)'$", err.strip()).groups()
    assert call(*command.split())[0] == 0
    code, out, err = call("eval", run, task.replace("]}", "], length: 32, share: 0.5}"))
    assert code == 0, err
    got = {name: float(value) for name, value in (line.rsplit("  ", 1) for line in out.splitlines())}
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]), rel=1e-4)
    made = find(run / "checkpoints/step-00000003")
    (ids,) = made.encode([text])
    size = len(text.encode()) / (len(ids) + 1)  # with the end
    assert got["bits per byte"] == pytest.approx(got["loss"] / math.log(2) / size, rel=1e-4)
    corpus.tokenize(["my.txt"], tmp_path / "other", 300)
    code, _, err = call("eval", run, "task={kind: tokens, folders: [other]}", "task.length=8")
    assert code == 2
    assert "BPE of 400 ids, and the task tokens has BPE of 300 ids; evaluate it on a task that has those" in err


def test_a_model_of_bytes_with_an_end_reads_text(call, tmp_path, monkeypatch):
    """A corpus of bytes and the task `text` have the same ids."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("some text, ever again. " * 30)
    assert call("tokenize", "my.txt", "--out", "corpus")[0] == 0
    task = "task={kind: tokens, folders: [corpus], length: 8}"
    code, _, err = call("train", "demo", task, f"model={{kind: lm, {TINY}}}", *SHORT, "--out", "run")
    assert code == 0, err
    assert models.tokenizer("run").text == plain_bytes(END).text
    code, out, err = call("eval", "run", "task={kind: text, files: [my.txt], length: 8}")
    assert code == 0, err
    assert "bits per byte" in out
    code, out, _ = call("generate", "run", "--max-new", 3, stdin=b"some \xff")
    assert code == 0


def test_bases_are_generated(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some = random.Random(0)
    (tmp_path / "a.fa").write_text(">one\n" + "".join(some.choice("ACGT") for _ in range(500)) + "\n")
    task = "task={kind: dna, files: [a.fa], length: 16}"
    code, _, err = call("train", "demo", task, f"model={{kind: lm, {TINY}}}", *SHORT, "--out", "run")
    assert code == 0, err
    assert 'longwave generate run --prompt "ACGT" --max-new 400' in err
    code, out, err = call("generate", "run", "--max-new", 20, stdin=b"acgtn\nuu\n")
    assert code == 0, err
    assert re.fullmatch("[ACGTN]{20}\n", out)
    code, _, err = call("generate", "run", "--prompt", "ACZT")
    assert code == 2
    assert "'Z' at byte 3 is none of the characters A C G T N" in err
    code, _, err = call("generate", "run", stdin=b" \n")
    assert code == 2
    assert "the prompt is empty" in err
    code, _, err = call("eval", "run", "task={kind: text, files: [a.fa], length: 8}")
    assert code == 2
    assert "model.vocab = 5 does not fit: the task has 256 token ids" in err


def test_a_model_without_a_tokenizer_is_given_one(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = LMSpec(vocab=320, d_model=8, pattern=[{"kind": "hyena", "max_len": 64, "width": 4, "emb_dim": 3}])
    models.save("a", spec.build(), spec)
    code, _, err = call("generate", "a", "--prompt", "Emma")
    assert code == 2
    assert "a has no tokenizer.json: copy one into it, or say what its ids stand for by --tokenizer: bytes, dna" in err
    code, _, err = call("eval", "a", "task={kind: text, length: 8, share: 0.001}")
    assert code == 2
    assert "a has no tokenizer.json: copy one into it, " in err
    assert "on the Hub; the task text has ids of bytes of 256 ids" in err
    for made in (plain_bytes(), OTHER["byte pairs"]):
        (tmp_path / "words.json").write_text(made.text)
        code, out, err = call("generate", "a", "--prompt", "Emma", "--max-new", 4, "--tokenizer", "words.json")
        assert code == 0, err
        assert out.startswith("Emma")
    assert call("eval", "a", "task={kind: text, length: 8, share: 0.001}", "--tokenizer", "bytes")[0] == 0
    models.save("b", *models.load("a"), OTHER["byte pairs"])
    assert call("distill", "b", "--order", "4", "--out", "c")[0] == 0
    assert models.tokenizer("c").text == OTHER["byte pairs"].text
    assert call("distill", "a", "--order", "4", "--out", "d")[0] == 0
    assert models.tokenizer("d") is None
    code, _, err = call("tokenize", "words.json", "--out", "corpus", "--tokenizer", "a")
    assert code == 2
    assert "a has no tokenizer.json; name one that has it" in err
    small = LMSpec(vocab=16, d_model=8, pattern=["s4d"])
    models.save("small", small.build(), small)
    code, _, err = call("generate", "small", "--prompt", "a", "--tokenizer", "bytes")
    assert code == 2
    assert "the tokenizer has 256 ids and small knows 16; give the one it was trained with" in err
    code, _, err = call("generate", "b", stdin=b"\xff")
    assert code == 2
    assert "the text is not UTF-8: invalid start byte at byte 0; only models of bytes take that" in err


def test_a_run_from_before_there_were_such_files(novel, call, tmp_path):
    """What its task says."""
    shutil.copytree(novel / "run", tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "tokenizer.json").unlink()
        about = json.loads((folder / "manifest.json").read_text())
        del about["tokenizer.json"]
        (folder / "manifest.json").write_text(json.dumps(about))
    assert models.tokenizer(tmp_path / "run") is None
    write = "--prompt", "Emma ", "--max-new", 9, "--seed", 0
    assert call("generate", tmp_path / "run", *write)[:2] == call("generate", novel / "run", *write)[:2]


def test_a_task_whose_tokenizer_does_not_fit_is_named_before_it_is_trained_on(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from longwave.tasks import InductionHeads\nfrom longwave.tokenizer import plain_bytes\n\n\n"
        "class Own(InductionHeads):\n    tokenizer = property(lambda self: plain_bytes())\n"
    )
    words = "the tokenizer has 256 ids and the {} knows"
    code, _, err = call("train", "demo", "task=own.py:Own", f"model={{kind: lm, {TINY}}}", *SHORT, "--out", "run")
    assert code == 2
    assert words.format("model") in err
    code, out, _ = call("check", "own.py:Own")
    assert code == 1
    assert words.format("task") in out


def test_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "tokenizer.json").write_text(OTHER["unigram"].text)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: f"{tmp_path}/{file}")
    assert find("owner/name").text == OTHER["unigram"].text

    def offline(name, file):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"no file owner/name, nor a tokenizer.json of it that .* gives: no network$"):
        find("owner/name")


def test_hyena_dna_is_imported_with_its_letters(call, tmp_path):
    """The words of its ids are no file of the release, and known."""
    torch.save({"state_dict": golden("hyenadna__lm_hidden_L64").state(torch.float32)}, tmp_path / "weights.ckpt")
    code, out, err = call("import", tmp_path / "weights.ckpt", "--to", tmp_path / "dna")
    assert code == 0, err
    assert "tokenizer" not in out
    made = models.tokenizer(tmp_path / "dna")
    assert made.text == TOKENIZER.text
    assert made.prompt(b"ACGTN[SEP]") == [7, 8, 9, 10, 11, 1]
    code, out, err = call("generate", tmp_path / "dna", "--prompt", "ACGT", "--max-new", 5)
    assert code == 0, err
    assert re.fullmatch("ACGT[ACGTN]{0,5}\n", out)
    (tmp_path / "a.fa").write_text(">one\n" + "ACGTNGGTA" * 60 + "\n")
    task = f"kind: dna, files: [{tmp_path / 'a.fa'}], length: 32, tail: 0.5"
    code, _, err = call("eval", tmp_path / "dna", f"task={{{task}}}")
    assert code == 2
    assert "trained on characters A C G T N of 12 ids, and the task dna has characters A C G T N of 5 ids; " in err
    assert "evaluate it with task.ids=hyenadna" in err
    code, out, err = call("eval", tmp_path / "dna", f"task={{{task}, ids: hyenadna}}")
    assert code == 0, err
    assert "accuracy" in out
