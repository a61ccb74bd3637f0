"""The command line as a user meets it: what it prints, what it exits with, and that no kill costs a run."""

import fcntl
import json
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml

from longwave.mixers import MIXERS
from longwave.models import LMSpec, load, save
from longwave.models.runs import find, saved_steps
from longwave.tasks import TASKS
from longwave.tasks.text import BOOKS
from longwave.train import load_recipe, recipe_names, train
from longwave.train.monitor import read_metrics

TINY = {
    "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d", {"kind": "attention", "heads": 2}], "dropout": 0.1},
    "task": {"kind": "text", "length": 16, "share": 0.01},
    "steps": 6,
    "batch": 4,
    "lr": 3e-3,
    "schedule": "constant",
    "eval_every": 10,
    "checkpoint_every": 1,
    "log_every": 1,
    "accelerator": "cpu",
}
FOREVER = "steps=1000000"
LONGWAVE = [sys.executable, "-m", "longwave.cli"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe file and a finished run of it."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_bytes((BOOKS / "emma.txt").read_bytes()[:20_000])
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "task": {**TINY["task"], "files": [str(text)]}}))
    train(load_recipe(folder / "tiny.yaml"), folder / "run")
    return folder / "tiny.yaml", folder / "run"


def digests(run):
    return json.loads((find(run) / "manifest.json").read_text())


def numbers(run):
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")}
        for line in read_metrics(run)
    ]


