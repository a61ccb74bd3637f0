"""Backbones and heads: hybrids resume exactly, long logits never exist, models survive the disk."""

import json

import pytest
import torch

from longwave.mixers import MIXERS, Mixer, mixer
from longwave.models import (
    LM,
    AutoencoderSpec,
    Backbone,
    Classifier,
    ClassifierSpec,
    ForecasterSpec,
    LMSpec,
    MaskedLMSpec,
    PairClassifierSpec,
    RegressorSpec,
    SashimiSpec,
    load,
    save,
)
from longwave.models import lm as lm_module
from longwave.models.size import on_meta

HYBRID = ["s4d", {"kind": "attention", "heads": 2}, {"kind": "hyena", "max_len": 64, "width": 8}, "mamba", "h3", "lstm"]


def close(ours, theirs, tolerance=1e-8):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def hybrid(**options):
    torch.manual_seed(0)
    return LMSpec(vocab=20, d_model=8, pattern=HYBRID, **options).build().double()


def test_hybrid_resumes_in_any_chunks():
    model, ids = hybrid(), torch.randint(0, 20, (2, 13))
    whole, none = model(ids)
    assert none is None
    assert whole.shape == (2, 13, 20)
    for sizes in ([1] * 13, [5, 1, 7]):
        state, parts = model.init_state(2), []
        for chunk in ids.split(sizes, dim=1):
            logits, state = model(chunk, state)
            parts.append(logits)
        close(torch.cat(parts, dim=1), whole)


def test_last_is_the_last_row():
    model, ids = hybrid(), torch.randint(0, 20, (2, 13))
    close(model(ids, last=True)[0], model(ids)[0][:, -1:])


@pytest.mark.parametrize("at_once", [2**22, 60])
def test_score_is_cross_entropy(at_once, monkeypatch):
    """Whether the logits are made at once or three tokens at a time, with gradients."""
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", at_once)
    model, ids, targets = hybrid(), torch.randint(0, 20, (2, 13)), torch.randint(0, 20, (2, 13))
    targets[0, :4] = -100
    score = model.score(ids, targets)
    logits = model(ids)[0].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    close(score.loss, expected)
    assert score.total == 22
    assert score.correct == (logits.argmax(-1) == targets.flatten()).sum()
    ours = torch.autograd.grad(score.loss, list(model.parameters()))
    for a, b in zip(ours, torch.autograd.grad(expected, list(model.parameters()))):
        close(a, b)


def test_long_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", 2**16)
    model = LMSpec(vocab=4096, d_model=4, pattern=["lstm"], channel=None).build()
    largest = 0
    head = model.head.forward

    def watched(x):
        nonlocal largest
        logits = head(x)
        largest = max(largest, logits.numel())
        return logits

    model.head.forward = watched
    model.score(torch.zeros(1, 1000, dtype=torch.long), torch.zeros(1, 1000, dtype=torch.long)).loss.backward()
    assert largest == 2**16


@pytest.mark.parametrize("tied", [True, False])
def test_saves_and_loads(tmp_path, tied):
    spec = LMSpec(vocab=20, d_model=8, pattern=HYBRID, tied=tied, channel="mlp", norm="layer")
    model, ids = spec.build(), torch.randint(0, 20, (2, 13))
    save(tmp_path / "m", model, spec)
    again, loaded = load(tmp_path / "m")
    assert loaded == spec
    assert torch.equal(again(ids)[0], model.eval()(ids)[0])
    assert (again.head.weight is again.embedding.weight) == tied
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MIXERS)
def test_loads_in_the_dtype_it_was_saved_in(tmp_path, name, dtype):
    """Of every parameter and buffer, whichever stay in another one, to the bit."""
    torch.manual_seed(0)
    spec = MaskedLMSpec(vocab=20, d_model=16, pattern=[{"kind": name, **MIXERS[name].examples[0]}], channel=None)
    model, ids = spec.build().to(dtype).eval(), torch.randint(0, 20, (2, 13))
    save(tmp_path / "m", model, spec)
    again = load(tmp_path / "m")[0]
    for key, value in model.state_dict().items():
        assert again.state_dict()[key].dtype == value.dtype, key
        assert torch.equal(again.state_dict()[key], value), key
    assert again.head.decoder.weight.dtype == dtype
    assert again.head.decoder.weight is again.embedding.weight
    assert torch.equal(again(ids), model(ids))


class Ones(Mixer):
    """y = 1."""

    name = "ones"

    def __init__(self, d_model):
        super().__init__()
        self.d_model = d_model

    def init_state(self, batch):
        return ()

    def mix(self, x, state, padding):
        return torch.ones_like(x), state


