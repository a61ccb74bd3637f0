"""BiGS and masked language models: official options against plain formulas, and what a user trains."""

import copy

import pytest
import torch
import torch.nn.functional as F
from official import convolved, drawn, error, golden, series
from torch import Tensor

from longwave.mixers import MIXERS
from longwave.models import MODEL_SPEC, MaskedLM, MaskedLMSpec, load, save
from longwave.models import masked_lm as masked_lm_module
from longwave.nn import reset
from longwave.official import SYSTEMS, from_official

TINY = {
    "vocab_size": 13,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "num_ssm": 3,
    "max_position_embeddings": 9,
}
ACT = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def inside(s: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in s.items() if key.startswith(prefix)}


def normed(s: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def linear(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def s4d_formula(s: dict[str, Tensor], u: Tensor) -> Tensor:
    A = torch.complex(s["kernel.A_re"].clamp(max=-1e-4), s["kernel.A_im"])
    a = (s["kernel.log_step"].exp() * A).exp()
    weight = torch.view_as_complex(s["kernel.C"]) * (a - 1) / A
    k = torch.stack([(weight * a**l).sum().real for l in range(u.shape[1])])
    y = convolved(u.transpose(1, 2), lambda lag: k[lag] if lag >= 0 else None).transpose(1, 2)
    return y + s["D"] * u


def layer_formula(s: dict[str, Tensor], x: Tensor, eps: float) -> Tensor:
    n = normed(s, "LayerNorm", x, eps)
    v = F.gelu(linear(s, "dv", n))
    past = s4d_formula(inside(s, "fs4."), F.gelu(linear(s, "du_forward", n)))
    future = s4d_formula(inside(s, "bs4."), F.gelu(linear(s, "du_backward", n.flip(1))))
    both = linear(s, "duc_forward", past) * linear(s, "duc_backward", future).flip(1)
    return x + linear(s, "do", F.gelu(linear(s, "dol", both)) * v)


def model_formula(c: dict, s: dict[str, Tensor], ids: Tensor, kinds: Tensor | None) -> Tensor:
    e = inside(s, "bigs.embeddings.")
    x = e["word_embeddings.weight"][ids]
    x = x + e["token_type_embeddings.weight"][torch.zeros_like(ids) if kinds is None else kinds]
    if c.get("position_embedding_type", "absolute") == "absolute":
        x = x + e["position_embeddings.weight"][: ids.shape[1]]
    eps = c.get("layer_norm_eps", 1e-12)
    x = normed(e, "LayerNorm", x, eps)
    for i in range(c["num_hidden_layers"]):
        x = layer_formula(inside(s, f"bigs.encoder.layer.{i}."), x, eps)
    return x


def tokens(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(0, 13, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_s4d_by_its_formula():
    module, state = drawn("bigs", {"cls": "S4dLayer", "num_ssm": 16})
    assert (state["kernel.A_re"] > -1e-4).any()  # some are clamped
    x = series(2, 7, 3)
    assert error(module(x=x), s4d_formula(state, x)) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 1e-5},
        {"position_embedding_type": "relative", "type_vocab_size": 3, "pad_token_id": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_masked_lm_by_its_formula(options):
    config = {**TINY, **options}
    module, s = drawn("bigs", config)
    ids, kinds = tokens(), tokens() % 2
    h = inside(s, "cls.predictions.")
    x = model_formula(config, s, ids, kinds)
    x = ACT[config.get("hidden_act", "gelu")](linear(h, "transform.dense", x))
    x = normed(h, "transform.LayerNorm", x, config.get("layer_norm_eps", 1e-12))
    expected = x @ h["decoder.weight"].T + h["bias"]
    assert error(module(input_ids=ids, token_type_ids=kinds), expected) < 1e-9
    padded = torch.ones_like(ids)
    padded[:, 5:] = 0
    assert torch.equal(module(ids, padded, kinds), module(ids, None, kinds))  # the official model masks nothing
    if config.get("position_embedding_type") is None:
        places = torch.arange(8).expand(2, -1)
        assert torch.equal(module(ids, position_ids=places), module(ids))
        assert not torch.equal(module(ids, position_ids=places.flip(1)), module(ids))


@pytest.mark.parametrize("pooler", ["mean", "non_padding_mean"])
def test_classifier_by_its_formula(pooler):
    config = {**TINY, "cls": "BiGSForSequenceClassification", "num_labels": 3, "pooler_type": pooler}
    module, s = drawn("bigs", config)
    leaves = {key: t.clone().requires_grad_() for key, t in s.items()}
    ids, mask = tokens(), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    x = model_formula(config, leaves, ids, None)
    pooled = torch.stack([x[0, :5].mean(0), x[1].mean(0)]) if pooler == "non_padding_mean" else x.mean(1)
    expected = linear(leaves, "classifier", linear(leaves, "bigs.pooler.dense", pooled).tanh())
    weights = SYSTEMS["bigs"].convert(leaves, SYSTEMS["bigs"].read(config))
    y = torch.func.functional_call(module, weights, (ids, mask))
    assert error(y, expected) < 1e-9
    ours = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    for key, a, b in zip(leaves, ours, torch.autograd.grad(expected.square().sum(), list(leaves.values()))):
        b[config.get("pad_token_id", 0)] = 0 if key == "bigs.embeddings.word_embeddings.weight" else b[0]
        assert error(a, b) < 1e-9, key
    if pooler == "non_padding_mean":
        with pytest.raises(ValueError, match="needs attention_mask"):
            module(ids)


def test_older_and_newer_checkpoints():
    case = golden("bigs__mlm")
    state, inputs = case.state(torch.float64), case.inputs(torch.float64)
    expected = case.module()(**inputs)
    second = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    for key in ("bigs.embeddings.position_ids", *second, "bigs.pooler.dense.weight", "bigs.pooler.dense.bias"):
        del state[key]
        assert torch.equal(from_official("bigs", case.config, state)(**inputs), expected)
    tied = from_official("bigs", case.config, state)
    assert tied.model.head.decoder.weight is tied.model.embedding.weight


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cls": "BiGSForMultipleChoice"}, "cls = 'BiGSForMultipleChoice'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"num_ssms": 4}, "'num_ssms' .*did you mean 'num_ssm'"),
        ({"num_ssm": 4}, "has shape"),
        ({"tie_word_embeddings": True, "vocab_size": 36}, "has shape"),
    ],
)
def test_what_is_not_carried_over_is_named(change, word):
    case = golden("bigs__mlm")
    with pytest.raises(ValueError, match=f"^bigs: .*{word}"):
        from_official("bigs", {**case.config, **change}, case.state(torch.float32))


