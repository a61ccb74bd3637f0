"""longwave's models inside ``transformers``: every face equal to longwave's own forward and generate."""

import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from longwave.hf import (
    LongwaveConfig,
    LongwaveForCausalLM,
    LongwaveForMaskedLM,
    LongwaveForSequenceClassification,
    StateCache,
)
from longwave.mixers import MIXERS
from longwave.models import (
    ClassifierSpec,
    LMSpec,
    MaskedLMSpec,
    RegressorSpec,
    SashimiSpec,
    generate,
    load,
    save,
    tokenizer,
)
from longwave.models.storage import read_tensors
from longwave.nn.frozen import stands_still
from longwave.tokenizer import END, MASK, learn, plain_bytes
from longwave.train import load_recipe
from longwave.train.loop import train

transformers.utils.logging.disable_progress_bar()

PATTERNS = {
    "s4d": ["s4d"],
    "mamba": ["mamba"],
    "hyena": [{"kind": "hyena", "max_len": 64}],
    "hybrid": ["s4d", {"kind": "attention", "heads": 2}, "mamba"],
}
PROGRAM = str(Path(sys.executable).with_name("longwave"))
QUIET = {"do_sample": False, "pad_token_id": 0}


def spec_of(name, vocab=32, **options):
    if name == "hybrid":
        options = {"embedding_scale": 2.0, "soft_cap": 5.0, **options}
    return LMSpec(vocab=vocab, d_model=16, pattern=PATTERNS[name], **options)


def face(spec, seed=0):
    """A model of ``transformers`` and the longwave model in it, in float64."""
    torch.manual_seed(seed)
    classes = {"masked_lm": LongwaveForMaskedLM, "classifier": LongwaveForSequenceClassification}
    made = classes.get(spec.kind, LongwaveForCausalLM)(LongwaveConfig(spec=spec)).double().eval()
    return made, made.model


def ids_of(*shape, vocab=32, seed=1):
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PATTERNS)
def pair(request):
    return face(spec_of(request.param))


@pytest.fixture
def hybrid():
    return face(spec_of("hybrid"))


@pytest.fixture
def folder(tmp_path):
    """A saved model of bytes with an end."""
    torch.manual_seed(0)
    spec = spec_of("hybrid", vocab=257)
    save(tmp_path / "model", spec.build().double(), spec, plain_bytes(END))
    return tmp_path / "model"


def same(a, b):
    return (a - b).abs().max().item() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", [*PATTERNS, "positions", "sashimi"])
def test_folders_open_either_way(tmp_path, name):
    """What longwave saves opens in transformers, and what that saves in longwave; every tensor is the same."""
    if name == "positions":  # with a buffer that holds nothing
        spec = spec_of("s4d").model_copy(update={"positions": MIXERS.make("sinusoidal_positions")})
    else:
        spec = SashimiSpec(vocab=32, d_model=8, layers=1) if name == "sashimi" else spec_of(name)
    torch.manual_seed(0)
    model, ids = spec.build().double().eval(), ids_of(2, 9)
    save(tmp_path / "own", model, spec)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert type(theirs) is LongwaveForCausalLM
    assert theirs.dtype is torch.float64
    assert same(theirs(ids).logits, model(ids)[0])
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours, found = load(tmp_path / "theirs")
    assert found == spec
    assert again.model.head.weight is again.model.embedding.weight
    for other in (again.model, ours):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert same(other(ids)[0], model(ids)[0])
    assert "model.head.weight" not in read_tensors(tmp_path / "theirs/model.safetensors")


def test_config_is_its_spec(tmp_path):
    spec = spec_of("hybrid")
    config = LongwaveConfig(spec=spec, eos_token_id=3)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert [stored[n] for n in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")] == [
        "longwave",
        32,
        16,
        3,
    ]
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.model_spec() == spec
    assert (again.vocab_size, again.tie_word_embeddings, again.eos_token_id) == (32, True, 3)
    again.vocab_size = 40
    assert again.model_spec().vocab == 40


@torch.no_grad()
def test_resized_embeddings_are_saved(tmp_path, hybrid):
    made, model = hybrid
    before = model(ids_of(1, 5))[0]
    made.resize_token_embeddings(40)
    made.save_pretrained(tmp_path)
    again, spec = load(tmp_path)
    assert spec.vocab == 40
    assert same(again(ids_of(1, 5))[0][..., :32], before)


