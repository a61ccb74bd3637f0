"""Runs as rows, and pages that are made of the committed ones."""

import json

import pytest

from longwave.results import table
from longwave.train.config import make_recipe
from longwave.train.loop import train

TREE = {
    "model": {"kind": "lm", "d_model": 8, "pattern": ["s4d"], "channel": None},
    "task": {"kind": "induction_heads", "vocab_size": 6, "length": 8, "eval_examples": 20},
    "steps": 2, "batch": 2, "lr": 1e-3, "threads": 1, "accelerator": "cpu", "paper": "99 % (table 1)",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        train(make_recipe({**TREE, "seed": seed}, []), folder / f"{seed}", command=f"longwave train x lr=1 seed={seed}")
    return [table.row(folder / f"{seed}") for seed in range(2)]


def test_a_row_says_all_that_a_table_needs(rows):
    first = rows[0]
    assert first["command"] == "longwave train x lr=1 seed=0"
    assert first["commit"]
    assert first["parameters"] > 0
    assert 0 <= first["minutes"] < 5
    assert (first["metric"], first["paper"], first["step"]) == ("accuracy", "99 % (table 1)", 2)
    assert 0 <= first["metrics"]["accuracy"] <= 1


def test_seeds_are_one_row_with_mean_and_deviation(rows):
    changed = [{**row, "metrics": {"accuracy": value}} for row, value in zip(rows, (0.5, 0.7))]
    lines = table.markdown(changed).splitlines()
    assert len(lines) == 3
    assert "| `longwave train x lr=1` |" in lines[2]
    assert "accuracy 60.0 ± 14.1 %, 2 seeds" in lines[2]
    assert lines[2].endswith("| 99 % (table 1) |")
    early = [{**changed[0], "step": 1}]
    assert "accuracy 50.0 % (after 1 of 2 steps)" in table.markdown(early)


def test_saved_rows_are_replaced_by_newer_ones_and_pages_are_derived(rows, tmp_path):
    file = tmp_path / "docs/results.jsonl"
    table.save(rows, file)
    table.save([{**rows[0], "minutes": 9.0}], file)
    assert [json.loads(line)["minutes"] == 9.0 for line in file.read_text().splitlines()] == [True, False]
    page = tmp_path / "README.md"
    page.write_text("a\n\n<!-- table: runs docs/results.jsonl -->\nold\n<!-- end of table -->\n\nb\n")
    ((found, text, made),) = table.derived(tmp_path)
    assert found == page
    assert text != made
    assert made.startswith("a\n\n<!-- table: runs docs/results.jsonl -->\n| command |")
    assert made.endswith("|\n<!-- end of table -->\n\nb\n")
    page.write_text(made)
    ((_, text, again),) = table.derived(tmp_path)
    assert text == again
    file.unlink()
    with pytest.raises(ValueError, match="not there"):
        list(table.derived(tmp_path))


def test_what_is_no_run_or_not_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run"):
        table.row(tmp_path)
    (tmp_path / "config.yaml").write_text(make_recipe(dict(TREE), []).to_yaml())
    with pytest.raises(ValueError, match="not been evaluated"):
        table.row(tmp_path)
