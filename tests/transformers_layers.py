"""Layers of Hugging Face transformers, drawn at random and run in float64: cases beside the authors' files."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from official import Case, series
from torch import Tensor, nn


class Drawn(NamedTuple):
    """A layer of transformers: what official.py's files have of others, made when it is asked for.

    Attributes:
        stem: for the test's id.
        system: name in longwave.official.
        config: its options, without defaults.
    """

    stem: str
    system: str
    config: dict

    def layer(self) -> Any:
        """Theirs."""
        return _layer(self.stem)

    def run(self, x: Tensor, cut: int | None = None) -> Tensor:
        """Their output (B, L, D); with ``cut`` from a prompt of so many steps and its cache, step by step."""
        with in_float64():
            return RUNS[self.system](self.layer(), x, cut)

    def case(self) -> Case:
        """Their weights, output and gradients."""
        return _case(self.stem)


class _Wide:
    """torch for code that computes in float32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64():
    """Within it the layers compute in float64 where they say float32."""
    from transformers.models.qwen3_next import modeling_qwen3_next
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
    from transformers.models.xlstm import modeling_xlstm

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_qwen3_next, modeling_xlstm):
            patch.setattr(module, "torch", _Wide())
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


@functools.cache
def _layer(stem: str) -> nn.Module:
    drawn = next(one for one in DRAWN if one.stem == stem)
    with in_float64():
        layer = LAYERS[drawn.system]({key: value for key, value in drawn.config.items() if key != "L"})
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=rng)
    return layer.double()


@functools.cache
def _case(stem: str) -> Case:
    drawn, layer = next(one for one in DRAWN if one.stem == stem), _layer(stem)
    given = series(2, drawn.config["L"], drawn.config["hidden_size"], dtype=torch.float32)
    x, (names, parameters) = given.double().requires_grad_(), zip(*layer.named_parameters())
    with torch.enable_grad():
        y = drawn.run(x)
        cotangent = series(*y.shape).flip(1)
        of_x, *grads = torch.autograd.grad(y, [x, *parameters], cotangent)
    tensors = {f"state.{key}": t.float() for key, t in layer.state_dict().items()}  # exact, as they were drawn
    tensors |= {f"grad64.state.{key}": t for key, t in zip(names, grads)} | {"grad64.input.x": of_x}
    tensors |= {"input.x": given, "output64.y": y.detach(), "output.y": y.detach().float(), "cotangent": cotangent}
    return Case(drawn.system, drawn.config, tensors)
