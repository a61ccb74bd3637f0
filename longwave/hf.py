"""longwave's models among those of ``transformers``: importing this registers the model type "longwave".

A folder opens either way, whether ``longwave.models.save`` wrote it or ``save_pretrained``.
"""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from longwave.errors import few
from longwave.machine import required
from longwave.mixers.base import as_mask
from longwave.models.reader import Reader
from longwave.models.runs import model_at
from longwave.models.score import next_targets, score_logits
from longwave.models.spec import ModelSpec
from longwave.models.storage import read_spec, stored_spec
from longwave.nn import frozen, longest
from longwave.nn.module import StaysWide
from longwave.tasks.forms import scored
from longwave.tokenizer import ENDS, FILE, MASK, find

transformers = required("transformers", "hf")
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput  # noqa: E402
from transformers.utils import can_return_tuple  # noqa: E402

NAMES = {"vocab_size": "vocab", "hidden_size": "d_model", "num_hidden_layers": "layers", "tie_word_embeddings": "tied"}


def _view(field: str) -> Any:
    """An attribute that stands in the spec, so that it is there once."""
    return property(lambda self: (self.spec or {}).get(field), lambda self, value: self.spec.update({field: value}))


class OfRun:
    """What is read from a folder, a run (its best checkpoint) or a name on the Hub."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        path: Any = pretrained_model_name_or_path
        if Path(path).is_dir():
            path = str(model_at(Path(path)))
        elif len(Path(path).parts) > 2:
            raise ValueError(f"there is no folder {path}; a name on the Hub has one slash")
        return super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]


class LongwaveConfig(OfRun, PreTrainedConfig):
    """What a model is, as a ``ModelSpec`` or the dict of its fields; names that ``transformers`` asks for are views."""

    model_type = "longwave"
    has_no_defaults_at_init = True
    spec: Any = None
    architectures: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings = map(_view, NAMES.values())

    def __post_init__(self, **kwargs: Any) -> None:
        if self.spec is not None:
            self.spec = dict(self.spec) if isinstance(self.spec, dict) else self.spec.model_dump()
            if self.id2label is None and self.spec.get("classes") is not None:
                kwargs.setdefault("num_labels", self.spec["classes"])
            if self.architectures is None:
                self.architectures = [cls.__name__ for cls in MODELS if self.spec.get("kind") in cls.kinds]
        super().__post_init__(**kwargs)

    def model_spec(self) -> ModelSpec:
        """The spec; ValueError where it describes no model, naming the field."""
        return read_spec(self.spec, "the spec of this config")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{name: self.spec[k] for name, k in NAMES.items() if k in (self.spec or ())}}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the JSON of ``save_pretrained``, or of ``longwave.models.save``."""
        whole = config_dict if "spec" in config_dict else {"spec": stored_spec(config_dict)}
        return super().from_dict({name: value for name, value in whole.items() if name not in NAMES}, **kwargs)


