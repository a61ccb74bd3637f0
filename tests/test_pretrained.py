"""Official weights in our modules: the authors' outputs, gradients, kernels and steps, and plain formulas besides."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from derived import DERIVED
from official import GOLDEN, Case, convolved, drawn, error, golden, load, named, series
from torch import Tensor
from transformers_layers import DRAWN

from longwave.models.generate import generate
from longwave.nn import weight_only
from longwave.nn.block_fft import BlockFFT, block_fft, dft_matrices
from longwave.official import SYSTEMS, from_official
from longwave.official.s4_kernel import StateSpaceConv

FLOAT32 = {"longconv__H4_L32_blockfft", "rwkv4_blinkdl__v4"}  # the official code runs in float32 only
WITHOUT_GRADIENTS = {"rwkv4_blinkdl__v4"}  # the official code infers only; test_rwkv4.py has those of its names
STEPS_IN_FLOAT32 = {"s4__fout_chan2_H4_L128": 5e-5}  # the official steps are that far from the official convolution
# The official softmax is in float32, and its sums are those of a CPU of eight lanes: of others they are that far.
SOFTMAX_IN_FLOAT32 = {"fbmega__softmax_causal_step_L18", "fbmega__softmax_simple_L20"}
LANES = torch.backends.cpu.get_cpu_capability()
TIME_FIRST = {"fbmega", "fbmegaema", "mega_ema", "mega_layer", "mega_nffn"}  # x (L, B, D)

cases = pytest.mark.parametrize("path", [*GOLDEN, *DRAWN, *DERIVED], ids=lambda path: path.stem)


@cases
def test_output_and_every_gradient(path):
    case = load(path)
    dtype, suffix, *tolerances = (torch.float64, "64", 1e-9, 1e-9)
    if path.stem in FLOAT32:
        dtype, suffix, *tolerances = (torch.float32, "", 1e-5, 1e-4)
    if path.stem in SOFTMAX_IN_FLOAT32 and LANES != "AVX2":
        tolerances = [1e-7, 1e-5]
    system, module = SYSTEMS[case.system], case.module(dtype)
    leaves = {key: t.requires_grad_() for key, t in case.state(dtype).items()}
    inputs = case.inputs(dtype)
    for t in inputs.values():
        if t.is_floating_point() or t.is_complex():
            t.requires_grad_()
    weights = system.convert(leaves, system.read(case.config))
    expected = case.part(f"output{suffix}.")
    outputs = named(torch.func.functional_call(module, weights, (), inputs), expected)
    assert expected
    assert outputs.keys() == expected.keys()
    for key, theirs in expected.items():
        assert error(outputs[key], theirs) < tolerances[0], key
    if path.stem in WITHOUT_GRADIENTS:
        return
    cotangents = case.part("cotangent.") or dict.fromkeys(expected, case.tensors["cotangent"])
    dots = [(real(outputs[key]) * real(c.to(outputs[key].dtype))).sum() for key, c in cotangents.items()]
    sum(dots).backward()
    recorded = case.part(f"grad{suffix}.")
    assert recorded
    largest = max(theirs.abs().max() for theirs in recorded.values())
    for key, theirs in recorded.items():
        leaf = inputs[key.removeprefix("input.")] if key.startswith("input.") else leaves[key.removeprefix("state.")]
        if leaf.grad is None:  # what the output does not depend on may be recorded as zeros
            assert not theirs.any(), key
            continue
        rounding = 1e-12 * largest
        if theirs.abs().max() < rounding:  # zero, as that of a direction of which only the sign counts
            assert leaf.grad.abs().max() < rounding, key
            continue
        assert error(leaf.grad, theirs) < tolerances[1], key
    for key, leaf in leaves.items():  # a matrix that the length does not need
        if ".mat_" in f".{key}":
            assert (leaf.grad is not None) == (key in recorded), key


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


@cases
def test_output_in_float32(path):
    case = load(path)
    module = case.module(torch.float32)
    assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} <= {torch.float32}
    wide = case.part("output64.")  # without the official code's outputs of other calls
    expected = {key: theirs for key, theirs in case.part("output.").items() if not wide or key in wide}
    with torch.no_grad():
        outputs = named(module(**case.inputs(torch.float32)), expected)
    tolerance = 2e-4 if case.config.get("w", 1) >= 10 else 1e-5  # sines of large arguments
    for key, theirs in expected.items():
        assert outputs[key].dtype == theirs.dtype
        assert error(outputs[key], theirs) < tolerance, key


def s4d_kernels(case: Case, module) -> dict[str, Tensor]:
    support = module.conv.support or case.config["L"]
    return {"k": module.conv.filter(min(case.config["L"], support))}


def s4dmin_kernels(case: Case, module) -> dict[str, Tensor]:
    return {"k": module.model.kernel(case.config["L"])}


def longconv_kernels(case: Case, module) -> dict[str, Tensor]:
    return {"k": module.conv.filter(module.conv.filter.max_len)}


def h3_kernels(case: Case, module) -> dict[str, Tensor]:
    shift, ssm = module.model.ssm_k_kernel(case.config["L"]), module.model.kernel(case.config["L"])
    return {"ssm": ssm, "shift": F.pad(shift, (0, ssm.shape[1] - shift.shape[1]))}


def hyena_kernels(case: Case, module) -> dict[str, Tensor]:
    return {"filter": module.model.filter_fn(case.config["L"]).T}


def h3conv_kernels(case: Case, module) -> dict[str, Tensor]:
    convs = {"k_kernel": module.k_conv, "kernel": module.conv}
    return {name: conv.filter(conv.filter.max_len) for name, conv in convs.items()}


def m2_kernels(case: Case, module) -> dict[str, Tensor]:
    names = {"fwd": "filter_fn", "rev": "filter_ahead"} if case.config.get("bidirectional") else {"fwd": "filter_fn"}
    return {key: getattr(module.model, name)(case.config["L"]).T for key, name in names.items()}


def hyenastandalone_kernels(case: Case, module) -> dict[str, Tensor]:
    taps = module.model.filter_fn(case.config["L"]).T
    return {"filter": taps.unflatten(1, (case.config["d_model"], -1)).transpose(1, 2).flatten(1)}


def s4nd_kernels(case: Case, module) -> dict[str, Tensor]:
    filters = module.conv.inner.filters
    return {f"k{i}": filter(length) for i, (filter, length) in enumerate(zip(filters, case.config["dims"]))}


def ema_kernels(case: Case, module) -> dict[str, Tensor]:
    both = [getattr(module.model, name, None) for name in ("filter", "ahead")]
    return {"k": torch.cat([filter(case.config["L"]) for filter in both if filter is not None])}


def dss_kernels(case: Case, module) -> dict[str, Tensor]:
    return {"k": module.model.conv.kernel(case.config["L"])}


def s4v3_kernels(case: Case, module) -> dict[str, Tensor]:
    conv = next(part for part in module.modules() if isinstance(part, StateSpaceConv))
    return {"k": conv.filter(case.config["L"])}


# Our filters under the names and layouts of the files' ``kernel64.*``, by system.
KERNELS = {
    "dss": dss_kernels,
    "fbmegaema": ema_kernels,
    "megaema": ema_kernels,
    "gss": s4v3_kernels,
    "h3": h3_kernels,
    "hyena": hyena_kernels,
    "h3conv": h3conv_kernels,
    "hyenadna": hyena_kernels,
    "hyenastandalone": hyenastandalone_kernels,
    "m2": m2_kernels,
    "liquids4": s4v3_kernels,
    "longconv": longconv_kernels,
    "s4": s4d_kernels,
    "s4d": s4d_kernels,
    "s4dmin": s4dmin_kernels,
    "s4nd": s4nd_kernels,
    "s4v3": s4v3_kernels,
}


@pytest.mark.parametrize("path", [p for p in GOLDEN if load(p).part("kernel64.")], ids=lambda path: path.stem)
@torch.no_grad()
def test_kernels(path):
    case = load(path)
    ours, theirs = KERNELS[case.system](case, case.module()), case.part("kernel64.")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert error(ours[key].reshape(theirs[key].shape), theirs[key]) < 1e-9, key


@pytest.mark.parametrize("path", [p for p in GOLDEN if load(p).part("step.")], ids=lambda path: path.stem)
@torch.no_grad()
def test_official_steps_against_our_state(path):
    case = load(path)
    module, x = case.module(), next(t for t in case.inputs(torch.float64).values() if t.ndim > 1)
    for key, theirs in case.part("step.").items():
        prefill = int(key.partition("@prefill")[2] or case.config.get("prefill", 1))
        y = STEPS.get(case.system, model_steps)(case, module, x, prefill)
        assert error(y, theirs) < STEPS_IN_FLOAT32.get(path.stem, 1e-5), key


def model_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    """The mixer or model inside, time on axis 1: a prefill, then one step at a time."""
    state, ys = module.model.init_state(len(x)), []
    for piece in x.split([prefill, *[1] * (x.shape[1] - prefill)], dim=1):
        y, state = module.model(piece, state)
        ys.append(y)
    return torch.cat(ys, dim=1)


def conv_block_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    """An official block that takes and returns its state."""
    time = 2 if case.config.get("transposed", True) else 1
    state, ys = module.conv.init_state(len(x)), []
    for piece in x.split([prefill, *[1] * (x.shape[time] - prefill)], dim=time):
        y, state = module(x=piece, state=state).values()
        ys.append(y)
    return torch.cat(ys, dim=time)


def s5_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    """The official recurrence of a bidirectional layer runs over the whole sequence, either way."""
    return module(x=x) if case.config.get("bidirectional") else model_steps(case, module, x, prefill)


def rescaled_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    """The official steps halve hidden states after so many blocks: to a norm, an epsilon of four times that."""
    backbone, every = module.model.backbone, case.config.get("rescale_every", 6)
    for i, norm in enumerate([*(layer.norm1 for layer in backbone.layers), backbone.norm]):
        norm.eps *= 4 ** (i // 2 // every)
    return model_steps(case, module, x, prefill)


def retention_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    """Three inputs with time on axis 2, and a state that is given."""
    inputs = case.inputs(torch.float64)
    state, ys = x.new_zeros(*x.shape[:2], x.shape[3], inputs["v"].shape[3]), []
    for step in zip(*(t.split([prefill, *[1] * (t.shape[2] - prefill)], dim=2) for t in inputs.values())):
        y, state = module(**dict(zip(inputs, step)), state=state).values()
        ys.append(y)
    return torch.cat(ys, dim=2)


def time_first_steps(case: Case, module, x: Tensor, prefill: int) -> Tensor:
    y = model_steps(case, module, x.transpose(0, 1), prefill).transpose(0, 1)
    return F.silu(y) if case.system.endswith("ema") else y


# How a system steps where it is not as ``model_steps`` does.
STEPS = {
    "rwkv4_hf": rescaled_steps,
    **dict.fromkeys(("s4", "s4d", "s4v3"), conv_block_steps),
    "s5": s5_steps,
    "retention_naive": retention_steps,
    **dict.fromkeys(TIME_FIRST, time_first_steps),
}


@torch.no_grad()
def test_the_imported_language_model_generates():
    case = golden("mamba_hf__base")
    module, ids = case.module(), case.inputs(torch.float64)["input_ids"][:, :9]
    tokens = generate(module.model, ids, 3, temperature=0)
    for row, new in zip(ids.tolist(), tokens):
        for token in new:
            assert module(input_ids=torch.tensor([row]))[0, -1].argmax() == token
            row.append(token)


def test_a_tied_head_may_be_left_out_as_in_hub_files():
    case = golden("mamba_hf__base")
    state = case.state(torch.float32)
    del state["lm_head.weight"]
    model = from_official("mamba_hf", case.config, state).model
    assert model.head.weight is model.embedding.weight


def block(**args) -> dict:
    return {"block_fft_conv_args": {"H": 4, **args}}


@pytest.mark.parametrize(
    ("path", "change", "word"),
    [
        ("s4d__lin_zoh_H8_L64", {"gate": 2}, "gate = 2"),
        ("s4d__lin_zoh_H8_L64", {"bottleneck": 2}, "bottleneck = 2"),
        ("s4d__lin_zoh_H8_L64", {"disc": "foh"}, "disc = 'foh'"),
        ("s4d__lin_zoh_H8_L64", {"mode": "nplr"}, "mode = 'nplr'"),
        ("s4d__lin_zoh_H8_L64", {"kernel": "s4d"}, "mode and kernel"),
        ("s4d__lin_zoh_H8_L64", {"activation": "mish"}, "activation = 'mish'"),
        ("s4d__lin_zoh_H8_L64", {"postact": "glu"}, "final_act = 'glu'"),
        ("s4d__lin_zoh_H8_L64", {"n_ssm": 3}, "n_ssm = 3"),
        ("s4d__lin_zoh_H8_L64", {"bidirectionl": True}, "'bidirectionl' .*did you mean 'bidirectional'"),
        ("s4dmin__H8_N16_L64", {"d_model": 4}, "'D' has shape"),
        ("h3__hd1_H8_L32", {"mode": "nplr"}, "mode = 'nplr'"),
        ("h3__hd1_H8_L32", {"disc": "dss"}, "disc = 'dss'"),
        ("h3__hd1_H8_L32", {"real_type": "none"}, "real_type = 'none'"),
        ("hyena__o2_H8_L32", {"num_heads": 2}, "num_heads = 2"),
        ("hyena__o2_H8_L32", {"num_blocks": 5}, "num_blocks = 5"),
        ("hyena__o2_H8_L32", {"inner_factor": 2}, "inner_factor = 2"),
        ("hyena__o2_H8_L32", {"filter_cls": "ckconv"}, "filter_cls = 'ckconv'"),
        ("hyena__o2_H8_L32", {"post_order_ffn": True}, "no key 'ord_proj_w'"),
        ("hyenastandalone__o2_H8_L32", {"outer_mixing": True}, "'outer_mixing'"),
        ("longconv__H8_L32", {"weight_norm": True}, "weight_norm = True"),
        ("longconv__H8_L32", {"use_ma_smoothing": True, "ma_window_len": 4}, "odd width"),
        ("longconv__H8_L32", {"block_fft_conv": True}, "no key 'block_fft_u.mat_2'"),
        ("longconv__H4_L32_blockfft", {"block_fft_conv": False}, "unexpected key 'block_fft_k.dft_matrices.0'"),
        ("longconv__H4_L32_blockfft", block(H=2), "block_fft_conv_args: H = 2 .*d_model = 4"),
        ("longconv__H4_L32_blockfft", block(H=1), "'block_fft_u.mat_2' has shape"),
        ("longconv__H4_L32_blockfft", block(max_m=8), "max_m = 8"),
        ("longconv__H4_L32_blockfft", block(max_m=24), "max_m = 24"),
        ("longconv__H4_L32_blockfft", block(max_m=32), "no key 'block_fft_u.mat_32'"),
        ("longconv__H4_L32_blockfft", block(activation="glu"), "block_fft_conv_args: .*activation = 'glu'"),
        ("longconv__H4_L32_blockfft", block(block_size=4), "block_fft_conv_args: .*'block_size'"),
        ("longconv__H4_L32_blockfft", block(N=64), "block_fft_conv_args: .*'N'"),
        ("longconv__H4_L32_blockfft", block(learn_dft_matrix=True), "did you mean 'learn_dft_matrices'"),
        ("longconv__H4_L32_blockfft", block(learn_dft_matrices=False), "unexpected key 'block_fft_k"),
        ("longconv__H4_L32_blockfft", {"block_fft_conv_args": None}, "block_fft_conv_args: None is no mapping"),
        ("blockfft__learn_H4_N32", {"N": 0}, "N = 0"),
        ("blockfft__learn_H4_N32", {"forward": False}, "forward = False"),
        ("blockfft__learn_H4_N32", {"learn_dft_matrices": False}, "unexpected key"),
        ("mamba_hf__base", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("mamba_hf__base", {"intermediate_size": 30}, "has shape"),
        ("mamba_hf__base", {"tie_word_embeddings": False, "use_bias": True}, "in_proj.bias"),
        ("rwkv4_hf__base", {"attention_hidden_size": 20}, "'rwkv.blocks.0.attention.time_decay' has shape"),
        ("rwkv4_blinkdl__v4", {"pre_ffn": 1}, "pre_ffn = 1 is not carried over"),
        ("rwkv4_blinkdl__v4", {"model_type": "RWKV-ffnPre"}, "model_type = 'RWKV-ffnPre'"),
        ("mamba2_hf__base", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("mamba2_hf__base", {"num_heads": 5}, r"num_heads \* head_dim = 5 \* 8 is not expand \* hidden_size = 48"),
        ("mamba2_hf__base", {"n_groups": 4}, "groups = 4 does not divide the 6 heads"),
        ("mamba2_hf__base", {"time_step_limit": [0.1]}, r"time_step_limit = \[0.1\] must be two numbers"),
        ("mamba2_hf__base", {"time_step_limit": [0.1, 0.01]}, "dt_low = 0.1, dt_high = 0.01"),
        ("mamba2_hf__base", {"num_hidden_layers": 5000}, "layers: .* 4096; got 5000"),
        ("mamba_ssm_lm__mamba1", {"ssm_cfg": {"layer": "Mamba3"}}, "no layer in ssm_cfg is called 'Mamba3'"),
        ("mamba_ssm_lm__mamba1", {"ssm_cfg": {"d_stat": 4}}, "ssm_cfg: .*'d_stat' .*did you mean 'd_state'"),
        ("mamba_ssm_lm__mamba1", {"ssm_cfg": [4]}, r"\[4\] is no mapping"),
        ("mamba_ssm_lm__mamba2_mlp", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 20}}, "d_ssm = 20 is not carried over"),
        ("mamba_ssm_lm__mamba1", {"attn_layer_idx": [0]}, "attn_cfg: the option '(num_heads|causal)' is missing"),
        (
            "mamba_ssm_lm__mamba1",
            {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "causal": False}},
            "causal = False",
        ),
        ("mamba_ssm_lm__mamba2_mlp", {"d_intermediate": 0}, "unexpected key"),
        ("mamba_ssm_lm__mamba2_mlp", {"pad_vocab_size_multiple": 1}, "has shape"),
        ("retnet_torchscale__base", {"deepnorm": True}, "deepnorm = True"),
        ("retnet_torchscale__base", {"release": "0.2"}, "release = '0.2'"),
        ("retnet_torchscale__base", {"decoder_retention_heads": 5}, "heads = 5 does not divide d_model = 24"),
        ("selective_scan__real_all", {"delta_softpus": True}, "'delta_softpus'"),
    ],
)
def test_options_that_are_not_carried_over_are_named(path, change, word):
    case = golden(path)
    with pytest.raises(ValueError, match=f"^{case.system}: .*{word}"):
        from_official(case.system, {**case.config, **change}, case.state(torch.float32))


# What an importer may meet: every system from its first file, and whatever else it is given.

ONE_OF_EACH = list(
    {(case.system, case.config.get("cls")): path for path in reversed(GOLDEN) for case in [load(path)]}.values()
)
ONE_OF_EACH += {drawn.system: drawn for drawn in [*DRAWN, *DERIVED]}.values()
one_of_each = pytest.mark.parametrize("path", ONE_OF_EACH, ids=lambda path: path.stem)


def test_every_system_has_a_case():
    assert {load(path).system for path in ONE_OF_EACH} == SYSTEMS.keys()


def refused(case: Case, config, state, *words: str) -> None:
    """The pair is refused in at most two lines that say all the words."""
    with pytest.raises(ValueError) as caught:
        from_official(case.system, config, state)
    message = str(caught.value)
    assert message.startswith(f"{case.system}: ")
    assert message.count("\n") < 2
    assert len(message) < 400
    assert all(word in message for word in words), message


@one_of_each
def test_states_that_do_not_fit_are_named(path):
    case = load(path)
    state = case.state(torch.float32)
    member = SYSTEMS[case.system].meant(case.config, state)
    options = member.read(case.config)
    needed = member.keys(options).keys() - member.aliases(options).keys()
    for key, tensor in state.items():
        if key in needed:
            refused(case, case.config, {k: t for k, t in state.items() if k != key}, key)
        refused(case, case.config, {**state, key: tensor[None]}, key, "shape")
        refused(case, case.config, {**state, key: tensor.tolist()}, key)
    refused(case, case.config, {**state, "strange": torch.zeros(1)}, "'strange'")


@one_of_each
def test_options_that_do_not_fit_are_named(path):
    case = load(path)
    state = case.state(torch.float32)
    system = SYSTEMS[case.system].meant(case.config, state)
    refused(case, {**case.config, "strange": 1}, state, "'strange'")
    refused(case, None, state, "None is no mapping")
    for name, value in case.config.items():
        if name in system.options:
            refused(
                case, {**{k: v for k, v in case.config.items() if k != name}, f"{name}x": value}, state, f"'{name}x'"
            )
    for name in system.options:
        for value in ("nonsense", -1, 1.5, {}):
            with contextlib.suppress(ValueError):  # or it is a value that means something
                from_official(case.system, {**case.config, name: value}, state)


def outputs(case: Case, module, **inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(named(module(**inputs), ["y"]).values())


@one_of_each
def test_defaults_may_be_given_and_left_out(path):
    case = load(path)
    state, inputs = case.state(torch.float32), case.inputs(torch.float32)
    system = SYSTEMS[case.system].meant(case.config, state)
    spelt_out = vars(system.read(case.config))
    expected = outputs(case, case.module(torch.float32), **inputs)
    for ours, theirs in zip(outputs(case, from_official(case.system, spelt_out, state), **inputs), expected):
        assert torch.equal(ours, theirs)
    for name, value in spelt_out.items():
        less = {k: v for k, v in spelt_out.items() if k != name}
        try:
            default = getattr(system.read(less), name)
        except ValueError:  # it has none
            continue
        assert default == value or name in case.config


@one_of_each
def test_one_row_one_step_and_odd_lengths(path):
    case = load(path)
    module, inputs = case.module(), case.inputs(torch.float64)
    length = case.config.get("L") or case.config.get("length")
    if case.system == "selective_scan" or not inputs:
        pytest.skip("not a batch of sequences")
    across = {k: 1 if case.system in TIME_FIRST and t.is_floating_point() else 0 for k, t in inputs.items()}  # rows
    rows = max(t.shape[across[k]] for k, t in inputs.items())
    full = outputs(case, module, **inputs)
    for ours, theirs in zip(outputs(case, module, **{k: t.narrow(across[k], 0, 1) for k, t in inputs.items()}), full):
        axis = max(across.values())
        assert error(ours, theirs.narrow(axis, 0, 1) if theirs.shape[axis] == rows else theirs) < 1e-9
    for few in (1, 3):
        if case.system in ("liquids4", "liquid_s4"):  # combinations of steps: the official one fails on so few
            continue
        short = {k: t.narrow(axis, 0, few) for k, t in inputs.items() for axis in times(t, length)}
        if len(short) == len(inputs):
            assert all(t.isfinite().all() for t in outputs(case, module, **short))


@one_of_each
def test_weights_may_be_kept_in_fewer_bits(path):
    case = load(path)
    module, inputs = case.module(torch.float32).eval(), case.inputs(torch.float32)
    exact = outputs(case, module, **inputs)
    for ours, theirs in zip(outputs(case, weight_only(module, "bf16"), **inputs), exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def times(t: Tensor, length: int | None) -> list[int]:
    """The axis of time, where a shape tells."""
    axes = [axis for axis in range(1, t.ndim) if t.shape[axis] == length]
    return axes if len(axes) == 1 else []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@one_of_each
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_checkpoints_of_low_precision(path, dtype):
    case = load(path)

    def low(tensors):
        return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}

    module = from_official(case.system, case.config, low(case.state(torch.float32)))
    assert all(t.dtype == dtype for t in module.parameters())
    for t in outputs(case, module, **low(case.inputs(torch.float32))):
        assert t.isfinite().all()


def test_bad_systems_and_states_are_named():
    case = golden("s4d__lin_zoh_H8_L64")
    state = case.state(torch.float32)
    with pytest.raises(ValueError, match=r"'s4dd'.*did you mean 's4d'"):
        from_official("s4dd", case.config, state)
    with pytest.raises(ValueError, match="'d_model' is missing"):
        from_official("s4d", {"mode": "diag"}, state)
    for key in state:
        with pytest.raises(ValueError, match=f"no key '{key}'"):
            from_official("s4d", case.config, {k: t for k, t in state.items() if k != key})
        with pytest.raises(ValueError, match=f"'{key}' has shape"):
            from_official("s4d", case.config, {**state, key: state[key][None]})
    with pytest.raises(ValueError, match=r"'layer.kernel.inv_dz'.*did you mean 'layer.kernel.inv_dt'"):
        from_official("s4d", case.config, {**state, "layer.kernel.inv_dz": state["layer.D"]})
    with pytest.raises(ValueError, match="unexpected key 'A'"):
        from_official("selective_scan", {}, {"A": state["layer.D"]})


def test_aliases_that_differ_are_named():
    case = golden("hyena__o2_H8_L32")
    state = case.state(torch.float32)
    state["filter_fn.implicit_filter.3.freq"] = state["filter_fn.implicit_filter.3.freq"] + 1
    with pytest.raises(ValueError, match=r"'filter_fn.implicit_filter.3.freq' and .* name one tensor"):
        from_official("hyena", case.config, state)


def test_impossible_states_are_refused():
    x, h = torch.zeros(1, 2, 5), torch.zeros(1, 2, 2, dtype=torch.complex64)
    for options, word in [
        ({"bidirectional": True}, "bidirectional"),
        ({"disc": "dss"}, "dss"),
        ({"rate": 2.0}, "rate = 2.0"),
        ({"l_max": 3}, "l_max = 3"),
    ]:
        module, _ = drawn("s4d", {"d_model": 2, "d_state": 4, "mode": "diag", **options}, torch.float32)
        with pytest.raises(ValueError, match=word):
            module(x=x, state=h)
    module, _ = drawn("s4d", {"d_model": 2, "d_state": 4, "mode": "diag"}, torch.float32)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        module(x=x, state=h[:, :1])


def test_hyena_refuses_more_than_l_max():
    module, _ = drawn("hyena", {"d_model": 2, "l_max": 8}, torch.float32)
    with pytest.raises(ValueError, match="max_len = 8"):
        module(x=torch.zeros(1, 9, 2))


# Configurations without a file: formulas of the official definition, written down once more and slowly.


TRANSFORMED = {
    "exp": torch.exp,
    "none": lambda p: p,
    "relu": lambda p: p.clamp(min=0) + 1e-4,
    "sigmoid": lambda p: 1 / (1 + torch.exp(-p)),
    "softplus": lambda p: torch.log1p(torch.exp(p)),
}
ACT = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "id": lambda y: y,
    None: lambda y: y,
    "glu": lambda y: F.glu(y, dim=-1),
    "relu": F.relu,
    "silu": F.silu,
}


def s4d_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """S4Block with a diagonal kernel, x (B, H, L)."""
    c = {"disc": "zoh", "rate": 1.0, "activation": "gelu", "mult_act": None, "final_act": "glu", **config}
    p = {key.removeprefix("layer.kernel."): t for key, t in state.items()}
    (H, L), rate = x.shape[1:], c["rate"]
    K = L if c.get("l_max") is None else min(L, round(c["l_max"] / rate))
    inv_dt = p["inv_dt"].sinh() if c.get("dt_fast") else p["inv_dt"]
    dt = TRANSFORMED[c.get("dt_transform", "exp")](inv_dt)
    A = -TRANSFORMED[c.get("real_transform", "exp")](p["A_real"]) + 0j
    B, C = p["B"][0], p["C"]
    if not c.get("is_real"):
        A = A - 1j * TRANSFORMED[c.get("imag_transform", "none")](p["A_imag"])
        B, C = torch.view_as_complex(B), torch.view_as_complex(C)
    groups = [h % len(A) for h in range(H)]
    A, B = A[groups], B[groups]
    if c.get("bandlimit"):
        C = torch.where(dt * A.imag.abs() / (2 * math.pi) < c["bandlimit"] / 2, C, 0)
    dt = dt * rate
    steps = torch.arange(K)
    if c["disc"] == "zoh":
        b, a = (torch.exp(dt * A) - 1) / A, torch.exp(dt * A)
    elif c["disc"] == "bilinear":
        b, a = dt / (1 - dt * A / 2), (1 + dt * A / 2) / (1 - dt * A / 2)
    if c["disc"] == "dss":
        up = A.real > 0
        powers = torch.exp((dt * A)[..., None] * torch.where(up[..., None], steps - (K - 1), steps))
        z = torch.where(up, -dt * A, dt * A)
        v = (torch.exp(z * K) - 1) * A
        k = torch.einsum("chn,hnl->chl", C * (B * (torch.exp(z) - 1) * v.conj() / (v.abs() ** 2 + 1e-7)), powers).real
    else:
        k = 2 * torch.einsum("chn,hnl->chl", C * (B * b), a[..., None] ** steps).real
    k, ahead = k.chunk(2) if c.get("bidirectional") else (k, None)

    def weight(lag):
        if lag >= 0:
            return k[:, :, lag] if lag < K else None
        return ahead[:, :, -lag - 1] if ahead is not None and -lag - 1 < K else None

    y = convolved(x[:, None], weight) + state["layer.D"][:, :, None] * x[:, None]  # (B, C, H, L)
    y = y.transpose(1, 2) if c.get("swap_channels") else y
    y = ACT[c["mult_act"]](ACT[c["activation"]](y.flatten(1, 2).transpose(1, 2)))
    if c["final_act"] is not None:
        y = ACT[c["final_act"]](F.linear(y, state["output_linear.0.weight"], state["output_linear.0.bias"]))
    return y.transpose(1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"bidirectional": True, "channels": 2, "l_max": 5, "activation": "tanh"},
        {"channels": 2, "swap_channels": True, "final_act": None},
        {"channels": 3, "mult_act": "relu", "final_act": "id"},
        {"disc": "bilinear", "n_ssm": 2},
        {"disc": "bilinear", "is_real": True, "dt_tie": False},
        {"disc": "dss"},
        {"disc": "dss", "real_transform": "none", "channels": 2, "bidirectional": True},
        {"rate": 2.0, "l_max": 8, "n_ssm": 1},
        {"rate": 0.5, "l_max": 8},
        {"dt_tie": False, "dt_transform": "softplus", "real_transform": "sigmoid", "imag_transform": "relu"},
        {"dt_transform": "none", "dt_fast": True, "real_transform": "softplus"},
        {"dt_transform": "relu", "real_transform": "relu", "imag_transform": "exp"},
        {"imag_transform": "exp", "bandlimit": 0.08, "rate": 2.0},
        {"n_ssm": 2, "dt_tie": False, "rate": 2.0, "bidirectional": True, "l_max": 7, "disc": "bilinear"},
        {"is_real": True, "n_ssm": 1, "channels": 2, "swap_channels": True, "bidirectional": True, "l_max": 30},
        {"activation": "glu", "final_act": "silu", "d_state": 5},
        {"final_act": None, "postact": "glu", "activation": None, "mode": None, "kernel": "s4d"},
    ],
    ids=str,
)
@torch.no_grad()
def test_s4d_by_its_formula(options):
    config = {"d_model": 4, "d_state": 6, "mode": "diag", **options}
    module, state = drawn("s4d", config)
    x = series(2, 4, 11)
    if "postact" in options:
        config["final_act"] = options["postact"]
    assert error(module(x=x), s4d_formula(config, state, x)) < 1e-9


@pytest.mark.parametrize("options", [{"channels": 2, "disc": "bilinear"}, {"is_real": True, "dt_tie": False}], ids=str)
@torch.no_grad()
def test_s4d_state_goes_on(options):
    module, _ = drawn("s4d", {"d_model": 4, "d_state": 6, "mode": "s4d", **options})
    x, state = series(2, 4, 11), module.conv.init_state(2)
    state = state.real if module.conv.filter.system.real else torch.view_as_real(state)
    first = module(x=x[..., :4], state=state)
    assert first["next_state"].shape == state.shape
    assert first["next_state"].dtype == torch.float64
    second = module(x=x[..., 4:], state=first["next_state"])
    assert error(torch.cat([first["y"], second["y"]], dim=-1), module(x=x)) < 1e-9


def hyena_formula(config: dict, state: dict[str, Tensor], x: Tensor, features_first: bool) -> Tensor:
    c = {
        "order": 2,
        "short_filter_order": 3,
        "modulate": True,
        "shift": 0.0,
        "bias": True,
        "activation": "id",
        **config,
    }
    D, order, L, K = c["d_model"], c["order"], x.shape[1], c["short_filter_order"]
    u = F.linear(x, state["in_proj.weight"], state["in_proj.bias"]).transpose(1, 2)
    taps = state["short_filter.weight"][:, 0]
    short = (
        convolved(u, lambda lag: taps[:, K - 1 - lag] if 0 <= lag < K else None) + state["short_filter.bias"][:, None]
    )
    *gates, v = short.split(D, dim=1)
    f = {key.removeprefix("filter_fn."): t for key, t in state.items() if key.startswith("filter_fn.")}
    h, i = f["pos_emb.z"][0, :L], 0
    while f"implicit_filter.{i + 1}.freq" in f:
        h = F.linear(h, f[f"implicit_filter.{i}.weight"], f[f"implicit_filter.{i}.bias"])
        h, i = torch.sin(f["implicit_filter.1.freq"] * h), i + 2
    h = h @ f[f"implicit_filter.{i}.weight"].T  # (L, D (order - 1))
    if c["modulate"]:
        h = h * (torch.exp(-f["pos_emb.t"][0, :L] * f["modulation.deltas"][0].abs()) + c["shift"])
    if c.get("normalized"):
        h = h / h.abs().sum(1, keepdim=True)
    for o, gate in enumerate(reversed(gates[1:])):
        rows = [d * (order - 1) + o if features_first else o * D + d for d in range(D)]
        v = v * (gate.sum(1, keepdim=True) if c.get("outer_mixing") else gate)
        bias = f["bias"][rows] if c["bias"] else torch.zeros(D, dtype=x.dtype)
        v = convolved(v, lambda lag, rows=rows: h[lag, rows] if lag >= 0 else None) + bias[:, None] * v
        if c.get("post_order_ffn"):
            v = state["ord_proj_w"][o] * v
    y = ACT[c["activation"]]((v * gates[0]).transpose(1, 2))
    return F.linear(y, state["out_proj.weight"], state["out_proj.bias"])


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("hyena", {"normalized": True, "order": 3}),
        ("hyena", {"normalized": True, "activation": "gelu", "post_order_ffn": True, "order": 4, "bias": False}),
        ("hyena", {"outer_mixing": True, "order": 3, "activation": "tanh", "post_order_ffn": True}),
        (
            "hyena",
            {"order": 3, "num_inner_mlps": 1, "emb_dim": 5, "shift": 0.03, "w": 7, "post_order_ffn": True}
            | {"activation": "gelu", "short_filter_order": 4, "bias": False},
        ),
        ("hyena", {"shift": 0.05, "num_inner_mlps": 0, "short_filter_order": 1, "num_heads": 1}),
        ("hyena", {"modulate": False, "shift": 0.05, "target": 0.1, "fast_decay_pct": 0.2, "bias": False}),
        ("hyenastandalone", {"order": 3, "shift": 0.05, "emb_dim": 5}),
        ("hyenastandalone", {"order": 3, "modulate": False, "w": 4}),
    ],
    ids=str,
)
@torch.no_grad()
def test_hyena_by_its_formula(system, options):
    config = {"d_model": 3, "l_max": 12, "filter_order": 4, **options}
    module, state = drawn(system, config)
    x = series(2, 10, 3)
    assert error(module(x=x), hyena_formula(config, state, x, system == "hyena")) < 1e-9


def test_the_standalone_hyena_does_not_look_at_bias_and_normalized():
    config = {"d_model": 3, "l_max": 12, "filter_order": 4}
    module, state = drawn("hyenastandalone", config)
    same = from_official("hyenastandalone", {**config, "bias": False, "normalized": True}, state)
    assert torch.equal(module(x=series(2, 10, 3)), same(x=series(2, 10, 3)))


def long_conv_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """x (B, H, L): every tap of the kernel on a circle of n steps."""
    c = {"lam": 0.1, "activation": "gelu", "postact": "glu", "channels": 1, **config}
    k, L = state["kernel.kernel"], x.shape[2]
    w = c.get("ma_window_len", 7)
    if c.get("use_ma_smoothing") and c.get("smooth_freq"):
        bins, smooth = torch.fft.rfft(k), 0
        for j in range(w):
            weight = torch.exp(torch.tensor(-0.5 * (j - w // 2) ** 2)).double()
            shift = j - (w - 1) // 2
            smooth = smooth + weight * F.pad(bins, (w, w))[..., w + shift : w + shift + bins.shape[-1]]
        k = torch.fft.irfft(smooth)
    elif c.get("use_ma_smoothing"):
        padded = F.pad(k, (w // 2, w // 2))
        k = sum(padded[..., j : j + k.shape[-1]] for j in range(w)) / w
    k = torch.sign(k) * (k.abs() - c["lam"]).clamp(min=0)
    if c.get("bidirectional"):
        behind, ahead = k.chunk(2)
        k = F.pad(behind, (0, L)) + F.pad(ahead.flip(-1), (L, 0))
    n = min(L, round(c["l_max"] / c.get("rate", 1.0))) + L
    circle = F.pad(k, (0, n))[..., :n]
    wrapped = F.pad(x, (0, n - L))[:, None]  # (B, 1, H, n)
    y = sum(circle[..., p : p + 1] * wrapped.roll(p, -1) for p in range(n))[..., :L]
    y = (y + state["D"][..., None] * x[:, None]).flatten(1, 2).transpose(1, 2)
    y = ACT[c["activation"]](y)
    if c["postact"] is not None:
        y = ACT[c["postact"]](F.linear(y, state["output_linear.0.weight"], state["output_linear.0.bias"]))
    return y.transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 9, 23])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 2, "bidirectional": True},
        {"causal": False, "activation": "relu", "postact": "id"},
        {"causal": False, "bidirectional": True, "postact": None, "channels": 2},
        {"use_ma_smoothing": True, "ma_window_len": 3},
        {"rate": 2.0, "causal": False, "bidirectional": True},
        {"use_ma_smoothing": True, "smooth_freq": True, "ma_window_len": 5},
        {"use_ma_smoothing": True, "smooth_freq": True, "ma_window_len": 4, "causal": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_long_conv_by_its_formula(options, length):
    config = {"d_model": 3, "l_max": 9, "lam": 0.3, **options}
    module, state = drawn("longconv", config)
    x = series(2, 3, length)
    expected = long_conv_formula(config, state, x)
    assert error(module(x=x), expected) < 1e-9
    untransposed = from_official("longconv", {**config, "transposed": False}, state)
    assert error(untransposed(x=x.transpose(1, 2)), expected.transpose(1, 2)) < 1e-9


def matrices_by_definition(n: int) -> Tensor:
    j = torch.arange(n, dtype=torch.float64)
    return torch.exp(-2j * math.pi * j[:, None] * j / n)


def block_fft_formula(options: dict, state: dict[str, Tensor], x: Tensor, length: int) -> Tensor:
    """x (..., H, T): a dense matrix a feature, column by column from sums over the digits of the two indices."""

    def matrix(n: int) -> Tensor:
        if not options.get("learn_dft_matrices", True):
            return matrices_by_definition(n)[None]
        learned = torch.view_as_complex(state[f"mat_{n}"])
        return learned + matrices_by_definition(n) if options.get("learn_additive") else learned

    act = ACT[options.get("activation")]

    def transform(x: Tensor) -> Tensor:
        N = x.shape[-1]
        if N <= 16:
            y = torch.einsum("hjk,...hk->...hj", matrix(N).expand(x.shape[-2], N, N), x)
            return torch.complex(act(y.real), act(y.imag))
        n = N // 16
        rows = torch.stack([transform(x[..., b::n]) for b in range(n)], dim=-1)  # (..., H, 16, n)
        out = torch.empty_like(x)
        for a in range(16):
            twiddled = rows[..., a, :] * torch.exp(-2j * math.pi * a * torch.arange(n, dtype=torch.float64) / N)
            out[..., a::16] = transform(twiddled)
        return out

    N = 2 ** math.ceil(math.log2(length))
    return transform(F.pad(x, (0, N - x.shape[-1])).to(torch.complex128))


@pytest.mark.parametrize("length", [2, 16, 17, 32, 64, 200, 256, 512, 1000, 4096])
@torch.no_grad()
def test_fixed_block_fft_is_the_fourier_transform(length):
    for n in {length, length // 2, 2 * length}:  # as long, filled with zeros, cut
        x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n), dtype=torch.complex128)
        module = from_official("blockfft", {"learn_dft_matrices": False, "N": length}, {})
        y = torch.complex(*module(x=torch.view_as_real(x)).values())
        expected = torch.fft.fft(x, n=2 ** math.ceil(math.log2(length)))
        assert error(y, expected) < 1e-12
        assert torch.equal(torch.complex(*module(x=x).values()), y)
        assert error(BlockFFT(1).double()(x, length), expected) < 1e-6  # they start as float32 ones
        assert (
            error(block_fft(x.real, length, dft_matrices(4, torch.complex128)), torch.fft.fft(x.real, n=y.shape[-1]))
            < 1e-12
        )
        assert error(torch.complex(*module(x=x.to(torch.complex64)).values()), expected) < 1e-6


@pytest.mark.parametrize("length", [8, 32, 100, 512, 1024])
@pytest.mark.parametrize(
    "options",
    [
        {"H": 3},
        {"max_m": 64, "dropout": 0.1, "dft_lr": 1e-4},
        {"H": 3, "learn_additive": True, "activation": "gelu"},
        {"learn_dft_matrices": False, "H": 7, "learn_additive": True, "activation": "tanh"},
    ],
    ids=str,
)
@torch.no_grad()
def test_block_fft_by_its_formula(options, length):
    module, state = drawn("blockfft", {**options, "N": length})
    x = torch.view_as_complex(series(2, 3, 40, 2))
    y = torch.complex(*module(x=x).values())
    assert error(y, block_fft_formula(options, state, x, length)) < 1e-12


@pytest.mark.parametrize("length", [4, 9, 23])  # transforms of 8, 32 instead of 18, 32
@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({}, {"H": 3}),
        ({"channels": 2, "bidirectional": True}, {"learn_additive": True, "activation": "relu"}),
        ({"causal": False, "bidirectional": True, "postact": None, "channels": 2}, {"max_m": 32, "H": 3}),
        ({"use_ma_smoothing": True}, {"learn_dft_matrices": False, "H": 5, "activation": "id"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_long_conv_in_blocks_by_its_formula(options, args, length):
    config = {"d_model": 3, "l_max": 9, "lam": 0.3, **options}
    module, state = drawn("longconv", {**config, "block_fft_conv": True, "block_fft_conv_args": args})
    x, n = series(2, 3, length), min(length, 9) + length
    k = module.conv.filter(module.conv.filter.max_len).unflatten(0, (-1, 3))  # tested without blocks
    if options.get("bidirectional"):
        behind, ahead = k.chunk(2)
        k = F.pad(behind, (0, length)) + F.pad(ahead.flip(-1), (length, 0))

    def spectrum(name, x):
        part = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
        return block_fft_formula(args, part, x, n)[..., :n]

    inverse = matrices_by_definition(n).conj() / n
    y = (spectrum("block_fft_u", x)[:, None] * spectrum("block_fft_k", k) @ inverse).real[..., :length]
    y = F.gelu((y + state["D"][..., None] * x[:, None]).flatten(1, 2).transpose(1, 2))
    if "postact" not in options:
        y = F.glu(F.linear(y, state["output_linear.0.weight"], state["output_linear.0.bias"]), dim=-1)
    assert error(module(x=x), y.transpose(1, 2)) < 1e-11
    untransposed = from_official(
        "longconv", {**config, "transposed": False, "block_fft_conv": True, "block_fft_conv_args": args}, state
    )
    assert error(untransposed(x=x.transpose(1, 2)), y) < 1e-11


@torch.no_grad()
def test_fixed_blocks_change_nothing_where_the_circle_is_a_power_of_two():
    config = {"d_model": 3, "l_max": 16, "bidirectional": True}
    module, state = drawn("longconv", config)
    blocks = {"block_fft_conv": True, "block_fft_conv_args": {"learn_dft_matrices": False}}
    x = series(2, 3, 16)
    assert error(from_official("longconv", {**config, **blocks}, state)(x=x), module(x=x)) < 1e-12


def test_gradients_of_block_fft():
    x = torch.view_as_complex(series(2, 2, 5, 2)).requires_grad_()
    matrices = [torch.view_as_complex(series(2, n, n, 2)).requires_grad_() for n in (2, 4)]

    def transformed(x, two, four):
        return block_fft(x, 32, {2: two, 4: four}, torch.tanh)  # 4 times 4 times 2

    assert torch.autograd.gradcheck(transformed, (x, *matrices))
    module = BlockFFT(2, radix=4).double()
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(module, dict(zip(("mat_2", "mat_4"), p)), (x, 8)),
        (x.detach().real.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())),
    )


def test_what_block_fft_refuses():
    x = torch.zeros(1, 3, 4)
    for radix in (0, 1, 12):
        with pytest.raises(ValueError, match=f"radix = {radix}"):
            BlockFFT(1, radix=radix)
    with pytest.raises(ValueError, match="length = 0"):
        BlockFFT(1)(x, 0)
    with pytest.raises(ValueError, match="x has 3 features; the matrices have 2"):
        BlockFFT(2)(x, 4)
    with pytest.raises(ValueError, match="state"):
        load(next(p for p in GOLDEN if p.stem in FLOAT32)).module(torch.float32)(x=torch.zeros(1, 4, 32), state=x)
    assert BlockFFT(3).bfloat16()(x.bfloat16(), 5).dtype == torch.complex64
    assert torch.equal(BlockFFT(3)(x + 2, 1), torch.full((1, 3, 1), 2, dtype=torch.complex64))


def h3_formula(config: dict, state: dict[str, Tensor], x: Tensor) -> Tensor:
    D, P, N, L = config["d_model"], config.get("head_dim", 1), config["d_state"], x.shape[1]
    H, K = D // P, min(L, config.get("l_max") or L)
    q, k, v = (
        F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"]).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    B, C = state["ssm_k_kernel.kernel.B"], state["ssm_k_kernel.kernel.C"][0]
    shift = [(B[:, : N - l] * C[:, l:]).sum(1) for l in range(min(N, K))]
    k = convolved(k, lambda lag: shift[lag] if 0 <= lag < len(shift) else None) + state["ssm_k_D"][:, None] * k
    s = {key.removeprefix("kernel.kernel."): t for key, t in state.items() if key.startswith("kernel.kernel.")}
    A = torch.complex(-TRANSFORMED[config.get("real_type", "exp")](s["inv_A_real"]), s["A_imag"])
    A = A.real + 0j if config.get("force_real") else A
    groups = [h % len(A) for h in range(H)]
    A, B, C, dt = A[groups], torch.view_as_complex(s["B"])[groups], torch.view_as_complex(s["C"])[0], s["log_dt"].exp()
    if config.get("bandlimit"):
        C = torch.where(dt[:, None] * A.imag.abs() / (2 * math.pi) < config["bandlimit"] / 2, C, 0)
    dtA = dt[:, None] * A
    if config.get("disc") == "zoh":
        a, b = dtA.exp(), (dtA.exp() - 1) / A
    else:
        a, b = (1 + dtA / 2) / (1 - dtA / 2), dt[:, None] / (1 - dtA / 2)
    taps = 2 * torch.einsum("hn,hnl->hl", B * C * b, a[..., None] ** torch.arange(K)).real
    q, k, v = (t.unflatten(1, (H, P)) for t in (q, k, v))
    kv = torch.einsum("bhil,bhjl->bijhl", k, v)
    y = convolved(kv, lambda lag: taps[:, lag] if 0 <= lag < K else None) + state["D"][:, None] * kv
    y = torch.einsum("bhil,bijhl->bljh", q, y).flatten(2)
    return F.linear(y, state["output_linear.weight"], state["output_linear.bias"])


@pytest.mark.parametrize(
    "options",
    [
        {"disc": "zoh"},
        {"disc": "zoh", "head_dim": 2, "n_ssm": 1, "l_max": 3},
        {"head_dim": 4, "real_type": "softplus", "d_state": 5},
        {"real_type": "sigmoid", "bandlimit": 0.1, "n_ssm": 2},
        {"real_type": "relu", "force_real": True, "l_max": 20},
        {"head_dim": 2, "l_max": 7, "n_ssm": 2, "real_type": "softplus", "bandlimit": 0.2},
    ],
    ids=str,
)
@torch.no_grad()
def test_h3_by_its_formula(options):
    config = {"d_model": 4, "d_state": 6, **options}
    module, state = drawn("h3", config)
    x = series(2, 10, 4)
    y = module(x=x)
    assert error(y, h3_formula(config, state, x)) < 1e-9
    pieces, carried = [], module.model.init_state(2)
    for piece in x.split([3, 1, 1, 5], dim=1):
        piece, carried = module.model(piece, carried)
        pieces.append(piece)
    assert error(torch.cat(pieces, dim=1), y) < 1e-9


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize(
    ("variable_B", "variable_C", "groups"), [(False, True, 2), (True, False, 0), (False, False, 0)]
)
@torch.no_grad()
def test_selective_scan_by_its_formula(complex_A, variable_B, variable_C, groups):
    rng = torch.Generator().manual_seed(3)
    randn = lambda *shape, dtype=torch.float64: torch.randn(shape, generator=rng, dtype=dtype)  # noqa: E731
    rows, E, N, L = 2, 4, 3, 7
    dtype = torch.complex128 if complex_A else torch.float64
    u, delta, D, bias = randn(rows, E, L), randn(rows, E, L), randn(E), randn(E)
    A = randn(E, N, dtype=dtype) - 1

    def maps(variable):
        """As the module takes it, and as (rows, E, N, L)."""
        if not variable:
            x = randn(E, N, dtype=dtype)
            return x, x[None, :, :, None].expand(rows, E, N, L)
        x = randn(rows, *([groups] if groups else []), N, L, dtype=dtype)
        given = torch.view_as_real(x).flatten(-2) if complex_A else x
        return given, (x if groups else x[:, None]).repeat_interleave(E // (groups or 1), dim=1)

    (B, B_all), (C, C_all) = maps(variable_B), maps(variable_C)
    module = from_official("selective_scan", {"delta_softplus": True, "groups": groups, "dim": E}, {})
    out = module(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=bias)
    dt, h, ys = F.softplus(delta + bias[:, None]), torch.zeros(rows, E, N, dtype=dtype), []
    for t in range(L):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt * u)[:, :, t, None] * B_all[..., t]
        y = (h * C_all[..., t]).sum(-1)
        ys.append((2 * y.real if complex_A else y) + D * u[:, :, t])
    assert error(out["y"], torch.stack(ys, dim=-1)) < 1e-9
    assert error(out["last_state"], h) < 1e-9


@pytest.mark.parametrize(
    ("system", "change", "word"),
    [
        ("s4d", {"rate": 0}, "rate = 0 must be a number > 0"),
        ("s4d", {"l_max": 8.0}, "l_max = 8.0 must be a whole number >= 1 or None"),
        ("s4d", {"dt_tie": "yes"}, "dt_tie = 'yes' .* True, False"),
        ("s4d", {"d_model": True}, "d_model = True must be a whole number"),
        ("s4nd", {"l_max": [4, "x"]}, r"l_max = \[4, 'x'\] must be a list of whole numbers >= 1, or one"),
        ("sashimi", {"pool": 4}, "pool = 4 must be a list of whole numbers"),
        ("mamba_hf", {"time_step_rank": "full"}, "time_step_rank = 'full' must be a whole number >= 1 or 'auto'"),
        ("h3", {"d_model": 6, "n_ssm": 4}, "n_ssm = 4 does not divide the 6 heads"),
        ("s4v3", {"d_model": 4, "bottleneck": 5}, "bottleneck = 5 leaves nothing of d_model = 4"),
        ("s4model", {"d_model": 4, "layer": 3}, "no layer is called '3'; there are s4, ffn"),
        ("s5", {"H": 2, "P": 2, "layer": "gelu"}, "layer: 'gelu' is no mapping"),
    ],
)
def test_values_that_mean_nothing_are_named(system, change, word):
    with pytest.raises(ValueError, match=f"^{system}: .*{word}"):
        from_official(system, {"d_model": 4, **change} if system in ("s4d", "s4nd") else change, {})


@pytest.mark.parametrize(
    ("stem", "missing", "key"),
    [("monarch__linear_20_30", "bias", "bias"), ("monarch__bdlinear_16_24", "weight", "weight")],
)
def test_of_a_family_the_nearest_to_the_state_is_meant(stem, missing, key):
    case = golden(stem)
    state = case.state(torch.float32)
    del state[missing]
    with pytest.raises(ValueError, match=f"no key '{key}'"):
        from_official(case.system, case.config, state)


def test_whole_numbers_are_exact_in_any_dtype():
    module, _ = drawn("ckconv", {"in_channels": 1, "out_channels": 1, "hidden_channels": 2, "omega_0": 1.0})
    module.load_state_dict({**module.state_dict(), "train_length": torch.tensor([1023])})
    assert int(module.bfloat16().train_length) == 1023  # which bfloat16 itself does not have


def test_numbers_of_numpy_are_numbers():
    case = golden("s4d__lin_zoh_H8_L64")
    sizes = {"d_model": np.int64(8), "rate": np.float32(1)}
    assert outputs(case, case.module(), **case.inputs(torch.float64))[0].equal(
        outputs(
            case,
            from_official("s4d", {**case.config, **sizes}, case.state(torch.float64)),
            **case.inputs(torch.float64),
        )[0]
    )
