"""Published models by name: a source with its official options, which say the spec, and how large it is.

Sizes: github.com/state-spaces/mamba (README, and config.json of mamba2-*), github.com/BlinkDL/RWKV-LM, the GPT-2 and
Pythia (arXiv:2304.01373, table 1) models of the Hugging Face Hub, READMEs and configs of github.com/HazyResearch/H3,
safari, hyena-dna and m2.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from longwave.errors import nearest, shown
from longwave.models.spec import AnyModel
from longwave.official.blocks import ModelSource
from longwave.official.hyenadna import HyenaDNAModel
from longwave.official.m2 import M2Bert
from longwave.official.mamba import MambaLMHeadModel
from longwave.official.rwkv4 import BlinkDL
from longwave.official.safari_lm import H3LM, HyenaLM
from longwave.official.transformer import GPT2, GPTNeoX


class Preset(NamedTuple):
    """A published model without its weights.

    Attributes:
        source: the official module.
        options: by their official names.
        parameters: how many numbers its official weights are.
        hub: where its weights are, on the Hugging Face Hub.
        published: whether the authors, or the Hub, tell ``parameters`` to the last digit; else they are the sum over
            the shapes of the authors' module.
    """

    source: type[ModelSource]
    options: dict[str, Any]
    parameters: int
    hub: str
    published: bool

    def official(self) -> ModelSource:
        """The options, defaults filled in."""
        return self.source.read(self.options)

    def spec(self) -> AnyModel:
        """What it is, as a recipe has it."""
        return self.official().spec()

    def counted(self) -> int:
        """The numbers of its official tensors, those with two names once."""
        official = self.official()
        return sum(math.prod(s) for key, s in official.tensors().items() if key not in official.aliases())


def _family(
    source: type[ModelSource],
    hub: str,
    options: Callable[..., dict[str, Any]],
    rows: Iterable[tuple[Any, ...]],
    published: bool = True,
) -> dict[str, Preset]:
    """Models of one source, of rows (name, parameters, sizes ...); hub has {} where what is behind a - stands."""
    return {
        name: Preset(source, options(*sizes), parameters, hub.format(name.partition("-")[2]), published)
        for name, parameters, *sizes in rows
    }


MAMBA = _family(
    MambaLMHeadModel,
    "state-spaces/mamba-{}",
    lambda D, layers: {"d_model": D, "n_layer": layers, "vocab_size": 50277, "rms_norm": True},
    [
        ("mamba-130m", 129_135_360, 768, 24),
        ("mamba-370m", 371_516_416, 1024, 48),
        ("mamba-790m", 793_204_224, 1536, 48),
        ("mamba-1.4b", 1_372_178_432, 2048, 48),
        ("mamba-2.8b", 2_768_345_600, 2560, 64),
    ],
)
MAMBA2 = _family(
    MambaLMHeadModel,
    "state-spaces/mamba2-{}",
    lambda D, layers: {
        **{"d_model": D, "n_layer": layers, "vocab_size": 50277, "pad_vocab_size_multiple": 16, "rms_norm": True},
        "ssm_cfg": {"layer": "Mamba2"},
    },
    [
        ("mamba2-130m", 128_989_632, 768, 24),
        ("mamba2-370m", 368_346_624, 1024, 48),
        ("mamba2-780m", 780_161_280, 1536, 48),
        ("mamba2-1.3b", 1_343_757_312, 2048, 48),
        ("mamba2-2.7b", 2_702_599_680, 2560, 64),
    ],
    published=False,
)


def _rwkv4(D: int, layers: int) -> dict[str, Any]:
    return {"n_embd": D, "n_layer": layers, "vocab_size": 50277}


RWKV4_HUB = "RWKV/rwkv-4-{}-pile"
RWKV4 = _family(
    BlinkDL,
    RWKV4_HUB,
    _rwkv4,
    [
        ("rwkv4-169m", 169_342_464, 768, 12),
        ("rwkv4-430m", 430_397_440, 1024, 24),
        ("rwkv4-1b5", 1_515_106_304, 2048, 24),
        ("rwkv4-3b", 2_984_627_200, 2560, 32),
    ],
)
LARGE_RWKV4 = _family(
    BlinkDL,
    RWKV4_HUB,
    _rwkv4,
    [("rwkv4-7b", 7_392_649_216, 4096, 32), ("rwkv4-14b", 14_148_597_760, 5120, 40)],
    published=False,
)
GPT = _family(
    GPT2,
    "openai-community/gpt2-{}",
    lambda D, layers, heads: {"n_embd": D, "n_layer": layers, "n_head": heads},
    [
        ("gpt2-medium", 354_823_168, 1024, 24, 16),
        ("gpt2-large", 774_030_080, 1280, 36, 20),
        ("gpt2-xl", 1_557_611_200, 1600, 48, 25),
    ],
)
GPT = {"gpt2": Preset(GPT2, {}, 124_439_808, "openai-community/gpt2", True)} | GPT
PYTHIA = _family(
    GPTNeoX,
    "EleutherAI/pythia-{}",
    lambda D, layers, heads, vocab: {
        **{"hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": layers, "num_attention_heads": heads},
        "vocab_size": vocab,
    },
    [
        ("pythia-70m", 70_426_624, 512, 6, 8, 50304),
        ("pythia-160m", 162_322_944, 768, 12, 12, 50304),
        ("pythia-410m", 405_334_016, 1024, 24, 16, 50304),
        ("pythia-1b", 1_011_781_632, 2048, 16, 8, 50304),
        ("pythia-1.4b", 1_414_647_808, 2048, 24, 16, 50304),
        ("pythia-2.8b", 2_775_208_960, 2560, 32, 32, 50304),
        ("pythia-6.9b", 6_857_302_016, 4096, 32, 32, 50432),
        ("pythia-12b", 11_846_072_320, 5120, 36, 40, 50688),
    ],
)
GPT2_TOKENS = {"vocab_size": 50257, "pad_vocab_size_multiple": 8}
H3 = _family(
    H3LM,
    "danfu09/H3-{}",
    lambda D, layers, heads, attention: {
        **{"d_model": D, "n_layer": layers, **GPT2_TOKENS, "ssm_cfg": {"mode": "diag", "measure": "diag-lin"}},
        **{"attn_layer_idx": attention, "attn_cfg": {"num_heads": heads}},
    },
    [
        ("h3-125M", 126_387_456, 768, 12, 12, [6]),
        ("h3-355M", 361_058_304, 1024, 24, 16, [8, 16]),
        ("h3-1.3B", 1_326_096_384, 2048, 24, 16, [8, 16]),
        ("h3-2.7B", 2_670_307_840, 2560, 32, 20, [8, 16, 24]),
    ],
    published=False,
)
HYENA = _family(
    HyenaLM,
    "Zymrael/hyena-{}-150b-tok",
    lambda D, layers: {
        **{"d_model": D, "n_layer": layers, "d_inner": 2 * D, **GPT2_TOKENS},
        "layer": {"_name_": "hyena", "emb_dim": 33, "filter_order": 64, "l_max": 2048, "modulate": False, "w": 14},
    },
    [("hyena-small", 153_752_832, 864, 18)],
    published=False,
)
HYENA_DNA = _family(
    HyenaDNAModel,
    "LongSafari/hyenadna-{}-seqlen",
    lambda D, layers, length: {
        **{"d_model": D, "n_layer": layers, "d_inner": 4 * D, "vocab_size": 12, "pad_vocab_size_multiple": 8},
        "layer": {"_name_": "hyena", "emb_dim": 5, "filter_order": 64, "l_max": length, "modulate": True, "w": 10},
    },
    [
        ("hyenadna-tiny-1k", 448_664, 128, 2, 1026),
        ("hyenadna-medium-160k", 14_232_672, 256, 8, 160_002),
        ("hyenadna-medium-450k", 28_152_672, 256, 8, 450_002),
        ("hyenadna-large-1m", 54_552_672, 256, 8, 1_000_002),
    ],
    published=False,
)
M2_BERT = _family(
    M2Bert,
    "danfu09/m2-{}",
    lambda D, additions: {
        **{"vocab_size": 30528, "hidden_size": D, "num_hidden_layers": 12, "intermediate_size": 4 * D},
        **{"max_position_embeddings": 128, "use_positional_encodings": True, "use_monarch_mlp": True},
        **{"long_conv_l_max": 128, "hyena_emb_dim": 5, "hyena_filter_order": 128, "residual_long_conv": True},
        "hyena_training_additions": additions,
    },
    [
        ("m2-bert-80M", 80_307_264, 768, True),
        ("m2-bert-110M", 115_609_728, 960, False),
        ("m2-bert-260m", 259_173_696, 1536, False),
        ("m2-bert-341m", 341_084_224, 1792, False),
    ],
    published=False,
)
PRESETS: dict[str, Preset] = {
    name.lower(): preset
    for family in (MAMBA, MAMBA2, RWKV4, LARGE_RWKV4, GPT, PYTHIA, H3, HYENA, HYENA_DNA, M2_BERT)
    for name, preset in family.items()
}


def preset(name: Any) -> Preset:
    """The published model of a name.

    Raises:
        ValueError: for a name that none has, with the nearest.
    """
    if not isinstance(name, str) or name not in PRESETS:
        hint = nearest(str(name), PRESETS) or "; longwave list presets shows them"
        raise ValueError(f"no preset is called {shown(name)}{hint}")
    return PRESETS[name]
