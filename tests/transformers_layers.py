"""Layers and models of Hugging Face transformers, drawn at random, in float64: cases beside the authors' files."""

import contextlib
import functools
import importlib
import json
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from official import Case, series
from torch import Tensor, nn


class Drawn(NamedTuple):
    """A layer or model of transformers: what official.py's files have of others, made when it is asked for.

    Attributes:
        stem: for the test's id.
        system: name in longwave.official.
        config: its options, without defaults, and L; of a model also its class as "cls".
    """

    stem: str
    system: str
    config: dict

    def layer(self) -> Any:
        """Theirs."""
        return _layer(self.stem)

    def run(self, x: Tensor, cut: int | None = None) -> Tensor:
        """Their output (B, L, D), of ids logits (B, L, V); with ``cut`` from a prompt of so many steps and its cache,
        step by step."""
        with in_float64():
            return RUNS.get(self.system, _run_model)(self.layer(), x, cut)

    def case(self) -> Case:
        """Their weights, output and gradients."""
        return _case(self.stem)


class _Wide:
    """torch for code that computes in float32 whatever it is given."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64():
    """Within it the layers compute in float64 where they say float32."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    with pytest.MonkeyPatch.context() as patch:
        names = ["falcon_mamba", "gpt_neox", "gpt2", "lfm2", "llama", "mamba", "mamba2", "qwen3_next"]
        names += ["recurrent_gemma", "rwkv", "xlstm"]
        files = [f"models.{name}.modeling_{name}" for name in names]
        for file in (*files, "modeling_rope_utils"):
            patch.setattr(importlib.import_module(f"transformers.{file}"), "torch", _Wide())
        patch.setattr(RecurrentGemmaRglru._rnn_scan, "__defaults__", (torch.float64,))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def _gated_deltanet(options: dict) -> nn.Module:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"], **options)
    layer: Any = Qwen3NextGatedDeltaNet(config, 0)
    layer.config = config
    return layer


def _recurrent_gemma(options: dict) -> nn.Module:
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    return RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(num_hidden_layers=3, **options), 0)


def _lfm2(options: dict) -> nn.Module:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    return Lfm2ShortConv(Lfm2Config(num_hidden_layers=1, layer_types=["conv"], **options), 0)


def _xlstm(options: dict) -> nn.Module:
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    return xLSTMLayer(xLSTMConfig(num_hidden_layers=1, chunk_size=4, **options))


LAYERS: dict[str, Callable[[dict], nn.Module]] = {
    "qwen3_next_gated_deltanet": _gated_deltanet,
    "recurrent_gemma_block": _recurrent_gemma,
    "lfm2_short_conv": _lfm2,
    "xlstm_layer": _xlstm,
}


def _parts(x: Tensor, cut: int | None) -> list[Tensor]:
    return [x] if cut is None else [x[:, :cut], *x[:, cut:].split(1, dim=1)]


def _with_cache(layer: Any, x: Tensor, cut: int | None, name: str) -> Tensor:
    from transformers import DynamicCache

    cache = {} if cut is None else {name: DynamicCache(config=layer.config)}
    return torch.cat([layer(part, **cache) for part in _parts(x, cut)], dim=1)


def _run_recurrent_gemma(layer: Any, x: Tensor, cut: int | None) -> Tensor:
    places = torch.arange(x.shape[1]).expand(x.shape[:2])
    layer.conv1d_state = layer.rg_lru.recurrent_states = None
    parts = zip(_parts(x, cut), [places] if cut is None else [places[:, :cut], *places[:, cut:].split(1, dim=1)])
    return torch.cat([layer(part, place, None, use_cache=cut is not None)[0] for part, place in parts], dim=1)


def _run_xlstm(layer: Any, x: Tensor, cut: int | None) -> Tensor:
    ys, state = [], None
    for part in _parts(x, cut):
        y, state = layer(part, state)
        ys.append(y)
    return torch.cat(ys, dim=1)


def _run_model(model: Any, ids: Tensor, cut: int | None) -> Tensor:
    if cut is None:
        return model(ids, use_cache=False).logits
    from transformers import DynamicCache

    name = next(name for name in ("cache_params", "past_key_values") if name in signature(model.forward).parameters)
    cache, ys, done = DynamicCache(config=model.config) if name == "past_key_values" else None, [], 0
    if hasattr(model, "_setup_cache"):
        model._setup_cache(model.config, len(ids), ids.device, torch.float64)
    for part in _parts(ids, cut):
        more = {"position_ids": torch.arange(done, done + part.shape[1])[None]} if name == "past_key_values" else {}
        out = model(part, use_cache=True, **{name: cache}, **more)
        cache, done = out.get(name, cache), done + part.shape[1]
        ys.append(out.logits)
    return torch.cat(ys, dim=1)


