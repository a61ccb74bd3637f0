"""Training: what a recipe may say, what the optimiser gets, and that no stop, kill or full disk costs a run."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from longwave import own
from longwave.models import load
from longwave.models.runs import find, find_best, name_of, saved_steps
from longwave.models.score import Score
from longwave.nn import optim_hints
from longwave.tasks import Batch, Text
from longwave.train import Recipe, load_recipe, loop, recipe_names, train
from longwave.train import checkpoint as checkpoints
from longwave.train.ahead import batches
from longwave.train.checkpoint import gather
from longwave.train.evaluate import evaluate
from longwave.train.monitor import METRICS, Monitor, plot_loss, read_metrics
from longwave.train.optim import build_optimizer, schedule, set_lr
from longwave.train.ranks import Ranks

TINY = {
    "model": {
        "kind": "lm",
        "d_model": 8,
        "pattern": [{"kind": "s4d", "d_state": 4}, {"kind": "attention", "heads": 2}],
        "dropout": 0.2,
    },
    "task": {"kind": "text", "files": ["book:emma"], "length": 16, "share": 0.0002},
    "steps": 8,
    "batch": 4,
    "lr": 3e-3,
    "warmup": 2,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "accelerator": "cpu",
}


@pytest.fixture
def tiny(tmp_path):
    """A tiny recipe with changes."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return lambda *changes: load_recipe(file, changes)


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(3, act)`` calls act() once step 3 is logged, which is before it is saved."""

    def install(step, act):
        def logged(self, done, *numbers, original=Monitor.train):
            original(self, done, *numbers)
            if done == step:
                act()

        monkeypatch.setattr(Monitor, "train", logged)

    return install


def stop(number=signal.SIGTERM):
    return lambda: signal.raise_signal(number)


def digests(run):
    """SHA-256 of weights, optimiser state, best result and step of a checkpoint, or of a run's latest."""
    return json.loads((find(run) / "manifest.json").read_text())


def numbers(run):
    """Every line of metrics.jsonl without the numbers that are no function of the recipe."""
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")}
        for line in read_metrics(run)
    ]


# Recipes


def test_every_shipped_recipe_says_what_it_is():
    """That each loads, tests/test_recipes.py sees."""
    assert {"demo", "induction_mamba"} <= set(recipe_names())
    for name, line in recipe_names().items():
        assert len(line) > 20, name


def test_changes_reach_every_depth():
    recipe = load_recipe(
        "demo",
        [
            "lr=3e-4",
            "task.length=99",
            "model.pattern.0.d_state=8",
            "model.channel=mlp",
            "clip=null",
            "betas=[0.8, 0.9]",
            "eval_batch=null",
        ],
    )
    assert (recipe.lr, recipe.task.length, recipe.clip, recipe.betas) == (3e-4, 99, None, (0.8, 0.9))
    assert (recipe.model.pattern[0].kind, recipe.model.pattern[0].d_state) == ("h3", 8)
    assert (recipe.model.channel.kind, recipe.model.vocab, recipe.eval_batch) == ("mlp", 256, recipe.batch)


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    for name in recipe_names():
        recipe = load_recipe(name, dry=True)
        if recipe.task.kind == "Zeros":  # it stands in for data that are not there
            continue
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["modle=1"], ["modle: a recipe has no field 'modle'", "did you mean 'model'?"]),
        (["task.lenght=5"], ["task.lenght: 'text' has no field 'lenght'", "did you mean 'length'?"]),
        (
            ["model.pattern.0.dstate=5"],
            ["model.pattern.0.dstate: mixer 's4d' has no", "did you mean 'd_state'?"],
        ),
        (["zzz=1"], ["zzz: a recipe has no field 'zzz'", "it has task, model, "]),
        (["model.pattern=[mamb]"], ["model.pattern.0: no mixer is called 'mamb'", "did you mean 'mamba'?"]),
        (["model.pattern=[]"], ["model.pattern", "at least 1 item"]),
        (["model.kind=lmm"], ["no model is called 'lmm'", "'lm'"]),
        (["model.channel=mpl"], ["no channel mixer is called 'mpl'", "did you mean 'mlp'?"]),
        (["task=txt"], ["task: no task is called 'txt'", "did you mean 'text'?"]),
        (["lr=fast"], ["lr: ", "valid number", "'fast'"]),
        (["lr=-1"], ["lr: ", "greater than 0", "-1"]),
        (["steps=1.5"], ["steps: ", "integer", "1.5"]),
        (["steps=0"], ["steps: ", "greater than or equal to 1"]),
        (["schedule=cosin"], ["schedule: ", "'cosine', 'linear' or 'constant'", "'cosin'"]),
        (["precision=16"], ["precision: ", "'32-true' or 'bf16-mixed'", "16"]),
        (["model.dropout=1"], ["model.dropout: ", "less than 1"]),
        (["batch=3", "accumulate=2"], ["batch = 3", "accumulate = 2", "multiple of 2"]),
        (["model.vocab=10"], ["model.vocab = 10", "256 token ids"]),
        (["model.kind=masked_lm"], ["masked_lm sees the next token", "the task text", "masked_text"]),
        (["task.stride=17"], ["stride 17 is above length 16", "16 or less"]),
        (["model.pattern.7.d_state=1"], ["model.pattern has entries 0..1"]),
        (["steps.x=1"], ["steps has no fields"]),
        (["steps"], ["'steps' is no change", "key=value"]),
        (["task.files=[a"], ["task.files=[a: the value is not valid YAML"]),
    ],
)
def test_a_wrong_recipe_says_what_where_and_instead(tiny, changes, words):
    with pytest.raises(ValueError) as caught:
        tiny(*changes)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 2
    assert "pydantic" not in message


