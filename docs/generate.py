"""Rewrites all tables, also those of ``longwave table``, and draws filters: ``python docs/generate.py [table]``."""

import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from longwave.inspection import drawn, inspect_layer
from longwave.mixers import MIXERS, Mixer, state_bytes
from longwave.ops import Op
from longwave.plots import draw_figure, draw_sample
from longwave.results.table import derived
from longwave.tasks import TASKS

DOCS = Path(__file__).parent
PAGE, TASK_PAGE = DOCS / "mixers.md", DOCS / "tasks.md"
START, END = "<!-- table: python docs/generate.py -->", "<!-- end of table -->"
WIDTH = 64
SAMPLES = {  # short enough to be read
    "text": {"length": 60},
    "masked_text": {"length": 60},
    "selective_copying": {"length": 50, "copy_length": 6},
    "copying": {"length": 50, "copy_length": 8},
    "spread_copying": {"length": 50, "copy_length": 8},
    "in_context_recall": {"length": 60},
    "fuzzy_recall": {"length": 60},
    "multi_query_recall": {"length": 32, "vocab_size": 100, "pairs": [4]},
}
PICTURES = ("images", "pathfinder")  # of which more are drawn
OPTIONS = {"bidirectional": {"inner": "s4d"}, "s4nd": {"shape": [32]}}  # what has no default, but for max_len = 1024
HEAD = f"""\
| mixer | file | lines | source | ops used | state at D = {WIDTH}, after 1 and 1,000 steps | official weights |
|---|---|---|---|---|---|---|"""


def example(name: str) -> Mixer:
    """A mixer with its defaults."""
    return drawn(name, OPTIONS.get(name, {}), WIDTH)


def sections(page: str) -> dict[str, str]:
    """The text of every section of the page, by the name of the mixer in its title."""
    parts = re.split(r"^## `(\w+)`.*\n", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def official(section: str) -> list[str]:
    """The systems that a section says it loads."""
    line = re.search(r"^\*\*Official weights:\*\* (.*?)(?:\n\n|\Z)", section, re.M | re.S)
    return [] if line is None else re.findall(r"`(\w+)`", line[1])


def source(cls: type[Mixer]) -> str:
    """Authors and year of the first source that a mixer's file names, with a link where there is one."""
    text = " ".join((sys.modules[cls.__module__].__doc__ or "").partition("Source")[2].split())
    named = re.search(r"^s?: ([^\"]*?\(\d{4}\))", text)
    link = re.search(r"arXiv:(\d{4}\.\d{5})", text)
    if named is None:
        return ", ".join(dict.fromkeys(re.findall(r"github\.com/[\w.-]+/[\w.-]+\w", text)))
    return named[1] if link is None else f"[{named[1]}, arXiv:{link[1]}](https://arxiv.org/abs/{link[1]})"


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Within it, the names of the ops that are called, without those that ops call themselves."""
    names: list[str] = []
    inside = False
    call = Op.__call__

    def record(op, *args, **kwargs):
        nonlocal inside
        if inside:
            return call(op, *args, **kwargs)
        names.append(op.__name__)
        inside = True
        try:
            return call(op, *args, **kwargs)
        finally:
            inside = False

    Op.__call__ = record
    try:
        yield names
    finally:
        Op.__call__ = call


@torch.no_grad()
def ops(layer: Mixer) -> str:
    """The ops that a layer calls, on a sequence and, where it can, on its continuation."""
    x = torch.zeros(1, 8, layer.d_model)
    with recorded() as names:
        layer(x)
        if layer.causal:
            _, state = layer(x, layer.init_state(1))
            layer(x[:, :1], state)
    return ", ".join(f"`{name}`" for name in sorted(set(names))) or "-"


@torch.no_grad()
def state_size(layer: Mixer) -> str:
    """Bytes of the state after 1 and after 1,000 steps; on the meta device, so at no cost."""
    if not layer.causal:
        return "none: looks ahead"
    layer = layer.to("meta")
    x = torch.zeros(1, 1000, layer.d_model, device="meta")
    one, many = (state_bytes(layer(x[:, :length], layer.init_state(1))[1]) for length in (1, 1000))
    return f"{one:,} B, constant" if one == many else f"{one:,} B, {many:,} B: grows"


def table(page: str) -> str:
    """The table of all mixers, from the registry, their files and the sections of the page."""
    rows, written = [HEAD], sections(page)
    for name, cls in sorted(MIXERS.items()):
        file = Path(sys.modules[cls.__module__].__file__ or "")
        layer = example(name)
        cells = [
            f"[`{name}`](#{name})",
            f"[`{file.name}`](../longwave/mixers/{file.name})",
            str(len(file.read_text().splitlines())),
            source(cls),
            ops(layer),
            state_size(layer),
            ", ".join(f"`{system}`" for system in official(written.get(name, ""))) or "-",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def task_sections() -> str:
    """A section of every task: its docstring's first line, its source and a picture."""
    parts = []
    for name, cls in sorted(TASKS.items()):
        doc = inspect.getdoc(cls) or ""
        found = re.search(r"Sources?: (.*?)(?:\n\n|\Z)", doc, re.S)
        lines = [f"## `{name}`", doc.split("\n", 1)[0]]
        if found is not None:
            lines.append("**Source:** " + re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(found[1].split())))
        lines += [] if cls.examples else ["It reads files of yours; here are some that `docs/samples.py` makes."]
        lines.append(f"![rows of {name}](tasks/{name}.png)")
        parts += [*lines, ""]
    return "\n\n".join(part for part in parts if part)


def draw_tasks() -> None:
    """The first rows of every task."""
    from samples import MAKERS

    (DOCS / "tasks").mkdir(exist_ok=True)
    for name, cls in sorted(TASKS.items()):
        with tempfile.TemporaryDirectory() as folder:
            task = cls(**SAMPLES.get(name, {})) if cls.examples else MAKERS[name](Path(folder))
            task.prepare()
            file = DOCS / "tasks" / f"{name}.png"
            draw_sample(task, file, rows=6 if name in PICTURES else 3)
            Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


def rewritten(page: str, text: str) -> str:
    """The page with new tables."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}"


def draw_all() -> None:
    """A picture of every mixer that has filters."""
    for name in sorted(MIXERS):
        layer, file = inspect_layer(example(name)), DOCS / "filters" / f"{name}.png"
        if layer.banks:
            draw_figure({layer.name: layer}, file, f"{name} at the start", dpi=80)
            Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["table"]):
        sys.exit("usage: python docs/generate.py [table]")
    PAGE.write_text(rewritten(PAGE.read_text(), table(PAGE.read_text())))
    TASK_PAGE.write_text(rewritten(TASK_PAGE.read_text(), task_sections()))
    for page, _, text in derived(DOCS.parent):
        page.write_text(text)
    if not sys.argv[1:]:
        draw_all()
        draw_tasks()