RUNS: dict[str, Callable[[Any, Tensor, int | None], Tensor]] = {
    "qwen3_next_gated_deltanet": functools.partial(_with_cache, name="cache_params"),
    "recurrent_gemma_block": _run_recurrent_gemma,
    "lfm2_short_conv": functools.partial(_with_cache, name="past_key_values"),
    "xlstm_layer": _run_xlstm,
}
SMALL = {"L": 13, "hidden_size": 12}
GROUPS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
FUSED = {"num_heads": 2, "weight_mode": "fused"}
DRAWN = [
    Drawn(stem, system, {**SMALL, **options})
    for stem, system, options in (
        ("gated_deltanet", "qwen3_next_gated_deltanet", {**GROUPS, "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-3}),
        ("gated_deltanet_70", "qwen3_next_gated_deltanet", {**HEADS, "L": 70}),
        ("recurrent_gemma", "recurrent_gemma_block", {"num_attention_heads": 3, "lru_width": 12, "conv1d_width": 3}),
        (
            "recurrent_gemma_wide",
            "recurrent_gemma_block",
            {"num_attention_heads": 2, "lru_width": 16, "conv1d_width": 3},
        ),
        ("lfm2", "lfm2_short_conv", {}),
        ("lfm2_bias", "lfm2_short_conv", {"conv_bias": True, "conv_L_cache": 4}),
        ("xlstm", "xlstm_layer", {"num_heads": 3, "eps": 1e-2}),
        (
            "xlstm_fused",
            "xlstm_layer",
            {"num_heads": 2, "use_bias": True, "weight_mode": "fused", "gate_soft_cap": 2.0},
        ),
    )
]
SIZES = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": None, "bos_token_id": None}
SIZES |= {"eos_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = [
    Drawn(f"{system}__{cls}", system, {"L": 13, "cls": cls, **SIZES, **options})
    for system, cls, options in (
        ("mamba_hf", "Mamba", {"expand": 16, "intermediate_size": 40, "num_hidden_layers": 2}),
        ("mamba2_hf", "Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 4, "chunk_size": 4}),
        ("falcon_mamba_hf", "FalconMamba", {"state_size": 5, "mixer_rms_eps": 1e-3, "tie_word_embeddings": False}),
        ("rwkv4_hf", "Rwkv", {"layer_norm_epsilon": 1e-3, "attention_hidden_size": 40}),
        ("gpt2_hf", "GPT2LMHead", {"n_positions": 32, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}),
        ("gptneox_hf", "GPTNeoX", {"num_attention_heads": 4, "intermediate_size": 40, "attention_bias": False}),
        (
            "llama_hf",
            "Llama",
            {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 40, "head_dim": 8}
            | {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
        ),
        ("recurrent_gemma_hf", "RecurrentGemma", {**ATTENTION, "intermediate_size": 80, "attention_window_size": 6}),
        (
            "qwen3_next_hf",
            "Qwen3Next",
            {**ATTENTION, **GROUPS, "head_dim": 16, "intermediate_size": 40, "num_experts": 0, "attention_bias": True}
            | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "rms_norm_eps": 1e-3},
        ),
        ("lfm2_hf", "Lfm2", {**ATTENTION, "intermediate_size": 96, "block_multiple_of": 8, "full_attn_idxs": [1]}),
        ("xlstm_hf", "xLSTM", {"hidden_size": 128, "num_heads": 2, "chunk_size": 4, "output_logit_soft_cap": 2.0}),
    )
]
DRAWN += MODELS


def _model(options: dict) -> nn.Module:
    import transformers

    cls = options.pop("cls")
    model = f"{cls}Model" if cls.endswith("LMHead") else f"{cls}ForCausalLM"
    return getattr(transformers, model)(getattr(transformers, f"{cls.removesuffix('LMHead')}Config")(**options))


@functools.cache
def _layer(stem: str) -> nn.Module:
    drawn = next(one for one in DRAWN if one.stem == stem)
    with in_float64():
        layer = LAYERS.get(drawn.system, _model)({key: value for key, value in drawn.config.items() if key != "L"})
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=rng)
    return layer.double().eval()


@functools.cache
def _case(stem: str) -> Case:
    drawn, layer = next(one for one in DRAWN if one.stem == stem), _layer(stem)
    names, parameters = zip(*layer.named_parameters())
    config, L = drawn.config, drawn.config["L"]
    if "cls" in config:
        config = {"L": L, **json.loads(layer.config.to_json_string(use_diff=False))}  # as transformers writes it
        given = torch.randint(layer.config.vocab_size, (2, L), generator=torch.Generator().manual_seed(2))
        inputs, leaves = {"input_ids": given}, {}
    else:
        given = series(2, L, config["hidden_size"], dtype=torch.float32)
        inputs, leaves = {"x": given}, {"grad64.input.x": given.double().requires_grad_()}
    with torch.enable_grad():
        y = drawn.run(leaves.get("grad64.input.x", given))
        cotangent = series(*y.shape).flip(1)
        grads = torch.autograd.grad(y, [*leaves.values(), *parameters], cotangent)
    tensors = {f"state.{key}": t.float() for key, t in layer.state_dict().items()}  # exact, as they were drawn
    tensors |= dict(zip([*leaves, *(f"grad64.state.{name}" for name in names)], grads))
    tensors |= {f"input.{name}": t for name, t in inputs.items()}
    tensors |= {"output64.y": y.detach(), "output.y": y.detach().float(), "cotangent": cotangent}
    return Case(drawn.system, config, tensors)