def wait_for(condition, process, seconds=150):
    """Until it holds; fails where the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


# Help and the commands that only tell


def test_start_up_is_quick():
    """Help comes before anything large is imported."""
    code = "import sys; sys.argv = ['longwave', '--help']; import longwave.cli\ntry: longwave.cli.main()\nfinally: "
    code += "print([m for m in ('torch', 'numpy', 'lightning_fabric', 'matplotlib', 'pydantic') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert run.stdout.strip().splitlines()[-1] == "[]", run.stderr


def test_a_dry_run_says_what_it_costs_and_leaves_nothing(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("train", trained[0], "--dry-run")
    assert code == 0
    assert re.search(r"parameters +[\d,]+\n.*attention [\d.]+%.*activations +[\d.]+ MB.*time +about", out, re.S)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(call, arguments):
    code, out, _ = call(*arguments)
    assert code == 0
    for command in ("train", "eval", "generate", "distill", "list", "show", "doctor"):
        assert re.search(rf"\b{command} ", out), command


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train", "longwave train --resume runs/mine"),
        ("eval", "longwave eval runs/demo"),
        ("generate", 'longwave generate runs/demo --prompt "Emma had"'),
        ("show", "longwave show demo"),
    ],
)
def test_help_has_examples(call, command, example):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert example in out


def test_list_has_a_line_for_everything(call):
    code, out, _ = call("list")
    assert code == 0
    for name in [*MIXERS, *TASKS, *recipe_names()]:
        assert re.search(rf"^  {name} +\S+ \S+ \S+", out, re.MULTILINE), name


def test_show_a_recipe(call):
    code, out, _ = call("show", "demo", "steps=7")
    assert code == 0
    resolved = yaml.safe_load(out.split("\nparameters:")[0])
    assert (resolved["steps"], resolved["model"]["vocab"], resolved["task"]["kind"]) == (7, 256, "text")
    count = sum(p.numel() for p in load_recipe("demo").model.build().parameters())
    assert f"parameters: {count:,}\n" in out


def test_show_a_run_and_its_state(call, trained):
    code, out, _ = call("show", trained[1])
    assert code == 0
    assert yaml.safe_load(out.split("\nparameters:")[0]) == yaml.safe_load((trained[1] / "config.yaml").read_text())
    rows = {
        line.split()[-4]: line.replace(",", "").split()[-3:] for line in out.splitlines() if re.match(r" *\d ", line)
    }
    first, growth, million = map(int, rows["s4d"])
    assert (growth, million) == (0, first)
    first, growth, million = map(int, rows["attention"])
    assert growth >= 2 * 8 * 4  # a key and a value of float32 a token
    assert million == first + growth * 999_999


def test_doctor_checks_every_mixer(call):
    code, out, _ = call("doctor")
    assert code == 0
    assert "torch 2." in out
    assert re.search(r"^cuda", out, re.MULTILINE)
    assert re.search(r"^  causal_conv .*\btorch, reference$", out, re.MULTILINE)
    for name, cls in MIXERS.items():
        assert len(re.findall(rf"^  {name} .*  ok  ", out, re.MULTILINE)) == len(cls.examples), name


def test_doctor_reports_a_mixer_that_sees_the_future(call, monkeypatch):
    monkeypatch.setattr(MIXERS["lstm"], "forward", lambda self, x, state=None: (x + x.sum(1, keepdim=True), state))
    code, out, _ = call("doctor")
    assert code == 1
    assert re.search(r"^  lstm .*  WRONG", out, re.MULTILINE)


# Training, evaluation, generation


def test_train_says_how_good_it_is_and_what_is_next(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train", trained[0], "steps=2")
    assert (code, out) == (0, "")
    run = Path("runs/tiny")
    assert saved_steps(run) == [1, 2]
    assert "held out: loss " in err
    assert "this model" in err
    assert "gzip -9" in err
    assert "next: longwave generate runs/tiny --prompt" in err
    assert "longwave train --resume runs/tiny steps=4\n" in err
    assert "longwave train demo 'task.files=[my.txt]' --out runs/mine\n" in err
    assert re.search(r"^step 2/2  loss \d\.\d{3}  [\d,]+ tokens/s$", err, re.MULTILINE)


def test_the_hint_after_training_names_the_run_just_made(call, trained, tmp_path, monkeypatch):
    """Every command that it shows can be pasted: none is refused because the run is there."""
    monkeypatch.chdir(tmp_path)
    code, _, err = call("train", trained[0], "steps=1", "--out", "runs/mine")
    assert code == 0
    assert re.findall(r": (longwave .*)$", err, re.MULTILINE) == [
        'longwave generate runs/mine --prompt "The " --max-new 400',
        "longwave train --resume runs/mine steps=2",
    ]
    assert "longwave generate 'my runs/a' --prompt" in call("train", trained[0], "steps=1", "--out", "my runs/a")[2]


def test_train_twice_is_an_error_that_says_how_to_go_on(call, trained):
    before = digests(trained[1])
    code, _, err = call("train", trained[0], "--out", trained[1])
    assert code == 2
    run = trained[1]
    assert err == f"error: {run} exists already: go on with it by --resume {run}, or choose another folder by --out\n"
    assert digests(trained[1]) == before


def test_resume_with_the_recipe_and_changes(call, trained, tmp_path):
    recipe, run = trained[0], tmp_path / "run"
    train(load_recipe(recipe), run)
    for arguments in ([recipe], [recipe, "steps=8"], ["steps=9"], []):
        code, _, err = call("train", *arguments, "--resume", run)
        assert code == 0, err
    assert saved_steps(run)[-1] == 9
    code, _, err = call("train", recipe, "lr=1", "--resume", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "lr was 0.003 and is now 1.0" in err
    code, _, err = call("train", "--resume", run, "--out", tmp_path / "elsewhere")
    assert (code, err) == (2, f"error: --resume goes on in {run}; leave out --out {tmp_path / 'elsewhere'}\n")


def test_resume_from_a_named_checkpoint(call, trained, tmp_path):
    run = tmp_path / "run"
    train(load_recipe(trained[0]), run)
    code, _, err = call("train", "--resume", run / "checkpoints" / "step-00000005")
    assert code == 0, err
    assert digests(run) == digests(trained[1])


def test_eval_gives_the_numbers_of_training(call, trained):
    code, out, err = call("eval", trained[1])
    assert code == 0, err
    got = {name: float(value) for name, value in (line.rsplit("  ", 1) for line in out.splitlines())}
    last = [line for line in read_metrics(trained[1]) if "eval_loss" in line][-1]
    assert got == {
        name[5:].replace("_", " "): pytest.approx(last[name], rel=1e-4) for name in last if name[:5] == "eval_"
    }


def test_eval_on_a_changed_task_and_a_named_checkpoint(call, trained):
    code, changed, _ = call("eval", trained[1], "task.share=0.02", "eval_batch=1")
    assert code == 0
    assert changed != call("eval", trained[1])[1]
    code, earlier, _ = call("eval", trained[1] / "checkpoints" / "step-00000005")
    assert code == 0
    assert earlier != call("eval", trained[1])[1]


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_eval_and_generate_with_weights_in_fewer_bits(call, trained, form):
    code, out, err = call("eval", trained[1], "--weights", form)
    assert code == 0, err
    got = {name: float(value) for name, value in (line.rsplit("  ", 1) for line in out.splitlines())}
    assert out.startswith(call("eval", trained[1])[1])
    assert 0 < abs(got[f"bits per byte, {form}"] - got["bits per byte"]) < 0.01
    assert 1e-4 < got[f"error of logits, {form}"] < 0.05
    assert 0.8 < got[f"same choice, {form}"] <= 1
    code, out, err = call("generate", trained[1], "--prompt", "Emma ", "--max-new", 12, "--seed", 3, "--weights", form)
    assert code == 0, err
    assert out.startswith("Emma ")


def test_generate_goes_on_from_the_prompt(call, trained):
    code, out, err = call("generate", trained[1], "--prompt", "Emma ", "--max-new", 12, "--seed", 3)
    assert code == 0
    assert out.startswith("Emma ")
    assert "12 tokens in" in err
    assert re.search(r"recurrent state of 1 layers \(s4d\): .* did not grow", err)
    before, after = re.search(
        r"cache of 1 layers \(attention\): ([\d,]+) bytes after the prompt, ([\d,]+)", err
    ).groups()
    assert int(after.replace(",", "")) > 2 * int(before.replace(",", ""))
    assert call("generate", trained[1], "--prompt", "Emma ", "--max-new", 12, "--seed", 3)[1] == out
    assert call("generate", trained[1], "--prompt", "Emma ", "--max-new", 12, "--seed", 4)[1] != out


def test_generate_from_standard_input_is_generate_from_the_prompt(call, trained):
    _, out, _ = call("generate", trained[1], "--prompt", "Emma é", "--max-new", 9, "--seed", 1)
    code, piped, _ = call("generate", trained[1], "--max-new", 9, "--seed", 1, stdin="Emma é".encode())
    assert code == 0
    assert "Emma é" + piped == out


def test_generate_stops_at_the_text_given(call, trained):
    arguments = ("generate", trained[1], "--prompt", "a", "--max-new", 400, "--seed", 0, "--temperature", 1)
    new = call(*arguments)[1].removeprefix("a")
    stop = next(new[i : i + 2] for i in range(40, 300) if new[i : i + 2].isascii() and new[i : i + 2].isprintable())
    code, out, _ = call(*arguments, "--stop", stop)
    assert code == 0
    assert out == "a" + new[: new.index(stop) + 2] + "\n"


def test_a_trusted_file_brings_its_classes(call, tmp_path):
    """A mixer of one's own, in a run of any processes; without the option no file runs."""
    (tmp_path / "mine.py").write_text(
        "from longwave.mixers import LSTM\n\n\nclass Mine(LSTM, name='mine_of_a_file'):\n    pass\n"
    )
    code, _, err = call("show", "demo", "model.pattern=[mine_of_a_file]")
    assert code == 2
    assert "no mixer is called 'mine_of_a_file'" in err
    try:
        code, out, _ = call("--trust", tmp_path / "mine.py", "show", "demo", "model.pattern=[mine_of_a_file]")
        assert code == 0
        assert "kind: mine_of_a_file" in out
    finally:
        MIXERS.pop("mine_of_a_file", None)
    code, _, err = call("--trust", tmp_path / "none.py", "show", "demo")
    assert code == 2
    assert "none.py: there is no such file" in err


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: Expecting property name"),
        ("x = 1\n\n\ny = = 2\n", 4, "SyntaxError: invalid syntax"),
        ("import json\ndef f():\n    json.loads('{')\nf()\n", 3, "JSONDecodeError: Expecting"),
    ],
)
def test_a_trusted_file_that_fails_is_named_with_its_own_line(call, tmp_path, text, line, words):
    """Not with the line of a library that it calls; and nothing of it stays behind."""
    file = tmp_path / "broken.py"
    file.write_text(text)
    code, _, err = call("--trust", file, "show", "demo")
    assert code == 2
    assert f"--trust {file}, line {line}: {words}" in err
    assert not [name for name in sys.modules if name.endswith("_broken")]


