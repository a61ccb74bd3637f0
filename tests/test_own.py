"""Classes of one's own run by path or entry point, and only where the caller says so."""

import pickle
import re
import subprocess
import sys

import pytest
import torch

from longwave import cli, own
from longwave.contract import checks
from longwave.contract import mixers as mixer_contract
from longwave.contract.mixers import EVERY, STATES
from longwave.mixers import MIXERS, mixer
from longwave.models import ClassifierSpec, LMSpec, load, save
from longwave.nn import FILTERS
from longwave.train import load_recipe, train
from longwave.train.lookup import look_up, overview
from longwave.train.runs import load_run

TASK = """
from typing import ClassVar
from longwave.tasks import EVAL, TRAIN, Label, Row, Task, Tokens, random_stream

open("ran", "a").write("x")

class Parity(Task):
    "Is the number of ones odd?"

    inputs, targets, metric, higher_is_better = Tokens(2), Label(2), "accuracy", True
    length: int = 8
    longest = property(lambda self: self.length)
    eval_rows: ClassVar[int] = 20

    def train_row(self, seed, number):
        return self.draw(random_stream(seed, TRAIN, number))

    def eval_row(self, number):
        return self.draw(random_stream(0, EVAL, number))

    def draw(self, random):
        bits = random.integers(2, size=self.length)
        return Row(bits, bits.sum() % 2)

class Half(Task):
    pass
"""
MIXER = """
from longwave.mixers import S4D
from longwave.nn import S4DFilter

class Foo(S4D):
    "S4D by another name."

    def __init__(self, d_model: int, d_state: int = 4):
        super().__init__(d_model, d_state)

class Taps(S4DFilter):
    "Modes by another name."
"""
TINY = [
    "model={kind: classifier, d_model: 8, pattern: [s4d]}", "steps=4", "batch=4", "threads=1", "accelerator=cpu",
    "checkpoint_every=2", "eval_every=4",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "foo.py").write_text(MIXER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_task_of_a_file_is_trained_resumed_and_loaded(here):
    own.trust("my_task.py")
    recipe = load_recipe("demo", [*TINY, "task.kind=my_task.py:Parity"])
    assert (recipe.task.kind, recipe.task.length, recipe.model.classes) == ("my_task.py:Parity", 256, 2)
    assert pickle.loads(pickle.dumps(recipe.task)) == recipe.task
    recipe = load_recipe("demo", [*TINY, "task=my_task.py:Parity"])
    whole = train(recipe, "whole")
    train(recipe.model_copy(update={"steps": 2}), "half")
    assert train(load_recipe("half/config.yaml", ["steps=4"]), "half", resume="half") == whole
    assert load_run(here / "half", [])[0] == load_recipe("whole/config.yaml")
    assert "Is the number of ones odd?" in look_up("my_task.py:Parity")


def test_no_file_runs_that_the_caller_has_not_named(here):
    (here / "recipe.yaml").write_text("{task: {kind: 'my_task.py:Parity'}, model: {kind: classifier, d_model: 4}}")
    with pytest.raises(ValueError, match=r"task: 'my_task.py:Parity' is a file, and a config .* --trust my_task.py "):
        load_recipe("recipe.yaml")
    own.trust("foo.py")
    spec = LMSpec(vocab=5, d_model=4, pattern=["foo.py:Foo", {"kind": "conv", "filter": "foo.py:Taps"}])
    save("saved", spec.build(), spec)
    own._modules.clear()
    MIXERS.pop("foo.py:Foo")
    FILTERS.pop("foo.py:Taps")
    with pytest.raises(ValueError, match=r"config.json .* pattern.0: 'foo.py:Foo' is a file, .* --trust foo.py "):
        load("saved")
    assert not (here / "ran").exists()
    (here / "elsewhere").mkdir()
    (here / "foo.py").rename(here / "elsewhere/foo.py")
    own.trust("elsewhere/foo.py")  # it has moved since
    model, loaded = load("saved")
    assert loaded.model_dump() == spec.model_dump()
    assert (model.backbone.mixers[0].name, type(model.backbone.mixers[1].kernel).__name__) == ("Foo", "Taps")


def test_the_command_line_allows_what_it_names(here):
    def longwave(*arguments):
        return subprocess.run([sys.executable, "-m", "longwave.cli", *arguments], capture_output=True, text=True)

    made = longwave("train", "demo", "task=my_task.py:Parity", *TINY, "--out", "run")
    assert made.returncode == 0, made.stderr
    assert f"next: longwave --trust {here / 'my_task.py'} eval run" in made.stderr
    refused = longwave("eval", "run")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "allow it by longwave --trust my_task.py" in refused.stderr
    assert longwave("--trust", "my_task.py", "eval", "run").returncode == 0
    assert (here / "ran").read_text() == "xx"
    drawn = longwave("show", "my_task.py:Parity", "length=5", "--sample", "rows.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (here / "rows.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("my_task.py:Parety", r"my_task.py has no 'Parety'; did you mean 'Parity'\?"),
        ("my_task.py:Half", "my_task.py:Half is not whole: it lacks eval_row, eval_rows, inputs, longest, train_row"),
        (
            "my_task.py:random_stream",
            "my_task.py:random_stream is no task: such a class inherits longwave.tasks.base.Task",
        ),
        ("foo.py:Foo", "foo.py:Foo is no task"),
        ("gone.py:Foo", r"'gone.py:Foo' is a file, and a config runs no code: .* --trust gone.py"),
        (
            "acme:foo",
            "'acme:foo' is a task of the package acme, which is not installed here, or has no entry point 'foo'",
        ),
    ],
)
def test_a_class_that_is_not_there_is_told(here, kind, says):
    own.trust("my_task.py")
    own.trust("foo.py")
    with pytest.raises(ValueError, match=says) as caught:
        load_recipe("demo", [f"task={kind}"])
    assert str(caught.value).count("\n") < 2


