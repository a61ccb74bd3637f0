"""Published checkpoints as ordinary models: a spec and tensors, which build, save, load and generate."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import Case, drawn, error, golden, load, series
from safetensors.torch import save_file
from torch import Tensor, nn

from longwave.models import LM, MODEL_SPEC, ClassifierSpec, LMSpec, generate, save
from longwave.models import load as load_model
from longwave.nn import reset
from longwave.official import SYSTEMS, from_official, safari_lm
from longwave.official.blocks import ModelSource
from longwave.official.importing import import_model
from longwave.official.source import under

LEGACY = Path(__file__).parent / "golden" / "legacy" / "h3lm__off_legacykeys_L20.safetensors"
MODELS = list(dict.fromkeys(s for system in SYSTEMS.values() for s in system.sources if issubclass(s, ModelSource)))

State = dict[str, Tensor]


def recognised(config: dict, state: State) -> ModelSource:
    """By its config and shapes, by one of all sources."""
    shapes = {key: tuple(t.shape) for key, t in state.items()}
    found = [(source, said) for source in MODELS if (said := source.found(config, shapes)) is not None]
    assert len(found) == 1, found
    source, said = found[0]
    return source.read(said)


@torch.no_grad()
def ordinary(source: ModelSource, state: State, tmp_path: Path) -> nn.Module:
    """What the spec builds, with the tensors and nothing else, written and read."""
    weights = {key.removeprefix("model."): t for key, t in source.convert(state).items()}
    model = source.spec().build().double()
    model.load_state_dict(weights)
    save(tmp_path, model, source.spec())
    again, spec = load_model(tmp_path)
    assert spec == source.spec()
    return again


def goes_on(model: nn.Module, ids: Tensor, logits: Tensor) -> None:
    """In chunks and token by token as at once, and generates what its logits say."""
    assert isinstance(model, LM)
    for sizes in ([1] * ids.shape[1], [5, ids.shape[1] - 5]):
        state, pieces = model.init_state(len(ids)), []
        for piece in ids.split(sizes, dim=1):
            y, state = model(piece, state)
            pieces.append(y)
        assert error(torch.cat(pieces, dim=1), logits) < 1e-9
    row = ids[0, :7].tolist()
    for token in generate(model, [row], 3)[0]:
        assert model(torch.tensor([row]))[0][0, -1].argmax() == token
        row.append(token)


LANGUAGE_MODELS = [
    "h3lm__off_attn1_L32",
    "h3lm__off_hd8_2attn_L64",
    "h3lm__simple_attn1_L32",
    "hyenalm__simple_o2_L32",
    "hyenalm__conv_o2_attn_L25",
]


@pytest.mark.parametrize("stem", LANGUAGE_MODELS)
@torch.no_grad()
def test_h3_and_hyena(stem, tmp_path):
    case = golden(stem)
    state, ids, logits = case.state(torch.float64), case.tensors["input.input_ids"], case.tensors["output64.logits"]
    model = ordinary(recognised(case.config, state), state, tmp_path)
    assert error(model(ids)[0], logits) < 1e-9
    goes_on(model, ids, logits)


def older(state: State) -> State:
    """By the names of today, as a training run kept it, with layers that make their activations again."""
    nested = {key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): t for key, t in state.items()}
    return {f"model.{key}": t for key, t in nested.items()} | {"step": torch.ones(1)}


@pytest.mark.parametrize("stem", LANGUAGE_MODELS)
@pytest.mark.parametrize("change", [dict, older])
def test_shapes_tell_what_h3_and_hyena_are(stem, change, monkeypatch):
    case = golden(stem)
    state, heads = change(case.state(torch.float64)), case.config.get("attn_cfg", {"num_heads": 4})["num_heads"]
    told = safari_lm.H3LM.read(case.config).spec()
    with pytest.raises(ValueError, match=r"none of the released models is 16 wide; put a config.json"):
        recognised({}, state)
    monkeypatch.setitem(safari_lm.HEADS, 16, heads)
    monkeypatch.setitem(
        safari_lm.FILTERS, (16, case.config["n_layer"]), {"w": case.config.get("layer", {}).get("w", 1)}
    )
    assert recognised({}, state).spec() == told
    assert recognised({}, {key: t for key, t in state.items() if "lm_head" not in key}).spec() == told


@torch.no_grad()
def test_h3_of_older_names(tmp_path, monkeypatch):
    case = load(LEGACY)
    monkeypatch.setitem(safari_lm.HEADS, 16, 4)
    state = {key: t.double() for key, t in case.part("legacy_state.").items()}
    ids, logits = case.tensors["input.input_ids"], case.part("output.")["logits"]
    separate = {key: t for key, t in state.items() if ".1.mixer." not in key}
    for kind in ("weight", "bias"):
        mixer = "s4seq.encoder.layers.1.mixer"
        parts = state[f"{mixer}.Wqkv.{kind}"].chunk(3)
        separate |= {f"{mixer}.{name}_proj.{kind}": t for name, t in zip("qkv", parts)}
        separate[f"{mixer}.output_linear.{kind}"] = state[f"{mixer}.out_proj.{kind}"]
    for i, given in enumerate((state, separate, {f"model.{key}": t for key, t in separate.items()})):
        model = ordinary(recognised({}, given), given, tmp_path / str(i))
        assert error(model(ids)[0], logits.double()) < 1e-5  # which are in float32


RELEASED = {
    "h3-125m": (768, 12, [6], 12, 0, 126_387_456),
    "h3-2.7b": (2560, 32, [10, 21], 20, 64, 2_671_134_720),
}


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_released_h3(name):
    width, layers, attention, heads, turned, parameters = RELEASED[name]
    config = {"d_model": width, "n_layer": layers, "vocab_size": 50257, "pad_vocab_size_multiple": 8, "ssm_cfg": {}}
    config |= {"attn_layer_idx": attention, "attn_cfg": {"num_heads": heads, "rotary_emb_dim": turned}}
    source = safari_lm.H3LM.read(config)
    spec = source.spec()
    with torch.device("meta"):
        assert sum(p.numel() for p in spec.build().parameters()) == parameters
    shapes = source.tensors()
    assert safari_lm.H3LM.read(safari_lm.H3LM.found({}, shapes)).spec() == spec
    shapes[f"backbone.layers.{attention[0]}.mixer.rotary_emb.inv_freq"] = (16,)
    seen = safari_lm.H3LM.read(safari_lm.H3LM.found({}, shapes)).spec()
    assert seen.pattern[attention[0]].positions.dim == 32


@torch.no_grad()
def test_released_hyena_has_no_window():
    layer = {"_name_": "hyena", "emb_dim": 33, "filter_order": 64, "l_max": 2048, "modulate": False, "w": 14}
    config = {"d_model": 864, "n_layer": 18, "d_inner": 1728, "vocab_size": 50264, "layer": layer}
    source = safari_lm.HyenaLM.read(config)
    with torch.device("meta"):
        assert sum(p.numel() for p in source.spec().build().parameters()) == 152_483_904
    found = safari_lm.HyenaLM.found({}, {f"model.{key}": shape for key, shape in source.tensors().items()})
    assert found["layer"]["modulate"] is False
    assert safari_lm.HyenaLM.read(found).spec() == source.spec()


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ({"_name_": "hyena", "l_max": 8, "normalized": True}, "hyena has no normalized"),
        ({"_name_": "hyena", "l_max": 8, "num_blocks": 2}, "num_blocks"),
        ({"_name_": "h3", "l_max": 8}, r"no l_max \(= 8\)"),
        ({"_name_": "h3-conv", "l_max": 8}, "h3-conv is no mixer of longwave"),
    ],
)
def test_layers_that_are_no_mixers_are_named(layer, word):
    source = safari_lm.H3LM.read({"d_model": 8, "n_layer": 1, "vocab_size": 30, "layer": layer})
    with pytest.raises(ValueError, match=word):
        source.spec()


@pytest.mark.parametrize("stem", ["hyenadna__lm_hidden_L64", "hyenadna__lm_o2_w14_L25"])
@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_hyena_dna(stem, told, tmp_path):
    case = golden(stem)
    state, ids = older(case.state(torch.float64)), case.tensors["input.input_ids"]
    source = recognised(case.config if told else {}, state)
    model = ordinary(source, state, tmp_path)
    logits = F.linear(case.tensors["output64.out"], case.tensors[f"state.{safari_lm.WORDS}"].double())
    assert error(model(ids)[0], logits) < 1e-9
    goes_on(model, ids, logits)


def fine_tuned(case: Case) -> tuple[State, Tensor, Tensor]:
    """A state with a head for three labels, and its weight and bias."""
    head = {"head.output_transform.weight": series(3, 16), "head.output_transform.bias": series(3)}
    return {**case.state(torch.float64), **head}, *head.values()


@torch.no_grad()
def test_hyena_dna_with_a_head(tmp_path):
    case = golden("hyenadna__lm_hidden_L64")
    state, weight, bias = fine_tuned(case)
    model = ordinary(recognised({}, state), state, tmp_path)
    expected = F.linear(case.tensors["output64.out"].mean(1), weight, bias)
    assert error(model(case.tensors["input.input_ids"]), expected) < 1e-9
    trained = {f"model.{key}": t for key, t in case.state(torch.float64).items()}
    source = recognised({}, trained)
    with pytest.raises(ValueError, match=r"unexpected key 'decoder.0.output_transform.weight'"):
        source.load({**trained, "decoder.0.output_transform.weight": weight})


HF_DNA = {
    "model_type": "hyenadna", "vocab_size": 12, "d_model": 16, "d_inner": 64, "n_layer": 2, "max_seq_len": 66,
    "emb_dim": 5, "filter_order": 16, "activation_freq": 10, "short_filter_order": 3, "hyena_order": 2,
    "num_inner_mlps": 2, "train_freq": True, "use_bias": True, "pad_token_id": 4, "layer_norm_epsilon": 1e-5,
    "architectures": ["HyenaDNAForCausalLM"], "auto_map": {}, "torch_dtype": "float32", "pad_vocab_size_multiple": 8,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_hyena_dna_of_transformers(tied, tmp_path):
    case = golden("hyenadna__lm_hidden_L64")
    state = {f"hyena.{key}": t for key, t in case.state(torch.float64).items()}
    first, others = "implicit_filter.1.freq", ("implicit_filter.3.freq", "implicit_filter.5.freq")
    state = {key: t for key, t in state.items() if not key.endswith(others)}  # as safetensors keeps what is shared
    assert any(key.endswith(first) for key in state)
    words = state[f"hyena.{safari_lm.WORDS}"] if tied else series(16, 16)
    source = recognised({**HF_DNA, "tie_word_embeddings": tied}, {**state, "lm_head.weight": words})
    model = ordinary(source, {**state, "lm_head.weight": words}, tmp_path)
    ids, logits = case.tensors["input.input_ids"], F.linear(case.tensors["output64.out"], words)
    assert error(model(ids)[0], logits) < 1e-9
    goes_on(model, ids, logits)
    if tied:
        assert torch.equal(source.load(state)(ids), model(ids)[0])


@torch.no_grad()
def test_labels_of_hyena_dna_of_transformers(tmp_path):
    case = golden("hyenadna__lm_hidden_L64")
    score = series(3, 16)
    state = {f"hyena.{key}": t for key, t in case.state(torch.float64).items()} | {"score.weight": score}
    source = recognised(HF_DNA, state)
    model, official = ordinary(source, state, tmp_path), source.load(state)
    ids = case.tensors["input.input_ids"].clone()
    ids[ids == 4] = 7
    y = from_body(case, ids)
    assert error(model(ids), F.linear(y[:, -1], score)) < 1e-9
    assert error(official(ids), model(ids)) < 1e-12
    ids[0, 20:] = 4
    assert error(official(ids), F.linear(from_body(case, ids)[[0, 1], [19, -1]], score)) < 1e-9
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    assert error(model(ids, mask=mask), official(ids)) < 1e-9


def from_body(case: Case, ids: Tensor) -> Tensor:
    """What HyenaDNA's body says."""
    return case.module()(ids)