def test_generate_goes_on_from_a_saved_state(call, trained, tmp_path):
    """A prompt is read once; what is written behind its state is what would have been written behind it."""
    state = tmp_path / "state"
    options = ("--temperature", 0, "--max-new")
    whole = call("generate", trained[1], "--prompt", "Emma had", *options, 9)[1].rstrip("\n")
    code, out, err = call("generate", trained[1], "--prompt", "Emma had", *options, 4, "--save-state", state)
    assert code == 0
    assert f"--from-state {state}" in err
    code, rest, _ = call("generate", trained[1], "--from-state", state, "--prompt", "", *options, 5)
    assert code == 0
    assert out.rstrip("\n") + rest.rstrip("\n") == whole
    state.write_bytes(state.read_bytes()[:-3])
    code, _, err = call("generate", trained[1], "--from-state", state, "--prompt", "a", *options, 5)
    assert code == 2
    assert f"{state} is not a readable safetensors file" in err


def test_generate_leaves_quietly_when_nobody_reads(trained):
    command = shlex.join([*LONGWAVE, "generate", str(trained[1]), "--prompt", "x", "--max-new", "100000"])
    run = subprocess.run(["bash", "-c", f"{command} | head -c 5"], capture_output=True, timeout=150)
    assert len(run.stdout) == 5
    assert run.stderr == b""


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command 'nonsense'; see longwave --help"),
        (["train", "demo", "--lr", "3"], "No such option: --lr .*; see longwave train --help"),
        (["generate"], "Missing argument 'run'; see longwave generate --help"),
        (["generate", "RUN", "--max-new", "many"], "Invalid value for '--max-new'.*; see longwave generate --help"),
        (["train"], "name a recipe"),
        (["train", "lr=1"], "name a recipe"),
        (["train", "demoo"], "'demoo' is neither a recipe nor a YAML file; did you mean 'demo'"),
        (["train", "demo", "stepz=1"], "stepz: .* did you mean 'steps'"),
        (["train", "demo", "model.d_model=17"], "heads = 4 does not divide d_model = 17"),
        (["train", "--resume", "nowhere"], "nowhere is no run: it has no config.yaml"),
        (["train", "demo", "--resume", "r1"], "r1 is no run: it has no config.yaml; a new one is started by --out r1"),
        (["train", "demo", "--resume", "RUN"], "made with another config: .*; go on with its own config, by --resume"),
        (["eval", "nowhere"], "nowhere is no run"),
        (["show", "demoo"], "'demoo' is neither"),
        (["show", "RUN", "model.d_model=16"], "holds another model: model.d_model was 8 and is now 16; name a recipe"),
        (["inspect", "s4d", "--out", "x.foo"], "--out x.foo: a figure ends in .png, .svg, .pdf, and a folder in none"),
        (["train", "demo", "model.pattern.0={kind: s4d, d_state: 1000000000000}"], "d_state: .* equal to 65536"),
        (["eval", "RUN", "task.lenght=3"], "task.lenght: .* did you mean 'length'"),
        (["eval", "RUN", "--weights", "int4"], "no form of weights is called 'int4'.* did you mean 'int8'"),
        (["eval", "RUN", "model.d_model=16"], "holds another model: model.d_model was 8 and is now 16"),
        (["eval", "RUN/checkpoints/step-00000099"], "there is no checkpoint .*step-00000099; the one before it is"),
        (["generate", "RUN", "--prompt", ""], "the prompt is empty"),
        (["generate", "RUN"], "the prompt is empty: give --prompt TEXT or text on standard input"),
        (["generate", "RUN", "--prompt", "a", "--stop", ""], "--stop is empty: give a text to end after, or leave"),
        (["generate", "RUN", "--prompt", "a", "--max-new", "-1"], "max_new must be >= 0; got -1"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "-1"], "temperature must be >= 0"),
        (["generate", "RUN", "--prompt", "a", "--top-k", "0"], "top_k must lie in 1..256; got 0"),
        (["generate", "RUN", "--prompt", "a", "--top-p", "0"], "top_p must lie in"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "nan"], "temperature must be >= 0 .*; got nan"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "inf"], "temperature must be >= 0 .*; got inf"),
        (["generate", "RUN", "--prompt", "a", "--top-p", "nan"], "top_p must lie in .*; got nan"),
        (["generate", "RUN", "--prompt", "a", "--seed", str(2**63)], "seed must lie in 0..2"),
        (
            ["bench", "opps"],
            "no bench is called 'opps'; there are ops, models, memory, generate, online; did you mean 'ops'",
        ),
        (["bench", "ops", "--only", "causal_con"], "no op in the bench is called .*did you mean 'causal_conv'"),
        (["bench", "memory", "--only", "nosuch"], "no causal mixer is called 'nosuch'"),
        (["bench", "models", "--only", "s4d"], "bench models measures them all; leave out --only 's4d'"),
        (
            ["train", "demo", "model.d_model=200000"],
            "d_model = 200,000 and layers = 4, .* takes .* GB, and this",
        ),
        (["train", "demo", "model.d_model=" + "9" * 20], "model.d_model: no size reaches 2.63"),
        (["train", "demo", "model.layers=1000000"], "model.layers: .*less than or equal to 4096"),
        (
            ["train", "recall_h3", "task.length=1000000000000000000"],
            "a sequence of 1,0.* tokens takes .* GB, and",
        ),
        (["eval", "RUN", "task.length=1000000000000000000"], "the training part has .* needs 10+1"),
        (["train", "demo", "model.dropout=.nan"], "model.dropout: .*; got nan"),
        (["train", "demo", "model={kind: classifier, d_model: 8, pattern: [s4d], classes: 2}"], "one label a row"),
        (
            ["train", "demo", "model.pattern.0={kind: two_sided, filter: {kind: s4d, d_stat: 4}}"],
            "did you mean 'd_state'",
        ),
        (["train", "demo", "9" * 3000], "no change: write key=value"),
        (["train", "demo", "steps=" + "9" * 3000], "steps: .*characters"),
        (["train", "9" * 3000], "recipe '9+ .* cannot be read"),
        (["generate", "RUN", "--max-new", "x" * 3000], "Invalid value for '--max-new'"),
        (["train", "demo", "--" + "x" * 3000], "No such option.*characters"),
        (["inspect", "s4d", "d_state=" + "x" * 3000], "d_state: .*characters"),
    ],
    ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else "",
)
def test_an_error_is_two_lines_and_code_2(call, trained, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*(argument.replace("RUN", str(trained[1])) for argument in arguments))
    assert (code, out) == (2, "")
    assert re.match("error: .*" + words, err), err
    assert len(err.splitlines()) <= 2
    assert len(err) < 1000
    assert list(tmp_path.iterdir()) == []


