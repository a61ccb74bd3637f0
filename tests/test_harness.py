"""lm-eval's questions: choices behind one prefix, whole texts and generation, against reading everything at once."""

import json

import pytest
import torch
import yaml

from longwave.models import LMSpec
from longwave.results import harness
from longwave.tokenizer import plain_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["The cat sat on the mat.", "Once upon a time there was a story. It was long."]


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def asked():
    torch.manual_seed(0)
    model = LMSpec(d_model=16, pattern=["mamba", "s4d", "attention"], vocab=256, channel=None)
    return harness.Harness(model.build().double(), plain_bytes())


def alone(asked, prefix, text):
    """Both at once, without a state."""
    ids = list((prefix + text).encode())
    begin = len(prefix.encode())
    logits = asked.model(torch.tensor([ids[:-1]]))[0][0, begin - 1 :].log_softmax(-1)
    wanted = torch.tensor(ids[begin:])
    return logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


@torch.no_grad()
def test_choices_behind_one_prefix_are_as_if_each_were_read_alone(asked):
    pairs = [(TEXTS[0], text) for text in (" Yes", " No, it did not", "!", " Maybe so")] + [(TEXTS[1], " Why?")]
    pairs.insert(2, ("Another", " one"))
    found = asked.loglikelihood([Request(*pair) for pair in pairs])
    for pair, (logp, greedy) in zip(pairs, found):
        expected = alone(asked, *pair)
        assert logp == pytest.approx(expected[0], rel=1e-10)
        assert greedy == expected[1]
    (best,) = asked.generate_until([Request(TEXTS[0], {"max_gen_toks": 3})])
    if len(best.encode()) == 3:
        assert asked.loglikelihood([Request(TEXTS[0], best)])[0][1]


@torch.no_grad()
def test_a_prefix_is_read_once(asked, monkeypatch):
    read = []
    forward = type(asked.model).forward

    def counted(self, ids, *rest, **options):
        read.append(ids.numel())
        return forward(self, ids, *rest, **options)

    monkeypatch.setattr(type(asked.model), "forward", counted)
    asked.loglikelihood([Request("x" * 100, f" {i}") for i in range(4)])
    assert sum(read) == 100 + 4 * 1


@torch.no_grad()
def test_whole_texts_are_carried_through_chunks(asked, monkeypatch):
    monkeypatch.setattr(harness, "CHUNK", 7)
    found = asked.loglikelihood_rolling([Request(text) for text in TEXTS])
    begin = bytes([asked.beginning]).decode() if asked.beginning < 128 else None
    assert begin == "\n"
    for text, logp in zip(TEXTS, found):
        assert logp == pytest.approx(alone(asked, begin, text)[0], rel=1e-10)


def test_generation_ends_where_it_is_told(asked):
    (whole,) = asked.generate_until([Request("The ", {"max_gen_toks": 30})])
    cut = whole[5]
    (ended,) = asked.generate_until([Request("The ", {"max_gen_toks": 30, "until": [cut]})])
    assert ended == whole.partition(cut)[0]


def test_a_task_of_local_files_is_asked(asked, tmp_path):
    rows = [
        {"q": f"{a} and {b} make", "choices": [" more", " less"], "gold": a % 2} for a in range(4) for b in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {split: str(tmp_path / "data.jsonl") for split in ("train", "test")}
    task = {
        "task": "local_choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(tmp_path)},
        "output_type": "multiple_choice",
        "test_split": "test", "fewshot_split": "train", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task))
    found = harness.ask(asked.model, asked.tokenizer, ["local_choice"], 2, tmp_path, None)
    assert 0 <= found["local_choice"]["acc"] <= 1
    with pytest.raises(ValueError, match="no task of lm-eval"):
        harness.ask(asked.model, asked.tokenizer, ["local_choices"], 0, tmp_path, None)
