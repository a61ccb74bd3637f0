"""Pure functions on tensors, time on axis 1: what the mixers are made of."""

from longwave.ops.attention import attention
from longwave.ops.attention_step import attention_step
from longwave.ops.butterfly import butterfly
from longwave.ops.cauchy import cauchy
from longwave.ops.causal_conv import causal_conv
from longwave.ops.dispatch import OPS, Op, at_least_float32, without_autocast
from longwave.ops.dplr_step import dplr_step
from longwave.ops.gated_delta_rule import gated_delta_rule
from longwave.ops.linear_attention import linear_attention
from longwave.ops.linear_scan import linear_scan
from longwave.ops.monarch import blockdiag_multiply, monarch, monarch_project
from longwave.ops.opaque import opaque
from longwave.ops.rms_norm import rms_norm
from longwave.ops.rotary import rotary
from longwave.ops.selective_scan import selective_scan
from longwave.ops.short_conv import short_conv
from longwave.ops.state_space_step import state_space_step
from longwave.ops.swiglu import swiglu
from longwave.ops.vandermonde import vandermonde, vandermonde_transpose
from longwave.ops.weight_only_linear import weight_only_linear
from longwave.ops.wkv import wkv

__all__ = [
    "OPS",
    "Op",
    "at_least_float32",
    "attention",
    "attention_step",
    "blockdiag_multiply",
    "butterfly",
    "cauchy",
    "causal_conv",
    "dplr_step",
    "gated_delta_rule",
    "linear_attention",
    "linear_scan",
    "monarch",
    "monarch_project",
    "opaque",
    "rms_norm",
    "rotary",
    "selective_scan",
    "short_conv",
    "state_space_step",
    "swiglu",
    "vandermonde",
    "vandermonde_transpose",
    "weight_only_linear",
    "without_autocast",
    "wkv",
]
