"""What `longwave inspect` prints and draws, and the page that it makes the pictures of."""

import importlib.util
import math
import re
from pathlib import Path

import matplotlib
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from longwave.inspection import describe, drawn, effective_memory, inspect_layer, look, time_layers
from longwave.mixers import MIXERS
from longwave.nn import S4ND, DPLRFilter, FreeFilter, Response, S4DFilter, ShiftFilter, responses
from longwave.official import SYSTEMS
from longwave.ops import wkv
from longwave.plots import draw
from longwave.train import load_recipe, train

DOCS = Path(__file__).parent.parent / "docs"
CASES = [pytest.param(name, kw, id=f"{name}-{i}") for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]
RECIPE = {
    "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d", {"kind": "attention", "heads": 2}, "h3"]},
    "task": {"kind": "text", "length": 16, "share": 0.05},
    "steps": 2,
    "batch": 2,
    "lr": 1e-3,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 100)
    recipe = {**RECIPE, "task": {**RECIPE["task"], "files": [str(folder / "text.txt")]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "tiny.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Effective memory


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999])
def test_memory_of_an_exponential(decay):
    """sum_{t<n} a^2t = (1 - a^2n) / (1 - a^2), which reaches 95 % at n = log 0.05 / (2 log a)."""
    taps = decay ** torch.arange(20_000, dtype=torch.float64)
    assert effective_memory(taps) == math.ceil(math.log(0.05) / (2 * math.log(decay)))


def test_memory_of_simple_filters():
    taps = torch.zeros(4, 100)
    taps[1, 0] = -3
    taps[2, 99] = 1e-20
    taps[3] = 1
    assert effective_memory(taps).tolist() == [0, 1, 100, 95]


def test_a_slow_filter_is_looked_at_for_longer():
    """The memory does not depend on the length that was asked for, where the filter goes on."""
    decay = 0.999 ** torch.arange(2**16, dtype=torch.float64)
    banks = [look(Response("", 2, lambda L: decay[:L].expand(2, -1)), length) for length in (16, 1024, 10_000)]
    assert {(bank.median, bank.high) for bank in banks} == {(1498, 1498)}
    assert all(bank.complete for bank in banks)


def test_a_filter_that_never_ends_is_marked():
    bank = look(Response("", 1, lambda L: torch.ones(1, L)), 1024)
    assert not bank.complete
    layer = inspect_layer(FreeFilter(2, 8))._replace(banks=[bank])
    assert ">= " in describe([layer])


@pytest.mark.parametrize("max_len", [1, 2, 17, 64])
def test_a_filter_is_looked_at_where_it_is_defined(max_len):
    filter = FreeFilter(3, max_len, squash=0.0)
    (bank,) = inspect_layer(filter, 50).banks
    assert bank.complete
    torch.testing.assert_close(bank.taps, filter(max_len).double().detach(), rtol=0, atol=0)


# What is found


def test_eigenvalues_of_state_spaces():
    """Those of S4 are those of its matrix, inside the unit disc; a diagonal is its own."""
    torch.manual_seed(0)
    dense, diagonal = DPLRFilter(2, 8).double(), S4DFilter(2, 8).double()
    (found,), (same,) = responses(dense), responses(diagonal)
    matrix = dense.realize().matrix()
    for a, values in zip(matrix, found.eigenvalues):
        for value in values:
            assert torch.linalg.svdvals(a - value * torch.eye(8, dtype=torch.float64)).min() < 1e-9
    assert found.eigenvalues.abs().max() < 1
    assert torch.equal(same.eigenvalues, diagonal.realize().a)


def impulse_response(layer, channel, length):
    """A causal layer's answer to one impulse less its answer to none, its state space alone."""
    x = torch.zeros(1, length, layer.d_model, dtype=torch.float64)
    x[0, 0, channel] = 1
    return (layer(x)[0] - layer(torch.zeros_like(x))[0])[0, :, channel]


@pytest.mark.parametrize("options", [{"d_state": 8}, {"d_state": 6, "conj_sym": False}])
def test_s5_from_each_feature_to_itself(options):
    torch.manual_seed(0)
    layer = MIXERS["s5"](4, activation="none", **options).double()
    with torch.no_grad():
        layer.D.zero_()
        (bank,) = inspect_layer(layer, 32).banks
        for channel in range(4):
            torch.testing.assert_close(bank.taps[channel, :32], impulse_response(layer, channel, 32))


def test_rwkv4_weighs_the_past_as_at_equal_keys():
    layer = drawn("rwkv4", {}, 4)
    (bank,) = inspect_layer(layer, 64).banks
    w, u = -layer.time_decay.double().exp().detach(), layer.time_first.double().detach()
    torch.testing.assert_close(bank.taps[:, :3].log(), torch.stack([u, 0 * w, w], dim=1), rtol=1e-4, atol=1e-4)
    k, v = torch.zeros(1, 9, 4, dtype=torch.float64), torch.randn(1, 9, 4, dtype=torch.float64)
    y, _ = wkv(k, v, w, u)
    taps = bank.taps[:, :9].flip(1)
    torch.testing.assert_close(y[0, -1], (taps * v[0].T).sum(1) / taps.sum(1), rtol=1e-5, atol=1e-5)


