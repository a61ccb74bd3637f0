"""Shipped recipes: each is whole, of the size that was published, and costs what it costs without its data."""

import re

import pytest
import yaml

from longwave.models.size import on_meta
from longwave.official.presets import PRESETS
from longwave.train import load_recipe, recipe_names
from longwave.train.cost import cost
from longwave.train.lookup import look_up

UNITS = {"m": 1e6, "b": 1e9}
HYENADNA = {"tiny_1k": 0.44e6, "small_32k": 3.3e6, "medium_160k": 6.6e6, "large_1m": 6.6e6}


def size(recipe):
    return sum(p.numel() for p in on_meta(recipe.model).parameters())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole_and_of_the_size_that_it_says(name):
    recipe = load_recipe(name, dry=True)
    assert recipe.warmup < recipe.steps
    count = size(recipe)
    if said := re.search(r"^(?:pile|owt|wt103)_\w+?_(\d+)(?:_(\d))?([mb])$", name):
        assert count == pytest.approx(float(f"{said[1]}.{said[2] or 0}") * UNITS[said[3]], rel=0.12), name
    if said := re.fullmatch(r"hyenadna_(\w+_\w+)", name):
        assert count == pytest.approx(HYENADNA[said[1]], rel=0.01)


SAME = {"pile_mamba_2_8b": "mamba-2.8b", "pile_rwkv4_3b": "rwkv4-3b", "wt103_gpt_125m": "gpt2"}
COSTLY = [
    "pile_hybrid_h3_2_7b",
    "pile_hyena_1_3b",
    "pile_mamba_2_8b",
    "pile_retnet_2_7b",
    "lra_pathx_s4",
    "lra_image_s5",
]
COSTLY += ["lra_retrieval_mega", "lra_listops_liquid_s4", "sc_s4d", "hyenadna_large_1m"]


@pytest.mark.parametrize(("name", "preset"), SAME.items())
def test_published_sizes_are_those_of_the_weights(name, preset):
    recipe = load_recipe(name, dry=True)
    folded = 2 * recipe.model.d_model if "rwkv" in name else 0  # the norm of the embedding, within ours
    assert size(recipe) == PRESETS[preset].parameters - folded


@pytest.mark.parametrize("name", COSTLY)
def test_what_it_costs_is_known_without_its_data(name):
    recipe = load_recipe(name, dry=True)
    known = cost(recipe)
    least = 6 * known.parameters - 12 * recipe.model.d_model * (recipe.model.vocab or 0)  # of what all tokens pass
    assert known.flops / known.row > 0.9 * least or "free" in str(recipe.model)
    assert known.device > 16 * known.parameters / (recipe.devices if recipe.strategy == "fsdp2" else 1)


def test_data_that_are_there_stand_for_themselves(tmp_path):
    with pytest.raises(ValueError, match="cifar"):
        load_recipe("lra_image_s4")
    assert load_recipe("lra_image_s4", dry=True).task.kind == "Zeros"
    assert load_recipe("lra_image_s4", ["task.images=digits", "task.grey=false"], dry=True).task.kind == "images"
    assert load_recipe("lra_listops_s4").task.kind == "listops"


def test_parts_that_a_file_shares_change_alone():
    recipe = load_recipe("pile_hybrid_h3_125m", ["model.pattern.0.head_dim=8"], dry=True)
    assert [getattr(mixer, "head_dim", None) for mixer in recipe.model.pattern[:3]] == [8, None, 1]
    assert load_recipe("pile_hybrid_h3_125m", dry=True).model.pattern[0].head_dim == 1
    assert "recipe lra_image_mega: 90.44 %" in look_up("lra_image_mega")


def test_a_file_of_several_is_named_by_one_of_them(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"parts": {}, "recipes": {"a": {}}}))
    with pytest.raises(ValueError, match="several recipes"):
        load_recipe(file)
