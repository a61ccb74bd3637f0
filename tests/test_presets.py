"""Published models by name: as large as they are said to be, and what a recipe makes of them."""

import re

import pytest

from longwave.models.size import on_meta
from longwave.official.presets import PRESETS
from longwave.official.rwkv4 import BlinkDL
from longwave.train.config import load_recipe, make_recipe
from longwave.train.lookup import look_up


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_as_large_as_published(name):
    """Its official tensors, and ours: RWKV-4's norm behind the embedding is in the embedding here."""
    known = PRESETS[name]
    assert known.counted() == known.parameters
    tensors = on_meta(known.spec()).state_dict(keep_vars=True).items()
    shared = re.compile(r"_ahead\.(pos_emb|modulation|.*\.freq)")  # M2-BERT's filters look both ways with one of them
    ours = sum({id(t): t.numel() for name, t in tensors if not shared.search(name)}.values())
    folded = 2 * known.options["n_embd"] if known.source is BlinkDL else 0
    assert ours == known.parameters - folded


def test_a_recipe_holds_the_whole_model_of_a_preset():
    """Also where its own model is of other sizes; what is said besides holds, whatever stands first."""
    spec = PRESETS["mamba-130m"].spec()
    assert load_recipe("demo", ["model.preset=mamba-130m"]).model == spec
    changed = load_recipe("demo", ["model.preset=mamba-130m", "model.layers=2", "model.pattern.0.d_state=8"]).model
    assert changed.layers == 2
    assert changed.pattern[0].d_state == 8
    assert changed.d_model == spec.d_model
    recipe = load_recipe("demo")
    tree = recipe.model_dump() | {"model": {"preset": "mamba-130m", "layers": 2}}
    assert make_recipe(tree, []).model == spec.model_copy(update={"layers": 2})
    assert "preset" not in make_recipe(tree, []).to_yaml()


def test_a_preset_of_another_kind_keeps_its_stack():
    """A classifier, say, of a published size."""
    changes = ["model.preset=pythia-70m", "model.kind=classifier"]
    model = make_recipe({"task": {"kind": "listops"}, "steps": 1, "batch": 1, "lr": 1.0}, changes).model
    assert model.kind == "classifier"
    assert model.layers == 6
    assert model.block == "parallel"
    tree = {"task": {"kind": "listops"}, "model": {"preset": "pythia-70m", "kind": "classifier"}, "steps": 1}
    assert make_recipe(tree | {"batch": 1, "lr": 1.0}, []).model == model


@pytest.mark.parametrize(
    ("name", "hint"), [("mamba-130", "mamba-130m"), ("gpt-2", "gpt2"), ("7", "longwave list presets")]
)
def test_an_unknown_preset_is_suggested(name, hint):
    """In one line, with the nearest."""
    with pytest.raises(ValueError, match=rf"no preset is called .*{hint}"):
        load_recipe("demo", [f"model.preset={name}"])


def test_presets_are_listed():
    """With sizes, and each with its source, its tokenizer and the model that it is."""
    lines = look_up("presets").splitlines()
    assert len(lines) == len(PRESETS) + 1
    assert "129,135,360" in lines[0]
    page = look_up("rwkv4-14b")
    assert "RWKV/rwkv-4-14b-pile" in page
    assert "by the authors' shapes" in page
    assert "n_embd = 5120" in page
    assert "kind: rwkv4_channel" in page
    assert "published" in look_up("gpt2")