def test_a_sequence_above_max_position_embeddings_is_refused():
    module, _ = drawn("bigs", TINY)
    with pytest.raises(ValueError, match="max_position_embeddings = 9; the sequence has 10 tokens"):
        module(tokens(1, 10))


SPEC = {"kind": "masked_lm", "d_model": 8, "pattern": [{"kind": "bigs", "d_state": 4}], "layers": 2, "channel": None}


def masked_lm(**changes) -> MaskedLM:
    torch.manual_seed(0)
    spec = MODEL_SPEC.validate_python({**SPEC, "vocab": 13, **changes})
    assert isinstance(spec, MaskedLMSpec)
    model = spec.build()
    assert isinstance(model, MaskedLM)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_is_its_parts(tied):
    model, ids = masked_lm(tied=tied).double(), tokens()
    x, _ = model.backbone(model.embedding(ids))
    head = model.head
    expected = F.linear(head.norm(F.gelu(head.dense(x))), head.decoder.weight, head.decoder.bias)
    assert torch.equal(model(ids), expected)
    assert (head.decoder.weight is model.embedding.weight) == tied
    assert model.vocab == 13
    assert 0.2 < model(ids).std() < 5


def test_masked_lm_looks_both_ways_and_padding_is_invisible():
    model, ids = masked_lm().double(), tokens()
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 13
    assert ((model(changed) - model(ids)).abs().amax(dim=(0, 2)) > 1e-12).all()
    padded = torch.cat([tokens(2, 3), ids, tokens(2, 2)], dim=1)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 3:11] = True
    torch.testing.assert_close(model(padded, mask=mask)[:, 3:11], model(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_once", [2**22, 40])
def test_masked_lm_score_is_cross_entropy(at_once, monkeypatch):
    monkeypatch.setattr(masked_lm_module, "LOGITS_AT_ONCE", at_once)
    model, ids, targets = masked_lm().double(), tokens(), tokens(2, 8).flip(1)
    targets[:, ::2] = -100
    score = model.score(ids, targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(score.loss, expected)
    assert score.total == 8
    ours = torch.autograd.grad(score.loss, list(model.parameters()))
    for a, b in zip(ours, torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_saves_loads_and_builds_on_meta(tied, tmp_path):
    spec = MaskedLMSpec(**{**SPEC, "vocab": 13, "tied": tied})
    torch.manual_seed(1)
    model = spec.build()
    save(tmp_path, model, spec)
    again, read = load(tmp_path)
    assert read == spec
    assert torch.equal(again(tokens()), model(tokens()))
    with torch.device("meta"):
        ghost = spec.build()
    drawn_again = reset(ghost.to_empty(device="cpu"))
    assert (drawn_again.head.decoder.weight is drawn_again.embedding.weight) == tied
    assert 0.2 < drawn_again(tokens()).std() < 5
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))


def test_masked_lm_learns_what_stands_on_both_sides():
    """The hidden token tells which two stand beside it: looking one way gets half of them right."""
    rng = torch.Generator().manual_seed(0)
    model = masked_lm(d_model=16, vocab=7)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        ids = torch.randint(0, 2, (64, 7), generator=rng)
        targets = torch.full_like(ids, -100)
        targets[:, 3] = 2 + 2 * ids[:, 2] + ids[:, 4]
        ids[:, 3] = 6
        score = model.score(ids, targets)
        optimizer.zero_grad()
        (score.loss / score.total).backward()
        optimizer.step()
    assert score.correct > 0.9 * score.total


def test_bad_masked_lms_are_named():
    with pytest.raises(ValueError, match="needs vocab"):
        MaskedLMSpec(**SPEC).build()
    with pytest.raises(ValueError, match="vocab >= 1; got 0"):
        MaskedLM(masked_lm().backbone, 0)
    with pytest.raises(ValueError, match="d_state must be even, >= 2; got 3"):
        MIXERS["bigs"](8, d_state=3)