def test_mamba_decays_by_its_step_sizes():
    layer = drawn("mamba", {"d_state": 2}, 4)
    (bank,) = inspect_layer(layer, 64).banks
    dt = torch.nn.functional.softplus(layer.dt_proj.bias).double().detach()
    torch.testing.assert_close(bank.taps[:, 3], torch.exp(-3 * dt), rtol=1e-4, atol=0)
    assert bank.response.eigenvalues.shape == (8, 2)


def test_mamba2_decays_by_a_step_size_a_head():
    layer = drawn("mamba2", {"head_dim": 4, "dt_low": 0.01}, 4)
    (bank,) = inspect_layer(layer, 64).banks
    dt = torch.nn.functional.softplus(layer.dt_bias).clamp(min=0.01).double().detach()
    torch.testing.assert_close(bank.taps[:, 3], torch.exp(-3 * dt * layer.A_log.exp()).detach(), rtol=1e-4, atol=0)
    assert bank.response.eigenvalues.shape == (2, 1)


def test_layers_are_the_outermost_mixers():
    layer, filter = drawn("bidirectional", {"inner": "s4d"}, 4), ShiftFilter(2, 4)
    found = list(time_layers(torch.nn.ModuleList([torch.nn.Sequential(layer, torch.nn.Linear(4, 4)), filter])))
    assert found == [layer, filter]
    assert [bank.response.name for bank in inspect_layer(layer, 16).banks] == ["forwards.kernel", "backwards.kernel"]


def test_modules_that_are_no_mixers():
    layer = inspect_layer(S4ND(4, [S4DFilter(8, 4), ShiftFilter(8, 4)]), 16)
    assert [bank.response.name for bank in layer.banks] == ["kernel.filters.0", "kernel.filters.1"]
    assert layer.banks[1].response.eigenvalues is None


def test_inspecting_leaves_a_module_as_it_was():
    layer = drawn("long_conv", {"max_len": 16, "dropout": 0.5}, 4)
    layer.output_linear.eval()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    first, second = inspect_layer(layer, 16), inspect_layer(layer, 16)
    assert torch.equal(first.banks[0].taps, second.banks[0].taps)  # no tap is dropped
    assert layer.training
    assert layer.kernel.dropout.training
    assert not layer.output_linear.training
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


