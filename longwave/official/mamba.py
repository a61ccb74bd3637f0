"""Mamba: the language model of Hugging Face transformers, and the scan of github.com/state-spaces/mamba."""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longwave.mixers import Mamba
from longwave.models.backbone import Backbone
from longwave.models.lm import LM
from longwave.official.blocks import Call, logits
from longwave.official.source import Alias, Flag, Name, Names, Size, Source, System
from longwave.ops import selective_scan


class MambaForCausalLM(Source):
    """MambaForCausalLM of transformers."""

    ignored = frozenset(
        {"residual_in_fp32", "initializer_range", "rescale_prenorm_residual", "use_cache", "use_mambapy"}
        | {"use_associative_scan", "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme"}
        | {"time_step_floor", "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "model_type"}
        | {"torch_dtype", "dtype", "transformers_version", "d_model", "d_inner", "n_layer", "ssm_cfg"}
        | {"fused_add_norm", "pad_vocab_size_multiple"}
    )
    optional = True
    vocab_size: Size = 50280
    hidden_size: Size = 768
    state_size: Size = 16
    num_hidden_layers: Size = 32
    layer_norm_epsilon: float = 1e-5
    expand: float = 2.0
    intermediate_size: Size | None = None
    conv_kernel: Size = 4
    use_bias: Flag = False
    use_conv_bias: Flag = True
    time_step_rank: Size | Literal["auto"] = "auto"
    hidden_act: Literal["silu", "swish"] = "silu"
    tie_word_embeddings: Flag = True
    rms_norm: Literal[True] = True

    def build(self) -> nn.Module:
        D = self.hidden_size
        E = int(self.expand * D) if self.intermediate_size is None else self.intermediate_size
        if E % D:
            raise ValueError(f"intermediate_size = {E} is not carried over: it is no multiple of hidden_size = {D}")
        options: dict[str, Any] = {
            "d_state": self.state_size,
            "d_conv": self.conv_kernel,
            "expand": E // D,
            "dt_rank": math.ceil(D / 16) if self.time_step_rank == "auto" else self.time_step_rank,
            "bias": self.use_bias,
            "conv_bias": self.use_conv_bias,
        }
        mixers = [Mamba(D, **options) for _ in range(self.num_hidden_layers)]
        backbone = Backbone(mixers, partial(nn.RMSNorm, eps=self.layer_norm_epsilon))
        return Call(LM(backbone, self.vocab_size, tied=self.tie_word_embeddings), logits)

    def names(self) -> Names:
        head = "lm_head.weight"
        return [
            *([Alias(head, "backbone.embeddings.weight")] if self.tie_word_embeddings else []),
            Name("backbone.embeddings.", "model.embedding."),
            Name("backbone.norm_f.", "model.backbone.norm."),
            Name(head, "model.head.weight"),
            *(
                Name(f"backbone.layers.{i}.norm.", f"model.backbone.layers.{i}.norm1.")
                for i in range(self.num_hidden_layers)
            ),
            Name("", "model."),
        ]


class SelectiveScan(Source):
    """selective_scan_ref, which has no weights of its own."""

    ignored = frozenset(
        {"dim", "dstate", "groups", "variable_B", "variable_C", "complex_A", "D", "z", "delta_bias"}
        | {"return_last_state"}
    )
    delta_softplus: Flag = False

    def build(self) -> nn.Module:
        return Call(nn.Identity(), self.run)

    def run(
        self,
        model: nn.Module,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
    ) -> dict[str, Any]:
        """:func:`longwave.ops.selective_scan` in the authors' layout, time last.

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
        z = None if z is None else z.transpose(1, 2)
        more = {"z": z, "dt_bias": delta_bias, "softplus": self.delta_softplus}
        y, state = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, **more)
        return {"y": y.transpose(1, 2), "last_state": state}


def _time_second(x: Tensor, A: Tensor, length: int) -> Tensor:
    """B or C as (B or 1, L, G, N); a constant one has a group for every channel."""
    if x.ndim == 2:
        return x.expand(1, length, -1, -1)
    if A.is_complex() and not x.is_complex():
        x = torch.view_as_complex(x.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return (x[:, None] if x.ndim == 3 else x).permute(0, 3, 1, 2)


SYSTEMS = {"mamba_hf": System(MambaForCausalLM), "selective_scan": System(SelectiveScan)}
