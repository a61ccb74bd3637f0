"""Layers and models of Hugging Face transformers beside ours: steps with their cache, configs of whole models, models
that become ordinary ones, and what of them does not."""

import pytest
import torch
import transformers
from official import error
from transformers_layers import DRAWN, MODELS

from longwave import models
from longwave.models import generate
from longwave.official import SYSTEMS, from_official
from longwave.official.importing import import_model

CONFIGS = {
    "qwen3_next_gated_deltanet": transformers.Qwen3NextConfig,
    "recurrent_gemma_block": transformers.RecurrentGemmaConfig,
    "lfm2_short_conv": transformers.Lfm2Config,
    "xlstm_layer": transformers.xLSTMConfig,
}
WITHOUT_STEPS = {"recurrent_gemma_wide", "rwkv4_hf__Rwkv"}  # whose cache has the width of the model, or mixes up rows
STEPS = [drawn for drawn in DRAWN if drawn.stem not in WITHOUT_STEPS]
LAYERS = [drawn for drawn in DRAWN if drawn not in MODELS]


@pytest.mark.parametrize("drawn", STEPS, ids=lambda drawn: drawn.stem)
@torch.no_grad()
def test_steps_with_a_state_are_those_with_their_cache(drawn):
    case = drawn.case()
    mixer, x = case.module().model, next(iter(case.inputs(torch.float64).values()))
    y, state = mixer(x[:, :5], mixer.init_state(len(x)))
    ys = [y]
    for part in x[:, 5:].split(1, dim=1):
        y, state = mixer(part, state)
        ys.append(y)
    theirs = drawn.run(x, cut=5)
    assert error(torch.cat(ys, dim=1), theirs) < 1e-9
    assert error(theirs, case.tensors["output64.y"]) < 1e-9


@pytest.mark.parametrize("drawn", LAYERS, ids=lambda drawn: drawn.stem)
def test_the_config_of_a_whole_model_will_do(drawn):
    case = drawn.case()
    options = {key: value for key, value in case.config.items() if key != "L"}
    config = CONFIGS[drawn.system](num_hidden_layers=3, **options).to_dict()
    whole = from_official(drawn.system, config, case.state(torch.float64))
    x = case.tensors["input.x"].double()
    assert torch.equal(whole(x), case.module()(x))


@pytest.mark.parametrize("drawn", MODELS, ids=lambda drawn: drawn.stem)
@torch.no_grad()
def test_a_model_becomes_an_ordinary_one(drawn, tmp_path):
    """From the files that transformers writes: it is found, loaded in its dtype, scored and generated from."""
    case = drawn.case()
    drawn.layer().save_pretrained(tmp_path / "theirs")
    assert import_model(tmp_path / "theirs", tmp_path / "ours").format == drawn.system
    model, spec = models.load(tmp_path / "ours")
    (source,) = SYSTEMS[drawn.system].sources
    assert spec == source.read(drawn.layer().config.to_dict()).spec()
    ids, logits = case.tensors["input.input_ids"], case.tensors["output64.y"]
    assert error(model(ids)[0], logits) < 1e-9
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert error(model.score(ids[:, :-1], ids[:, 1:]).loss, expected) < 1e-9
    tokens = torch.tensor(generate(model, ids, 3, temperature=0))
    assert drawn.run(torch.cat([ids, tokens], dim=1))[:, len(ids[0]) - 1 : -1].argmax(-1).equal(tokens)


@pytest.mark.parametrize(
    ("cls", "change", "words"),
    [
        ("Qwen3Next", {"num_experts": 4}, r"num_experts = 4 in layers \[0, 1, 2\] are not carried over"),
        ("Qwen3Next", {"num_experts": 4, "mlp_only_layers": [0, 2]}, r"layers \[1\]"),
        ("Qwen3Next", {"layer_types": ["mamba"] * 3}, "layer_types: 'mamba' is not carried over"),
        ("Lfm2", {"layer_types": ["conv"]}, "layer_types names 1 layers, num_hidden_layers = 3"),
        ("RecurrentGemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("xLSTM", {"use_bias": True}, "use_bias = True is not carried over"),
        ("FalconMamba", {"mixer_rms_eps": 0.0}, "mixer_rms_eps = 0.0 must be a number > 0"),
    ],
)
def test_what_of_a_model_is_not_carried_over_is_named(cls, change, words):
    case = next(drawn for drawn in MODELS if drawn.config["cls"] == cls).case()
    with pytest.raises(ValueError, match=f"^{case.system}: .*{words}"):
        from_official(case.system, {**case.config, **change}, case.state(torch.float32))


def test_what_a_config_says_besides():
    """Unknown options that are off change nothing; the names of xLSTM-7b's config; those that are on are named."""
    case = next(drawn for drawn in MODELS if drawn.config["cls"] == "xLSTM").case()
    (source,) = SYSTEMS[case.system].sources
    config = {
        **case.config,
        "add_qk_norm": False,
        "auto_map": {"AutoConfig": "file.Class"},
        "quantization_config": None,
    }
    older = {"embedding_dim": config.pop("hidden_size"), "num_blocks": config.pop("num_hidden_layers")}
    assert source.read(source.found({**config, **older}, {})).spec() == source.read(case.config).spec()
    with pytest.raises(ValueError, match="no option 'add_qk_norm'"):
        source.read(source.found({**case.config, "add_qk_norm": True}, {}))
