"""Official weights in longwave's modules: one file a source, one line of the table a source."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from longwave.errors import nearest
from longwave.official import (
    aft,
    bigs,
    ckconv,
    dss,
    flexconv,
    gss,
    hf_hybrids,
    hf_layers,
    hyenadna,
    m2,
    mamba,
    mega,
    monarch,
    retnet,
    rwkv4,
    s4,
    s4model,
    s4nd,
    s4v3,
    s5,
    safari_block_fft,
    safari_h3,
    safari_hyena,
    safari_lm,
    safari_longconv,
    sashimi,
    transformer,
)
from longwave.official.source import Source, System, mapping
from longwave.spec import explain

_MODULES: Any = [
    s4, s4v3, s4model, safari_h3, safari_hyena, safari_longconv, safari_block_fft, safari_lm, hyenadna, m2, mamba,
    mega, monarch, rwkv4, s5, dss, gss, bigs, ckconv, flexconv, s4nd, sashimi, retnet, transformer, hf_layers,
    hf_hybrids, aft,
]  # fmt: skip
SYSTEMS: dict[str, System] = {name: system for module in _MODULES for name, system in module.SYSTEMS.items()}

__all__ = ["SYSTEMS", "Source", "System", "from_official"]


def from_official(system: str, config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A module that computes what the official one does, from the official one's weights.

    Args:
        system: which official module: h3, h3conv, hyena, hyenastandalone, hyenafilter, longconv,
            longconvkernel, longconvstandalone, blockfft, hyenalm, h3lm (HazyResearch/safari, HazyResearch/H3),
            hyenadna (HazyResearch/hyena-dna), m2 (HazyResearch/m2), s4, s4d, s4kernel, s4dkernel, s4dmin,
            s4model (state-spaces/s4), s4v3, gss, liquids4, liquid_s4 (raminmh/liquid-s4), mamba_hf, mamba2_hf,
            falcon_mamba_hf, rwkv4_hf, gpt2_hf, gptneox_hf, llama_hf, recurrent_gemma_hf, qwen3_next_hf,
            lfm2_hf, xlstm_hf (Hugging Face transformers), mamba_ssm_lm, selective_scan (state-spaces/mamba),
            rwkv4_blinkdl (BlinkDL/RWKV-LM), mega_ema, mega_layer, mega_nffn, fbmega, fbmegaema
            (facebookresearch/mega), megaema, megablock (state-spaces/s4), mega_hf (transformers),
            mega_lucidrains (lucidrains/Mega-pytorch), s5 (lindermanlab/S5), dss (ag1988/dss), gss_lucidrains
            (lucidrains/gated-state-spaces-pytorch), bigs (jxiw/BiGS), s4nd, sashimi, sashimisrc, sashimi_lm
            (state-spaces/s4), monarch (HazyResearch/fly), butterfly (HazyResearch/butterfly), ckconv
            (dwromero/ckconv), flexconv (rjbruin/flexconv), retnet_torchscale (microsoft/torchscale),
            retention_naive (fla-org/flash-linear-attention), qwen3_next_gated_deltanet, recurrent_gemma_block,
            lfm2_short_conv, xlstm_layer (layers of Hugging Face transformers), aft (rish-16/aft-pytorch).
        config: the official constructor's arguments by name, defaults left out or not; arguments of the run
            (L, rate, batch, ...) may be among them.
        state: the official ``state_dict()``; of Liquid-S4 also its attributes ``kernel.B``, ``C``, ``w``, ``log_dt``,
            which it does not save (else what they were if it had started from these weights).
    Returns:
        A module that takes the official inputs by name and returns the output, or a dict of them where there are
        several. It is in the weights' dtype. The mixer or model inside, with its own state, is ``.model`` where
        there is one.
    Raises:
        ValueError: for an unknown system, an option that is unknown or not carried over, a key that is missing or
            unexpected, or a wrong shape; it names the thing.
    """
    if system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise ValueError(f"no official system is called {system!r}; there are {known}{nearest(system, SYSTEMS)}")
    try:
        return SYSTEMS[system].load(mapping(config), state)
    except ValueError as error:
        sentence = explain(error, "model") if isinstance(error, ValidationError) else error
        raise ValueError(f"{system}: {sentence}") from error
