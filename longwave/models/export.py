"""Models as programs that run where longwave is not installed, by torch.export.

    torch.export.save(export_prompt(model), "prompt.pt2")
    torch.export.save(export_step(model), "step.pt2")

and elsewhere, with torch alone:

    prompt, step = (torch.export.load(file).module() for file in ("prompt.pt2", "step.pt2"))
    logits, state = prompt(ids)  # (B, L)
    logits, state = step(logits[:, -1:].argmax(-1), state)
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from longwave.errors import clipped
from longwave.models.classifier import PairClassifier
from longwave.models.lm import LM
from longwave.models.portable import decompositions
from longwave.models.runs import model_at
from longwave.models.sashimi import Sashimi
from longwave.models.states import filled, leaves
from longwave.models.storage import load
from longwave.ops.dispatch import use_backend
from longwave.tokenizer import FILE as TOKENIZER

ROWS, STEPS = 2, 6  # of the example inputs: 0 and 1 would be taken for constants
OTHERS = ((3, -1), (1, -2))  # rows, and steps besides those, with which a program is tried before it is returned

Flat = dict[str, Tensor]  # a state's tensors by where they stand in it, such as layers.0.h


def _flat(state: Any) -> Flat:
    """Without the room that a cache has behind it: a program holds to the strides of its example."""
    return {name: t.contiguous() for name, t in leaves(state)}


class _Program(nn.Module):
    """What a program is made of: a model behind inputs and outputs that are tensors."""

    def __init__(self, model: nn.Module, form: Any = None):
        super().__init__()
        self.model: Any = model
        self.form = form  # of a state


class _Parallel(_Program):
    """x -> what a model tells of it, without a state."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y[0] if isinstance(y, tuple) else y


class _Prompt(_Program):
    """ids (B, L) -> logits (B, L, V) and the state behind them."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Flat]:
        logits, state = self.model(ids, self.model.init_state(ids.shape[0]))
        return logits, _flat(state)


class _Step(_Program):
    """ids (B, 1) and a state -> logits (B, 1, V) and the next state."""

    def forward(self, ids: Tensor, state: Flat) -> tuple[Tensor, Flat]:
        logits, after = self.model(ids, filled(self.form, state, ""))
        return logits, _flat(after)


def export_parallel(model: nn.Module) -> ExportedProgram:
    """A model of whole sequences as a program  x -> y  of any batch and length.

    Args:
        model: any of those that a spec builds. x are token ids (B, L) or real inputs (B, L, features), without padding;
            of a pair classifier two sequences, (B, 2, L) or (B, 2, L, features).
    Returns:
        the program, in evaluation; y of a language model are the logits (B, L, V), else what its ``forward`` says.
    Raises:
        ValueError: for SaShiMi, whose graph depends on the length, and where torch takes a size for a constant.
    """
    _check(model, stateful=False)
    steps = max(STEPS, getattr(model, "steps", 0) + 3)
    pairs = [2] if isinstance(model, PairClassifier) else []
    encoder: Any = getattr(model, "encoder", None) or model.embedding

    def inputs(rows: int, length: int) -> tuple[Tensor]:
        if isinstance(encoder, nn.Embedding):
            return (encoder.weight.new_zeros(rows, *pairs, length, dtype=torch.int64),)
        return (encoder.weight.new_zeros(rows, *pairs, length, encoder.in_features),)

    sizes = {"x": {0: Dim.DYNAMIC, 1 + len(pairs): Dim.DYNAMIC}}
    others = [inputs(rows, steps + less) for rows, less in OTHERS]
    return _exported(_Parallel(model), inputs(ROWS, steps), sizes, others)


def export_prompt(model: LM) -> ExportedProgram:
    """A language model as a program  ids (B, L) -> logits (B, L, V), state  of any batch and length.

    The state is that after the last token, as the program of :func:`export_step` goes on from it: a dict of tensors,
    batch first, named by where they stand in it.

    Raises:
        ValueError: as :func:`export_step`; of what mixers, ``REFUSED`` of tests/test_export.py says.
    """
    _check(model)
    others = [(_ids(model, rows, STEPS + less),) for rows, less in OTHERS]
    return _exported(_Prompt(model), (_ids(model, ROWS, STEPS),), {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}, others)


def export_step(model: LM) -> ExportedProgram:
    """A language model as a program  ids (B, 1), state -> logits (B, 1, V), state  of any batch, and of any past where
    the state grows.

    Raises:
        ValueError: for what is no language model, or SaShiMi; and where torch takes a size for a constant.
    """
    _check(model)
    start = model.init_state(ROWS)

    @torch.no_grad()
    def inputs(rows: int, past: int) -> tuple[Tensor, Flat]:
        return _ids(model, rows, 1), _flat(model(_ids(model, rows, past), model.init_state(rows))[1])

    ids, state = inputs(ROWS, STEPS)
    before = _flat(start)
    sizes = {
        name: {i: Dim.DYNAMIC for i in range(t.ndim) if i == 0 or t.shape[i] != before[name].shape[i]}
        for name, t in state.items()
    }
    others = [inputs(rows, STEPS + less) for rows, less in OTHERS]
    return _exported(_Step(model, start), (ids, state), {"ids": {0: Dim.DYNAMIC}, "state": sizes}, others)


def _ids(model: LM, rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.int64, device=model.embedding.weight.device)


def _check(model: nn.Module, stateful: bool = True) -> None:
    if stateful and not isinstance(model, LM):
        raise ValueError(f"a {type(model).__name__} keeps no state: it is exported in its parallel form alone")
    if isinstance(getattr(model, "backbone", None), Sashimi):
        raise ValueError("SaShiMi is not exported: whether a window is full is another graph at every length")


@torch.no_grad()
def _exported(
    wrapped: _Program, example: tuple[Any, ...], sizes: dict[str, Any], others: list[tuple[Any, ...]]
) -> ExportedProgram:
    """The program of torch operations alone, which has taken inputs of other sizes too."""
    training = wrapped.model.training
    try:
        with use_backend("torch"):
            program = torch.export.export(wrapped.eval(), example, dynamic_shapes=sizes)
        program = program.run_decompositions(decompositions())
        run = program.module()
        for inputs in others:
            run(*inputs)
    except (AssertionError, UserError, ConstraintViolationError) as error:
        reason = clipped(" ".join(str(error).split()))
        raise ValueError(f"torch takes a size for a constant, so only one could be exported: {reason}") from error
    finally:
        wrapped.model.train(training)
    return program


def export_programs(path: str | Path, out: str | Path) -> list[Path]:
    """Write a model's programs, and its tokenizer.json where it has one.

    Args:
        path: a run, a checkpoint or a saved model.
        out: the folder to make: prompt.pt2 and step.pt2 of a language model, else parallel.pt2.
    Returns:
        The programs.
    Raises:
        ValueError: as those above.
    """
    model, _ = load(path)
    forms: Any = {"parallel": export_parallel}
    if isinstance(model, LM):
        forms = {"prompt": export_prompt, "step": export_step}
    programs = {Path(out) / f"{form}.pt2": make(model) for form, make in forms.items()}
    Path(out).mkdir(parents=True)
    for file, program in programs.items():
        torch.export.save(program, file)
    if (tokens := model_at(Path(path)) / TOKENIZER).is_file():
        shutil.copy(tokens, out)
    return list(programs)