def test_a_draw_is_the_same_again_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    layers = [drawn("s4d", {}, 4) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(layers[0].kernel.C, layers[1].kernel.C)


# Pictures


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_every_mixer_can_be_inspected(name, kw, tmp_path):
    layer = inspect_layer(drawn(name, kw, 8), 32)
    text = describe([layer])
    assert name in text
    assert bool(layer.banks) != bool(layer.note)
    for bank in layer.banks:
        assert 0 <= bank.median <= bank.high <= bank.taps.shape[1]
        assert re.search(rf"{re.escape(bank.response.name)} +{bank.response.channels} ", text)
    if kw is MIXERS[name].examples[0]:
        files = draw([layer], tmp_path / "all.png", name)
        assert [file.read_bytes()[:4] for file in files] == [b"\x89PNG"] * bool(layer.banks)


def test_a_filter_without_taps_is_drawn(tmp_path):
    filter = FreeFilter(2, 16, squash=1.0)  # every tap is squashed to zero
    layer = inspect_layer(filter, 16)
    assert layer.banks[0].memory.tolist() == [0, 0]
    assert draw([layer], tmp_path / "zero.svg", "zero")[0].read_text().startswith("<?xml")


# The command


def test_a_mixer_at_the_start(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("inspect", "hyena", "d_model=4", "width=8", "--length", 64)
    assert code == 0, err
    assert re.search(r"0 hyena +filter_fn +4 +\d+ +\d+", out)
    assert "95 %" in out
    assert "drawn: hyena.png" in err
    assert (tmp_path / "hyena.png").is_file()


def test_options_of_options(call, tmp_path):
    options = ["filter=free", "filter.max_len=16", "d_model=4"]
    code, out, _ = call("inspect", "two_sided", *options, "--out", tmp_path / "a" / "folder")
    assert code == 0
    assert re.search(r"kernel_ahead +4", out)
    assert [file.name for file in (tmp_path / "a" / "folder").iterdir()] == ["layer-00-two_sided.png"]


def test_a_mixer_without_filters_draws_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("inspect", "attention")
    assert code == 0
    assert "attention" in out
    assert "has no filter: looks at every past token by content" in out
    assert "nothing is drawn" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["learned_positions", "sinusoidal_positions"])
def test_a_long_name_stands_apart_from_what_is_said_of_it(name, call):
    assert f"{name} " in call("inspect", name, *(["max_len=8"] if name.startswith("learned") else []))[1]


def test_a_trained_run(call, run, tmp_path):
    code, out, err = call("inspect", run)
    assert code == 0, err
    assert re.search(r"0 s4d +kernel +8", out)
    assert re.search(r"1 attention +has no filter", out)
    assert re.search(r"2 h3 +ssm_k_kernel +8", out)
    assert sorted(file.name for file in (run / "inspect").iterdir()) == ["layer-00-s4d.png", "layer-02-h3.png"]
    checkpoint = next((run / "checkpoints").iterdir())
    code, again, _ = call("inspect", checkpoint, "--out", tmp_path / "all.svg")
    assert code == 0
    assert again == out
    assert (tmp_path / "all.svg").is_file()


def test_the_figure_of_all_layers_numbers_them_and_names_run_and_step(call, run, tmp_path, monkeypatch):
    """As the table does; a figure of one layer, in its title."""
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
    before = matplotlib.get_backend(auto_select=False)
    assert call("inspect", run, "--out", tmp_path / "all.png")[0] == 0
    assert call("inspect", run, "--out", tmp_path / "folder")[0] == 0
    assert call("inspect", "s4d", "d_model=4", "--out", tmp_path / "s4d.png")[0] == 0
    shown = [(figure.get_suptitle(), [axes.get_title() for axes in figure.axes[::4]]) for figure in figures]
    both = ["h3: ssm_k_kernel", "h3: kernel"]
    assert shown == [
        (f"{run}, step 2", ["layer 0, s4d: kernel", *(f"layer 2, {name}" for name in both)]),
        (f"{run}, step 2, layer 0", ["s4d: kernel"]),
        (f"{run}, step 2, layer 2", both),
        ("s4d d_model=4", ["s4d: kernel"]),
    ]
    assert matplotlib.get_backend(auto_select=False) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s4e"], "no mixer is called 's4e'; there are .*; did you mean 's4"),
        (["s4d", "d_stat=4"], "mixer 's4d' has no option 'd_stat'.*; did you mean 'd_state'"),
        (["s4d", "d_state=many"], "d_state: .*got 'many'"),
        (["s4d", "d_state=3"], "d_state must be even"),
        (["s4d", "d_model=0"], "d_model is a whole number >= 1; got 0"),
        (["s4d", "4"], "'4' is no change: write key=value"),
        (["s4d", "--length", "1"], "length >= 2 steps; got length = 1"),
        (["bidirectional"], "mixer 'bidirectional' needs the option 'inner'"),
        (["two_sided", "filter=free"], "filter.max_len: filter 'free' needs the option 'max_len'"),
        (["runs/none"], "runs/none is no run: it has no config.yaml"),
    ],
)
def test_a_mistake_is_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("inspect", *arguments)
    assert code == 2
    assert out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err


def test_a_run_without_a_checkpoint(call, run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    code, _, err = call("inspect", tmp_path)
    assert code == 2
    assert err == f"error: run {tmp_path} has no checkpoint yet\n"


def test_a_run_is_drawn_as_it_is(call, run):
    code, _, err = call("inspect", run, "model.d_model=16")
    assert code == 2
    assert "leave out model.d_model=16" in err


@pytest.mark.parametrize("out", ["taken/folder", "taken/file.png"])
def test_an_output_that_cannot_be_written(call, tmp_path, out):
    (tmp_path / "taken").write_text("a file")
    code, _, err = call("inspect", "s4d", "d_model=4", "--out", tmp_path / out)
    assert code == 2
    assert err.count("\n") == 1
    assert "taken" in err


# The page


def without_lines(table):
    return [re.sub(r"^((?:\|[^|]*){2})\| \d+ ", r"\1| n ", row) for row in table.splitlines()]


def test_the_table_is_the_generated_one(generate):
    page = generate.PAGE.read_text()
    new = generate.rewritten(page, generate.table(page))
    assert without_lines(new) == without_lines(page), "run python docs/generate.py table"


def test_every_mixer_has_a_section(generate):
    assert sorted(generate.sections(generate.PAGE.read_text())) == sorted(MIXERS)


def test_every_official_system_has_a_place(generate):
    named = set()
    for part in generate.PAGE.read_text().split("\n## "):
        named |= set(generate.official(part))
    assert named == set(SYSTEMS)


def test_every_picture_is_linked_and_exists():
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (DOCS / "mixers.md").read_text())
    assert sorted(linked) == sorted(f"filters/{file.name}" for file in (DOCS / "filters").iterdir())


def test_every_link_leads_somewhere():
    page = (DOCS / "mixers.md").read_text()
    titles = {title.strip("`").lower() for title in re.findall(r"^#+ (.*)$", page, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("#"):
            assert target[1:] in titles, target
        elif not target.startswith("https://"):
            assert (DOCS / target).is_file(), target
