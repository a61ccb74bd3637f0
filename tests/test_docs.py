"""What the documents say runs: README's Python, docstring examples, recipe headers, the rules on text."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import longwave
from longwave.mixers import MIXERS
from longwave.ops import OPS
from longwave.results.table import derived
from longwave.tasks import TASKS
from longwave.train import load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(longwave.__path__, "longwave.")]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page.name, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_of_pages_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {})


def test_readme_has_python():
    assert "```python" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def public(module):
    for name, item in vars(module).items():
        own = getattr(item, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(item) or inspect.isfunction(item)):
            yield name, item


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__ or name.endswith("recipes"), f"{name} has no docstring"
    missing = [item for item, value in public(module) if not value.__doc__]
    assert missing == []


RECIPES = sorted(path.stem for path in (ROOT / "longwave/recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES)
def test_recipes_say_what_to_expect(file):
    text = (ROOT / f"longwave/recipes/{file}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    named = re.findall(r"longwave train (\w+)", header)
    assert named
    assert set(named) <= set(recipe_names())
    assert re.search(r"\d|`paper`", header), "a recipe says which number to expect"
    assert re.search(r"minutes|hours", header), "a recipe says how long it takes"
    assert "Source" in header
    if file in recipe_names():
        assert yaml.safe_load(load_recipe(file).to_yaml())["steps"] == load_recipe(file).steps


def test_tables_are_those_of_the_committed_rows():
    pages = list(derived(ROOT))
    assert {page.name for page, _, _ in pages} >= {"README.md", "learning.md"}
    for page, text, made in pages:
        assert made == text, f"{page.name}: longwave table --write"


def test_readme_lists_every_mixer_and_recipe():
    readme = (ROOT / "README.md").read_text()
    for name in [*MIXERS, *RECIPES]:
        assert f"`{name}`" in readme, name
    assert len(OPS) >= 7


def test_repository_has_no_absolute_paths_and_no_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = re.compile(r"(?<![\w.])/(?:root|home|tmp|work)/|index-url|pythonhosted|https?://pypi")
    for name in files:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", "")
            and "books" not in name
            and path != Path(__file__)
        ):
            assert not words.search(path.read_text(errors="ignore")), name


def test_every_task_has_a_section_and_its_picture():
    page = (ROOT / "docs/tasks.md").read_text()
    for name, cls in TASKS.items():
        assert f"\n## `{name}`\n\n{cls.__doc__.splitlines()[0]}\n" in page, name
        assert (ROOT / f"docs/tasks/{name}.png").is_file(), name
