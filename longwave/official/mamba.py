"""Mamba and Mamba-2: the language models of github.com/state-spaces/mamba and of transformers, and the scan."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from longwave.errors import choose
from longwave.mixers import MixerSpec, mixer
from longwave.models import LMSpec
from longwave.models.spec import CHANNEL_MIXERS
from longwave.official.blocks import Call, ModelSource
from longwave.official.source import (
    HUGGING_FACE,
    Alias,
    Count,
    Flag,
    Name,
    Names,
    Positive,
    Shapes,
    Size,
    Source,
    System,
    Turn,
    mapping,
    numbered,
    part,
)
from longwave.ops import selective_scan


def _open(value: Any) -> Any:
    """A pair of limits, of which none is infinity, also as config.json has it."""
    open_ends = (math.inf, {"__float__": "Infinity"})
    return [None if x in open_ends else x for x in value] if isinstance(value, list | tuple) else value


Limits = Annotated[
    Sequence[float | None],
    BeforeValidator(_open),
    Len(2, 2),
    Field(description="must be two numbers, the least step size and the greatest or infinity"),
]
Rank = Size | Literal["auto"]
NO_LIMITS = (0.0, None)
NEOX = "GPT-NeoX's (EleutherAI/gpt-neox-20b)"
SWAPPED = Turn(lambda w: w.roll(len(w) // 2, 0), lambda w: w)  # [value | gate] as [gate | value]


class Mamba1(Source):
    """Mamba of mamba_ssm."""

    ignored = frozenset(
        {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer_idx", "device"}
        | {"dtype"}
    )
    d_model: Size
    d_state: Size = 16
    d_conv: Size = 4
    expand: Positive = 2.0
    dt_rank: Rank = "auto"
    conv_bias: Flag = True
    bias: Flag = False

    def mixer(self, inner_norm: Any = None) -> MixerSpec:
        """Its mixer as data, whose tensors have the official names."""
        return mixer(
            "mamba",
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=int(self.expand * self.d_model) / self.d_model,
            dt_rank=None if self.dt_rank == "auto" else self.dt_rank,
            bias=self.bias,
            conv_bias=self.conv_bias,
            inner_norm=inner_norm,
        )


class Mamba2(Source):
    """Mamba2 of mamba_ssm."""

    ignored = frozenset(
        {"layer", "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "chunk_size", "use_mem_eff_path"}
        | {"layer_idx", "process_group", "sequence_parallel", "device", "dtype"}
    )
    d_model: Size
    d_state: Size = 128
    d_conv: Size = 4
    expand: Positive = 2.0
    headdim: Size = 64
    d_ssm: Size | None = None
    ngroups: Size = 1
    D_has_hdim: Flag = False
    rmsnorm: Flag = True
    norm_before_gate: Flag = False
    dt_limit: Limits = NO_LIMITS
    conv_bias: Flag = True
    bias: Flag = False

    def mixer(self, eps: float = 1e-5) -> MixerSpec:
        """Its mixer as data, whose tensors have the official names; eps is of its norm."""
        E, (low, high) = int(self.expand * self.d_model), self.dt_limit
        if self.d_ssm not in (None, E):
            raise ValueError(f"d_ssm = {self.d_ssm} is not carried over; longwave has all {E} channels in the states")
        norm = {"kind": "norm_gate" if self.norm_before_gate else "gate_norm", "eps": eps}
        return mixer(
            "mamba2",
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=E / self.d_model,
            head_dim=self.headdim,
            groups=self.ngroups,
            norm=norm if self.rmsnorm else "gate",
            skip="channel" if self.D_has_hdim else "head",
            bias=self.bias,
            conv_bias=self.conv_bias,
            dt_low=low,
            dt_high=high,
        )


class MHA(Source):
    """MHA of mamba_ssm."""

    ignored = frozenset({"layer_idx", "device", "dtype"})
    d_model: Size
    num_heads: Size
    num_heads_kv: Size | None = None
    head_dim: Size | None = None
    mlp_dim: Literal[0] = 0
    qkv_proj_bias: Flag = True
    out_proj_bias: Flag = True
    softmax_scale: float | None = None
    causal: Literal[True]
    d_conv: Count = 0
    rotary_emb_dim: Count = 0
    rotary_emb_base: Positive = 10_000.0
    rotary_emb_interleaved: Literal[False] = False

    def mixer(self) -> MixerSpec:
        """Its mixer as data."""
        turned = {"kind": "rotary", "dim": self.rotary_emb_dim, "base": self.rotary_emb_base}
        return mixer(
            "attention",
            heads=self.num_heads,
            kv_heads=self.num_heads_kv,
            head_dim=self.head_dim,
            positions=turned if self.rotary_emb_dim else None,
            bias=self.qkv_proj_bias,
            out_bias=self.out_proj_bias,
            d_conv=self.d_conv,
            scale=self.softmax_scale,
        )


def _lm_names(embedding: str, layers: int, tied: bool) -> Names:
    """Of a language model of blocks around mixers."""
    head = "lm_head.weight"
    block = [
        Name("norm.", "norm1."),
        Name("norm2.", "norm2."),
        Name("mlp.fc1.weight", "channel.up.weight", SWAPPED),
        Name("mlp.fc2.weight", "channel.down.weight"),
        Name("mixer.in_proj.", "mixer.Wqkv."),
        Name("mixer.conv1d.", "mixer.dwconv_qkv."),
        Name("mixer.", "mixer."),
    ]
    return [
        *([Alias(head, f"{embedding}.weight")] if tied else []),
        Name(head, "model.head.weight"),
        Name(f"{embedding}.", "model.embedding."),
        Name("backbone.norm_f.", "model.backbone.norm."),
        *numbered(layers, "backbone.layers.{}.", "model.backbone.layers.{}.", block),
    ]


class MambaLMHeadModel(ModelSource):
    """MambaLMHeadModel of mamba_ssm, by the options of its MambaConfig."""

    ignored = frozenset({"residual_in_fp32", "fused_add_norm", "initializer_cfg", "device", "dtype"})
    optional = True
    tokenizer = NEOX
    d_model: Size = 2560
    d_intermediate: Count = 0
    n_layer: Size = 64
    vocab_size: Size = 50277
    ssm_cfg: Any = None
    attn_layer_idx: Sequence[Count] | None = None
    attn_cfg: Any = None
    norm_epsilon: Positive = 1e-5
    rms_norm: Flag = True
    pad_vocab_size_multiple: Size = 8
    tie_embeddings: Flag = True

    def spec(self) -> LMSpec:
        hidden = -(-self.d_intermediate // 128) * 128
        return LMSpec(
            d_model=self.d_model,
            pattern=self._mixers(),
            layers=self.n_layer,
            channel=CHANNEL_MIXERS.make("swiglu", expand=hidden / self.d_model) if hidden else None,
            norm="rms" if self.rms_norm else "layer",
            norm_eps=self.norm_epsilon,
            vocab=-(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple,
            tied=self.tie_embeddings,
        )

    def _mixers(self) -> list[MixerSpec]:
        config = {} if self.ssm_cfg is None else mapping(self.ssm_cfg)
        kind = choose("layer in ssm_cfg", config.get("layer", "Mamba1"), {"Mamba1": Mamba1, "Mamba2": Mamba2})
        ssm = part("ssm_cfg", kind, config, d_model=self.d_model).mixer()
        if not (places := self.attn_layer_idx):
            return [ssm]
        attention = part("attn_cfg", MHA, {} if self.attn_cfg is None else self.attn_cfg, d_model=self.d_model).mixer()
        return [attention if i in places else ssm for i in range(self.n_layer)]

    def names(self) -> Names:
        return _lm_names("backbone.embedding", self.n_layer, self.tie_embeddings)

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        if "backbone.embedding.weight" not in shapes or "backbone.norm_f.weight" not in shapes:
            return None
        if "d_model" in config:
            return config
        (vocab, D), mixer = shapes["backbone.embedding.weight"], "backbone.layers.0.mixer."
        if len(shapes.get(f"{mixer}A_log", ())) != 2:
            raise ValueError(
                "a Mamba-2 of state-spaces/mamba is told by its config.json: put it beside the weights, "
                "with d_model, n_layer, vocab_size and ssm_cfg"
            )
        E, N = shapes[f"{mixer}A_log"]
        sizes = {
            "d_state": N,
            "d_conv": shapes[f"{mixer}conv1d.weight"][2],
            "dt_rank": shapes[f"{mixer}dt_proj.weight"][1],
        }
        return {
            "d_model": D,
            "n_layer": sum(key.endswith(".mixer.A_log") for key in shapes),
            "vocab_size": vocab,
            "pad_vocab_size_multiple": 1,
            "rms_norm": "backbone.norm_f.bias" not in shapes,
            "ssm_cfg": {"expand": E / D, **sizes},
        }


class HuggingFaceMamba(ModelSource):
    """What both language models of transformers have in common."""

    ignored = HUGGING_FACE | {
        *("residual_in_fp32", "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor")
    }
    optional = True
    tokenizer = NEOX
    hidden_size: Size
    num_hidden_layers: Size
    vocab_size: Size
    state_size: Size
    layer_norm_epsilon: Positive = 1e-5
    expand: Positive = 2.0
    conv_kernel: Size = 4
    use_bias: Flag = False
    use_conv_bias: Flag = True
    hidden_act: Literal["silu", "swish"] = "silu"
    tie_word_embeddings: Flag = True
    rms_norm: Literal[True] = True

    @abstractmethod
    def mixer(self) -> MixerSpec:
        """That of every layer, as data."""

    def spec(self) -> LMSpec:
        return LMSpec(
            d_model=self.hidden_size,
            pattern=[self.mixer()],
            layers=self.num_hidden_layers,
            channel=None,
            norm_eps=self.layer_norm_epsilon,
            vocab=self.vocab_size,
            tied=self.tie_word_embeddings,
        )

    def names(self) -> Names:
        return _lm_names("backbone.embeddings", self.num_hidden_layers, self.tie_word_embeddings)


class MambaForCausalLM(HuggingFaceMamba):
    """MambaForCausalLM of transformers."""

    hf_type = "mamba"
    ignored = HuggingFaceMamba.ignored | {
        *("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_falcon_mambapy", "use_associative_scan"),
        *("d_model", "d_inner", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple"),
    }
    vocab_size: Size = 50280
    hidden_size: Size = 768
    state_size: Size = 16
    num_hidden_layers: Size = 32
    intermediate_size: Size | None = None
    time_step_rank: Rank = "auto"

    def mixer(self) -> MixerSpec:
        return self.layer().mixer()

    def layer(self) -> Mamba1:
        """The options of its layers."""
        E = self.intermediate_size
        return Mamba1(
            d_model=self.hidden_size,
            d_state=self.state_size,
            d_conv=self.conv_kernel,
            expand=self.expand if E is None else E / self.hidden_size,
            dt_rank=self.time_step_rank,
            conv_bias=self.use_conv_bias,
            bias=self.use_bias,
        )


class FalconMambaForCausalLM(MambaForCausalLM):
    """FalconMambaForCausalLM of transformers, whose step sizes, input and output maps are normed, without weights."""

    hf_type = "falcon_mamba"
    tokenizer = "Falcon's (tiiuae/falcon-mamba-7b)"
    mixer_rms_eps: Positive = 1e-6

    def mixer(self) -> MixerSpec:
        return self.layer().mixer(inner_norm={"kind": "plain_rms", "eps": self.mixer_rms_eps})


class Mamba2ForCausalLM(HuggingFaceMamba):
    """Mamba2ForCausalLM of transformers."""

    hf_type = "mamba2"
    ignored = HuggingFaceMamba.ignored | {"time_step_rank", "chunk_size", "norm_before_gate"}
    vocab_size: Size = 32768
    hidden_size: Size = 4096
    state_size: Size = 128
    num_hidden_layers: Size = 64
    num_heads: Size = 128
    head_dim: Size = 64
    n_groups: Size = 8
    time_step_limit: Limits = NO_LIMITS
    tie_word_embeddings: Flag = False

    def mixer(self) -> MixerSpec:
        E = int(self.expand * self.hidden_size)
        if self.num_heads * self.head_dim != E:
            raise ValueError(
                f"num_heads * head_dim = {self.num_heads} * {self.head_dim} is not expand * hidden_size = {E}"
            )
        return Mamba2(
            d_model=self.hidden_size,
            d_state=self.state_size,
            d_conv=self.conv_kernel,
            expand=self.expand,
            headdim=self.head_dim,
            ngroups=self.n_groups,
            dt_limit=self.time_step_limit,
            conv_bias=self.use_conv_bias,
            bias=self.use_bias,
        ).mixer(self.layer_norm_epsilon)


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


SYSTEMS = {
    "mamba_hf": System(MambaForCausalLM),
    "mamba2_hf": System(Mamba2ForCausalLM),
    "falcon_mamba_hf": System(FalconMambaForCausalLM),
    "mamba_ssm_lm": System(MambaLMHeadModel),
    "selective_scan": System(SelectiveScan),
}
