"""What a run is: a recipe, read from YAML, changed by ``key=value``, and checked as a whole before anything starts."""

import functools
import operator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from longwave.mixers import nearest
from longwave.models import ModelSpec
from longwave.models.spec import AnyChannelMixer, AnyMixer, LanguageSpec, MaskedLMSpec, Spec
from longwave.tasks import TASKS, Task

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[
        functools.reduce(operator.or_, TASKS.values()),
        Field(discriminator="kind"),
        BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
    ]


class Recipe(Spec):
    """A training run as data.

    Fields:
        model, task: what is trained on what.
        steps: optimiser steps.
        batch: rows a step, over all processes and accumulated parts.
        accumulate: parts a step's rows are run in, to save memory.
        lr, weight_decay, betas, clip: of AdamW; clip is the largest norm of the gradient, null for none. State-space
            parameters keep their own highest learning rate and have no decay.
        warmup: steps over which lr rises linearly from 0.
        schedule: cosine | linear | constant, of lr after the warm-up, down to ``final_lr`` times lr.
        precision: 32-true | bf16-mixed.
        threads: CPU threads of a process; default torch's choice. A tiny model is fastest on one.
        keep_memory: on a CPU, keep freed memory in the process rather than give it back and fault it in anew, see
            :func:`longwave.train.memory.keep_freed_memory`; false leaves malloc as it is.
        accelerator, devices, nodes, strategy: as lightning-fabric has them; strategy auto | ddp | fsdp2.
        eval_every, checkpoint_every, log_every: in steps; the last step always evaluates and saves.
        eval_batch: rows an evaluation batch; default batch.
        keep: how many of the latest checkpoints stay, besides the best.
        seed: of the weights, the batches and dropout.
    """

    model: ModelSpec
    task: AnyTask
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = Field(1.0, gt=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int | None = Field(None, ge=1)
    keep_memory: bool = True
    accelerator: str = "auto"
    devices: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    eval_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    log_every: int = Field(10, ge=1)
    eval_batch: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        model = self.model
        if isinstance(model, LanguageSpec) and model.vocab is None:
            object.__setattr__(self, "model", model.model_copy(update={"vocab": self.task.vocab}))
        elif model.vocab is not None and model.vocab < self.task.vocab:
            raise ValueError(f"model.vocab = {model.vocab} is too small: the task has {self.task.vocab} token ids")
        if isinstance(model, MaskedLMSpec) and self.task.asks_next:
            kind = type(self.task).model_fields["kind"].default
            raise ValueError(
                f"model masked_lm sees the next token, which is what the task {kind} asks for; "
                "take the model lm, or a task that hides its targets, such as masked_text"
            )
        if self.eval_batch is None:
            object.__setattr__(self, "eval_batch", self.batch)
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


def recipe_names() -> dict[str, str]:
    """The recipes shipped with the package and the first line of each one's header comment."""
    files = sorted(resources.files("longwave.recipes").iterdir(), key=lambda f: f.name)
    return {
        file.name.removesuffix(".yaml"): file.read_text().split("\n", 1)[0].lstrip("# ")
        for file in files
        if file.name.endswith(".yaml")
    }


def load_recipe(source: str | Path, changes: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe, shipped or a file of one's own, with ``key=value`` changes.

    Args:
        source: name of a shipped recipe, or path of a YAML file.
        changes: such as "lr=3e-3", "task.length=512" or "model.pattern.0.d_state=32"; values are YAML.
    Raises:
        ValueError: for an unknown recipe, field, mixer or task (with the nearest one), a wrong type or value, each
            naming its path.
    """
    text, where = _read(str(source))
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is not a recipe: it must hold fields such as model, task and steps")
    for change in changes:
        set_field(tree, change)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise ValueError("\n".join(lines[:2]) + more) from error


def _read(source: str) -> tuple[str, str]:
    shipped = recipe_names()
    if source in shipped:
        return resources.files("longwave.recipes").joinpath(source + ".yaml").read_text(), f"recipe {source}"
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {path} cannot be read: {error}") from error
    hint = nearest(source, shipped) or f"; the recipes are {', '.join(shipped)}"
    raise ValueError(f"{source!r} is neither a recipe nor a YAML file{hint}")


def set_field(tree: dict, change: str) -> None:
    """Put a ``key=value`` change into a tree of dicts and lists, the value read as YAML.

    Raises:
        ValueError: for a path that leads nowhere, or text that is not YAML.
    """
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ValueError(f"{change!r} is no change: write key=value, such as lr=3e-3 or task.length=512")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, part in enumerate([*parents, last]):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{change}: {'.'.join(path.split('.')[:depth])} has entries 0..{len(node) - 1}")
            key = int(part)
        elif not isinstance(node, dict):
            raise ValueError(f"{change}: {'.'.join(path.split('.')[:depth])} has no fields")
        if depth == len(parents):
            try:
                node[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{change}: the value is not valid YAML") from error
            return
        child = node[key] if isinstance(node, list) else node.get(key, {})
        node[key] = {"kind": child} if isinstance(child, str) else child
        node = node[key]


def _classes(annotation: Any) -> dict[str, type[BaseModel]]:
    """The members of a union that is told apart by ``kind``."""
    members = getattr(annotation.__origin__, "__args__", (annotation.__origin__,))
    return {cls.model_fields["kind"].default: cls for cls in members}


TAGGED: dict[str, dict[str, type[BaseModel]]] = {
    "mixer": _classes(AnyMixer),
    "task": dict(TASKS),
    "model": _classes(ModelSpec),
    "channel mixer": _classes(AnyChannelMixer),
}


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: the path, what is wrong, and the nearest that would be right."""
    tags = {tag: cls for table in TAGGED.values() for tag, cls in table.items()}
    owner: type[BaseModel] = Recipe
    path: list[str] = []
    for part in error["loc"]:
        if part in tags and path and part not in owner.model_fields:
            owner = tags[part]
        else:
            path.append(str(part))
    where, given = ".".join(path) or "recipe", error.get("input")
    if error["type"] == "extra_forbidden":
        fields = [name for name in owner.model_fields if name != "kind"]
        inside = "a recipe" if owner is Recipe else f"{owner.model_fields['kind'].default!r}"
        hint = nearest(path[-1], fields) or f"; it has {', '.join(fields)}"
        return f"{where}: {inside} has no field {path[-1]!r}{hint}"
    if error["type"] == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
        what = next((name for name, table in TAGGED.items() if set(table) == set(known)), "kind")
        return f"{where}: no {what} is called {tag!r}; there are {', '.join(sorted(known))}{nearest(tag, known)}"
    if error["type"] == "union_tag_not_found":
        return f"{where}: say which kind it is, such as {{kind: ...}}; got {given!r}"
    if error["type"] == "missing":
        return f"{where}: this field is needed"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{where}: {message}; got {given!r}"