def test_distill_writes_a_model_and_says_how_near_it_is(call, tmp_path):
    spec = LMSpec(d_model=4, vocab=7, pattern=[{"kind": "hyena", "max_len": 32, "width": 4, "emb_dim": 3}])
    save(tmp_path / "old", spec.build(), spec)
    command = "distill", tmp_path / "old", "--order", "4", "--out", tmp_path / "new"
    code, out, _ = call(*command)
    assert code == 0
    assert re.search(r"^backbone\.layers\.0\.mixer +\d\.\d+e[+-]\d+ +\d\.\d+e[+-]\d+$", out, re.M)
    assert re.search(r"^logits +\d\.\d+e[+-]\d+$", out, re.M)
    assert load(tmp_path / "new")[1].pattern[0].kind == "laughing_hyena"
    code, out, _ = call("inspect", tmp_path / "new")
    assert code == 0
    assert "laughing_hyena" in out
    code, _, err = call("generate", tmp_path / "new", "--prompt", "a")
    assert code == 2
    assert (
        "new has no tokenizer.json: copy one into it, or say what its ids stand for by --tokenizer: bytes, dna" in err
    )
    code, _, err = call(*command)
    assert code == 2
    assert "is there already; name another --out" in err


def test_a_saved_model_is_taken_as_a_run_is(call, trained, tmp_path):
    """But for the task, which it does not know."""
    save(tmp_path / "model", *load(trained[1]))
    write = "--prompt", "Emma", "--temperature", 0, "--max-new", 5
    assert call("generate", tmp_path / "model", *write)[1] == call("generate", trained[1], *write)[1]
    task = f"task={{kind: text, length: 16, share: 0.01, files: [{trained[0].parent / 'text.txt'}]}}"
    code, out, _ = call("eval", tmp_path / "model", task)
    assert code == 0
    assert out == call("eval", trained[1])[1]
    code, _, err = call("eval", tmp_path / "model")
    assert code == 2
    assert "model is a saved model, which knows no task: say what to evaluate it on, such as 'task={kind: text" in err
    code, _, err = call("eval", tmp_path / "model", task, "model.d_model=16")
    assert code == 2
    assert "holds another model: model.d_model was 8 and is now 16" in err


