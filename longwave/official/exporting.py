"""Our models as folders that the classes of Hugging Face transformers open, without longwave."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from longwave.models import load
from longwave.models.spec import AnyModel, LMSpec
from longwave.models.storage import tokenizer
from longwave.official.blocks import ModelSource
from longwave.official.mamba import Mamba2ForCausalLM, MambaForCausalLM
from longwave.official.source import State, layout, several
from longwave.official.transformer import ACTIVATIONS, GPT2, GPTNeoX, Llama
from longwave.tokenizer import FILE as TOKENIZER
from longwave.tokenizer import Tokenizer

PROMPT = 32  # tokens of the prompt that an export is checked with


class Target(NamedTuple):
    """A class of transformers.

    Attributes:
        name: of the class.
        source: how its models are read here.
        options: what its config says for a model of one kind of mixer; what it cannot say is found by reading it back.
    """

    name: str
    source: type[ModelSource]
    options: Callable[[LMSpec, Any], Mapping[str, Any]]


def _sizes(spec: LMSpec) -> dict[str, Any]:
    """By the names that most classes have for them."""
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.layers,
        "tie_word_embeddings": spec.tied,
    }


def _mamba(spec: LMSpec, mixer: Any) -> Mapping[str, Any]:
    inner = round(mixer.expand * spec.d_model)
    rank = "auto" if mixer.dt_rank is None else mixer.dt_rank
    return _both_mambas(spec, mixer) | {"intermediate_size": inner, "time_step_rank": rank}


def _mamba2(spec: LMSpec, mixer: Any) -> Mapping[str, Any]:
    inner = round(mixer.expand * spec.d_model)
    heads = {"num_heads": inner // mixer.head_dim, "head_dim": mixer.head_dim, "n_groups": mixer.groups}
    limits = [mixer.dt_low, float("inf") if mixer.dt_high is None else mixer.dt_high]
    return _both_mambas(spec, mixer) | heads | {"time_step_limit": limits}


def _both_mambas(spec: LMSpec, mixer: Any) -> dict[str, Any]:
    return _sizes(spec) | {
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": max(1, round(mixer.expand)),  # which must be whole there
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": spec.norm_eps,
    }


def _gpt2(spec: LMSpec, mixer: Any) -> Mapping[str, Any]:
    return {
        "vocab_size": spec.vocab,
        "n_embd": spec.d_model,
        "n_layer": spec.layers,
        "n_head": mixer.heads,
        "n_inner": _hidden(spec),
        "n_positions": getattr(spec.positions, "max_len", 1),
        "activation_function": _activation(spec),
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
    }


def _gptneox(spec: LMSpec, mixer: Any) -> Mapping[str, Any]:
    return _sizes(spec) | {
        "num_attention_heads": mixer.heads,
        "intermediate_size": _hidden(spec),
        "hidden_act": _activation(spec),
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.block == "parallel",
        "attention_bias": mixer.bias,
        "rope_parameters": _rope(mixer.positions, spec.d_model // mixer.heads, share=True),
    }


def _llama(spec: LMSpec, mixer: Any) -> Mapping[str, Any]:
    width = mixer.head_dim or spec.d_model // mixer.heads
    return _sizes(spec) | {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": width,
        "intermediate_size": _hidden(spec),
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": mixer.bias,
        "mlp_bias": getattr(spec.channel, "bias", False),
        "rope_parameters": _rope(mixer.positions, width, share=False),
    }


def _hidden(spec: LMSpec) -> int:
    """Width of the channel mixers."""
    return round(getattr(spec.channel, "expand", 0) * spec.d_model) or 1


def _activation(spec: LMSpec) -> str:
    ours = getattr(spec.channel, "activation", "gelu")
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), "gelu")


def _rope(positions: Any, width: int, share: bool) -> Mapping[str, Any]:
    """Plain rotary positions as ``rope_parameters``."""
    turned = {"partial_rotary_factor": (getattr(positions, "dim", None) or width) / width} if share else {}
    return {"rope_type": "default", "rope_theta": getattr(positions, "base", 10_000.0), **turned}


TARGETS = {
    "mamba": [Target("MambaForCausalLM", MambaForCausalLM, _mamba)],
    "mamba2": [Target("Mamba2ForCausalLM", Mamba2ForCausalLM, _mamba2)],
    "attention": [
        Target("LlamaForCausalLM", Llama, _llama),
        Target("GPTNeoXForCausalLM", GPTNeoX, _gptneox),
        Target("GPT2LMHeadModel", GPT2, _gpt2),
    ],
}


def export_hf(path: str | Path, out: str | Path) -> list[str]:
    """Write a model for a class of transformers; before, it is read back and must say the same, bit for bit.

    Args:
        path: a run, a checkpoint or a saved model.
        out: the folder to make: config.json, model.safetensors, and the tokenizer where the model has one.
    Returns:
        The class, alone in a list.
    Raises:
        ValueError: where none of the classes of :data:`TARGETS` computes the model.
    """
    model, spec = load(path)
    kinds = {part.kind for part in spec.pattern}
    targets = TARGETS.get(min(kinds), []) if len(kinds) == 1 and isinstance(spec, LMSpec) else []
    for target in targets:
        found = _as(target, model, spec)
        if found is not None:
            _write(Path(out), target, *found, tokenizer(path))
            return [target.name]
    tried = f" as {', '.join(target.name for target in targets)} would not compute it" if targets else ""
    raise ValueError(
        f"longwave writes no class of transformers for this model, a {spec.kind} of {', '.join(sorted(kinds))}{tried}; "
        "longwave.hf.LongwaveForCausalLM and its like save any model for transformers with longwave installed"
    )


def _as(target: Target, model: torch.nn.Module, spec: AnyModel) -> tuple[Mapping[str, Any], State] | None:
    """Options and tensors by the names of a class, or None where it is not the same model."""
    assert isinstance(spec, LMSpec)
    options = target.options(spec, spec.pattern[0])
    try:
        source = target.source.read(options)
        state = _official(source, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
        again: Any = source.load(state)
    except (ValueError, KeyError):
        return None
    steps = min(PROMPT, options.get("n_positions", PROMPT))
    ids = torch.arange(1, steps + 1)[None] ** 2 % spec.known("vocab")
    with torch.no_grad():
        same = torch.equal(again.model.eval()(ids)[0], model(ids)[0])
    return (options, state) if same else None


def _official(source: ModelSource, ours: State) -> State:
    """The tensors under their official names, second names left out.

    Raises:
        KeyError: for a tensor that the model has not.
    """
    with torch.device("meta"):
        module = source.build()
    state: dict[str, Tensor] = {}
    for theirs, mine, turn in layout(source.names(), module.state_dict()):
        made = several(turn.official(*(ours[name] for name in mine)))
        state |= {name: tensor.contiguous() for name, tensor in zip(theirs, made, strict=True)}
    return {name: tensor for name, tensor in state.items() if name not in source.aliases()}


def _write(folder: Path, target: Target, options: Mapping[str, Any], state: State, made: Tokenizer | None) -> None:
    folder.mkdir(parents=True)
    end = None if made is None else made.end
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    about = {"architectures": [target.name], "model_type": target.source.hf_type, "dtype": dtype}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    (folder / "config.json").write_text(json.dumps({**about, **options, **ids}, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if made is not None:
        (folder / TOKENIZER).write_text(made.text, encoding="utf-8")
        special = {name: token for token, i in made.special.items() if i == end for name in ("eos_token", "pad_token")}
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
