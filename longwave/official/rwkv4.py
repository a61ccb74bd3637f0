"""RWKV-4: RwkvForCausalLM of Hugging Face transformers, and the models of github.com/BlinkDL/RWKV-LM (commit 524481d).

Both become an ordinary :class:`longwave.models.LMSpec`: the norm between embedding and first block sees each token
alone, so it goes into the embedding. While it does not train, transformers halves hidden states and what is added to
them (``rescale_every``, against overflow in float16): the same function but for the epsilon of its norms, and ours is
the one that was trained. Its one-token step of a batch mixes up the rows; ours does not.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from longwave.mixers import mixer
from longwave.models.spec import LMSpec
from longwave.nn import NORMS
from longwave.official.blocks import ModelSource
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
    System,
    Turn,
    inside,
)

LAST_EPS = 1e-5
BLINKDL = {"embedding": "emb.", "norm": "ln0.", "rwkv4": "att.", "rwkv4_channel": "ffn.", "k": "k", "v": "v", "r": "r"}
HF = {"embedding": "embeddings.", "norm": "pre_ln.", "rwkv4": "attention.", "rwkv4_channel": "feed_forward."}
HF |= {"k": "key", "v": "value", "r": "receptance"}


PILE = "GPT-NeoX's (EleutherAI/gpt-neox-20b), or of RWKV-4 World its own (RWKV/rwkv-4-world-169m)"


def language_model(vocab: int, layers: int, width: int, A: int | None, hidden: int | None, eps: float) -> LMSpec:
    """Two of our blocks a block of theirs; None, or 0, is D of A and 4 D of the channel mix. The last norm has its own
    epsilon whatever the option says."""
    pattern = [
        mixer("rwkv4", expand=(A or width) / width),
        mixer("rwkv4_channel", expand=(hidden or 4 * width) / width),
    ]
    sizes: dict[str, Any] = {"vocab": vocab, "d_model": width, "layers": 2 * layers, "tied": False}
    last = None if eps == LAST_EPS else NORMS.make("layer", eps=LAST_EPS)
    return LMSpec(pattern=pattern, channel=None, norm="layer", norm_eps=eps, final_norm=last, **sizes)


def table(layers: int, eps: float, prefix: str, words: dict[str, str]) -> Names:
    """The names in :class:`longwave.models.LM`, for a prefix and the words that the two have of their own."""

    def normed(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(embedding, weight.shape, weight, bias, eps)

    first = f"{prefix}blocks.0.{words['norm']}"
    into_embedding = Turn(normed, lambda embedding: (embedding, embedding[0], embedding[0]))
    names: Names = [
        Name(
            (f"{prefix}{words['embedding']}weight", f"{first}weight", f"{first}bias"),
            "embedding.weight",
            into_embedding,
        ),
        Name(f"{prefix}ln_out.", "backbone.norm."),
        Name("head.", "head."),
    ]
    for i in range(layers):
        for j, kind in enumerate(("rwkv4", "rwkv4_channel")):
            part = words[kind]
            layer = [
                Name(f"ln{j + 1}.", "norm1."),
                *(Name(f"{part}time_mix_{words[map]}", f"mixer.time_mix_{map}") for map in "kvr"),
                Name(part, "mixer."),
            ]
            names += inside(f"{prefix}blocks.{i}.", f"backbone.layers.{2 * i + j}.", layer)
    return names


class BlinkDL(ModelSource):
    """GPT of RWKV-v4 and RWKV of RWKV-v4neo."""

    ignored = frozenset({"ctx_len", "tiny_att_layer"})
    tokenizer = PILE
    vocab_size: Size = 50277
    n_layer: Size
    n_embd: Size
    dim_att: Count | None = None
    dim_ffn: Count | None = None
    model_type: Literal["RWKV"] = "RWKV"
    pre_ffn: Literal[0] = 0
    head_qk: Literal[0] = 0
    tiny_att_dim: Literal[0] = 0
    my_pos_emb: Literal[0] = 0

    def spec(self) -> LMSpec:
        return language_model(self.vocab_size, self.n_layer, self.n_embd, self.dim_att, self.dim_ffn, 1e-5)

    def names(self) -> Names:
        return inside("", "model.", table(self.n_layer, 1e-5, "", BLINKDL))

    @classmethod
    def found(cls, config: Mapping[str, Any], shapes: Shapes) -> Mapping[str, Any] | None:
        if len(shapes.get("blocks.0.att.time_first", ())) != 1 or "blocks.0.att.ln_x.weight" in shapes:
            return None  # RWKV-5 has heads
        vocab, width = shapes["emb.weight"]
        layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
        widths = {"dim_att": shapes["blocks.0.att.key.weight"][0], "dim_ffn": shapes["blocks.0.ffn.key.weight"][0]}
        return {"vocab_size": vocab, "n_embd": width, "n_layer": layers, **widths}


class RwkvForCausalLM(ModelSource):
    """RwkvForCausalLM of transformers."""

    hf_type = "rwkv"
    tokenizer = PILE
    ignored = HUGGING_FACE | {"context_length", "max_position_embeddings", "rescale_every"}
    optional = True
    vocab_size: Size = 50277
    hidden_size: Size = 4096
    num_hidden_layers: Size = 32
    attention_hidden_size: Size | None = None
    intermediate_size: Size | None = None
    layer_norm_epsilon: Positive = 1e-5
    tie_word_embeddings: Flag = False

    def spec(self) -> LMSpec:
        sizes = (self.vocab_size, self.num_hidden_layers, self.hidden_size)
        widths = (self.attention_hidden_size, self.intermediate_size)
        return language_model(*sizes, *widths, self.layer_norm_epsilon)

    def names(self) -> Names:
        head = Alias("head.weight", "rwkv.embeddings.weight")  # without the norm that ours has
        names = table(self.num_hidden_layers, self.layer_norm_epsilon, "rwkv.", HF)
        return [*([head] if self.tie_word_embeddings else []), *inside("", "model.", names)]


SYSTEMS = {"rwkv4_hf": System(RwkvForCausalLM), "rwkv4_blinkdl": System(BlinkDL)}
