"""Mamba: the language model of Hugging Face transformers, and the scan of github.com/state-spaces/mamba."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers import Mamba
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.official.blocks import LMFace
from longwave.official.system import Choice, Options, Shapes, Size, State, System, prefixed
from longwave.ops import selective_scan


def _inner(o: Options) -> int:
    return int(o.expand * o.hidden_size) if o.intermediate_size is None else o.intermediate_size


def _rank(o: Options) -> int:
    return math.ceil(o.hidden_size / 16) if o.time_step_rank == "auto" else o.time_step_rank


def _keys(o: Options) -> Shapes:
    D, E, N, R = o.hidden_size, _inner(o), o.state_size, _rank(o)
    layer: Shapes = {
        "norm.weight": (D,),
        "mixer.A_log": (E, N),
        "mixer.D": (E,),
        "mixer.conv1d.weight": (E, 1, o.conv_kernel),
        "mixer.in_proj.weight": (2 * E, D),
        "mixer.x_proj.weight": (R + 2 * N, E),
        "mixer.dt_proj.weight": (E, R),
        "mixer.dt_proj.bias": (E,),
        "mixer.out_proj.weight": (D, E),
    }
    if o.use_conv_bias:
        layer["mixer.conv1d.bias"] = (E,)
    if o.use_bias:
        layer |= {"mixer.in_proj.bias": (2 * E,), "mixer.out_proj.bias": (D,)}
    return {
        "backbone.embeddings.weight": (o.vocab_size, D),
        **{f"backbone.layers.{i}.{key}": shape for i in range(o.num_hidden_layers) for key, shape in layer.items()},
        "backbone.norm_f.weight": (D,),
        "lm_head.weight": (o.vocab_size, D),
    }


def _build(o: Options) -> LMFace:
    D, E = o.hidden_size, _inner(o)
    if E % D:
        raise ValueError(f"intermediate_size = {E} is not carried over: it is no multiple of hidden_size = {D}")
    mixers = [
        Mamba(
            D,
            d_state=o.state_size,
            d_conv=o.conv_kernel,
            expand=E // D,
            dt_rank=_rank(o),
            bias=o.use_bias,
            conv_bias=o.use_conv_bias,
        )
        for _ in range(o.num_hidden_layers)
    ]
    backbone = Backbone(mixers, partial(nn.RMSNorm, eps=o.layer_norm_epsilon))
    return LMFace(LM(backbone, o.vocab_size, tied=o.tie_word_embeddings))


def _convert(state: State, o: Options) -> State:
    fixed = {
        "backbone.embeddings.weight": "embedding.weight",
        "backbone.norm_f.weight": "backbone.norm.weight",
        "lm_head.weight": "head.weight",
    }
    ours = {fixed.get(key) or key.replace(".norm.", ".norm1."): tensor for key, tensor in state.items()}
    if o.tie_word_embeddings:
        ours["head.weight"] = ours["embedding.weight"]
    return prefixed("model.", ours)


MAMBA_HF = System(
    options={
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "layer_norm_epsilon": 1e-5,
        "expand": 2.0,
        "intermediate_size": Size(None),
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": Size("auto"),
        "hidden_act": Choice("silu", "swish"),
        "tie_word_embeddings": True,
        "rms_norm": Choice(True),
    },
    ignored=frozenset(
        {"residual_in_fp32", "initializer_range", "rescale_prenorm_residual", "use_cache", "use_mambapy"}
        | {"use_associative_scan", "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme"}
        | {"time_step_floor", "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "model_type"}
        | {"torch_dtype", "dtype", "transformers_version", "d_model", "d_inner", "n_layer", "ssm_cfg"}
        | {"fused_add_norm", "pad_vocab_size_multiple"}
    ),
    keys=_keys,
    build=_build,
    convert=_convert,
    aliases=lambda o: {"lm_head.weight": "backbone.embeddings.weight"} if o.tie_word_embeddings else {},
    optional=True,
)


class SelectiveScan(nn.Module):
    """:func:`longwave.ops.selective_scan` in the layout of the authors' selective_scan_ref, time last.

    Args:
        softplus: delta becomes log(1 + exp(delta + delta_bias)).
    """

    def __init__(self, softplus: bool):
        super().__init__()
        self.softplus = softplus

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
    ) -> dict[str, Any]:
        """The scan and its last state.

        Args:
            u, delta, z: (B, D, L).
            A: (D, N) real or complex.
            B, C: (D, N) constant, (B, N, L), or (B, G, N, L) in G groups; with a complex A the latter two are real
                with the last axis 2 L, (re, im) a step.
            D, delta_bias: (D,).
        Returns:
            y: (B, D, L).
            last_state: (B, D, N).
        """
        B, C = (_time_second(x, A, u.shape[2]) for x in (B, C))  # (B or 1, L, G, N)
        groups = max(B.shape[2], C.shape[2])
        B, C = (x.expand(len(u), -1, -1, -1).repeat_interleave(groups // x.shape[2], dim=2) for x in (B, C))
        y, state = selective_scan(
            u.transpose(1, 2),
            delta.transpose(1, 2),
            A,
            B,
            C,
            D,
            z=None if z is None else z.transpose(1, 2),
            dt_bias=delta_bias,
            softplus=self.softplus,
        )
        return {"y": y.transpose(1, 2), "last_state": state}


def _time_second(x: Tensor, A: Tensor, length: int) -> Tensor:
    """B or C as (B or 1, L, G, N); a constant one has a group for every channel."""
    if x.ndim == 2:
        return x.expand(1, length, -1, -1)
    if A.is_complex() and not x.is_complex():
        x = torch.view_as_complex(x.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return (x[:, None] if x.ndim == 3 else x).permute(0, 3, 1, 2)


SELECTIVE_SCAN = System(
    options={"delta_softplus": False},
    ignored=frozenset(
        {"dim", "dstate", "groups", "variable_B", "variable_C", "complex_A", "D", "z", "delta_bias"}
        | {"return_last_state"}
    ),
    keys=lambda o: {},
    build=lambda o: SelectiveScan(o.delta_softplus),
    convert=lambda state, o: {},
)

SYSTEMS = {"mamba_hf": MAMBA_HF, "selective_scan": SELECTIVE_SCAN}
