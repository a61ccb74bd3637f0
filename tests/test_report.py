"""Runs on one page: what stands on it, and that a browser shows all of it without a network."""

import re
import shutil
import subprocess

import pytest
import torch

from longwave.results.report import look, report
from longwave.tasks import TASKS
from longwave.train.config import make_recipe
from longwave.train.loop import train

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
COMMON = {"batch": 8, "threads": 1, "accelerator": "cpu", "eval_every": 10, "log_every": 5, "lr": 5e-3}
TREES = {
    "pictures": {"task": {"kind": "images"}, "steps": 30,
                 "model": {"kind": "classifier", "d_model": 16, "pattern": ["s4d"], "channel": None}},
    "recall": {"task": {"kind": "induction_heads", "vocab_size": 8, "length": 16, "eval_examples": 30}, "steps": 20,
               "model": {"kind": "lm", "d_model": 16, "pattern": ["attention"], "channel": None}},
    "text": {"task": {"kind": "text", "length": 32, "share": 0.01}, "steps": 10,
             "model": {"kind": "lm", "d_model": 16, "pattern": ["h3", "attention"], "channel": None}},
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, tree in TREES.items():
        train(make_recipe({**COMMON, **tree}, []), folder / name, command=f"longwave train <{name}>")
    report([folder / name for name in TREES], folder / "report.html")
    return folder / "report.html"


def test_everything_stands_on_the_page_and_nothing_outside_of_it(page):
    text = page.read_text()
    for said in (
        "Training and evaluation of all runs",
        "Confusion matrix of 143 held-out rows",
        "Rows of the task",
        "Accuracy and bits against position in the row",
        "Filters of layer 0, s4d: at the start and at the end",
        "Filters of layer 0, h3",
        "<h3>Sample</h3>",
        "longwave train &lt;text&gt;",
        "effective memory",
    ):
        assert said in text, said
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)', text))
    assert "<script" not in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_shows_all_of_it(page, tmp_path):
    """A copy with a script that says whether every picture was drawn."""
    script = "document.title = [...document.images].map(i => i.naturalWidth > 100).join()"
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>onload = () => {{ {script} }}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([CHROMIUM, *flags, f"file://{copy}"], capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>([^<]*)", shown)[1].split(",")
    assert len(title) == page.read_text().count("<img")
    assert set(title) == {"true"}


def test_what_is_looked_at_adds_up():
    class Right(torch.nn.Module):
        """Tells the last id of every row, so it is right where the target is that."""

        def forward(self, ids, mask=None):
            return torch.nn.functional.one_hot(ids[:, -1:].expand_as(ids) * 0 + 1, 10).float(), None

    task = TASKS["induction_heads"](vocab_size=9, length=16, eval_examples=30)
    detail = look(Right(), task)
    targets = torch.cat([task.eval_batch(30, 0).targets.flatten()])
    counted = targets[targets != -100]
    assert sum(count for _, count, _, _ in detail.positions) == len(counted)
    assert sum(right for _, _, right, _ in detail.positions) == (counted == 1).sum()
    assert detail.confusion is None
    assert detail.lengths == []