def test_files_that_fail_or_are_alike_are_told(here):
    (here / "broken.py").write_text("x = 1\nraise OSError('no luck')\n")
    with pytest.raises(ValueError, match=r"broken.py, line 2: OSError: no luck"):
        own.trust("broken.py")
    with pytest.raises(ValueError, match=r"gone.py: there is no such file"):
        own.trust("gone.py")
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "foo.py").write_text(MIXER)
        own.trust(f"{name}/foo.py")
    with pytest.raises(ValueError, match=r"c/foo.py is .*a/foo.py or .*b/foo.py: trust one of them"):
        mixer("c/foo.py:Foo")
    assert mixer("b/foo.py:Foo").build(4).name == "Foo"


def test_packages_bring_classes_by_entry_points(here, monkeypatch):
    (here / "acme_models.py").write_text(MIXER + TASK + "\nbroken = 3\n")
    (here / "acme-1.0.dist-info").mkdir()
    (here / "acme-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (here / "acme-1.0.dist-info/entry_points.txt").write_text(
        "[longwave.mixers]\nfoo = acme_models:Foo\n[longwave.tasks]\nparity = acme_models:Parity\n"
        "[longwave.filters]\ntaps = acme_models:Taps\n"
    )
    monkeypatch.syspath_prepend(here)
    spec = ClassifierSpec(d_model=4, pattern=["acme:foo", {"kind": "conv", "filter": "acme:taps"}])
    recipe = load_recipe("demo", ["task=acme:parity", *TINY])
    spec = spec.serving(recipe.task)
    assert recipe.task.kind == "acme:parity"
    assert recipe.task.train_batch(2, 0, 0).inputs.shape == (2, 8)
    assert spec.build()(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 2)
    assert "acme:foo" in overview()
    assert "acme:parity" in overview()
    with pytest.raises(
        ValueError, match="'acme:fop' is a mixer of the package acme, which is not installed here, or has"
    ):
        mixer("acme:fop")
    sys.modules.pop("acme_models")


def test_the_contract_runs_on_a_class_of_ones_own(here):
    own.trust("my_task.py")
    assert {(fault, str(options)) for options, _, fault in checks("my_task.py:Parity")} == {(None, "{}")}
    (here / "wrong.py").write_text(
        TASK.replace("random_stream(seed, TRAIN, number)", "random_stream(7, TRAIN, number)")
    )
    own.trust("wrong.py")
    faults = {clause: fault for _, clause, fault in checks("wrong.py:Parity", {"length": 5}) if fault is not None}
    assert faults == {"a_batch_depends_on_seed_and_number_alone": "batches of other seeds and numbers are the same"}


LEAKY = """
from torch.nn.functional import layer_norm
from longwave.mixers import LSTM

class Leaky(LSTM):
    "It sees the future, behind a norm that hides what is added to all features."

    examples = ({},)

    def mix(self, x, state, padding):
        y, state = super().mix(x, state, padding)
        return y + layer_norm(x, x.shape[2:]).mean(1, keepdim=True), state
"""


def test_the_command_line_says_which_clauses_are_broken(here, capsys, monkeypatch):
    (here / "leaky.py").write_text(LEAKY)
    own.trust("leaky.py")
    for name in [name for name in EVERY if "gradients" in name or "compiles" in name or "export" in name]:
        monkeypatch.delitem(EVERY, name)  # they take long
    monkeypatch.setattr(
        mixer_contract, "STATES", {"chunked_is_parallel-steps-grad": STATES["chunked_is_parallel-steps-grad"]}
    )
    monkeypatch.setattr(sys, "argv", ["longwave", "check", "leaky.py:Leaky"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert "BROKEN  causal\n        not so: No output sees the future" in out
    assert "BROKEN  chunked_is_parallel-steps-grad\n        Tensor-likes are not close!" in out
    assert "ok      no_state_in_no_state_out\n" in out
    assert re.search(r"^[2-9]\d* clauses are broken$", out, re.M)