def test_what_blocks_add_up_is_not_rounded_to_their_dtype():
    """A one is a quarter of what bfloat16 rounds 512 by: each would be lost."""
    backbone = Backbone([Ones(4) for _ in range(8)], norm=lambda width: torch.nn.Identity())
    x = torch.full((1, 3, 4), 512.0, dtype=torch.bfloat16)
    assert torch.equal(backbone(x)[0], x + 8)


def test_broken_models_are_named(tmp_path):
    spec = LMSpec(vocab=20, d_model=8, pattern=["s4d"])
    with pytest.raises(ValueError, match=r"is no run and no saved model: it has no config.json"):
        load(tmp_path)
    save(tmp_path, spec.build(), spec)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors (is of another model|is not a readable safetensors file)"):
        load(tmp_path)
    save(tmp_path, spec.build(), spec)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 16}))
    with pytest.raises(ValueError, match=r"model.safetensors (is of another model|is not a readable safetensors file)"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json does not describe a model"):
        load(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_classifier_ignores_padding(pooling):
    torch.manual_seed(0)
    spec = ClassifierSpec(d_model=8, pattern=["s4d", "mamba"], classes=3, features=2, pooling=pooling)
    model, x = spec.build().double(), torch.randn(2, 9, 2, dtype=torch.float64)
    padded = torch.cat([x, 100 * torch.ones(2, 4, 2, dtype=torch.float64)], dim=1)
    close(model(padded, lengths=torch.tensor([9, 9])), model(x))
    ragged = model(padded, lengths=torch.tensor([9, 5]))
    close(ragged[1:], model(x[1:, :5]))
    left = torch.cat([padded[:, 9:], x], dim=1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 9)], dim=1).bool()
    close(model(left, mask=mask), model(x))
    assert model.score(x, torch.tensor([1, -100])).total == 1


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("pool", [None, [2]], ids=["backbone", "sashimi"])
def test_not_a_number_at_padding_reaches_neither_labels_nor_gradients(pooling, pool):
    torch.manual_seed(0)
    backbone = (
        LMSpec(vocab=1, d_model=8, pattern=["s4d", "mamba"])
        if pool is None
        else SashimiSpec(vocab=1, d_model=8, pattern=["s4d"], pool=pool)
    )
    model = Classifier(backbone.build_backbone(), 3, features=2, pooling=pooling).double()
    x, mask = torch.randn(2, 13, 2, dtype=torch.float64), torch.tensor([[1] * 9 + [0] * 4, [0] * 4 + [1] * 9])
    x[mask == 0] = torch.nan
    alone = torch.cat([model(row[on == 1][None]) for row, on in zip(x, mask)])
    close(model(x, mask=mask), alone)
    parameters = list(model.parameters())
    ours, exact = (torch.autograd.grad(y.square().sum(), parameters) for y in (model(x, mask=mask), alone))
    for a, b in zip(ours, exact):
        close(a, b)


REAL = {"d_model": 8, "pattern": ["s4d", "mamba"], "features": 2}
HEADS_OF_ROWS = [
    ClassifierSpec(**REAL, classes=3),
    RegressorSpec(**REAL, width=3),
    RegressorSpec(**REAL, width=3, pooling="last"),
    ForecasterSpec(**REAL, steps=4, width=3),
]


@pytest.mark.parametrize("spec", HEADS_OF_ROWS, ids=lambda spec: spec.kind)
def test_heads_of_rows_ignore_padding(spec):
    torch.manual_seed(0)
    model, x = spec.build().double(), torch.randn(2, 13, 2, dtype=torch.float64)
    mask = torch.tensor([[1] * 9 + [0] * 4, [1, 0] * 4 + [1] * 5]).bool()
    x[~mask] = torch.nan
    alone = torch.cat([model(row[on][None]) for row, on in zip(x, mask)])
    close(model(x, mask=mask), alone)


def test_a_pair_is_two_sequences_through_one_backbone():
    torch.manual_seed(0)
    model = PairClassifierSpec(d_model=8, pattern=["s4d"], classes=3, vocab=7).build().double()
    x, mask = torch.randint(0, 7, (2, 2, 9)), torch.ones(2, 2, 9).bool()
    mask[0, 1, 5:] = False
    y = model(x, mask=mask)
    assert y.shape == (2, 3)
    alone = [model.backbone(model.encoder(x[i, j][mask[i, j]][None]))[0].mean(1) for i in (0, 1) for j in (0, 1)]
    for row, (a, b) in zip(y, (alone[:2], alone[2:])):
        close(row[None], model.out(torch.relu(model.hidden(torch.cat([a, b, a - b, a * b], dim=-1)))))
    assert model.score(x, torch.tensor([2, -100]), mask).total == 1


