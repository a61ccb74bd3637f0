"""What a run is: a recipe, read from YAML, changed by ``key=value``, and checked as a whole before anything starts."""

import functools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from longwave.errors import clipped, nearest, shown
from longwave.models import ModelSpec
from longwave.models.spec import MODELS
from longwave.models.storage import spec_at
from longwave.spec import Spec, explain, read_kind
from longwave.tasks import TASKS, Task
from longwave.tasks.zeros import Zeros


def _read_task(value: Any) -> Any:
    return value if isinstance(value, Zeros) else read_kind("task", TASKS, TASKS.__getitem__, value)


AnyTask = Annotated[SerializeAsAny[Task], BeforeValidator(_read_task)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Yaml(yaml.SafeLoader):
    """YAML in which 1e3 and 3e-4 are numbers, as they are in its version 1.2 and to everybody."""


Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Recipe(Spec):
    """A training run as data.

    Fields:
        task: what is learned.
        model: what learns it; sizes that it leaves open, such as ``vocab``, are the task's. In YAML and in changes also
            ``{preset: NAME, ...}``, the size of a published model with what is said besides.
        start: a run, a checkpoint or a saved model whose weights training starts with; null draws them. Where nothing
            is said of the model, or null, it is that one.
        steps: optimiser steps.
        batch: rows a step, over all processes and accumulated parts.
        accumulate: parts a step's rows are run in, to save memory.
        lr: highest learning rate of AdamW; that of state-space parameters stays below their own.
        weight_decay: of AdamW; state-space parameters have none.
        betas: of AdamW: how much of its two moments stays at each step.
        clip: largest norm of the gradient, null for none.
        warmup: steps over which lr rises linearly from 0.
        schedule: of lr after the warm-up.
        final_lr: at the end, over lr.
        precision: float32 throughout, or bfloat16 where torch's autocast thinks it safe.
        threads: CPU threads of a process; default torch's choice. A tiny model is fastest on one.
        workers: processes, of each that trains, that draw rows ahead of the steps; 0 draws them between steps.
        keep_memory: of the command line: keep freed memory in the process rather than give it back and fault it in
            anew, see :func:`longwave.train.memory.keep_freed_memory`; ``train()`` leaves malloc as it is.
        accelerator: auto | cpu | cuda | ..., as lightning-fabric has them.
        devices: processes a node, each with a device of its own.
        nodes: machines, under torchrun or SLURM.
        strategy: how processes share the work; auto is ddp where there are several.
        eval_every, checkpoint_every, log_every: in steps; the last step always evaluates and saves.
        eval_batch: rows an evaluation batch; default batch.
        keep: how many of the latest checkpoints stay, besides the best.
        seed: of the weights, the batches and dropout.
        paper: the number that was published for it, and where; for tables.
    """

    task: AnyTask
    model: ModelSpec
    start: str | None = None
    steps: int = Field(ge=1)
    batch: int = Field(ge=1, le=2**20)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip: float | None = Field(1.0, gt=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int | None = Field(None, ge=1, le=1024)
    workers: int = Field(0, ge=0, le=1024)
    keep_memory: bool = True
    accelerator: str = "auto"
    devices: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    eval_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    log_every: int = Field(10, ge=1)
    eval_batch: int | None = Field(None, ge=1, le=2**20)
    keep: int = Field(2, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    paper: str | None = None

    @field_validator("model")
    @classmethod
    def _serves_the_task(cls, model: Any, info: ValidationInfo) -> Any:
        task: Task | None = info.data.get("task")
        return model if task is None else model.serving(task)  # None: it is wrong, and said to be

    @field_validator("eval_batch")
    @classmethod
    def _as_in_training(cls, rows: int | None, info: ValidationInfo) -> int | None:
        return info.data.get("batch") if rows is None else rows

    @model_validator(mode="after")
    def _splits(self) -> "Recipe":
        parts = self.devices * self.nodes * self.accumulate
        if self.batch % parts:
            raise ValueError(
                f"batch = {self.batch} rows cannot be split over devices x nodes x accumulate = {parts}; "
                f"take a multiple of {parts}"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe as text that :func:`load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


@functools.cache
def _shipped() -> dict[str, tuple[str, str]]:
    """The file and the line about it of every recipe shipped with the package.

    A file with ``recipes:`` holds several by name, made of its ``parts`` by YAML's anchors and ``<<``.
    """
    found = {}
    for file in sorted(resources.files("longwave.recipes").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".yaml"):
            continue
        text = file.read_text()
        title = text.split("\n", 1)[0].lstrip("# ")
        if "\nrecipes:\n" in text:
            for name, tree in yaml.load(text, Yaml)["recipes"].items():
                paper = f"{tree['paper']}; " if "paper" in tree else ""
                found[name] = file.name, f"{paper}{title}"
        else:
            found[file.name.removesuffix(".yaml")] = file.name, title
    return found


def recipe_names() -> dict[str, str]:
    """The recipes shipped with the package, and a line about each."""
    return {name: line for name, (_, line) in _shipped().items()}


def load_recipe(source: str | Path, changes: tuple[str, ...] | list[str] = (), dry: bool = False) -> Recipe:
    """Read a recipe, shipped or a file of one's own, with ``key=value`` changes.

    Args:
        source: name of a shipped recipe, or path of a YAML file.
        changes: such as "lr=3e-3", "task.length=512" or "model.pattern.0.d_state=32"; values are YAML.
        dry: where the task's files are not there, its place is taken by zeros of the forms that the recipe's
            ``stand_in`` says: to tell what it costs.
    Raises:
        ValueError: for an unknown recipe, field, mixer or task (with the nearest one), a wrong type or value, each
            naming its path.
    """
    name = str(source)
    text, where = _read(name)
    try:
        tree = yaml.load(text, Yaml)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, dict) and "recipes" in tree:
        if name not in tree["recipes"]:
            raise ValueError(
                f"{where} holds several recipes; name one that is shipped, or write it to a file of its own"
            )
        tree = tree["recipes"][name]
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is not a recipe: it must hold fields such as model, task and steps")
    return make_recipe(_unshared(tree), changes, dry)


def _unshared(tree: Any) -> Any:
    """A copy in which what an anchor of YAML stands for is not one thing in many places, of which all would change."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def make_recipe(tree: dict, changes: Sequence[str], dry: bool = False) -> Recipe:
    """The recipe that a tree of fields with changes is. Raises: see :func:`load_recipe`."""
    _resolve(tree)
    for change in changes:
        set_field(tree, change)
        _resolve(tree)
    stand_in = tree.pop("stand_in", None)
    try:
        if dry and stand_in is not None:
            sources = TypeAdapter(AnyTask).validate_python(tree.get("task")).sources
            if not all(Path(source).expanduser().exists() for source in sources):
                tree["task"] = Zeros.model_validate(stand_in)
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, "recipe")) from error


def read_task(name: str, changes: Sequence[str] = ()) -> Task:
    """A task by its name with ``key=value`` changes, such as pathfinder with "size=128".

    Raises:
        ValueError: as :func:`load_recipe`.
    """
    tree: dict[str, Any] = {"kind": name}
    for change in changes:
        set_field(tree, change)
    try:
        return TypeAdapter(AnyTask).validate_python(tree)
    except ValidationError as error:
        raise ValueError(explain(error, "task")) from error


def _read(source: str) -> tuple[str, str]:
    shipped = _shipped()
    if source in shipped:
        return resources.files("longwave.recipes").joinpath(shipped[source][0]).read_text(), f"recipe {source}"
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"recipe {shown(source)} cannot be read: {reason}") from error
    hint = nearest(source, shipped) or "; longwave list names the recipes"
    raise ValueError(f"{shown(source)} is neither a recipe nor a YAML file{hint}")


def fields(changes: Sequence[str]) -> dict[str, Any]:
    """The tree that some ``key=value`` make of nothing."""
    tree: dict[str, Any] = {}
    for change in changes:
        set_field(tree, change)
    return tree


def set_field(tree: dict, change: str) -> None:
    """Put a ``key=value`` change into a tree of dicts and lists, the value read as YAML.

    Another ``kind`` of a part, such as model.pattern.0.kind=mamba, starts with its own defaults; one of the model or
    the task keeps the fields that it has too. ``model.preset=NAME`` is a model of its own: it keeps none.

    Raises:
        ValueError: for a path that leads nowhere, or text that is not YAML.
    """
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ValueError(f"{shown(change)} is no change: write key=value, such as lr=3e-3 or task.length=512")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, part in enumerate([*parents, last]):
        key: Any = part
        where = f"{clipped(change)}: {'.'.join(parents[:depth])}"
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{where} has entries 0..{len(node) - 1}")
            key = int(part)
        elif not isinstance(node, dict):
            raise ValueError(f"{where} has no fields")
        if depth == len(parents):
            try:
                value = yaml.load(text, Yaml)
            except yaml.YAMLError as error:
                raise ValueError(f"{clipped(change)}: the value is not valid YAML") from error
            if key == "kind" and node.get("kind") != value:
                for other in node.keys() - _fields_of(".".join(parents), value):
                    del node[other]
            if path == "model.preset":
                node.clear()
            node[key] = value
            return
        child = node[key] if isinstance(node, list) else node.get(key, {})
        node[key] = {"kind": child} if isinstance(child, str) else child
        node = node[key]


def _resolve(tree: dict) -> None:
    """Puts the model that ``{preset: NAME, ...}`` stands for in its place, with what is said besides, or that of start
    where none is said."""
    model = tree.get("model")
    if model is None and isinstance(start := tree.get("start"), str):
        tree["model"] = spec_at(start)[1].model_dump()
    if not isinstance(model, dict) or "preset" not in model:
        return
    from longwave.official.presets import preset  # takes long to import

    own = {key: value for key, value in model.items() if key != "preset"}
    fields = preset(model["preset"]).spec().model_dump()
    if own.get("kind", fields["kind"]) != fields["kind"]:
        fields = {key: value for key, value in fields.items() if key in _fields_of("model", own["kind"])}
    tree["model"] = fields | own


def _fields_of(where: str, kind: Any) -> set[str]:
    """The fields that another kind of the model or of the task keeps."""
    if where == "task" and isinstance(kind, str) and TASKS.find(kind):
        return set(TASKS[kind].model_fields)
    return set(MODELS[kind].model_fields) if where == "model" and kind in MODELS else set()
