"""Two processes: DDP and FSDP2 by lightning-fabric's own launch and under torchrun, stopped, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from longwave.models import load
from longwave.models.runs import find, saved_steps
from longwave.models.storage import read_tensors
from longwave.tasks.text import BOOKS
from longwave.train import load_recipe, train
from longwave.train.monitor import read_metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TINY = {
    "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d", {"kind": "attention", "heads": 2}], "dropout": 0.1},
    "task": {"kind": "text", "length": 16, "share": 0.01},
    "steps": 6,
    "batch": 4,
    "lr": 3e-3,
    "schedule": "constant",
    "eval_every": 1,  # FSDP2 has another state after an evaluation: let every checkpoint be written in it
    "checkpoint_every": 1,
    "log_every": 1,
    "accelerator": "cpu",
    "devices": 2,
}
FOREVER = "steps=1000000"
LONGWAVE = ["-m", "longwave.cli"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *LONGWAVE]
LAUNCH = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}  # by which one says who it is


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((BOOKS / "emma.txt").read_bytes()[:20_000])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "task": {**TINY["task"], "files": [str(text)]}}))
    return tmp_path / "tiny.yaml"


@pytest.fixture
def start(tmp_path):
    """Start a process with arguments; at the end of the test, no process that knows the test's folder is left."""

    def run(*arguments):
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCH}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"})

    yield run
    left = wait_until(lambda: not alive(tmp_path), 30)
    for process in alive(tmp_path):
        os.kill(process, signal.SIGKILL)
    assert left, "processes were left behind"


