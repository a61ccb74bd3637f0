"""Parts as data: the signature of a class is its fields, and a mistake anywhere in them is one line with its path."""

import json

import pytest
import torch
from torch import nn

from longwave.errors import shown
from longwave.mixers import MIXERS, Mixer, MixerSpec, mixer
from longwave.models import MODEL_SPEC, LMSpec, load, save
from longwave.nn import FILTERS
from longwave.train import load_recipe

NAN, INF = float("nan"), float("inf")


def mixers():
    for name, cls in MIXERS.items():
        for options in cls.examples:
            yield pytest.param(name, options, id=f"{name}-{options}")


@pytest.mark.parametrize(("name", "options"), mixers())
def test_a_mixer_survives_being_written_down(name, options):
    """All defaults are written, so that a later default does not change an earlier model."""
    spec = mixer(name, **options)
    again = MIXERS.read(json.loads(json.dumps(spec.model_dump())))
    assert again == spec
    assert isinstance(spec, MixerSpec)
    assert isinstance(spec.build(8), MIXERS[name])
    assert set(spec.model_dump()) >= set(options)


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_a_part(name):
    options = {"max_len": 8} if "max_len" in FILTERS.spec(name).model_fields else {}
    filter = FILTERS.make(name, **options).build(4)
    assert isinstance(filter, FILTERS[name])
    assert filter(3).shape[0] == 4


def test_what_only_python_can_pass_is_no_option():
    """A module cannot be written down."""
    assert "smooth" not in FILTERS.spec("free").model_fields
    assert FILTERS.spec("dss").model_fields["eigenvalues"].annotation is str
    assert "d_model" not in MIXERS.spec("s4d").model_fields


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_sided", {"filter": {"kind": "s4d", "d_stat": 4}}, "filter.d_stat: filter 's4d' has no option 'd_stat'"),
        ("two_sided", {"filter": "free"}, "filter.max_len: filter 'free' needs the option 'max_len'"),
        ("two_sided", {"filter": {"d_state": 4}}, "filter: say which filter it is, by its name or as {kind: ...}"),
        ("two_sided", {"filter": {"kind": "s4d", "d_state": "x"}}, "filter.d_state: .*; got 'x'"),
        ("ckconv", {"max_len": 8, "filter": {"kind": "ckconv", "widht": 4}}, "'widht'; did you mean 'width'?"),
        ("ckconv", {"max_len": 8, "filter": "free"}, "filter: no continuous filter is called 'free'; there are ckconv"),
        ("liquid_s4", {"filter": {"kind": "s4", "inti": "legs"}}, "'inti'; did you mean 'init'?"),
        ("bidirectional", {"inner": {"kind": "mamba", "d_stat": 4}}, "inner.d_stat: mixer 'mamba' has no option"),
        ("bidirectional", {"inner": {"kind": "bidirectional", "inner": "s4dd"}}, "inner.inner: no mixer is .*'s4d'"),
        ("s4d", {"dt_min": NAN}, "dt_min: .*finite number; got nan"),
        ("hyena", {"max_len": 8, "frequency": INF}, "frequency: .*finite number; got inf"),
        ("attention", {"heads": None}, "heads: .*integer; got None"),
    ],
)
def test_a_mistake_in_options_of_options(name, options, message):
    """In a recipe, in Python, and in a stored config: the same line, with the path in front."""
    with pytest.raises(ValueError, match=message) as caught:
        mixer(name, **options)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    text = json.dumps({"kind": name, **options}).replace("NaN", ".nan").replace("Infinity", ".inf")
    with pytest.raises(ValueError) as caught:
        load_recipe("demo", [f"model.pattern.0={text}"])
    assert str(caught.value) == f"model.pattern.0.{line}"
    with pytest.raises(ValueError, match=message):
        MIXERS.read({"kind": name, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr=.inf", "lr: .*finite number; got inf"),
        ("lr=.nan", "lr: .*finite number; got nan"),
        ("betas=[2, 3]", "betas.0: .*less than 1; got 2"),
        ("betas=[0.9, -0.1]", "betas.1: .*greater than or equal to 0; got -0.1"),
        ("weight_decay=.inf", "weight_decay: .*finite"),
        ("clip=.inf", "clip: .*finite"),
        ("model.dropout=.nan", "model.dropout: .*finite number; got nan"),
        ("model.norm_eps=.inf", "model.norm_eps: .*finite"),
        ("task.share=.nan", "task.share: .*finite"),
        ("model.channel={kind: mlp, expand: .inf}", "model.channel.expand: .*finite"),
    ],
)
def test_a_number_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", [change])


@pytest.mark.parametrize("expand", [0.0, -1.0, NAN, INF])
def test_a_channel_mixer_of_no_width(expand):
    for name in ("mlp", "swiglu"):
        with pytest.raises(ValueError, match="expand"):
            LMSpec(vocab=3, d_model=4, pattern=["s4d"], channel={"kind": name, "expand": expand}).build()


def test_long_values_are_shown_in_part():
    assert shown("ab") == "'ab'"
    assert len(shown("x" * 3000)) < 120
    assert shown("x" * 3000).endswith("(3,002 characters)")
    long = "9" * 3000
    for change in (f"steps={long}z", f"model.kind={long}", f"{long}=1", f"model.pattern.0.{long}=1", f"{long}"):
        with pytest.raises(ValueError) as caught:
            load_recipe("demo", [change])
        assert len(str(caught.value)) < 700, change
    with pytest.raises(ValueError) as caught:
        load_recipe(long)
    assert len(str(caught.value)) < 700


