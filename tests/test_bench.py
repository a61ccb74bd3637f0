"""The bench compares like with like: both sides of every case compute the same thing."""

import json

import pytest
import torch

from longwave.bench import ONLINE_COLUMNS, bench_generate, bench_online, lines, plot, save
from longwave.bench import device as device_module
from longwave.bench import report as report_module
from longwave.bench.cases import CASES
from longwave.bench.device import CASES as DEVICE_CASES
from longwave.bench.device import bench_device, measure_on
from longwave.bench.ops import measure, traffic, why_not


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.baseline}")
def test_both_sides_compute_the_same(case):
    if reason := why_not(case):
        pytest.skip(reason)
    torch.manual_seed(0)
    inputs = case.inputs(96)
    ours, theirs = case.ours(*inputs), case.theirs(*case.layout(inputs))
    theirs = theirs[None] if theirs.ndim < ours.ndim else theirs
    theirs = theirs if theirs.shape == ours.shape else theirs.transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_rows_are_recorded_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "RESULTS", tmp_path)
    rows = [measure(CASES[0], L, mode, "default", repeats=1) for L in (64, 128) for mode in ("forward", "both")]
    assert all(row["ms"] > 0 and row["baseline_ms"] > 0 and row["peak_mb"] >= 0 for row in rows)
    written = [json.loads(line) for line in save("ops", rows).read_text().splitlines()]
    assert [row["L"] for row in written] == [64, 64, 128, 128]
    assert {"commit", "machine", "torch", "malloc", "threads"} <= set(written[0])
    assert [path.name for path in plot([{**row, "threads": 1} for row in rows])] == ["causal_conv.png"]
    assert rows[0]["gb_per_second"] > 0
    (_, header), (row, line) = lines([{**rows[0], "target": 1e9}])
    assert header.split()[0] == "op"
    assert row["op"] == "causal_conv"
    assert line.endswith(f"missed: {CASES[0].note}")


@pytest.mark.parametrize(("mode", "passes"), [("forward", (1, 1)), ("both", (3, 2))])
def test_the_floor_counts_what_must_be_moved(mode, passes):
    """Of causal_conv: u (1, L, 16), k (16, L) and D (16,) go in, y (1, L, 16) comes out."""
    into, out = 64 * 16 + 16 * 64 + 16, 64 * 16
    assert traffic(CASES[0], 64, mode) == (out, 4 * (passes[0] * into + passes[1] * out))


def test_online_rows_say_what_a_token_costs():
    (row,) = bench_online((300,), channels=8, steps=64)
    assert set(row) == set(ONLINE_COLUMNS)
    assert 0 < row["median_us"] <= row["worst_us"]


def test_generation_rows_say_what_a_token_costs():
    threads = torch.get_num_threads()
    rows = list(bench_generate(["s4d", "attention"], 1, [1]))
    torch.set_num_threads(threads)
    assert [(row["op"], row["L"]) for row in rows] == [(name, L) for L in (16, 1000) for name in ("s4d", "attention")]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["target"] != rows[1]["target"]
    with pytest.raises(ValueError, match=r"no causal mixer is called 's4e'; .*did you mean 's4'"):
        list(bench_generate(["s4e"], 1, [1]))


@pytest.mark.parametrize("case", DEVICE_CASES, ids=lambda case: f"{case.name}-{case.baseline}")
def test_the_bench_of_a_gpu_measures_every_case(case, monkeypatch):
    """On the CPU in small, where all but the clock is the same."""
    monkeypatch.setattr(device_module, "ELEMENTS", 16)
    row = measure_on(case, 16, case.modes[-1], "cpu", 10.0, repeats=1)
    assert row["batch"] == 1
    assert all(row[time] > 0 for time in ("ms", "baseline_ms", "floor_ms"))


def test_the_bench_of_a_gpu_says_why_it_cannot_run():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"bench --device cuda: torch finds no such device"):
            bench_device([], 1, "cuda")
    with pytest.raises(ValueError, match=r"no op in the bench is called 'wvk'.*did you mean 'wkv'"):
        bench_device(["wvk"], 1, "cuda")
