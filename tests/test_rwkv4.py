"""RWKV-4 beyond the contract and the authors' files: its names, its model as data, padding that takes no time."""

import pytest
import torch
from official import golden

from longwave.mixers import RWKV4, mixer
from longwave.models import LMSpec
from longwave.official import SYSTEMS, from_official

BLINKDL = {
    "rwkv.": "",
    "embeddings.": "emb.",
    "pre_ln.": "ln0.",
    "attention.": "att.",
    "feed_forward.": "ffn.",
    **{f"time_mix_{name}": f"time_mix_{name[0]}" for name in ("key", "value", "receptance")},
}


def renamed(key: str) -> str:
    for theirs, ours in BLINKDL.items():
        key = key.replace(theirs, ours)
    return key


@pytest.mark.parametrize("name", ["base", "att_hidden_ne", "rescale2"])
def test_both_sets_of_names_are_one_model(name):
    """So the outputs and gradients of the one, which its files have, are those of the other."""
    case = golden(f"rwkv4_hf__{name}")
    state, config = case.state(torch.float64), case.config
    words = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "dim_att": "attention_hidden_size"}
    words |= {"vocab_size": "vocab_size", "dim_ffn": "intermediate_size"}
    options = {ours: config.get(theirs) for ours, theirs in words.items()}
    other = {renamed(key): t for key, t in state.items()}
    assert not other.keys() & state.keys() - {"head.weight"}
    system = SYSTEMS["rwkv4_blinkdl"]
    ours = SYSTEMS["rwkv4_hf"].convert(state, SYSTEMS["rwkv4_hf"].read(config))
    theirs = system.convert(other, system.read(options))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())


def test_a_published_model_is_an_ordinary_language_model():
    case = golden("rwkv4_hf__base")
    loaded, ids = case.module().model, case.inputs(torch.float64)["input_ids"]
    pattern = ["rwkv4", "rwkv4_channel"]
    model = LMSpec(vocab=37, d_model=24, pattern=pattern, layers=4, channel=None, norm="layer", tied=False).build()
    model.double().load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(model(ids)[0], loaded(ids)[0])


def test_a_tied_head_has_no_norm():
    case = golden("rwkv4_hf__base")
    state = case.state(torch.float64)
    rows = state["rwkv.embeddings.weight"]
    tied = {**case.config, "tie_word_embeddings": True}
    model = from_official("rwkv4_hf", tied, {key: t for key, t in state.items() if key != "head.weight"}).model
    assert torch.equal(model.head.weight, rows)
    assert torch.equal(from_official("rwkv4_hf", case.config, {**state, "head.weight": rows}).model.head.weight, rows)
    with pytest.raises(ValueError, match=r"'head.weight' and 'rwkv.embeddings.weight' name one tensor"):
        from_official("rwkv4_hf", tied, state)


@torch.no_grad()
def test_the_decay_of_a_long_padding_is_not_rounded():
    """In float32 a fast channel decays by e^-20 a step: over thousands of them the exponent would lose its digits."""
    torch.manual_seed(0)
    layer, x = RWKV4(8), torch.randn(2, 5, 8)
    padded = torch.cat([x, torch.zeros(2, 4000, 8)], dim=1)
    mask = torch.arange(4005).expand(2, -1) < 5
    _, state = layer(x, layer.init_state(2))
    _, after = layer(padded, layer.init_state(2), mask=mask)
    torch.testing.assert_close(after, state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_large_keys_neither_overflow_nor_vanish():
    layer, x = RWKV4(8).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    layer.key.weight.mul_(1e4)
    y, _ = layer(x, layer.init_state(1))
    assert torch.isfinite(y).all()
    assert (y != 0).all()


@pytest.mark.parametrize("name", ["rwkv4", "rwkv4_channel"])
def test_bad_options_are_named(name):
    for depth in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"{name} needs 0 <= depth <= 1, .*; got {depth}"):
            mixer(name, depth=depth).build(8)
    with pytest.raises(ValueError, match=r"expand > 0.*; got expand = 0"):
        mixer(name, expand=0.0).build(8)


@torch.no_grad()
def test_a_file_without_a_config_is_told_by_its_shapes():
    case = golden("rwkv4_blinkdl__v4")
    (source,) = SYSTEMS["rwkv4_blinkdl"].sources
    state = case.state(torch.float32)
    shapes = {key: tuple(t.shape) for key, t in state.items()}
    options = source.found({}, shapes)
    ids = case.inputs(torch.float32)["input_ids"]
    assert torch.equal(from_official("rwkv4_blinkdl", options, state)(ids), case.module(torch.float32)(ids))
    assert source.found({}, {**shapes, "blocks.0.att.ln_x.weight": (4,)}) is None  # a later RWKV
    assert source.found({}, {"emb.weight": (3, 4)}) is None