def test_many_mistakes_take_two_lines(tiny):
    with pytest.raises(ValueError, match=r"(?s)^steps: .*\nlr: .* \(and 1 more\)$"):
        tiny("lr=x", "steps=x", "foo=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML"), ("just words", "is not a recipe"), ("steps: 3", "a recipe needs the field 'task'")],
)
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert len(str(caught.value).splitlines()) <= 2


def test_an_unknown_recipe_is_told_the_nearest():
    with pytest.raises(ValueError, match="'demoo' is neither a recipe nor a YAML file; did you mean 'demo'"):
        load_recipe("demoo")


# Optimiser


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_schedule(tiny, name, middle, end):
    recipe = tiny(f"schedule={name}", "steps=110", "warmup=10", "final_lr=0.2")
    assert [schedule(step, recipe) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert schedule(60, recipe) == pytest.approx(middle)
    assert schedule(110, recipe) == schedule(10_000, recipe) == pytest.approx(end)
    values = [schedule(step, recipe) for step in range(10, 111)]
    assert all(b <= a for a, b in pairwise(values))
    if name == "cosine":
        assert schedule(35, recipe) == pytest.approx(0.2 + 0.8 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    if name == "linear":
        assert schedule(35, recipe) == pytest.approx(0.8)


def test_schedule_without_warmup_and_with_nothing_else(tiny):
    assert schedule(0, tiny("warmup=0")) == 1.0
    assert [schedule(step, tiny("warmup=8")) for step in (0, 7)] == [1 / 8, 1.0]


@pytest.mark.parametrize("mixer", ["s4d", "h3", "mamba", "hyena", "long_conv", "lstm"])
def test_each_parameter_has_one_group_and_its_own_treatment(tiny, mixer):
    options = ", max_len: 64" if mixer in ("hyena", "long_conv") else ""
    recipe = tiny(f"model.pattern=[{{kind: {mixer}{options}}}]", "lr=0.01", "weight_decay=0.3", "warmup=4")
    model = recipe.model.build()
    optimizer = build_optimizer(model, recipe)
    rate = set_lr(optimizer, 1, recipe)
    assert rate == pytest.approx(0.005)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    hints = optim_hints(model)
    for name, parameter in model.named_parameters():
        group, hint = group_of[id(parameter)], hints.get(name)
        limit = hint.max_lr if hint is not None and hint.max_lr is not None else 0.01
        assert group["lr"] == pytest.approx(0.5 * min(limit, 0.01)), name
        decays = parameter.ndim >= 2 if hint is None else hint.decay
        assert group["weight_decay"] == (0.3 if decays else 0.0), name
    if mixer in ("s4d", "h3", "hyena"):
        assert any(hint.max_lr == 1e-3 for hint in hints.values())


def test_a_limit_above_lr_does_not_raise_it(tiny):
    recipe = tiny("lr=1e-4", "warmup=0")
    optimizer = build_optimizer(recipe.model.build(), recipe)
    set_lr(optimizer, 0, recipe)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4}


class Weighed(nn.Module):
    """A head whose loss is linear in its inputs, to see how parts are weighed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, inputs, targets, mask):
        scored = targets >= 0
        per_token = (inputs.double()[..., None] * self.weight).pow(2).sum(-1)
        return Score((per_token * scored).sum(), scored.sum(), scored.sum())


def test_parts_of_a_step_add_up_to_the_whole(tiny):
    """Whatever number of targets each part has: the step is that of the batch as a whole."""
    inputs, targets = torch.randint(1, 9, (4, 5)), torch.randint(0, 9, (4, 5))
    targets[0], targets[3, 1:] = -100, -100
    steps = []
    for cuts in ([4], [2, 2], [1, 1, 1, 1]):
        fabric, model = Fabric(accelerator="cpu"), Weighed()
        objective = fabric.setup(model)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
        parts = [Batch(*pair) for pair in zip(inputs.split(cuts), targets.split(cuts))]
        loss, norm = loop._step(Ranks(fabric), objective, optimizer, list(model.parameters()), parts, tiny("clip=null"))
        steps.append([loss, norm, *model.weight.tolist()])
    assert steps[0][0] == pytest.approx(3 * inputs[targets >= 0].double().pow(2).mean().item())
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)
    assert steps[2] == pytest.approx(steps[0], rel=1e-6)


def test_clip_limits_the_step_and_reports_the_norm_before(tiny):
    fabric, model = Fabric(accelerator="cpu"), Weighed()
    objective = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
    batch = Batch(torch.full((1, 2), 3), torch.zeros(1, 2, dtype=torch.long))
    _, norm = loop._step(Ranks(fabric), objective, optimizer, list(model.parameters()), [batch], tiny("clip=0.5"))
    assert norm == pytest.approx(18 * math.sqrt(3))
    assert (1 - model.weight).norm().item() == pytest.approx(0.5, rel=1e-4)


# A run


def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    recipe, run = tiny("warmup=2", "log_every=2", "schedule=linear", "final_lr=0"), tmp_path / "run"
    metrics = train(recipe, run)
    assert {path.name for path in run.iterdir() if "tfevents" not in path.name} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "loss.png", "run.json",
    }  # fmt: skip
    assert load_recipe(run / "config.yaml") == recipe
    lines = read_metrics(run)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8]
    assert [line["lr"] for line in trained] == pytest.approx([3e-3 * f for f in (1, 5 / 6, 3 / 6, 1 / 6)])
    assert 4 < trained[-1]["loss"] < trained[0]["loss"] < 6
    assert all(line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in trained)
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    assert 0 < trained[0]["seconds"] <= held_out[-1].pop("seconds")
    assert held_out[-1] == {"step": 8, **{f"eval_{name}": value for name, value in metrics.items()}}
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2))
    (events,) = run.glob("*tfevents*")
    board = EventAccumulator(str(events)).Reload()
    for name in ("loss", "lr", "gradient_norm", "eval_loss", "eval_bits_per_byte"):
        logged = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line]
        assert logged == expected, name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, spec = load(find(run))
    assert spec == recipe.model
    assert not model.training


@pytest.mark.parametrize("metric", ["bits_per_byte", "accuracy", "loss"])
def test_the_plot_draws_each_quantity_once(tmp_path, monkeypatch, metric):
    """Bits a byte are the loss in another unit: one axis. Accuracy has one of its own."""
    run = tmp_path / "a run"
    run.mkdir()
    nats = {step: 4 - step / 2 for step in (1, 2, 3, 4)}
    lines = [{"step": step, "loss": value} for step, value in nats.items()]
    lines.append({"step": 4, "eval_loss": 3.0, "eval_accuracy": 0.5, "eval_bits_per_byte": 3 / math.log(2)})
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
    assert plot_loss(run, metric).read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    left, *others = figure.axes
    unit = math.log(2) if metric == "bits_per_byte" else 1.0
    assert left.get_ylabel() == ("bits per byte" if metric == "bits_per_byte" else "loss (nats per token)")
    assert left.get_title() == "a run, step 4"
    assert left.lines[0].get_ydata() == pytest.approx([value / unit for value in nats.values()])
    assert left.lines[-1].get_ydata() == pytest.approx([3 / unit])
    assert [(axes.get_ylabel(), *axes.lines[0].get_ydata()) for axes in others] == (
        [("accuracy", 0.5)] if metric == "accuracy" else []
    )


def test_a_plot_leaves_matplotlib_as_it_is(tiny, tmp_path):
    """A library function has no say in how the process that called it draws."""
    with matplotlib.rc_context({"backend": "svg"}):
        train(tiny("steps=1"), tmp_path / "run")
        assert matplotlib.get_backend() == "svg"


def test_the_progress_line_moves_at_every_step(tiny, tmp_path, monkeypatch):
    """However seldom numbers are logged."""
    shown = []
    original = Monitor.step
    monkeypatch.setattr(
        Monitor, "step", lambda self, done: (original(self, done), shown.append(self.progress.tasks[0].completed))
    )
    train(tiny("log_every=8"), tmp_path / "run")
    assert shown == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("start", "words"), [(0, "33 min on this machine for the 996"), (950, "92 s on this machine for the 46")]
)
def test_a_run_says_how_long_it_will_take(tmp_path, monkeypatch, capsys, start, words):
    """From three steps behind the first, which compiles; also where a run goes on."""
    now = [0.0]
    monkeypatch.setattr("longwave.train.monitor.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Monitor(tmp_path, 1000, start, "loss") as monitor:
        for step, seconds in enumerate((60, 1, 2, 3, 50, 50), start + 1):
            now[0] += seconds
            monitor.step(step)
    said = capsys.readouterr().err
    assert f"about {words} steps left, evaluations apart" in said
    assert said.count("about") == 1


def test_the_seed_decides_everything(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny(f"seed={seed}", "steps=3"), tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] != digests(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize("changes", [[], ["precision=bf16-mixed"], ["accumulate=2"]], ids=str)
@pytest.mark.parametrize(("number", "steps"), [(signal.SIGINT, [3]), (signal.SIGTERM, [1, 4, 7]), (signal.SIGHUP, [5])])
def test_interrupted_is_uninterrupted(tiny, tmp_path, at_step, changes, number, steps):
    recipe, whole, run = tiny(*changes), tmp_path / "whole", tmp_path / "run"
    metrics = train(recipe, whole)
    for i, step in enumerate(steps):
        at_step(step, stop(number))
        with pytest.raises(loop.Interrupted, match=f"after step {step}") as caught:
            train(recipe, run, resume=run if i else None)
        assert caught.value.number == number
        assert saved_steps(run)[-1] == step
        assert (run / "loss.png").is_file()
    assert train(recipe, run, resume=run) == metrics
    assert digests(run) == digests(whole)
    assert numbers(run) == numbers(whole)
    assert find_best(run).name == find_best(whole).name


def test_dropout_is_at_work_in_these_tests(tiny, tmp_path):
    train(tiny("steps=2"), tmp_path / "with")
    train(tiny("steps=2", "model.dropout=0"), tmp_path / "without")
    assert digests(tmp_path / "with")["model.safetensors"] != digests(tmp_path / "without")["model.safetensors"]


def test_a_signal_is_handled_as_before_outside_of_training(tiny, tmp_path):
    before = [signal.getsignal(number) for number in loop.STOPPING]
    train(tiny("steps=1"), tmp_path / "run")
    assert [signal.getsignal(number) for number in loop.STOPPING] == before


def test_training_outside_the_main_thread(tiny, tmp_path):
    """Where Python allows no handlers of signals: the same run."""
    before = [signal.getsignal(number) for number in loop.STOPPING]
    with ThreadPoolExecutor(1) as pool:
        metrics = pool.submit(train, tiny(), tmp_path / "thread").result()
    assert [signal.getsignal(number) for number in loop.STOPPING] == before
    assert train(tiny(), tmp_path / "main") == metrics
    assert digests(tmp_path / "thread") == digests(tmp_path / "main")


def test_training_leaves_the_process_as_it_was(tiny, tmp_path, monkeypatch):
    """Threads are as many as before, also after an error; malloc is the command line's affair."""
    monkeypatch.setattr("longwave.train.memory.keep_freed_memory", lambda: pytest.fail("malloc is changed"))
    seen = []
    monkeypatch.setattr(Monitor, "train", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    train(tiny(f"threads={before + 1}", "steps=1"), tmp_path / "run")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    with pytest.raises(ValueError, match="exists already"):
        train(tiny(f"threads={before + 1}"), tmp_path / "run")
    assert torch.get_num_threads() == before


def test_a_signal_that_was_ignored_stays_so(tiny, tmp_path, at_step):
    """As under nohup, where a hangup is no reason to stop."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, stop(signal.SIGHUP))
        train(tiny(), tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved_steps(tmp_path / "run")[-1] == 8


def test_a_rank_that_does_not_write_keeps_one_tensor_at_a_time(tiny, monkeypatch):
    """It helps to gather every tensor, in the same order, and forgets it before the next."""
    model = tiny().model.build()
    optimizer = build_optimizer(model, tiny())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    alive, seen = weakref.WeakSet(), {True: [], False: []}

    def copied(tensor):
        seen[keep].append((tensor.shape, len(alive)))
        copy = tensor.detach().clone()
        alive.add(copy)
        return copy

    monkeypatch.setattr("longwave.models.storage.whole", copied)
    for keep in (True, False):
        weights, moments = gather(model, optimizer, keep)
        assert bool(weights) == bool(moments) == keep
        del weights, moments
    shapes = {key: [shape for shape, _ in calls] for key, calls in seen.items()}
    assert shapes[True] == shapes[False]
    assert max(count for _, count in seen[True]) == len(seen[True]) - 1
    assert max(count for _, count in seen[False]) <= 1


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path, at_step):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(5, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2, 4]
    find(tmp_path / "run")


def test_ctrl_c_while_saving_leaves_the_checkpoint_before(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = checkpoints.sha256
        patch.setattr(
            checkpoints, "sha256", lambda file: original(file) if name_of(4) not in str(file) else interrupted()
        )
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [name_of(2)]
    train(tiny(), tmp_path / "run", resume=tmp_path / "run")


def scripted(monkeypatch, values):
    """Evaluations give these values of the metric, one after another."""
    left = iter(values)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.5, "bits_per_byte": next(left)})


@pytest.mark.parametrize(
    ("values", "keep", "kept", "best"),
    [
        ([5, 3, 4, 6], 1, [4, 8], 4),
        ([5, 3, 4, 6], 2, [4, 6, 8], 4),
        ([5, 4, 3, 2], 1, [8], 8),
        ([2, 2, 2, 2], 1, [2, 8], 2),
    ],
)
def test_the_last_and_the_best_are_kept(tiny, tmp_path, monkeypatch, values, keep, kept, best):
    scripted(monkeypatch, values)
    run = tmp_path / "run"
    train(tiny("eval_every=2", f"keep={keep}"), run)
    assert saved_steps(run) == kept
    assert find_best(run).name == name_of(best)
    assert find(run).name == name_of(8)


def test_the_best_may_be_the_highest(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Text, "higher_is_better", True)
    scripted(monkeypatch, [1, 7, 3, 4])
    train(tiny("eval_every=2", "keep=1"), tmp_path / "run")
    assert find_best(tmp_path / "run").name == name_of(4)


def test_the_best_is_remembered_by_a_resumed_run(tiny, tmp_path, monkeypatch, at_step):
    run = tmp_path / "run"
    scripted(monkeypatch, [3, 4, 5, 6])
    at_step(5, stop())
    with pytest.raises(loop.Interrupted):
        train(tiny("eval_every=2", "keep=1"), run)
    train(tiny("eval_every=2", "keep=1"), run, resume=run)
    assert saved_steps(run) == [2, 8]
    assert find_best(run).name == name_of(2)


def test_a_finished_run_can_be_resumed_and_made_longer(tiny, tmp_path):
    run = tmp_path / "run"
    metrics = train(tiny("schedule=constant"), run)
    lines, finished = numbers(run), digests(run)
    assert train(tiny("schedule=constant"), run, resume=run) == metrics
    assert (numbers(run), digests(run)) == (lines, finished)
    train(tiny("schedule=constant", "steps=12"), run, resume=run)
    train(tiny("schedule=constant", "steps=12"), tmp_path / "whole")
    assert digests(run)["model.safetensors"] == digests(tmp_path / "whole")["model.safetensors"]
    with pytest.raises(ValueError, match="step-00000012 is beyond steps = 8; set steps to at least 12"):
        train(tiny("schedule=constant"), run, resume=run)


def test_a_run_resumed_at_its_last_step_records_what_it_would_have(tiny, tmp_path, capsys):
    """Made shorter than it came, it is the run that was that short: evaluated there, and its best too."""
    longer, shorter = tiny("schedule=constant", "keep=4"), tiny("schedule=constant", "keep=4", "steps=6")
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(longer, run)
    metrics = train(shorter, whole)
    capsys.readouterr()
    assert train(shorter, run, resume=run / "checkpoints" / name_of(6)) == metrics
    assert "all 6 steps are done already; set steps higher to train on" in capsys.readouterr().err
    assert (numbers(run), digests(run / "checkpoints" / name_of(6))) == (numbers(whole), digests(whole))


def test_going_on_from_an_older_checkpoint_replaces_the_later_ones(tiny, tmp_path, at_step):
    """They are of a future that no longer is; metrics and the best follow."""
    recipe, run, whole = tiny("keep=4"), tmp_path / "run", tmp_path / "whole"
    train(recipe, whole)
    shutil.copytree(whole, run)
    at_step(5, stop())
    with pytest.raises(loop.Interrupted):
        train(recipe, run, resume=run / "checkpoints" / name_of(2))
    assert saved_steps(run) == [2, 4, 5]
    assert max(line["step"] for line in read_metrics(run)) == 5
    train(recipe, run, resume=run)
    assert digests(run) == digests(whole)
    assert numbers(run) == numbers(whole)


def test_a_best_that_is_gone_is_no_best(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    scripted(monkeypatch, [1, 2, 3, 4, 9, 8])
    train(tiny("eval_every=2"), run)
    shutil.rmtree(run / "checkpoints" / name_of(2))
    assert find_best(run).name == name_of(8)
    train(tiny("eval_every=2", "steps=12"), run, resume=run)
    assert find_best(run).name == name_of(12)


# What goes wrong


def test_a_run_that_exists_is_not_touched(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("x")
    with pytest.raises(ValueError, match=f"{run} exists already: go on with it by --resume"):
        train(tiny(), run)
    assert [path.name for path in run.iterdir()] == ["precious"]
    with pytest.raises(ValueError, match="exists already"):
        train(tiny(), run / "precious")


def test_an_empty_folder_may_be_a_run(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    train(tiny("steps=1"), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.d_model=9"], "heads = 2 does not divide d_model = 9"),
        (["model.pattern=[{kind: hyena, max_len: 15}]"], "max_len = 15 .* sequence of 16"),
        (["task.files=[nowhere.txt]"], "no file 'nowhere.txt'"),
        (["task.length=10000000"], "the training part has .* needs 10000001"),
        (["accelerator=gpuu"], "accelerator = gpuu, devices = 1: .*invalid accelerator"),
        (["betas=[2, 0.9]"], "beta.*less than 1; got 2"),
    ],
)
def test_what_cannot_run_leaves_no_folder(tiny, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        train(tiny(*changes), tmp_path / "run")
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lengths", ["length: 32, eval_length: 64", "length: 64, shortest: 3, eval_length: 8"])
@pytest.mark.parametrize(
    "mixers", ["hyena, max_len: 40", "long_conv, max_len: 40", "two_sided, filter: {kind: free, max_len: 40}"]
)
def test_what_is_too_long_for_a_filter_is_told_before_the_run(tiny, tmp_path, lengths, mixers):
    """Whichever it is of training and evaluation, and however short the first draw."""
    kind = "masked_lm" if "two_sided" in mixers else "lm"
    changes = f"task={{kind: selective_copying, {lengths}, copy_length: 1}}", f"model.pattern=[{{kind: {mixers}}}]"
    with pytest.raises(ValueError, match=r"max_len = 40 .* sequence of 65; .*65"):
        train(tiny(*changes, f"model.kind={kind}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_text_file(tiny, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        train(tiny(f"task.files=[{tmp_path / 'empty.txt'}]"), tmp_path / "run")


def test_resuming_what_is_not_there(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no run: it has no config\.yaml"):
        train(tiny(), tmp_path / "nowhere", resume=tmp_path / "nowhere")
    run = tmp_path / "run"
    train(tiny("steps=4"), run)
    missing = run / "checkpoints" / name_of(3)
    with pytest.raises(ValueError, match=f"there is no checkpoint {missing}; the one before it is .*{name_of(4)}"):
        train(tiny("steps=4"), run, resume=missing)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lr=1e-3", "lr was 0.003 and is now 0.001"),
        ("model.pattern.0.d_state=8", "model.pattern.0.d_state was 4 and is now 8"),
        ("task.length=8", "task.length was 16 and is now 8"),
        ("seed=1", "seed was 0 and is now 1"),
    ],
)
def test_resuming_with_another_config_names_the_field(tiny, tmp_path, change, words):
    run = tmp_path / "run"
    train(tiny("steps=1"), run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"{run} was made with another config: {words}"):
        train(tiny(change, "steps=1"), run, resume=run)
    assert (run / "config.yaml").read_text() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny, tmp_path, at_step, capsys):
    recipe, run = tiny("checkpoint_every=8", "eval_every=8"), tmp_path / "run"

    reasons = ["killed"]

    def die():
        if reasons:
            raise RuntimeError(reasons.pop())

    at_step(2, die)
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, run)
    assert saved_steps(run) == []
    capsys.readouterr()
    train(recipe, run, resume=run)
    assert f"{run} has no checkpoint yet; it starts again at its first step" in capsys.readouterr().err
    train(recipe, tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")
    assert numbers(run) == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "emptied"), [([], False), ([], True), (["checkpoint_every=8", "eval_every=8"], False)], ids=str
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tiny, tmp_path, changes, emptied):
    recipe, run = tiny(*changes), tmp_path / "run"
    train(recipe, run)
    before = (run / METRICS).read_bytes()
    shutil.rmtree(run / "checkpoints")
    if emptied:
        (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=f"{run} came to step 8, and its checkpoints are gone: put them back, or"):
        train(recipe, run, resume=run)
    assert (run / METRICS).read_bytes() == before


@pytest.mark.parametrize("line", [b'{"step": 3, "loss": "\xe9"}', b"\x00\x00", b"", b"[1]", b'{"loss": 3}'])
def test_metrics_that_are_none_name_the_file_and_line(tmp_path, broken_run, line):
    shutil.copytree(broken_run[1], tmp_path / "run")
    file = tmp_path / "run" / METRICS
    lines = file.read_bytes().splitlines()
    lines[2] = line
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=f"{file}, line 3, is not JSON with a step: .*; mend or delete it") as caught:
        train(broken_run[0], tmp_path / "run", resume=tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_broken_checkpoint_is_named_and_the_one_before_offered(tiny, tmp_path_factory, broken_run, name, harm):
    run = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(broken_run[1], run)
    latest, before = run / "checkpoints" / name_of(4), run / "checkpoints" / name_of(2)
    data = bytearray((latest / name).read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        (latest / name).write_bytes(data)
        what = "is corrupt: its SHA-256 differs from the manifest"
    elif harm == "truncate":
        (latest / name).write_bytes(data[:-1])
        what = f"has {len(data) - 1} bytes instead of {len(data)}"
    else:
        (latest / name).unlink()
        what = "is missing"
    with pytest.raises(ValueError, match=f"{latest / name} {what}; the one before it is {before}: name it to go on"):
        train(broken_run[0], run, resume=run)
    train(broken_run[0], run, resume=before)
    assert digests(run) == digests(broken_run[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "optimizer.safetensors"])
@pytest.mark.parametrize("place", ["run", f"run/checkpoints/{name_of(4)}", "copy"])
def test_load_refuses_what_differs_from_the_manifest(tmp_path, broken_run, name, place):
    """As ``--resume``, eval and generate do: a flipped bit, and another step's file that is sound in itself."""
    shutil.copytree(broken_run[1], tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / name_of(4)
    whole, other = (latest / name).read_bytes(), (latest.with_name(name_of(2)) / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shutil.copytree(latest, tmp_path / "copy")
    load(tmp_path / place)
    for wrong in {bytes(flipped), other} - {whole}:
        for folder in (latest, tmp_path / "copy"):
            (folder / name).write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{name} is corrupt: its SHA-256 differs from the manifest"):
            load(tmp_path / place)


def test_load_takes_what_the_command_line_takes(tiny, tmp_path, monkeypatch):
    """A run is its best checkpoint."""
    run = tmp_path / "run"
    scripted(monkeypatch, [1, 2])
    train(tiny("keep=4"), run)

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    best, last = load(run / "checkpoints" / name_of(4))[0], load(run / "checkpoints" / name_of(8))[0]
    assert same(load(run)[0], best)
    assert same(load(str(run))[0], best)
    assert not same(load(run)[0], last)
    with pytest.raises(ValueError, match=r"there is no checkpoint \S+step-00000005; the one before it is"):
        load(run / "checkpoints" / name_of(5))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load(run)
    with pytest.raises(ValueError, match=r"nowhere is no run and no saved model: it has no config\.json"):
        load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "steps": 4}))
    recipe = load_recipe(folder / "tiny.yaml")
    train(recipe, folder / "run")
    return recipe, folder / "run"


@pytest.mark.parametrize("text", [None, "", "[", "{}x", "[]", '{"model.safetensors": 3}'])
def test_a_manifest_that_is_missing_or_no_manifest(tmp_path, broken_run, text):
    shutil.copytree(broken_run[1], tmp_path / "run")
    manifest = find(tmp_path / "run") / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(ValueError, match=f"{manifest} is missing or corrupt; the one before it is"):
        find(tmp_path / "run")


def test_the_only_checkpoint_broken_offers_none(tmp_path, broken_run):
    shutil.copytree(broken_run[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / name_of(2))
    (find(tmp_path / "run") / "trainer.json").unlink()
    with pytest.raises(ValueError, match="is missing; there is no other checkpoint before it"):
        find(tmp_path / "run")


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path, broken_run):
    run = tmp_path / "run"
    shutil.copytree(broken_run[1], run)
    for name in (f".{name_of(6)}.part", f".{name_of(1)}.old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    (run / "checkpoints" / "step-of-mine").mkdir()
    (run / METRICS).open("a").write('{"step": 4, "lo')
    assert saved_steps(run) == [2, 4]
    recipe = Recipe.model_validate({**broken_run[0].model_dump(), "steps": 6})
    train(recipe, run, resume=run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [name_of(4), name_of(6), "step-of-mine"]
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_weights_of_another_model_are_named(tmp_path, broken_run):
    latest = find(broken_run[1])
    shutil.copytree(latest, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    spec = json.loads((latest / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**spec, "layers": 3}))
    with pytest.raises(ValueError, match=r"is of another model: backbone\.layers\.2\.\S+ is in the config"):
        load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**spec, "d_model": 16}))
    with pytest.raises(ValueError, match=r"another model: \S+down\.weight has shape \(8, 21\) there, and \(16, 43\)"):
        load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json does not describe a model") as caught:
        load(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(spec))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load(tmp_path / "model")