def test_a_run_opens(tmp_path):
    changes = ["steps=2", "eval_every=2", "model.d_model=8", "batch=2", "task.length=16"]
    train(load_recipe("demo", changes), tmp_path / "run")
    made = LongwaveForCausalLM.from_pretrained(tmp_path / "run")
    ids = ids_of(1, 7)
    assert same(made(ids).logits, load(tmp_path / "run")[0](ids)[0])
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    assert same(AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits, made(ids).logits)
    assert AutoTokenizer.from_pretrained(checkpoint)("Emma").input_ids == list(b"Emma")


@torch.no_grad()
def test_bfloat16_is_that_of_longwave(tmp_path):
    spec = spec_of("hyena")
    torch.manual_seed(0)
    model, ids = spec.build().eval(), ids_of(2, 9)
    save(tmp_path, model, spec)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = dict(model.to(torch.bfloat16).named_buffers())
    assert {name: t.dtype for name, t in made.model.named_buffers()} == {name: t.dtype for name, t in ours.items()}
    assert torch.equal(made(ids).logits, model(ids)[0])


@torch.no_grad()
def test_a_cache_reads_on(pair):
    made, model = pair
    ids = ids_of(2, 12)
    first = made(ids[:, :5], use_cache=True)
    fork = copy.deepcopy(first.past_key_values)
    rest = made(ids[:, 5:], past_key_values=first.past_key_values, logits_to_keep=3)
    assert rest.past_key_values.get_seq_length() == 12
    assert same(rest.logits, model(ids)[0][:, -3:])
    assert fork.get_seq_length() == 5
    assert same(made(ids[:, 5:7], past_key_values=fork).logits, model(ids[:, :7])[0][:, 5:])
    assert made(ids).past_key_values is None


@torch.no_grad()
def test_greedy_is_longwaves(pair):
    made, model = pair
    ids = ids_of(2, 8)
    new = made.generate(ids, max_new_tokens=14, **QUIET)[:, 8:]
    assert new.tolist() == generate(model, ids, 14)


@torch.no_grad()
def test_prompts_padded_on_the_left_are_as_alone(pair):
    made, model = pair
    rows = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 3, 1]]
    ids = torch.tensor([[31] * (6 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])
    new = made.generate(ids, attention_mask=mask, max_new_tokens=12, **QUIET)[:, 6:]
    assert new.tolist() == generate(model, rows, 12)
    chunked = made.generate(ids, attention_mask=mask, max_new_tokens=12, prefill_chunk_size=4, **QUIET)[:, 6:]
    assert torch.equal(chunked, new)


def test_sampling_draws_what_the_model_says(hybrid):
    made, _ = hybrid
    rows = [made.generate(ids_of(1, 5), max_new_tokens=9, do_sample=True, top_k=0, pad_token_id=0, use_cache=cached)
            for cached in (True, False) if torch.manual_seed(3)]  # fmt: skip
    assert torch.equal(*rows)
    many = made.generate(ids_of(1, 5), max_new_tokens=9, do_sample=True, num_return_sequences=4, pad_token_id=0)
    assert len({tuple(row) for row in many.tolist()}) > 1


def test_beams_reorder_states(pair, monkeypatch):
    made, _ = pair
    taken, reorder = [], StateCache.reorder_cache
    monkeypatch.setattr(StateCache, "reorder_cache", lambda self, rows: taken.append(rows) or reorder(self, rows))
    options = {"max_new_tokens": 9, "num_beams": 4, "num_return_sequences": 4, **QUIET}
    beams = made.generate(ids_of(2, 6), **options)
    assert torch.equal(beams, made.generate(ids_of(2, 6), use_cache=False, **options))
    assert any(rows.tolist() != list(range(8)) for rows in taken)


def test_returned_cache_goes_on(pair, monkeypatch):
    made, model = pair
    ids, read = ids_of(2, 6), []
    first = made.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **QUIET)
    forward = type(model.backbone).forward
    monkeypatch.setattr(
        type(model.backbone), "forward", lambda self, x, *a, **k: read.append(x.shape[1]) or forward(self, x, *a, **k)
    )
    more = made.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **QUIET)
    assert read == [1, 1, 1, 1]
    monkeypatch.undo()
    assert more[:, 6:].tolist() == generate(model, ids, 9)


