"""Exported programs: saved, read back and run by torch alone, they tell what the model tells, and go on as it does."""

import io
import subprocess
import sys

import pytest
import torch

from longwave.mixers import MIXERS
from longwave.models import (
    ClassifierSpec,
    ForecasterSpec,
    LMSpec,
    MaskedLMSpec,
    PairClassifierSpec,
    SashimiSpec,
    generate,
    save,
)
from longwave.models.export import export_parallel, export_prompt, export_step
from longwave.models.states import leaves

V, D = 11, 8
EXAMPLES = [(name, i, kw) for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]
# Those whose ops have a form of their own in longwave/models/portable.py, once each; the others are the long tail.
FIRST = {
    ("aft_full", 0), ("attention", 1), ("ckconv", 0), ("gated_deltanet", 1), ("hyena", 0), ("lstm", 0),
    ("mamba", 0), ("mamba2", 0), ("s4", 1), ("s4d", 0), ("s5", 2),
}  # fmt: skip
# What of which mixers cannot be exported, and why; all of it is checked to be refused, so that none is missed.
REFUSED = {("mega", 0): "in parallel and of a prompt: with chunks, how long the last one is asks for another graph"}


def cases(fast, causal):
    """The examples of mixers, those that are not fast marked slow."""
    return [
        pytest.param(name, i, kw, id=f"{name}-{i}", marks=[] if (name, i) in fast else [pytest.mark.slow])
        for name, i, kw in EXAMPLES
        if MIXERS[name].causal in causal
    ]


def build(name, kw):
    torch.manual_seed(0)
    spec = LMSpec if MIXERS[name].causal else MaskedLMSpec
    model = spec(vocab=V, d_model=D, pattern=[{"kind": name, **kw}], channel=None).build()
    return model.double().eval()


def read_back(program):
    """As a file has it; nothing in it is of longwave."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else []:
            assert "longwave" not in str(node.target)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def ids(*shape):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "i", "kw"), cases({("two_sided", 0)}, (True, False)))
@torch.no_grad()
def test_the_parallel_form_takes_any_batch_and_length(name, i, kw):
    """Of every mixer, those too that look ahead."""
    model = build(name, kw)
    if (name, i) in REFUSED:
        with pytest.raises(ValueError, match=r"takes a size for a constant"):
            export_parallel(model)
        return
    program = read_back(export_parallel(model))
    for shape in ((3, 9), (2, 5), (1, 17)):
        x = ids(*shape)
        close(program(x), model(x)[0] if MIXERS[name].causal else model(x))


@pytest.mark.parametrize(("name", "i", "kw"), cases(FIRST, (True,)))
@torch.no_grad()
def test_a_prompt_and_steps_are_what_the_model_tells(name, i, kw):
    """Logits and states, from a prompt of another batch and length, and token by token."""
    model, x = build(name, kw), ids(3, 9)
    y, state = model(x, model.init_state(3))
    if (name, i) in REFUSED:
        with pytest.raises(ValueError, match=r"takes a size for a constant"):
            export_prompt(model)
        flat = {key: t.contiguous() for key, t in leaves(state)}
    else:
        told, flat = read_back(export_prompt(model))(x)
        close(told, y)
    step = read_back(export_step(model))
    for t in range(3):
        told, flat = step(x[:, t : t + 1], flat)
        y, state = model(x[:, t : t + 1], state)
        close(told, y)
        close(flat, dict(leaves(state)))


@torch.no_grad()
def test_models_of_all_kinds():
    """A stack with positions and channel mixers; ids, pairs and real inputs."""
    torch.manual_seed(0)
    stack = {"d_model": D, "pattern": [{"kind": "attention", "heads": 2}], "positions": "sinusoidal_positions"}
    for spec, x in (
        (LMSpec(vocab=V, tied=False, norm="layer", block="parallel", **stack), ids(3, 9)),
        (ClassifierSpec(features=3, classes=2, **stack), torch.randn(3, 9, 3, dtype=torch.float64)),
        (PairClassifierSpec(vocab=V, classes=2, pooling="last", **stack), ids(3, 2, 9)),
        (ForecasterSpec(features=2, steps=7, width=1, **stack), torch.randn(3, 11, 2, dtype=torch.float64)),
    ):
        model = spec.build().double()
        training, y = model.training, model.eval()(x)
        close(read_back(export_parallel(model.train(training)))(x), y[0] if isinstance(y, tuple) else y)
        assert model.training == training


def test_what_cannot_be_exported_is_refused():
    """What keeps no state, in steps; and SaShiMi, whose windows at each level are full or not by the length."""
    with pytest.raises(ValueError, match=r"a Classifier keeps no state"):
        export_step(ClassifierSpec(d_model=D, pattern=["s4d"], vocab=V, classes=2).build())
    sashimi = SashimiSpec(vocab=V, d_model=D, layers=1, pool=[2]).build()
    for export in (export_parallel, export_prompt, export_step):
        with pytest.raises(ValueError, match=r"SaShiMi is not exported"):
            export(sashimi)


WITHOUT_LONGWAVE = """
import sys, torch
sys.modules["longwave"] = None
prompt, step = (torch.export.load(f"{sys.argv[1]}/{form}.pt2").module() for form in ("prompt", "step"))
logits, state = prompt(torch.tensor([list(b"Emma ")]))
told = []
for _ in range(8):
    ids = logits[:, -1:].argmax(-1)
    told.append(ids.item())
    logits, state = step(ids, state)
print(told)
"""


def test_the_files_run_without_longwave(call, tmp_path):
    """As the command writes them; they go on as generation does."""
    torch.manual_seed(0)
    spec = LMSpec(vocab=256, d_model=D, pattern=["mamba", "s4d"])
    model = spec.build()
    save(tmp_path / "model", model, spec)
    code, _, err = call("export", tmp_path / "model", "--to", "program", "--out", tmp_path / "out")
    assert code == 0, err
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_LONGWAVE, tmp_path / "out"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    (told,) = generate(model.eval(), [list(b"Emma ")], 8, temperature=0.0)
    assert run.stdout.split("\n")[0] == str(told)
    code, _, err = call("export", tmp_path / "model", "--to", "onxx", "--out", tmp_path / "other")
    assert code == 2 and "program" in err  # noqa: PT018
