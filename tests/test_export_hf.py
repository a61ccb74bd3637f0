"""Models of ours that classes of transformers open by themselves, and those for which there is none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longwave import models
from longwave.mixers import mixer
from longwave.models import LMSpec
from longwave.models.spec import CHANNEL_MIXERS
from longwave.official.exporting import export_hf
from longwave.official.importing import import_model
from longwave.tokenizer import plain_bytes

SIZES = {"vocab": 257, "d_model": 16, "layers": 2}
MLP = CHANNEL_MIXERS.make("mlp", expand=4.0, activation="gelu_tanh")
ROTARY = {"kind": "rotary", "dim": 4, "base": 10000.0}
LEARNED = mixer("learned_positions", max_len=40)
SAME = {
    "MambaForCausalLM": LMSpec(pattern=["mamba"], channel=None, **SIZES),
    "Mamba2ForCausalLM": LMSpec(pattern=[mixer("mamba2", d_state=8, head_dim=8)], channel=None, tied=False, **SIZES),
    "LlamaForCausalLM": LMSpec(pattern=[mixer("attention", heads=2, kv_heads=1, bias=False)], norm_eps=1e-6, **SIZES),
    "GPTNeoXForCausalLM": LMSpec(
        pattern=[mixer("attention", heads=2, positions=ROTARY)],
        block="parallel",
        channel=CHANNEL_MIXERS.make("mlp", expand=2.0, activation="gelu"),
        norm="layer",
        **SIZES,
    ),
    "GPT2LMHeadModel": LMSpec(
        pattern=[mixer("attention", heads=2, positions=None)], positions=LEARNED, channel=MLP, norm="layer", **SIZES
    ),
}


def saved(spec, folder):
    torch.manual_seed(0)
    model = spec.build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    models.save(folder, model, spec, plain_bytes("<|endoftext|>"))
    return model


@pytest.mark.parametrize("name", SAME)
def test_transformers_opens_it_and_says_the_same(name, tmp_path):
    model = saved(SAME[name], tmp_path / "ours")
    assert export_hf(tmp_path / "ours", tmp_path / "theirs") == [name]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float64).eval()
    assert type(theirs).__name__ == name
    ids = torch.arange(24).reshape(1, 24) * 7 % 257
    off = 1e-9 if name == "GPT2LMHeadModel" else 1e-5  # theirs have angles, scans and norms in float32
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits.double(), model(ids)[0], rtol=0, atol=off)
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").decode(list(b"long")) == "long"
    import_model(tmp_path / "theirs", tmp_path / "again")
    again = models.load(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ["s4d"]}, "longwave writes no class of transformers for this model, a lm of s4d; longwave.hf"),
        ({"pattern": ["mamba", "s4d"]}, "a lm of mamba, s4d"),
        ({"pattern": ["mamba"]}, "a lm of mamba as MambaForCausalLM would not compute it"),
        ({"pattern": ["mamba"], "channel": None, "norm_eps": 1e-5, "soft_cap": 5.0}, "would not compute it"),
        ({"pattern": [mixer("attention", heads=2, window=3)], "norm_eps": 1e-6}, "as LlamaForCausalLM, GPTNeoXFor"),
    ],
)
def test_what_transformers_has_no_class_for(change, message, tmp_path):
    saved(LMSpec(**{**SIZES, **change}), tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