class LongwaveTokenizer(OfRun, PreTrainedTokenizerFast):
    """The tokenizer.json of a model's folder; it pads on the left, by the end of a document where there is one."""

    padding_side = "left"
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As others; an ``__init__`` instead would make it build another tokenizer of the vocabulary."""
        made = super().from_pretrained(*args, **kwargs)
        known = made.get_vocab()
        for name, tokens in {"eos_token": ENDS, "pad_token": ENDS, "mask_token": [MASK]}.items():
            if getattr(made, name) is None and (found := [token for token in tokens if token in known]):
                setattr(made, name, found[0])
        return made


class StateCache(Reader, Cache):
    """The state of a model behind the tokens it has read; see :class:`longwave.models.reader.Reader`."""

    is_compileable = is_croppable = False  # else masks are built at every step; else it would have to record always

    def __init__(self) -> None:
        Cache.__init__(self, layers=[])
        Reader.__init__(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        self.take_back(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take(beam_idx.tolist())

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.take([row for row in range(self.batch_size) for _ in range(repeats)])


class LongwavePreTrainedModel(OfRun, PreTrainedModel):
    """What the models below have in common: ``self.model`` is the longwave model."""

    config_class = LongwaveConfig
    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    kinds: ClassVar[tuple[str, ...]] = ()  # of specs
    logits: ClassVar[str | None] = None  # the map to them
    model: Any

    def __init__(self, config: LongwaveConfig):
        super().__init__(config)
        spec = config.model_spec()
        if spec.kind not in self.kinds:
            others = [cls.__name__ for cls in MODELS if spec.kind in cls.kinds] or ["longwave.models.load"]
            raise ValueError(f"{type(self).__name__} opens a {' or '.join(self.kinds)}; {others[0]} a {spec.kind}")
        self.model = spec.build()
        firsts = {tensor: name for name, tensor in self.named_parameters()}
        every = self.named_parameters(remove_duplicate=False)
        self._tied_weights_keys = {name: firsts[tensor] for name, tensor in every if name != firsts[tensor]}
        self._keep_in_fp32_modules_strict = {n for n, part in self.named_modules() if isinstance(part, StaysWide)}
        self._keys_to_ignore_on_load_unexpected = {n for n, t in self.model.named_buffers() if not t.numel()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: what a spec builds is drawn."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.logits is None else self.get_submodule(self.logits)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.set_submodule(self.logits, new_embeddings)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As others; ValueError for weights of another model than the config's."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        path = model.name_or_path
        for what in ("missing", "unexpected"):
            if keys := sorted(info[f"{what}_keys"]):
                raise ValueError(f"{path} is not as its config; {what}: {few(keys)}")
        if model.can_generate() and model.generation_config.eos_token_id is None and (Path(path) / FILE).is_file():
            model.generation_config.eos_token_id = find(path).end
        return (model, info) if output_loading_info else model


class LongwaveForCausalLM(LongwavePreTrainedModel, GenerationMixin):
    """A language model."""

    kinds = ("lm", "sashimi")
    logits = "model.head"

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None, use_cache: bool | None = None,
        labels: Any = None, logits_to_keep: int | Tensor = 0, num_items_in_batch: Any = None, **others: Any,
    ) -> Any:  # fmt: skip
        """Logits over the next token; in training with labels None, as they exist for a few tokens at a time.

        Args:
            input_ids, attention_mask: (B, L), the mask also of all tokens until now; 0 is padding and takes no time.
            past_key_values: what an earlier call returned; it is read on. ``use_cache`` makes one, by default not.
            labels: (B, L) the tokens themselves, -100 where they are not scored; each is foretold at the one before it.
            logits_to_keep: logits of so many last tokens, or of these; 0 is all.
            num_items_in_batch: what the summed loss is divided by; default the number of scored labels.
        Raises:
            ValueError: for an argument without a meaning here, or a cache of another kind.
        """
        (ids, mask), model = _real(input_ids, attention_mask, others), self.model
        if not isinstance(past_key_values, StateCache | None):
            raise ValueError(f"past_key_values is a StateCache; got a {type(past_key_values).__name__}: leave it out")
        cache = StateCache() if use_cache and past_key_values is None else past_key_values
        targets = None if labels is None else next_targets(labels, mask)
        if targets is not None and self.training and cache is None:
            return CausalLMOutputWithPast(loss=_mean(model.score(ids, targets, mask), num_items_in_batch))
        keep, kept = (
            (logits_to_keep, slice(-logits_to_keep, None)) if isinstance(logits_to_keep, int) else (0, logits_to_keep)
        )
        x = model.hidden(ids, mask=mask)[0] if cache is None else cache.read(model, ids, mask, keep)
        logits = model.logits(x[:, kept])
        loss = None if targets is None else _loss(logits, targets, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def generate(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        """Weights stand still meanwhile, and what follows from them is derived once."""
        with frozen(self), frozen(assistant_model or self):
            return super().generate(*args, assistant_model=assistant_model, **kwargs)

    def _prepare_cache_for_generation(self, config: Any, kwargs: Any, mode: Any, batch_size: int, most: int) -> None:
        if config.cache_implementation is not None:
            raise ValueError(f"a longwave model has its own cache; leave out {config.cache_implementation!r}")
        if (mask := kwargs.get("attention_mask")) is not None:
            if not bool(mask[:, -1].all()):
                raise ValueError("new tokens would follow padding at the end of a prompt; set padding_side='left'")
            most -= int((mask == 0).sum(1).min())
        if (limit := longest(self.model)) is not None and most > limit:
            raise ValueError(
                f"prompt and new tokens are {most + 1}, and filters or positions of the model end at {limit}; "
                f"take {most - limit} fewer by a shorter prompt or max_new_tokens, or a model of larger max_len"
            )
        if config.use_cache is not False:
            cache = kwargs["past_key_values"] = StateCache() if (c := kwargs.get("past_key_values")) is None else c
            cache.recording, cache._is_user_defined = bool(config.is_assistant), True


class LongwaveForMaskedLM(LongwavePreTrainedModel):
    """A masked language model."""

    kinds = ("masked_lm",)
    logits = "model.head.decoder"

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, token_type_ids: Any = None,
        num_items_in_batch: Any = None, **others: Any,
    ) -> Any:  # fmt: skip
        """As that of :class:`LongwaveForCausalLM`; labels are what stands where a token is hidden, else -100."""
        ids, mask = _real(input_ids, attention_mask, others)
        if labels is not None and self.training and token_type_ids is None:
            return MaskedLMOutput(loss=_mean(self.model.score(ids, labels, mask), num_items_in_batch))
        logits = self.model(ids, types=token_type_ids, mask=mask)
        return MaskedLMOutput(None if labels is None else _loss(logits, labels, num_items_in_batch), logits)


class LongwaveForSequenceClassification(LongwavePreTrainedModel):
    """A classifier of whole sequences of token ids."""

    _input_embed_layer = "encoder"
    kinds = ("classifier",)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, token_type_ids: Any = None,
        num_items_in_batch: Any = None, **others: Any,
    ) -> Any:  # fmt: skip
        """Logits (B, classes); labels (B,), or as ``config.problem_type`` has them."""
        ids, mask = _real(input_ids, attention_mask, others)
        logits, loss = self.model(ids, types=token_type_ids, mask=mask), None
        if labels is not None:
            loss = self.loss_function(labels, logits, config=self.config, num_items_in_batch=num_items_in_batch)
        return SequenceClassifierOutput(loss, logits)


def _real(ids: Tensor, mask: Tensor | None, others: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Ids that can be embedded, and a mask where one is needed; no other argument is taken."""
    for name, value in others.items():
        if value is not None and value is not False and "tokenizer" not in name:  # generate hands on its own
            raise ValueError(f"a longwave model has no {name} (got a {type(value).__name__}); leave it out")
    mask = None if mask is None else as_mask(mask[:, -ids.shape[1] :], ids)
    return (ids, None) if mask is None or bool(mask.all()) else (ids.masked_fill(~mask, 0), mask)


def _mean(score: Any, count: Any) -> Tensor:
    return score.loss / (score.total if count is None else count)


def _loss(logits: Tensor, targets: Tensor, count: Any) -> Tensor:
    return _mean(score_logits(logits[scored(targets)], targets[scored(targets)]), count)


MODELS: tuple[Any, ...] = (LongwaveForCausalLM, LongwaveForMaskedLM, LongwaveForSequenceClassification)
transformers.AutoConfig.register("longwave", LongwaveConfig)
transformers.AutoTokenizer.register(LongwaveConfig, tokenizer_class=LongwaveTokenizer)
for _model in MODELS:
    getattr(transformers, _model.__name__.replace("Longwave", "AutoModel")).register(LongwaveConfig, _model)
    setattr(transformers, _model.__name__, _model)  # where its programs look for the name in a config