def alive(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def finish(process, code=0):
    err = process.communicate(timeout=150)[1]
    assert process.returncode == code, err
    return err


def begun(run, process):
    assert wait_until(lambda: max(saved_steps(run), default=0) >= 3 or process.poll() is not None, 150)
    assert process.poll() is None, process.communicate()


def digests(run):
    return json.loads((find(run) / "manifest.json").read_text())


def numbers(run):
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")}
        for line in read_metrics(run)
    ]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_interrupted_is_uninterrupted_and_goes_on_with_one(recipe, start, tmp_path, strategy):
    run, whole = tmp_path / "run", tmp_path / "whole"
    change = f"strategy={strategy}"
    process = start(*LONGWAVE, "train", recipe, change, FOREVER, "--out", run)
    begun(run, process)
    process.send_signal(signal.SIGTERM)
    err = finish(process, 128 + signal.SIGTERM)
    assert f"longwave train --resume {run}\n" in err
    assert err.count("everything is saved") == err.count("stopping: ") == 1
    assert "Traceback" not in err
    step = int(re.search(r"interrupted after step (\d+)", err)[1])
    steps = f"steps={step + 3}"
    finish(start(*LONGWAVE, "train", "--resume", run, steps))
    finish(start(*LONGWAVE, "train", recipe, change, steps, "--out", whole))
    assert digests(run) == digests(whole)
    assert numbers(run) == numbers(whole)
    before, model = numbers(run)[-2]["loss"], load(find(run))[0]  # the last line but one is of training
    assert sum(p.numel() for p in model.parameters()) > 256 * 8  # whole, not a shard
    moments = read_tensors(find(run) / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == {name for name, _ in model.named_parameters()}
    train(load_recipe(run / "config.yaml", ["devices=1", "strategy=auto", f"steps={step + 5}"]), run, resume=run)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert len(losses) == step + 5
    assert abs(losses[-2] - before) < 0.3  # it went on, and did not start anew


def test_ddp_and_fsdp2_by_torchrun_are_the_same_and_as_launched(recipe, start, tmp_path):
    launched, under = tmp_path / "launched", tmp_path / "torchrun"
    finish(start(*LONGWAVE, "train", recipe, "--out", launched))
    err = finish(start(*TORCHRUN, "train", recipe, "--out", under))
    assert err.count("held out: loss") == 1
    assert digests(launched) == digests(under)
    assert numbers(launched) == numbers(under)
    sharded = tmp_path / "sharded"
    finish(start(*TORCHRUN, "train", recipe, "strategy=fsdp2", "--out", sharded))
    for one, other in zip(numbers(launched), numbers(sharded), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_an_error_is_printed_once_with_code_2(recipe, start, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").touch()
    err = finish(start(*LONGWAVE, "train", recipe, "--out", run), 2)
    assert err.splitlines() == [
        f"error: {run} exists already: go on with it by --resume {run}, or choose another folder by --out"
    ]
    err = finish(start(*TORCHRUN, "train", recipe, "devices=1", "--out", tmp_path / "other"), 1)
    assert err.count("error: torchrun started 2 processes, and devices x nodes = 1 x 1; set devices to") == 1
    assert not (tmp_path / "other").exists()


def test_a_killed_main_process_takes_the_others_along(recipe, start, tmp_path):
    """The fixture fails where one is left; what they saved together loads."""
    run = tmp_path / "run"
    process = start(*LONGWAVE, "train", recipe, "strategy=fsdp2", FOREVER, "--out", run)
    begun(run, process)
    process.kill()
    assert "Traceback" not in process.communicate()[1]
    step = int(find(run).name.removeprefix("step-"))
    assert step >= 3
    assert wait_until(lambda: not alive(tmp_path), 30)
    train(load_recipe(run / "config.yaml", ["devices=1", "strategy=auto", f"steps={step + 1}"]), run, resume=run)


def test_a_killed_rank_ends_the_others_with_one_line(recipe, start, tmp_path):
    run = tmp_path / "a run"
    process = start(*LONGWAVE, "train", recipe, FOREVER, "--out", run)
    begun(run, process)
    (child,) = set(alive(tmp_path)) - {process.pid}
    os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    err = finish(process, 2)
    assert time.monotonic() - began < 10
    said = [line for line in err.splitlines() if not re.match(r"step \d+", line)]
    assert said == [f"error: rank 1 was lost: killed by SIGKILL; go on with longwave train --resume '{run}'"]


FAILING = """
import os
import sys
from longwave.tasks import Text
from longwave.train import load_recipe, loop, train

class Odd(Exception):
    pass

def fail(*_):
    raise Odd("gone\\nwrong")

where, recipe, run = sys.argv[1:]
if where == "on main":
    loop._start_monitor = fail
else:
    def batches(self, size, seed, index, original=Text.train_batch):
        return fail() if index == 5 else original(self, size, seed, index)  # rank 1 has the odd ones
    Text.train_batch = batches
try:
    train(load_recipe(recipe), run)
except Exception as error:
    os.write(2, f"{type(error).__name__}: {error}\\n".encode())  # in one piece: two processes share it
    sys.exit(7)
"""


@pytest.mark.parametrize("where", ["on main", "on rank 1"])
def test_any_error_of_a_rank_ends_all_of_them(recipe, start, tmp_path, where):
    """Each ends by itself, the one with its own error and the other with its rank."""
    (tmp_path / "script.py").write_text(FAILING)
    began = time.monotonic()
    err = finish(start(tmp_path / "script.py", where, recipe, tmp_path / "run"), 7)
    assert time.monotonic() - began < 60
    rank = 0 if where == "on main" else 1
    assert sorted(re.findall(r"(?:Traceback|Odd: gone\n|RankError: ).*", err)) == [
        "Odd: gone\nwrong",
        f"RankError: rank {rank} failed: Odd: gone wrong",
    ]


def test_eval_takes_one_device_unless_told_and_prints_once(recipe, tmp_path):
    train(load_recipe(recipe, ["devices=1", "steps=1"]), tmp_path / "run")
    results = []
    for arguments in ([], ["devices=2", "eval_batch=2"]):
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCH}
        command = [sys.executable, *LONGWAVE, "eval", str(tmp_path / "run"), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=True)
        results.append(run.stdout)
        assert run.stdout.count("loss") == 1
    assert results[0] == results[1]