def test_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    original = loop.Objective.forward

    def poisoned(self, inputs, targets, mask):
        score = original(self, inputs, targets, mask)
        calls.append(self.training)
        return score._replace(loss=score.loss * math.nan) if sum(calls) == 5 else score

    calls = []
    monkeypatch.setattr(loop.Objective, "forward", poisoned)
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 5; the checkpoint of step 4 stays"):
        train(tiny(), run)
    monkeypatch.undo()
    assert all(tensor.isfinite().all() for tensor in load(find(run))[0].parameters())
    assert [line["step"] for line in read_metrics(run)][-1] == 4
    train(tiny(), run, resume=run)
    train(tiny(), tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")


def test_nan_before_any_checkpoint_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Text, "train_batch", lambda *_: Batch(torch.full((4, 16), 0), torch.full((4, 16), 0)))
    recipe = tiny("lr=1e30", "warmup=0", "clip=null", "checkpoint_every=8", "eval_every=8")
    with pytest.raises(FloatingPointError, match=r"is not finite at step \d; there is no checkpoint yet; .* lower lr"):
        train(recipe, tmp_path / "run")


def test_an_evaluation_that_is_not_finite_is_no_best(tiny, tmp_path, monkeypatch):
    left = iter([1.0, math.nan])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": (v := next(left)), "accuracy": 0.0, "bits_per_byte": v})
    with pytest.raises(FloatingPointError, match="the held-out loss is not finite at step 8; the checkpoint of step 6"):
        train(tiny(), tmp_path / "run")
    assert find_best(tmp_path / "run").name == name_of(4)


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    original = loop._step

    def spoil(ranks, objective, optimizer, parameters, *rest):
        result = original(ranks, objective, optimizer, parameters, *rest)
        calls.append(1)
        if len(calls) == 4:
            parameters[0].data[0] = math.inf
        return result

    calls = []
    monkeypatch.setattr(loop, "_step", spoil)
    with pytest.raises(FloatingPointError, match=r"weight is not finite at step 4; the checkpoint of step 2"):
        train(tiny("eval_every=8"), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2]