# In the place of BERT


def normed(s: State, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def mapped(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def embedded(s: State, prefix: str, ids: Tensor, types: Tensor) -> Tensor:
    e = under(f"{prefix}embeddings.", s)
    x = e["word_embeddings.weight"][ids] + e["token_type_embeddings.weight"][types]
    return normed(e, "LayerNorm", x + e["position_embeddings.weight"][: ids.shape[1]])


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_bigs(told, tmp_path):
    case = golden("bigs__mlm")
    state, inputs = case.state(torch.float64), case.inputs(torch.float64)
    config = {key: value for key, value in case.config.items() if key != "cls"}
    source = recognised({**config, "model_type": "BiGS", "architectures": ["BiGSForMaskedLM"]} if told else {}, state)
    model = ordinary(source, state, tmp_path)
    logits = model(inputs["input_ids"], types=inputs["token_type_ids"])
    assert error(logits, case.tensors["output64.logits"]) < 1e-9
    first = torch.zeros_like(inputs["token_type_ids"])
    assert torch.equal(model(inputs["input_ids"]), model(inputs["input_ids"], types=first))
    with pytest.raises(ValueError, match="types of tokens are 0 and up"):
        model(inputs["input_ids"], types=first + 2)
    assert source.spec().pattern[0].kind == "bigs"


@torch.no_grad()
def test_bigs_over_rows(tmp_path):
    case = golden("bigs__mlm")
    ids, types = (case.tensors[f"input.{name}"] for name in ("input_ids", "token_type_ids"))
    body = {key: t for key, t in case.state(torch.float64).items() if not key.startswith("cls.")}
    state = {**body, "classifier.weight": series(3, 16), "classifier.bias": series(3)}
    source = recognised({"model_type": "BiGS", "num_labels": 2}, state)  # as AutoConfig.num_labels never says
    model, official = ordinary(source, state, tmp_path), source.load(state)
    mask = torch.ones_like(ids)
    assert error(model(ids, types=types), official(ids, mask, types)) < 1e-12
    pooled = model.backbone(model.encoder(ids, types))[0].mean(1)
    expected = mapped(state, "classifier", mapped(state, "bigs.pooler.dense", pooled).tanh())
    assert error(model(ids, types=types), expected) < 1e-12
    mask[:, 15:] = 0
    assert error(model(ids, mask=mask, types=types), model(ids[:, :15], types=types[:, :15])) < 1e-9


M2 = {
    "vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "max_position_embeddings": 24,
    "long_conv_l_max": 24, "hyena_emb_dim": 5, "hyena_filter_order": 6, "use_positional_encodings": True,
    "residual_long_conv": True, "use_monarch_mlp": True, "monarch_mlp_nblocks": 4,
}  # fmt: skip


def m2_formula(config: dict, s: State, ids: Tensor, types: Tensor) -> Tensor:
    """BertModel of M2-BERT; its sequence mixer is tested by itself."""
    x = embedded(s, "bert.", ids, types)
    options = {"d_model": 8, "l_max": 24, "bidirectional": True, "hyena_emb_dim": 5, "hyena_filter_order": 6}
    options["hyena_training_additions"] = config.get("hyena_training_additions", False)
    for i in range(2):
        layer = under(f"bert.encoder.layer.{i}.", s)
        residual = {"residual_long_conv": config["residual_long_conv"]}
        u = from_official("m2", {**options, **residual}, under("attention.", layer))(x=x)
        maps = {name: layer[f"mlp.{name}.weight"] for name in ("gated_layers", "wo")}
        up, down = (torch.block_diag(*w) if w.ndim == 3 else w for w in maps.values())
        gate, value = F.linear(u, up).chunk(2, dim=-1)
        y = F.linear(F.gelu(gate) * value, down, layer["mlp.wo.bias"])
        x = normed(layer, "mlp.layernorm", y + u)
    return x


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hyena_training_additions": True},  # as the released one of 80M
        {"residual_long_conv": False, "use_monarch_mlp": False, "monarch_mlp_nblocks": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_m2_bert(change, tmp_path):
    config = {**M2, **change}
    module, state = drawn("m2", config)
    ids, types = torch.randint(29, (2, 20)), torch.randint(2, (2, 20))
    x = m2_formula(config, state, ids, types)
    h = under("cls.predictions.", state)
    x = normed(h, "transform.LayerNorm", F.gelu(mapped(h, "transform.dense", x)))
    expected = F.linear(x, state["bert.embeddings.word_embeddings.weight"], h["decoder.bias"])
    assert error(module(input_ids=ids, token_type_ids=types), expected) < 1e-9
    run = {f"model.{key}": t for key, t in state.items()}
    run["model.bert.embeddings.position_ids"] = torch.arange(24)[None]
    published = {"model_type": "bert", "layer_norm_eps": 1e-12, "use_flash_fft": True, "type_vocab_size": 2}
    for i, (said, given) in enumerate((({}, state), (published, run))):
        source = recognised(said, given)
        model = ordinary(source, given, tmp_path / str(i))
        assert source.spec() == SYSTEMS["m2"].read(config).spec()
        assert error(model(ids, types=types), expected) < 1e-9
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    assert error(model(ids, types=types, mask=mask)[:, :15], model(ids[:, :15], types=types[:, :15])) < 1e-9


@pytest.mark.parametrize("pool_all", [True, False])
@torch.no_grad()
def test_m2_bert_over_rows(pool_all, tmp_path):
    config = {**M2, "cls": "BertForSequenceClassification", "num_labels": 3, "pool_all": pool_all}
    official, state = drawn("m2", config)
    ids, types = torch.randint(29, (2, 20)), torch.randint(2, (2, 20))
    x = m2_formula(config, state, ids, types)
    pooled = mapped(state, "bert.pooler.dense", x.mean(1) if pool_all else x[:, 0]).tanh()
    expected = mapped(state, "classifier", pooled)
    assert error(official(ids, None, types), expected) < 1e-9
    model = ordinary(recognised({"pool_all": pool_all}, state), state, tmp_path)
    assert error(model(ids, types=types), expected) < 1e-9


def test_size_of_m2_bert():
    """80M, of which the name speaks."""
    sizes = {"vocab_size": 30528, "use_positional_encodings": True, "residual_long_conv": True, "use_monarch_mlp": True}
    source = SYSTEMS["m2"].read({**sizes, "hyena_filter_order": 128, "long_conv_l_max": 128})
    with torch.device("meta"):
        assert sum(p.numel() for p in source.spec().build().parameters()) == 80_549_952


def test_what_m2_bert_may_not_be_is_named():
    for change, word in (
        ({"use_glu_mlp": False}, "use_glu_mlp = False"),
        ({"bidirectional": False}, "bidirectional = False"),
        ({"hyena_training_additions": True, "residual_long_conv": False}, "where there is residual_long_conv"),
    ):
        with pytest.raises(ValueError, match=word):
            from_official("m2", {**M2, **change}, {})


# The parts of specs that they need


@torch.no_grad()
def test_parts_of_specs(tmp_path):
    norm = {"kind": "layer", "eps": 1e-3}
    spec = MODEL_SPEC.validate_python(
        {
            "kind": "masked_lm", "d_model": 8, "vocab": 13, "types": 2, "pattern": ["bigs"], "layers": 2,
            "positions": {"kind": "learned_positions", "max_len": 16}, "first_norm": norm, "final_norm": "none",
            "block": "one_norm", "channel": {"kind": "blockdiag_glu", "expand": 2, "blocks": 2},
            "head": {"kind": "bert", "norm_eps": 0.1, "activation": "relu"},
        }
    )  # fmt: skip
    with torch.device("meta"):
        ghost = spec.build()
    model = reset(ghost.to_empty(device="cpu")).double()
    assert model.embedding.types.weight.std() < 1
    assert 0.2 < model(torch.zeros(1, 5, dtype=torch.int64)).std() < 5
    save(tmp_path, model, spec)
    again, read = load_model(tmp_path)
    assert read == spec
    ids, types = torch.randint(13, (2, 9)), torch.randint(2, (2, 9))
    x = model.embedding.weight[ids] + model.embedding.types.weight[types] + model.backbone.positions.weight[:9]
    x = F.layer_norm(x, (8,), *model.backbone.first_norm.parameters(), eps=1e-3)
    for layer in model.backbone.layers:
        u, _ = layer.mixer(x)
        x = layer.norm2(u + layer.channel(u))
    head = model.head
    x = F.layer_norm(head.dense(x).relu(), (8,), *head.norm.parameters(), eps=0.1)
    expected = F.linear(x, model.embedding.weight, head.decoder.bias)
    assert error(again(ids, types=types), expected) < 1e-12


def test_parts_that_do_not_fit_are_named():
    fields = {"d_model": 8, "pattern": ["s4d"]}
    with pytest.raises(ValueError, match="one norm has it behind its channel mixer"):
        LMSpec(vocab=5, block="one_norm", channel=None, **fields).build()
    with pytest.raises(ValueError, match="of real inputs has no types of tokens; got types = 2"):
        ClassifierSpec(classes=2, features=3, types=2, **fields).build()
    with pytest.raises(ValueError, match="blocks >= 1; got"):
        LMSpec(vocab=5, channel={"kind": "blockdiag_glu", "blocks": 0}, **fields).build()
    ids = torch.zeros(1, 3, dtype=torch.int64)
    model = ClassifierSpec(classes=2, vocab=5, head="tanh", **fields).build()
    with pytest.raises(ValueError, match="this model has no types of tokens"):
        model(ids, types=ids)
    with pytest.raises(ValueError, match=r"token ids lie in 0\.\.4; got 7"):
        model(ids + 7)


@torch.no_grad()
def test_a_language_model_with_a_first_norm_goes_on():
    first = {"kind": "rms"}
    spec = LMSpec(vocab=30, d_model=8, pattern=["s4d"], layers=2, first_norm=first, final_norm="none", block="one_norm")
    model = spec.build().double().eval()
    ids = torch.randint(30, (2, 11))
    goes_on(model, ids, model(ids)[0])


# As files


def wrote(folder: Path, state: State, name: str, config: dict | None = None) -> Path:
    """A checkpoint in float32 and what lies beside it; the folder, or the file where it is alone."""
    folder.mkdir()
    state = {key: t.float() if t.is_floating_point() else t for key, t in state.items()}
    if name.endswith(".safetensors"):
        save_file({key: t.clone() for key, t in state.items()}, folder / name)
    else:
        lightning = {"state_dict": state, "pytorch-lightning_version": "1.8.6"}
        composer = {"state": {"model": state, "optimizers": {}}, "rng": []}
        held = lightning if "step" in state else composer if name.startswith("ep") else state
        torch.save(held, folder / name)
    if config is None:
        return folder / name
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(family: str, where: Path) -> tuple[Path, State, nn.Module]:
    """As the Hub has them, what is in them, and the authors' module."""
    if family == "m2":
        state = drawn("m2", M2, torch.float32)[1]
        run = {f"model.{key}": t for key, t in state.items()}
        return wrote(where, run, "ep1-ba1-rank0.pt"), state, from_official("m2", M2, state).double()
    stems = {"h3": "h3lm__off_attn1_L32", "hyena": "hyenalm__simple_o2_L32", "bigs": "bigs__mlm"}
    case = golden(stems.get(family, "hyenadna__lm_hidden_L64"))
    state = case.state(torch.float32)
    config = {key: value for key, value in case.config.items() if key not in ("cls", "L", "batch", "length")}
    if family == "bigs":
        path = wrote(where, state, "pytorch_model.bin", {**config, "model_type": "BiGS"})
    elif family == "hyenadna-hf":
        hub = {f"hyena.{key}": t for key, t in state.items() if not key.endswith((".3.freq", ".5.freq"))}
        words = {"lm_head.weight": state[safari_lm.WORDS]}
        path = wrote(where, {**hub, **words}, "model.safetensors", HF_DNA)
    elif family == "hyenadna":
        path = wrote(where, older(state), "weights.ckpt", {**config, "return_hidden_state": True})
    else:
        path = wrote(where, older(state) if family == "hyena" else state, "model.pt")
    return path, state, from_official(case.system, case.config, state).double()


@pytest.mark.parametrize("family", ["h3", "hyena", "hyenadna", "hyenadna-hf", "bigs", "m2"])
@torch.no_grad()
def test_files_are_imported(family, tmp_path, monkeypatch):
    monkeypatch.setitem(safari_lm.HEADS, 16, 4)
    monkeypatch.setitem(safari_lm.FILTERS, (16, 2), {"w": 10})
    path, state, module = files(family, tmp_path / "there")
    made = import_model(path, tmp_path / "ours")
    model, spec = load_model(tmp_path / "ours")
    assert spec == made.spec
    assert made.tokenizer or family.startswith("hyenadna")  # whose own is written
    ids = torch.randint(12, (2, 20))
    theirs = module(ids)
    if family.startswith("hyenadna"):
        theirs = F.linear(theirs, state[safari_lm.WORDS].double())
    ours = model.double()(ids)
    assert error(ours[0] if isinstance(ours, tuple) else ours, theirs) < 1e-9
    assert {t.dtype for t in load_model(tmp_path / "ours")[0].parameters()} == {torch.float32}