BASES = {"d_model": 8, "vocab": 5, "complement": [3, 2, 1, 0, 4]}


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("pattern", [["mamba", {"kind": "attention", "heads": 2}], ["two_sided"]])
def test_both_strands_of_dna_are_told_the_same(pattern, pooling):
    torch.manual_seed(0)
    spec = ClassifierSpec(**BASES, pattern=pattern, pooling=pooling, classes=3)
    model, alone = spec.build().double(), spec.model_copy(update={"complement": None}).build().double()
    alone.load_state_dict(model.state_dict(), strict=False)
    x, lengths = torch.randint(0, 5, (4, 40)), torch.tensor([40, 31, 2, 17])
    mask = torch.arange(40) < lengths[:, None]
    other = torch.zeros_like(x)
    for row, length in enumerate(lengths):
        other[row, :length] = torch.tensor(BASES["complement"])[x[row, :length].flip(0)]
    close(model(x, mask=mask), model(other, mask=mask), 1e-10)
    assert (alone(x, mask=mask) - alone(other, mask=mask)).abs().max() > 1e-3
    halves = alone.pooled(x, mask), alone.pooled(other, mask)
    close(model(x, mask=mask), model.head(sum(halves) / 2), 1e-10)
    with pytest.raises(ValueError, match=r"ids lie in 0..4|token ids"):
        model(torch.full((1, 4), 5))


@pytest.mark.parametrize("complement", [[3, 2, 1, 0], [1, 2, 3, 4, 0], [0, 0, 1, 2, 3], [3, 2, 1, 0, 5]])
def test_a_complement_gives_back_each_id(complement):
    with pytest.raises(ValueError, match=r"a complement has an id for each of vocab = 5, .* again; got \[.*\]"):
        ClassifierSpec(**BASES | {"complement": complement}, pattern=["s4d"], classes=3).build()
    with pytest.raises(ValueError, match="a complement has an id for each of vocab = None"):
        RegressorSpec(d_model=4, features=2, complement=[1, 0], pattern=["s4d"], width=1).build()


