"""`longwave list NAME`: every option of everything that a recipe can hold can be looked up."""

import re

import pytest

from longwave.train.config import Recipe
from longwave.train.lookup import TABLES, describe, look_up, overview, spec_of

NAMES = sorted({name for table in TABLES.values() for name in table})
SPECS = [pytest.param(spec_of(table, name), id=f"{title}-{name}") for title, table in TABLES.items() for name in table]


@pytest.mark.parametrize("spec", [*SPECS, pytest.param(Recipe, id="recipe")])
def test_every_option_is_described(spec):
    for name in spec.model_fields.keys() - {"kind"}:
        text = describe(spec, name)
        assert len(text) >= 8, (name, text)
        assert "`" not in text.replace("`text`", "").replace("`length`", "").replace("`book:NAME`", ""), text


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_a_line_for_every_option(name):
    page = look_up(name)
    for title, table in TABLES.items():
        if name in table:
            assert f"{title[:-1]} {name}: " in page
            for option in spec_of(table, name).model_fields.keys() - {"kind"}:
                assert re.search(rf"^  {option} +\S", page, re.M), option
    assert all(len(line) <= 140 for line in page.splitlines()), page


def test_types_limits_defaults_and_meaning():
    assert re.search(r"^  d_state +int \(<= 65536\) +16 +N, state size a channel\.$", look_up("mamba"), re.M)
    assert re.search(r"^  max_len +int +needed +longest sequence\.$", look_up("hyena"), re.M)
    assert re.search(r"^  init +str +lin +lin \| inv \| quad \| legs \| real, of A and B\.$", look_up("s4d"), re.M)
    assert re.search(r"^  share +float \(> 0, < 1\) +0.1 +The fraction that is held out", look_up("text"), re.M)
    assert re.search(r"^  vocab_size +int \(>= 4\) +10 +Token ids", look_up("associative_recall"), re.M)
    assert re.search(
        r"^  filter +filter +\{kind: s4d, discretization: bilinear\} +what gives", look_up("liquid_s4"), re.M
    )
    page = look_up("recipe")
    assert re.search(r"^  steps +int \(>= 1\) +needed\n +optimiser steps", page, re.M)
    assert re.search(r"^  model +lm \| masked_lm \| sashimi \| \.\.\. +needed", page, re.M)
    assert re.search(r"^  schedule +cosine \| linear \| constant +cosine", page, re.M)
    assert "it has no options" in look_up("lstm")
    assert "longwave show demo" in look_up("demo")


def test_a_name_of_several_things_has_a_page_of_each():
    page = look_up("s4d")
    assert page.index("mixer s4d: ") < page.index("filter s4d: ")
    assert "bandlimit" in page.split("filter s4d")[1]


def test_overview_has_all_names():
    for name in NAMES:
        assert re.search(rf"^  {name} +\S+ \S+", overview(), re.M), name


def test_an_unknown_name_is_suggested():
    with pytest.raises(ValueError, match=r"no part is called 'mamb'; there are .*; did you mean 'mamba'\?"):
        look_up("mamb")
