"""Published models become ordinary ones: a folder that :func:`longwave.models.load` reads."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longwave.errors import choose
from longwave.models.size import on_meta
from longwave.models.spec import AnyModel
from longwave.models.storage import ORIGIN, save_tensors
from longwave.official import SYSTEMS
from longwave.official.blocks import ModelSource
from longwave.official.files import Published, open_published
from longwave.official.source import Shapes, mapping, under
from longwave.spec import explain
from longwave.tokenizer import Tokenizer, find

FORMATS: dict[str, list[type[ModelSource]]] = {
    name: models
    for name, system in SYSTEMS.items()
    if (models := [source for source in system.sources if issubclass(source, ModelSource)])
}


class Imported(NamedTuple):
    """What became of a published model.

    Attributes:
        format: what it was, a name of :data:`FORMATS`.
        spec: what it is now.
        keys: how many tensors it had; all of them were used, or the import would have been refused.
        tokenizer: in words, what made its tokens, where its own tokenizer did not lie beside it.
    """

    format: str
    spec: AnyModel
    keys: int
    tokenizer: str | None


def import_model(
    path: str | Path, out: str | Path, format: str | None = None, tokenizer: Tokenizer | None = None, **options: Any
) -> Imported:
    """Write a published model as one of ours, which loads, trains, generates and evaluates like any other.

    No more than one copy of the weights is in memory at any time, and one tensor.

    Args:
        path: see :func:`longwave.official.files.open_published`.
        out: the folder to make.
        format: a name of :data:`FORMATS`; by default the one that its config and the names of its tensors say.
        tokenizer: to put into the folder; by default the one that lies beside the weights.
        options: official ones, which the files do not say or which shall replace what they say.
    Raises:
        ValueError: where the files are not of the format or of none, a key is missing, unexpected or of another shape,
            or an option is not carried over.
    """
    published = open_published(path)
    published = _unwrapped(published._replace(config={**published.config, **options}))
    name, kind, said = recognised(published, format)
    try:
        source = kind.read(mapping(said), **options)
        spec, tensors = converted(source, published.state)
    except ValueError as error:
        sentence = explain(error, "model") if isinstance(error, ValidationError) else error
        guess = next((other for other, _, _ in _found(published) if other != name), None)
        hint = f"\nit looks like {guess}" if guess else ""
        raise ValueError(f"{published.path} as {name}: {sentence}{hint}") from error
    known = tokenizer or (source.tokenizer if published.tokenizer is None else find(published.tokenizer))
    made, expected = (known, None) if isinstance(known, Tokenizer) else (None, known or None)
    if made is not None:
        made.check_fits(getattr(spec, "vocab", None), "the model")
    save_tensors(Path(out), tensors, spec, made)
    about = {"format": name, **({} if expected is None else {"tokenizer": expected})}
    (Path(out) / ORIGIN).write_text(json.dumps(about, indent=2) + "\n")
    return Imported(name, spec, len(published.state), expected)


PROMPT = 16  # tokens of the prompt that a model is checked with


@torch.no_grad()
def check(model: nn.Module, spec: AnyModel) -> Iterator[str]:
    """Lines on a model as it was loaded: size, dtypes, and what it says to a fixed prompt.

    The prompt is the token ids i^2 mod V for i = 1, ..., 16, or that many steps of sin(i) in all features.

    Args:
        model: ours, in evaluation mode.
        spec: its description.
    """
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    yield f"parameters  {sum(p.numel() for p in model.parameters()):,} ({dtypes})"
    steps = torch.arange(1, PROMPT + 1)
    vocab: int | None = getattr(spec, "vocab", None)
    if vocab is None:
        features: Any = getattr(spec, "features", None)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        prompt = steps.to(weight.dtype).sin()[None, :, None].expand(-1, -1, features)
    else:
        prompt = (steps**2 % vocab)[None]
    said = model(prompt)[0].double()
    digest = hashlib.sha256(said.float().contiguous().numpy().tobytes()).hexdigest()
    last = said.flatten(0, -2)[-1]
    numbers = f"mean {said.mean():.6g}, deviation {said.std():.6g}, of the last the greatest is {last.argmax().item()}"
    yield f"outputs     of {PROMPT} fixed steps: {numbers}, sha256 {digest[:12]}"


def recognised(published: Published, format: str | None) -> tuple[str, type[ModelSource], Mapping[str, Any]]:
    """The format of a published model, and the options that its files say.

    Raises:
        ValueError: where it is of none, or there is no such format.
    """
    sources = None if format is None else choose("format", format, FORMATS)
    if published.config.get("model_type") == "longwave":
        raise ValueError(f"{published.path} is longwave's own: eval, generate and train --from take it as it is")
    for name, source, said in _found(published):
        if sources is None or source in sources:
            return name if format is None else format, source, said
    if format is not None and sources is not None:
        return format, sources[0], published.config
    keys = ", ".join(list(published.state)[:3])
    kind = published.config.get("model_type")
    about = f"of model_type {kind!r}" if kind else "without a config.json that says its model_type"
    raise ValueError(
        f"{published.path} ({about}, with {keys} ...) is of no format that longwave recognises; "
        f"if it is, name it by --from: {', '.join(FORMATS)}"
    )


def _unwrapped(published: Published) -> Published:
    """Where its names are of no format, but those under ``model.`` are, as in checkpoints of Lightning: these."""
    inner = published._replace(state=under("model.", published.state))
    return inner if next(_found(published), None) is None and next(_found(inner), None) is not None else published


def _found(published: Published) -> Iterator[tuple[str, type[ModelSource], Mapping[str, Any]]]:
    """Every format that a published model may be of, with its options."""
    shapes: Shapes = {key: tuple(tensor.shape) for key, tensor in published.state.items()}
    for name, sources in FORMATS.items():
        for source in sources:
            try:
                options = source.found(published.config, shapes)
            except ValueError as error:
                raise ValueError(f"{published.path} as {name}: {error}") from error
            if options is not None:
                yield name, source, options


def converted(source: ModelSource, state: Mapping[str, Tensor]) -> tuple[AnyModel, dict[str, Tensor]]:
    """A model as data and its tensors, as :func:`longwave.models.weights` names them, in the widest of their dtypes."""
    spec, state = source.spec(), source.rename(dict(state))
    with torch.device("meta"):
        module = source.build()
    source.check(state, source.shapes(module))
    dtype = source.dtype(state)
    ghost = on_meta(spec, copies=1)
    wanted = dict([*ghost.named_parameters(), *ghost.named_buffers()])
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in source.converted(state, module):
        ours = name.removeprefix("model.")
        if ours in wanted:  # and not the second name of a tensor
            made = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            tensors[ours] = made.clone() if made.data_ptr() in held else made  # of one of theirs may be two of ours
            held.add(made.data_ptr())
    return spec, tensors