def test_an_autoencoder_tells_all_tokens_from_one_vector():
    torch.manual_seed(0)
    model, x = AutoencoderSpec(d_model=8, pattern=["s4d"], vocab=7).build().double(), torch.randint(0, 7, (3, 9))
    y = model.backbone(model.encoder(x))[0][:, -1]
    pair = torch.arange(9, dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    where = torch.stack([pair.sin(), pair.cos()], -1).flatten(1)
    close(model(x), model.head(y[:, None] + where), 1e-10)
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    for row, on, logits in zip(x, mask, model(x, mask=mask)):
        close(logits[on], model(row[on][None])[0], 1e-10)
    targets = torch.where(mask, x, -100)
    score = model.score(x, targets, mask)
    close(score.loss, torch.nn.functional.cross_entropy(model(x, mask=mask)[mask], x[mask], reduction="sum"), 1e-10)
    assert score.total == 20


@pytest.mark.parametrize("spec", [RegressorSpec(**REAL, width=3), ForecasterSpec(**REAL, steps=4, width=3)])
def test_errors_are_summed_over_what_is_known(spec):
    torch.manual_seed(0)
    model, x = spec.build().double(), torch.randn(2, 9, 2, dtype=torch.float64)
    targets = torch.randn_like(model(x))
    targets[0, ..., 1] = torch.nan
    score, known = model.score(x, targets), ~targets.isnan()
    error = (model(x) - targets)[known]
    assert score.total == known.sum()
    close(score.loss, error.square().sum())
    close(score.absolute, error.abs().sum())
    score.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_forecast_needs_its_steps():
    model = ForecasterSpec(**REAL, steps=4, width=1).build()
    with pytest.raises(ValueError, match=r"a row of 3 steps has no last 4: make inputs longer"):
        model(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match=r"a row of 2 steps has no last 4"):
        model(torch.zeros(1, 5, 2), mask=torch.tensor([[1, 1, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"targets are \(1, 4, 1\); got \(1, 4\)"):
        model.score(torch.zeros(1, 5, 2), torch.zeros(1, 4))


def test_padded_prompts_go_on():
    """Right, left and inner padding, other rows other lengths: what comes after is as behind each prompt alone."""
    model, ids = hybrid(), torch.randint(1, 20, (3, 13))
    mask = torch.tensor([[1] * 9 + [0] * 4, [0] * 6 + [1] * 7, [1, 0] * 6 + [1]])
    logits, state = model(ids[:, :11], model.init_state(3), mask=mask[:, :11])
    last, state = model(ids[:, 11:], state, mask=mask[:, 11:], last=True)
    after, _ = model(torch.tensor([[7, 3], [1, 1], [4, 2]]), state)
    for row, prompt, more in zip(range(3), ids, ([7, 3], [1, 1], [4, 2])):
        alone = prompt[mask[row] == 1]
        exact = model(torch.cat([alone, torch.tensor(more)])[None])[0][0]
        close(after[row], exact[-2:])
        close(logits[row][mask[row, :11] == 1], exact[: mask[row, :11].sum()])
        if mask[row, 11:].any():
            close(last[row, 0], exact[-3])


def test_classifier_poolings_differ():
    """On tokens: mean, last and first look where their names say."""
    torch.manual_seed(0)
    x = torch.randint(0, 5, (1, 7))
    changed = x.clone()
    changed[0, -1] = (x[0, -1] + 1) % 5
    for pooling, moves in (("mean", True), ("last", True), ("first", False)):
        model = ClassifierSpec(d_model=8, pattern=["s4d"], classes=3, vocab=5, pooling=pooling).build()
        assert ((model(x) - model(changed)).abs().max() > 1e-4) == moves


def test_model_errors():
    with pytest.raises(ValueError, match=r"mixers of one d_model; got \[4, 8\]"):
        Backbone([mixer("s4d").build(4), mixer("s4d").build(8)])
    with pytest.raises(ValueError, match=r"got no mixer"):
        Backbone([])
    backbone = Backbone([mixer("s4d").build(4)])
    with pytest.raises(ValueError, match=r"vocab >= 1; got 0"):
        LM(backbone, 0)
    with pytest.raises(ValueError, match=r"no pooling is called 'max'; there are mean, last, first"):
        Classifier(backbone, 2, vocab=3, pooling="max")
    with pytest.raises(ValueError, match=r"either vocab or features; got vocab = None, features = None"):
        Classifier(backbone, 2)
    model = Classifier(backbone, 2, vocab=3)
    with pytest.raises(ValueError, match=r"lengths must lie in 1..4, the padded length; got 0..4"):
        model(torch.zeros(2, 4, dtype=torch.long), lengths=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"either lengths or mask"):
        model(torch.zeros(2, 4, dtype=torch.long), lengths=torch.tensor([1, 4]), mask=torch.ones(2, 4).bool())


HEADS = [
    LMSpec(vocab=5, d_model=4, pattern=["s4d"]),
    MaskedLMSpec(vocab=5, d_model=4, pattern=["bigs"]),
    ClassifierSpec(vocab=5, classes=2, d_model=4, pattern=["s4d"]),
]


@pytest.mark.parametrize("spec", HEADS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_ids_out_of_range_are_told(spec, wrong):
    model = spec.build()
    ids = torch.tensor([[0, 4, 1, wrong]])
    with pytest.raises(ValueError, match=rf"^token ids lie in 0\.\.4; got {wrong}: "):
        model(ids)
    classes = 2 if spec.kind == "classifier" else 5
    targets = torch.tensor([wrong]) if spec.kind == "classifier" else torch.tensor([[-100, 0, 0, wrong]])
    with pytest.raises(ValueError, match=rf"^targets lie in 0\.\.{classes - 1}, or are -100 where .*; got {wrong}$"):
        model.score(ids.clamp(0, 4), targets)


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made(tmp_path):
    """By what its weights take, from a recipe and from a stored config alike, and without any of it allocated."""
    spec = LMSpec(vocab=5, d_model=4, pattern=["s4d"])
    save(tmp_path, spec.build(), spec)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 10**6}))
    with pytest.raises(ValueError, match=r"d_model = 1,000,000 and layers = 1, its weights, takes .* GB, and this"):
        load(tmp_path)
    huge = LMSpec(vocab=5, d_model=4, pattern=[{"kind": "long_conv", "max_len": 10**18, "channels": 9}])
    with pytest.raises(ValueError, match="too large for any machine"):
        on_meta(huge)
    weights = sum(p.numel() for p in on_meta(LMSpec(vocab=5, d_model=10**6, pattern=["s4d"]), None).parameters())
    assert weights > 1e12