def test_generate_wants_a_text_model(call, trained, tmp_path):
    task = "task={kind: associative_recall, vocab_size: 10, length: 8, eval_examples: 4}"
    train(load_recipe(trained[0], [task, "steps=1", "eval_batch=4"]), tmp_path / "run")
    code, _, err = call("generate", tmp_path / "run", "--prompt", "a")
    assert code == 2
    assert "run has no tokenizer.json, and was trained with the task associative_recall: copy one into it, or" in err


def test_debug_shows_the_traceback(call):
    for arguments in (["show", "demoo", "--debug"], ["--debug", "show", "demoo"]):
        code, _, err = call(*arguments)
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert "ValueError: 'demoo' is neither" in err
    assert "Traceback" not in call("show", "demoo")[2]


def test_a_disk_that_is_full_says_how_to_go_on(call, trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longwave.train.loop.save_checkpoint", full)
    code, _, err = call("train", trained[0], "--out", tmp_path / "run")
    assert code == 2
    *_, first, second = err.splitlines()
    assert first == (
        "error: the checkpoint of step 1 cannot be written: [Errno 28] No space left on device; "
        "there is no checkpoint yet"
    )
    assert second == f"when that is mended, go on with longwave train --resume {tmp_path / 'run'}"


# Signals and kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_tells_the_command_that_resumes(trained, tmp_path, number):
    """With the code that a shell expects, so that what comes after ``&&`` does not begin."""
    run = tmp_path / "a run"
    command = [*LONGWAVE, "train", trained[0], FOREVER, "--out", run]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(run)) >= 3, process)
    process.send_signal(number)
    err = process.communicate(timeout=150)[1]
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    step, resume = re.search(
        r"interrupted after step (\d+); everything is saved\. Go on with\n  longwave (.*)\n", err
    ).groups()
    assert saved_steps(run)[-1] == int(step) == read_metrics(run)[-1]["step"]
    steps = f"steps={int(step) + 3}"
    subprocess.run([*LONGWAVE, *shlex.split(resume), steps], check=True, capture_output=True, timeout=150)
    train(load_recipe(trained[0], [steps]), tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")
    assert numbers(run) == numbers(tmp_path / "whole")


def test_a_closed_terminal_saves(trained, tmp_path):
    """The hangup comes from the system, and nothing can be told any more."""
    run, (ours, theirs) = tmp_path / "run", pty.openpty()
    command = [*LONGWAVE, "train", trained[0], FOREVER, "--out", run]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    wait_for(lambda: len(read_metrics(run)) >= 3, process)
    os.close(ours)
    assert process.wait(timeout=150) == 128 + signal.SIGHUP
    assert saved_steps(run)[-1] == read_metrics(run)[-1]["step"]


@pytest.mark.parametrize("command", ["train", "generate"])
def test_ctrl_c_in_earnest_is_no_traceback(call, trained, tmp_path, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("longwave.train.loop.train", interrupted)
    monkeypatch.setattr("longwave.models.stream", interrupted)
    arguments = ["--resume", trained[1]] if command == "train" else [trained[1], "--prompt", "a"]
    code, _, err = call(command, *arguments)
    assert code == 130
    assert err.strip().splitlines() == (
        ["stopped at once: what was not yet saved is lost. Go on with", f"  longwave train --resume {trained[1]}"]
        if command == "train"
        else []
    )


def test_kills_at_any_moment_cost_at_most_the_steps_since_the_checkpoint(trained, tmp_path):
    """A checkpoint is written at every step, so most of the kills come while one is."""
    run, moments = tmp_path / "run", random.Random()
    logged = 0
    for i in range(4):
        where = ["--resume", run] if i else [trained[0], "--out", run]
        process = subprocess.Popen([*LONGWAVE, "train", *where, FOREVER], stderr=subprocess.PIPE, text=True)
        wait_for(lambda before=logged: max(saved_steps(run), default=0) > before + 2, process)
        time.sleep(moments.random() / 20)  # any moment will do
        process.kill()
        process.communicate()
        logged, saved = read_metrics(run)[-1]["step"], int(find(run).name.removeprefix("step-"))
        assert logged - 1 <= saved <= logged
        logged = saved
    steps = f"steps={logged + 3}"
    train(load_recipe(trained[0], [steps]), run, resume=run)
    train(load_recipe(trained[0], [steps]), tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")
    assert numbers(run) == numbers(tmp_path / "whole")
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def sounds(folder, names=("x.wav",)):
    import soundfile

    x = [((i * 37) % 101 - 50) / 60 for i in range(600)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, x, 8000)
    return folder


def test_a_model_of_sound_writes_a_file(call, tmp_path):
    import soundfile

    task = {"kind": "audio_tokens", "files": [str(sounds(tmp_path / "in"))], "length": 64, "levels": 32}
    recipe = {**TINY, "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d"]}, "task": task, "steps": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    assert call("train", tmp_path / "r.yaml", "--out", run)[0] == 0
    out = tmp_path / "y.wav"
    code, _, err = call("generate", run, "--out", out, "--seconds", "0.01", "--seed", "1")
    assert (code, soundfile.info(out).frames, soundfile.info(out).samplerate) == (0, 80, 8000)
    assert "80 samples at 8,000 a second" in err
    assert call("generate", run)[2] == "error: a model of sound writes a file: give --out x.wav\n"
    assert "must end in one of .wav" in call("generate", run, "--out", tmp_path / "y.txt")[2]
    assert "is no sample at 8000 a second" in call("generate", run, "--out", out, "--seconds", "0")[2]


def test_sound_at_another_rate_is_heard_at_it(tmp_path):
    from longwave.train.runs import load_run

    folder = sounds(tmp_path / "in", [f"{name}/{i}.wav" for name in ("a", "b") for i in range(6)])
    task = {"kind": "audio", "folder": str(folder), "seconds": 0.01}
    recipe = {**TINY, "model": {"kind": "classifier", "d_model": 8, "pattern": ["s4d"]}, "task": task, "steps": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(tmp_path / "r.yaml"), tmp_path / "run")
    for changes, rate in (([], 1.0), (["task.rate=4000"], 2.0), (["task.seconds=0.02"], 1.0)):
        _, model = load_run(tmp_path / "run", changes)
        assert [m.rate for m in model.modules() if hasattr(m, "rate")] == [rate]