@pytest.fixture
def file_limit():
    """``file_limit(n)``: no file may grow beyond n bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_is_full_costs_no_older_checkpoint(tiny, tmp_path, at_step, file_limit, broken_run, name):
    """The write fails for real, inside the safetensors library."""
    run, size = tmp_path / "run", (find(broken_run[1]) / name).stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "train", lambda self, step, *_: file_limit(size - 1) if step == 3 else None)
        with pytest.raises(OSError, match=f"of step 4 cannot be written: .*{name}: .*; the checkpoint of step 2"):
            train(tiny(), run)
    file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [name_of(2)]
    train(tiny(), run, resume=run)
    train(tiny(), tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["trainer.json", "manifest.json"])
def test_a_disk_full_at_the_last_byte(tiny, tmp_path, monkeypatch, name):
    original = type(tmp_path).write_text

    def full(self, *args, **kwargs):
        if self.name == name and name_of(4) in str(self):
            self.touch()
            raise OSError(28, os.strerror(28), str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device.*; the checkpoint of step 2 stays"):
        train(tiny(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [name_of(2)]


def test_metrics_that_cannot_be_written_say_so(tiny, tmp_path, at_step):
    run = tmp_path / "run"

    def no_more():
        (run / METRICS).unlink()
        (run / METRICS).mkdir()

    at_step(3, no_more)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        train(tiny(), run)
    find(run)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    """After the first, large temporaries cause no page faults; in a process of its own, as it cannot be taken back."""
    code = (
        "import resource, torch; from longwave.train.memory import keep_freed_memory\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use():\n"
        "    before = faults()\n"
        "    for _ in range(10): torch.empty(10_000_000).fill_(1)\n"
        "    return faults() - before\n"
        "fresh = use(); assert keep_freed_memory(); use(); print(fresh, use())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fresh, kept = map(int, run.stdout.split())
    assert fresh > 100
    assert kept < 0.1 * fresh


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_that_fails_leaves_the_mode(tiny, training):
    """A broken batch ends it; who catches that goes on to train."""
    recipe = tiny()
    recipe.task.prepare()
    objective = loop.Objective(recipe.model.build()).train(training)
    objective.model.backbone.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(Fabric(accelerator="cpu", devices=1), objective, recipe.task, 4)
    assert all(module.training == training for module in objective.modules())


def test_a_run_is_not_resumed_on_other_data(tmp_path):
    data = tmp_path / "in"
    data.mkdir()
    for name in ("a", "b"):
        (data / f"{name}.txt").write_text(f"some text {name} " * 300)
    changes = [f"task.files=[{data}]", "task.length=16", "batch=4", "steps=2", "threads=1", "eval_batch=8"]
    changes += ["model={kind: lm, d_model: 8, pattern: [s4d]}", "task.share=0.05"]
    train(load_recipe("demo", changes), tmp_path / "run")
    train(load_recipe(tmp_path / "run/config.yaml", ["steps=3"]), tmp_path / "run", resume=tmp_path / "run")
    (data / "b.txt").write_text("other text b " * 300)
    with pytest.raises(ValueError, match=r"the data of .*run are not what they were when it began \(.*in\); put them"):
        train(load_recipe(tmp_path / "run/config.yaml", ["steps=4"]), tmp_path / "run", resume=tmp_path / "run")


def test_rows_drawn_ahead_are_those_drawn_between_steps(tmp_path):
    (tmp_path / "own.py").write_text(
        "from longwave.tasks import SelectiveCopying\nclass Mine(SelectiveCopying):\n    length: int = 12\n"
    )
    own.trust(tmp_path / "own.py")
    for task in ("selective_copying", f"{tmp_path / 'own.py'}:Mine"):
        changes = [f"task={{kind: '{task}', length: 12, copy_length: 3}}", "batch=4", "steps=5", "threads=1", "lr=0.01"]
        changes += ["model={kind: masked_lm, d_model: 8, pattern: [s4d]}", "accumulate=2", "eval_batch=250"]
        runs = [tmp_path / f"{Path(task).name}-{workers}" for workers in (0, 2)]
        for workers, run in zip((0, 2), runs):
            train(load_recipe("demo", [*changes, f"workers={workers}"]), run)
        losses = [[row["loss"] for row in read_metrics(run) if "loss" in row] for run in runs]
        assert losses[0] == losses[1] != []


def test_a_process_that_draws_and_is_lost_is_told(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os\nfrom longwave.tasks import SelectiveCopying\nclass Dies(SelectiveCopying):\n"
        "    def train_row(self, seed, number):\n        os._exit(9)\n"
    )
    task = own.trust(tmp_path / "own.py").Dies(kind=f"{tmp_path / 'own.py'}:Dies")
    with pytest.raises(OSError, match="a process that draws rows was killed"):
        next(batches(task, 2, 0, iter(range(9)), workers=1))