# Parts of a user's own


@pytest.fixture
def own():
    """A mixer that is defined after everything was imported, for one test."""

    class Own(Mixer, name="own"):
        """The identity, scaled."""

        examples = ({},)

        def __init__(self, d_model: int, scale: float = 2.0):
            super().__init__()
            self.d_model, self.scale = d_model, scale
            self.weight = nn.Parameter(torch.ones(d_model))

        def init_state(self, batch):
            return ()

        def mix(self, x, state, padding):
            return self.scale * self.weight * x, state

    yield Own
    del MIXERS["own"]


def test_a_mixer_that_came_later_exists_everywhere(own, tmp_path):
    recipe = load_recipe("demo", ["model.pattern=[own, {kind: bidirectional, inner: {kind: own, scale: 3}}]"])
    assert recipe.model.pattern[1].inner.scale == 3
    with pytest.raises(ValueError, match=r"model.pattern.0.scael: mixer 'own' has no option 'scael'.*'scale'"):
        load_recipe("demo", ["model.pattern=[{kind: own, scael: 3}]"])
    spec = LMSpec(vocab=5, d_model=4, pattern=[{"kind": "own", "scale": 3}])
    save(tmp_path, spec.build(), spec)
    model, loaded = load(tmp_path)
    assert loaded == spec
    assert model.backbone.mixers[0].scale == 3


@pytest.mark.parametrize("kind", ["evil.py:Evil", "evil.py", "./evil.py", "some/evil:Evil"])
def test_a_config_runs_no_file(tmp_path, monkeypatch, kind):
    """Neither a recipe nor a stored model: a file runs where the caller names it, and nowhere else."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"evil.*' is a file, and a config runs no code: .* --trust (FILE|evil.py) "):
        load_recipe("demo", [f"model.pattern=[{kind}]"])
    spec = LMSpec(vocab=5, d_model=4, pattern=["s4d"])
    save("m", spec.build(), spec)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "pattern": [{"kind": kind}]}))
    with pytest.raises(ValueError, match=r"config.json does not describe a model: pattern.0: .*is a file"):
        load("m")
    assert not (tmp_path / "ran").exists()


def test_specs_stay_as_they_are():
    """What follows from other fields is filled in while they are checked, never set on a frozen spec."""
    spec = LMSpec(d_model=4, pattern=["s4d", "lstm"])
    assert spec.layers == 2
    with pytest.raises(ValueError, match="frozen"):
        spec.layers = 3
    assert MODEL_SPEC.validate_python(spec.model_dump()) == spec
    assert load_recipe("demo").model.vocab == 256


def test_one_file_is_a_list_of_one(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 99)
    for task in ("text", "masked_text"):
        recipe = load_recipe(
            "demo", [f"task={{kind: {task}, length: 8, files: {tmp_path / 'a.txt'}}}", "model.kind=lm"]
        )
        assert recipe.task.files == [str(tmp_path / "a.txt")]
        recipe.task.prepare()


def test_another_kind_has_its_own_defaults():
    """Options of the kind before are neither kept nor complained about; a model and a task keep their fields."""
    for kind in ("mamba", "lstm", "h3"):
        changed = load_recipe("demo", [f"model.pattern.0.kind={kind}"]).model.pattern[0]
        assert changed == (mixer("h3", d_state=32) if kind == "h3" else mixer(kind))
    assert load_recipe("demo", ["model.pattern.0=mamba"]).model.pattern[0] == mixer("mamba")
    changes = ["model.pattern.0.kind=mamba", "model.pattern.0.d_state=8", "model.channel={kind: mlp, expand: 9}"]
    recipe = load_recipe(
        "demo", [*changes, "model.channel.kind=swiglu", "task.kind=masked_text", "model.kind=masked_lm"]
    )
    assert recipe.model.pattern[0] == mixer("mamba", d_state=8)
    assert recipe.model.channel.expand == 8 / 3
    assert (recipe.task.length, recipe.model.d_model) == (256, 96)


def test_a_spec_that_cannot_be_is_a_line():
    """Also where it is made in Python: no page of pydantic's."""
    good = {"d_model": 8, "pattern": ["s4d"]}
    for fields, words in (
        ({**good, "vocab": -1}, "vocab: Input should be greater than or equal to 1; got -1"),
        ({**good, "pattern": ["s4dd"]}, "pattern.0: no mixer is called 's4dd'; there are .*"),
        ({**good, "patern": 1}, "patern: 'lm' has no field 'patern'; did you mean 'pattern'.?"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            LMSpec(**fields)


def test_numbers_with_an_exponent_are_numbers():
    """To YAML 1.1 they were text, which a field of whole numbers refused."""
    recipe = load_recipe("demo", ["steps=1e3", "warmup=1.5e2", "lr=3E-4"])
    assert (recipe.steps, recipe.warmup, recipe.lr) == (1000, 150, 3e-4)
    with pytest.raises(ValueError, match=r"steps: .*; got 1.5"):
        load_recipe("demo", ["steps=15e-1"])
