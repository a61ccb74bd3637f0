"""Mixers beside the layers of Hugging Face transformers: steps with their cache, and configs of whole models."""

import pytest
import torch
import transformers
from official import error
from transformers_layers import DRAWN

from longwave.official import from_official

CONFIGS = {
    "qwen3_next_gated_deltanet": transformers.Qwen3NextConfig,
    "recurrent_gemma_block": transformers.RecurrentGemmaConfig,
    "lfm2_short_conv": transformers.Lfm2Config,
    "xlstm_layer": transformers.xLSTMConfig,
}
STEPS = [drawn for drawn in DRAWN if drawn.stem != "recurrent_gemma_wide"]  # their cache has the width of the model


@pytest.mark.parametrize("drawn", STEPS, ids=lambda drawn: drawn.stem)
@torch.no_grad()
def test_steps_with_a_state_are_those_with_their_cache(drawn):
    case = drawn.case()
    mixer, x = case.module().model, case.tensors["input.x"].double()
    y, state = mixer(x[:, :5], mixer.init_state(len(x)))
    ys = [y]
    for part in x[:, 5:].split(1, dim=1):
        y, state = mixer(part, state)
        ys.append(y)
    theirs = drawn.run(x, cut=5)
    assert error(torch.cat(ys, dim=1), theirs) < 1e-9
    assert error(theirs, case.tensors["output64.y"]) < 1e-9


@pytest.mark.parametrize("drawn", DRAWN, ids=lambda drawn: drawn.stem)
def test_the_config_of_a_whole_model_will_do(drawn):
    case = drawn.case()
    options = {key: value for key, value in case.config.items() if key != "L"}
    config = CONFIGS[drawn.system](num_hidden_layers=3, **options).to_dict()
    whole = from_official(drawn.system, config, case.state(torch.float64))
    x = case.tensors["input.x"].double()
    assert torch.equal(whole(x), case.module()(x))