@pytest.mark.parametrize("turn", [1, -1])
def test_an_assistant_may_have_another_tokenizer(tmp_path, turn):
    for name, made in (
        ("bytes", plain_bytes(END)),
        ("pairs", learn(["the cat sat on the mat and the other"] * 3, 280)),
    ):
        torch.manual_seed(0)
        spec = spec_of("mamba", vocab=made.vocab)
        save(tmp_path / name, spec.build().double(), spec, made)
    paths = [tmp_path / name for name in ("bytes", "pairs")][::turn]
    big, small = map(AutoModelForCausalLM.from_pretrained, paths)
    tok, other = map(AutoTokenizer.from_pretrained, paths)
    inputs, options = tok("the cat", return_tensors="pt"), {"max_new_tokens": 16, "do_sample": False}
    found = big.generate(**inputs, **options, assistant_model=small, tokenizer=tok, assistant_tokenizer=other)
    assert torch.equal(found, big.generate(**inputs, **options))


@pytest.mark.parametrize("helper", ["small", "itself", "lookup"])
def test_assisted_is_greedy(pair, helper):
    """Whatever is guessed ahead, and however much of it is taken back."""
    made, _ = pair
    ids = torch.tensor([[0, 0, 5, 6, 7, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone = made.generate(ids, attention_mask=mask, max_new_tokens=24, **QUIET)
    assistant = {"small": face(LMSpec(vocab=32, d_model=8, pattern=["s4d"]), 5)[0], "itself": made}.get(helper)
    options = {"prompt_lookup_num_tokens": 3} if assistant is None else {"assistant_model": assistant}
    assert torch.equal(made.generate(ids, attention_mask=mask, max_new_tokens=24, **options, **QUIET), alone)


@torch.no_grad()
def test_crop_goes_back(pair):
    made, model = pair
    ids, cache = ids_of(3, 10), StateCache()
    cache.activate_past_recording()
    made(ids[:, :4], past_key_values=cache)
    made(ids[:, 4:8], past_key_values=cache, logits_to_keep=3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.batch_size) == (6, 2)
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    other = ids_of(4, 3, seed=7)
    expected = model(torch.cat([ids[rows, :6], other], 1))[0][:, 6:]
    assert same(made(other, past_key_values=cache).logits, expected)
    for count in (1, 2, 3, 2):  # within what is unread, and behind it
        cache.crop(-count)
    assert cache.get_seq_length() == 1
    assert same(made(other, past_key_values=cache).logits, model(torch.cat([ids[rows, :1], other], 1))[0][:, 1:])
    with pytest.raises(ValueError, match=r"cannot take back 9 tokens: states before the last \d are kept"):
        cache.crop(-9)
    cache.reset()
    assert same(made(other, past_key_values=cache).logits, model(other)[0])


def test_what_follows_from_weights_is_kept_while_generating(hybrid):
    made, model = hybrid
    helper = face(spec_of("s4d"))[0]
    kept = []
    for part in (model.backbone, helper.model.backbone):
        part.register_forward_pre_hook(lambda module, _: kept.append(stands_still(module)))
    made.generate(ids_of(1, 4), max_new_tokens=5, assistant_model=helper, **QUIET)
    assert len(kept) > 4
    assert all(kept)
    made(ids_of(1, 4))
    assert not kept[-1]


@pytest.mark.parametrize("at", ["left", "middle", "right"])
@pytest.mark.parametrize("kind", ["hybrid", "hyena", "masked", "classifier"])
def test_padding_is_no_padding(at, kind):
    """Logits, loss and gradients, in training and evaluation."""
    if kind == "masked":
        spec = MaskedLMSpec(vocab=32, d_model=16, pattern=["bigs"])
    elif kind == "classifier":
        spec = ClassifierSpec(vocab=32, d_model=16, pattern=["s4d"], classes=3)
    else:
        spec = spec_of(kind)
    made, _ = face(spec)
    ids, pad = ids_of(2, 7), torch.full((2, 3), 99)  # no id of the model
    cut = {"left": 0, "middle": 4, "right": 7}[at]
    padded = torch.cat([ids[:, :cut], pad, ids[:, cut:]], 1)
    mask = torch.cat([torch.ones(2, cut), torch.zeros(2, 3), torch.ones(2, 7 - cut)], 1).long()
    labels = torch.tensor([0, 2]) if kind == "classifier" else ids
    more = labels if kind == "classifier" else torch.cat([ids[:, :cut], pad * 0 - 100, ids[:, cut:]], 1)
    for mode in (True, False):
        made.train(mode)
        found = []
        for options in ({"input_ids": ids, "labels": labels},
                        {"input_ids": padded, "labels": more, "attention_mask": mask}):  # fmt: skip
            made.zero_grad()
            out = made(**options)
            out.loss.backward()
            found.append((out.loss, torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])))
            logits = out.logits
        assert same(found[0][0], found[1][0])
        assert same(found[0][1], found[1][1])
    kept = logits if kind == "classifier" else torch.cat([logits[:, :cut], logits[:, cut + 3 :]], 1)
    assert same(kept, made(ids).logits)
    target = {"classifier": (kept, labels), "masked": (kept, ids)}.get(kind, (kept[:, :-1], ids[:, 1:]))
    assert same(found[0][0], F.cross_entropy(target[0].reshape(-1, target[0].shape[-1]), target[1].reshape(-1)))


@torch.no_grad()
def test_masked_lm_and_classifier_open(tmp_path):
    for spec, auto in (
        (MaskedLMSpec(vocab=257, d_model=16, pattern=["bigs"]), transformers.AutoModelForMaskedLM),
        (
            ClassifierSpec(vocab=257, d_model=16, pattern=["s4d"], classes=3),
            transformers.AutoModelForSequenceClassification,
        ),
    ):
        torch.manual_seed(0)
        model, ids = spec.build().double().eval(), ids_of(2, 9)
        save(tmp_path / spec.kind, model, spec, plain_bytes(MASK))
        made = auto.from_pretrained(tmp_path / spec.kind)
        assert same(made(ids).logits, model(ids))
        made.save_pretrained(tmp_path / "again")
        assert same(load(tmp_path / "again")[0](ids), model(ids))
    assert made.config.num_labels == 3
    typed, model = face(MaskedLMSpec(vocab=32, d_model=16, pattern=["bigs"], types=2))
    ids, types = ids_of(2, 9), ids_of(2, 9, vocab=3) - 1
    assert same(typed(ids, token_type_ids=types).logits, model(ids, types=types))
    losses = [typed.train(mode)(ids, token_type_ids=types, labels=ids).loss for mode in (True, False)]
    assert same(*losses)
    (found,) = pipeline("fill-mask", model=str(tmp_path / "masked_lm"))("he[MASK]lo", top_k=1)
    logits = load(tmp_path / "masked_lm")[0](torch.tensor([[*b"he", 256, *b"lo"]]))
    assert found["token"] == logits[0, 2].argmax().item()
    (label,) = pipeline("text-classification", model=str(tmp_path / "classifier"))("hello")
    assert label["label"] == f"LABEL_{load(tmp_path / 'classifier')[0](torch.tensor([[*b'hello']])).argmax().item()}"


@torch.no_grad()
def test_pipeline_writes_text(folder):
    made = AutoTokenizer.from_pretrained(folder)
    assert (made.padding_side, made.eos_token_id, made.pad_token_id, len(made)) == ("left", 256, 256, 257)
    write = pipeline("text-generation", model=str(folder))
    texts = ["Hello", "a"]
    found = write(texts, max_new_tokens=9, do_sample=False, batch_size=2, return_full_text=False)
    rows = generate(load(folder)[0], [list(text.encode()) for text in texts], 9, stop=[256])
    assert [row[0]["generated_text"] for row in found] == [plain_bytes(END).decode(row) for row in rows]
    made.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    assert again("Héllo <|endoftext|>") == made("Héllo <|endoftext|>")
    assert tokenizer(folder).agrees(plain_bytes(END))


def test_generation_ends_where_the_document_does(folder):
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.generation_config.eos_token_id == 256


@torch.no_grad()
def test_padding_may_have_an_id_that_the_model_has_not(tmp_path):
    """As one that is added to a tokenizer of plain bytes."""
    torch.manual_seed(0)
    spec = spec_of("s4d", vocab=256)
    model = spec.build().double().eval()
    save(tmp_path, model, spec, plain_bytes())
    tok = AutoTokenizer.from_pretrained(tmp_path)
    assert tok.pad_token is None
    tok.add_special_tokens({"pad_token": "<pad>"})
    tok.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["Hello", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids.max() == 256
    new = made.generate(**batch, max_new_tokens=6, do_sample=False)[:, 5:]
    assert new.tolist() == generate(model, [list(b"Hello"), list(b"a")], 6)


def test_streamers_see_every_token(folder):
    made, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    streamer = transformers.TextIteratorStreamer(tok, skip_prompt=True)
    inputs = tok("Hello", return_tensors="pt")
    thread = threading.Thread(
        target=made.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 9, "do_sample": False}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tok.decode(made.generate(**inputs, max_new_tokens=9, do_sample=False)[0, 5:])


def test_trainer_resumes_exactly(tmp_path):
    spec = spec_of("hybrid", dropout=0.1)
    rows = [{"input_ids": row, "labels": row} for row in ids_of(16, 12).tolist()]

    def run(out, steps, resume=None):
        torch.manual_seed(0)
        model = LongwaveForCausalLM(LongwaveConfig(spec=spec))
        arguments = transformers.TrainingArguments(
            str(out), max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, seed=3, report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    resumed = run(tmp_path / "resumed", 4, str(tmp_path / "whole/checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model, _ = load(tmp_path / "whole/checkpoint-4")
    score = model.score(
        torch.tensor([r["input_ids"] for r in rows])[:, :-1], torch.tensor([r["labels"] for r in rows])[:, 1:]
    )
    assert whole.evaluate()["eval_loss"] == pytest.approx((score.loss / score.total).item(), rel=1e-5)


LINEARS = [(name, i) for name, cls in MIXERS.items() for i in range(len(cls.examples))]


@torch.no_grad()
@pytest.mark.parametrize(("name", "i"), LINEARS)
def test_lora_on_every_projection_is_what_merging_it_gives(name, i):
    """A mixer that read a weight past its module would leave the adapter out."""
    import peft

    kind = LMSpec if MIXERS[name].causal else MaskedLMSpec
    made, _ = face(kind(vocab=16, d_model=8, pattern=[{"kind": name, **MIXERS[name].examples[i]}]))
    ids = ids_of(2, 7, vocab=16)
    before = made(ids).logits
    linear = [n for n, part in made.named_modules() if isinstance(part, torch.nn.Linear) and n != made.logits]
    for module in linear:
        adapted = peft.get_peft_model(
            copy.deepcopy(made), peft.LoraConfig(target_modules=[module], r=2, init_lora_weights=False)
        )
        adapted = adapted.double().eval()
        found = adapted(input_ids=ids).logits
        assert not torch.allclose(found, before, atol=1e-9, rtol=0), module
        assert same(found, adapted.merge_and_unload()(input_ids=ids).logits), module


def test_lora_trains_saves_and_generates(tmp_path, hybrid):
    import peft

    made, _ = hybrid
    made.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    adapted, ids = peft.get_peft_model(made, config).double(), ids_of(4, 9)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = LongwaveForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert same(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    new = again.generate(input_ids=ids, max_new_tokens=6, **QUIET)
    merged = again.merge_and_unload()
    assert new[:, 9:].tolist() == generate(merged.model, ids, 6)
    merged.save_pretrained(tmp_path / "merged")
    assert same(load(tmp_path / "merged")[0](ids)[0], merged(ids).logits)


@torch.no_grad()
def test_lm_eval_scores_and_writes(tmp_path, folder, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"context": f"{word} is", "good": f" {word}", "bad": " not it"} for word in ("one", "two", "three")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
    }
    text = {"doc_to_text": "{{context}}", "target_delimiter": ""}
    choice = {
        **text,
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "own_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    write = {
        **text,
        "task": "own_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{good}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    tasks = [choice, rolling, write]
    for task in tasks:
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**about, **task}))
    made, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    judged = lm_eval.simple_evaluate(
        model=HFLM(pretrained=made, tokenizer=tok, batch_size=2, device="cpu", max_length=64),
        tasks=[task["task"] for task in tasks], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    model = load(folder)[0].double()

    def told(context, text):
        ids = torch.tensor([[*context, *text]])
        spoken = model(ids)[0].log_softmax(-1)[0, len(context) - 1 : -1]
        return spoken.gather(1, torch.tensor([[t] for t in text])).sum().item()

    for sample in judged["samples"]["own_choice"]:
        row = sample["doc"]
        found = [answer[0] for answer in sample["filtered_resps"]]
        expected = [told(row["context"].encode(), row[key].encode()) for key in ("good", "bad")]
        assert found == pytest.approx(expected, rel=1e-5)
    bits = (
        -sum(told([256], row["context"].encode()) for row in rows)
        / sum(len(row["context"]) for row in rows)
        / torch.log(torch.tensor(2.0))
    )
    assert judged["results"]["own_text"]["bits_per_byte,none"] == pytest.approx(bits.item(), rel=1e-5)
    for sample in judged["samples"]["own_writing"]:
        (row,) = generate(model, [list(sample["doc"]["context"].encode())], 6, stop=[10, 256])
        assert sample["resps"][0][0] == plain_bytes(END).decode(row).split("\n")[0]


def refuses(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input(tmp_path, hybrid):
    made, _ = hybrid
    ids = ids_of(2, 5)
    ends = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    refuses(r"set padding_side='left'", lambda: made.generate(ids, attention_mask=ends, max_new_tokens=3, **QUIET))
    refuses(r"leave out 'static'", lambda: made.generate(ids, cache_implementation="static", max_new_tokens=3, **QUIET))
    refuses(r"a StateCache; got a DynamicCache", lambda: made(ids, past_key_values=transformers.DynamicCache()))
    refuses(r"has no output_attentions \(got a bool\)", lambda: made(ids, output_attentions=True))
    refuses(r"has no position_ids \(got a Tensor\)", lambda: made(ids, position_ids=ids))
    refuses(r"token ids lie in 0..31; got 99", lambda: made(torch.tensor([[99]])))
    refuses(r"of 2 sequences, x of 1", lambda: made(ids[:1], past_key_values=made(ids, use_cache=True).past_key_values))
    refuses(
        r"the spec of this config does not describe a model: .* got None", lambda: LongwaveForCausalLM(LongwaveConfig())
    )
    bad = {"kind": "lm", "d_model": 8, "pattern": ["s44"]}
    refuses(r"pattern.0: no mixer is called 's44'", lambda: LongwaveForCausalLM(LongwaveConfig(spec=bad)))
    refuses(r"there is no folder /a/b/c", lambda: LongwaveForCausalLM.from_pretrained("/a/b/c"))
    refuses(
        r"opens a masked_lm; LongwaveForCausalLM a lm", lambda: LongwaveForMaskedLM(LongwaveConfig(spec=spec_of("s4d")))
    )
    numbers = LongwaveConfig(spec=RegressorSpec(d_model=8, pattern=["s4d"], features=1, width=1))
    refuses(r"longwave.models.load a regressor", lambda: LongwaveForCausalLM(numbers))


ENDING = [
    {"pattern": [{"kind": "hyena", "max_len": 16}]},
    {"pattern": ["s4d"], "positions": {"kind": "learned_positions", "max_len": 16}},
]


@pytest.mark.parametrize("options", ENDING)
def test_a_text_beyond_the_model_says_by_how_much(options):
    made, model = face(LMSpec(vocab=32, d_model=8, **options))
    ids = ids_of(1, 10)
    refuses(
        r"are 18, and filters or positions .* end at 16; take 1 fewer",
        lambda: made.generate(ids, max_new_tokens=8, **QUIET),
    )
    assert made.generate(ids, max_new_tokens=7, **QUIET)[:, 10:].tolist() == generate(model, ids, 7)
    padded = torch.cat([torch.zeros(1, 9).long(), ids], 1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 10)], 1).long()
    assert made.generate(padded, attention_mask=mask, max_new_tokens=7, **QUIET)[:, 19:].tolist() == generate(
        model, ids, 7
    )


def test_weights_of_another_model_are_refused(tmp_path, hybrid):
    made, _ = hybrid
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spec"]["layers"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(
        r"is not as its config; missing: model.backbone.layers.3.channel.down.weight, .* and \d+ more",
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    config["spec"]["layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(r"is not as its config; unexpected: ", lambda: AutoModelForCausalLM.from_pretrained(tmp_path))


def test_programs_of_others_know_the_models():
    run = subprocess.run([PROGRAM, "hf", "transfrmers"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "did you mean 'transformers'?" in run.stderr


@pytest.mark.slow
@torch.no_grad()
def test_transformers_serve_speaks_to_a_client(folder):
    """Half a minute, most of it imports."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "hf", "transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(200):
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(1)
        ask = {"model": str(folder), "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        (row,) = generate(load(folder)[0], [list(b"Hello")], 8, stop=[256])
        expected = plain_bytes(END).decode(row)
        assert client.completions.create(**ask).choices[0].text == expected
        parts = client.completions.create(**ask, stream=True)
        assert "".join(part.choices[0].text for part in parts if part.choices) == expected
    finally:
        server.terminate()
        server.wait()
