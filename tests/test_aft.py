"""AFT against the paper's formulas: a softmax over the past, channel by channel, whatever keys and positions weigh."""

from pathlib import Path

import pytest
import torch
from official import error, load

from longwave.mixers import AFTConv, AFTFull, AFTLocal, AFTSimple, mixer
from longwave.official import from_official

PIECES = Path(__file__).parent / "golden/pieces"
E, T = 6, 50  # longer than a block of steps
LAYERS = {
    "aft_simple": lambda: AFTSimple(E),
    "aft_full": lambda: AFTFull(E, max_len=64),
    "aft_local": lambda: AFTLocal(E, max_len=64, window=7),
    "aft_conv": lambda: AFTConv(E, window=7, heads=2),
}
every = pytest.mark.parametrize("name", LAYERS)


def weights(name, layer):
    """w[t, s] of every channel, (T, T, E)."""
    lag = torch.arange(T)[:, None] - torch.arange(T)
    near = ((lag >= 0) & (lag < 7))[..., None]
    if name == "aft_simple":
        return torch.zeros(T, T, E, dtype=torch.float64)
    if name == "aft_full":
        return layer.wbias[:T, :T, None].expand(-1, -1, E)
    if name == "aft_local":
        table = layer.wbias[:T].gather(1, lag.clamp(0, 6))[..., None]
    else:
        table = layer.w.repeat_interleave(E // 2, 0).T[lag.clamp(0, 6)]
    return torch.where(near, table, 0.0)


def softmax(k, v, w):
    """(B, T, E) by all weights at once."""
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)[..., None]
    logits = (k[:, None] + w).masked_fill(ahead, -torch.inf)
    return (logits.softmax(2) * v[:, None]).sum(2)


def drawn(name, size, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, *(scale * torch.randn(2, T, E).to(dtype) for scale in (size, 1))


@every
@pytest.mark.parametrize("size", [1, 1000])
def test_average_by_the_formula(name, size):
    """Keys of any size: early steps see small ones alone, which may not be lost for larger ones to come."""
    layer, k, v = drawn(name, size)
    y, _ = layer.average(k, v, None, None)
    torch.testing.assert_close(y, softmax(k, v, weights(name, layer)), rtol=1e-9, atol=1e-9)
    low, single, values = layer.float(), k.float(), v.float()
    y, _ = low.average(single, values, None, None)
    exact = softmax(single.double(), values.double(), weights(name, layer.double()))
    torch.testing.assert_close(y, exact.float(), rtol=1e-3, atol=1e-3 if size == 1000 else 1e-5)


@every
@torch.no_grad()
def test_a_window_that_has_passed_weighs_as_any_other(name):
    """w that is far below 0: the window then weighs nothing, and what is older all."""
    layer, k, v = drawn(name, 1)
    for parameter in layer.parameters(recurse=False):
        parameter.sub_(40)
    y, _ = layer.average(k, v, None, None)
    torch.testing.assert_close(y, softmax(k, v, weights(name, layer)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", sorted(PIECES.glob("aft_paper__*")), ids=lambda path: path.stem)
def test_outputs_and_gradients_of_the_paper(path):
    case = load(path)
    config, inputs = case.config, {name: t.requires_grad_() for name, t in case.inputs(torch.float64).items()}
    q, k, v = (inputs[name].flatten(2) for name in "qkv")
    if config["kind"] == "conv":
        layer = AFTConv(q.shape[2], window=config["window"], heads=config["heads"])
        layer.w = torch.nn.Parameter(inputs["w"].detach())
        learned = layer.w
    else:
        layer = AFTFull(q.shape[2], max_len=config["length"])
        layer.wbias = torch.nn.Parameter(inputs["w"].detach())
        learned = layer.wbias
    y = q.sigmoid() * layer.average(k, v, None, None)[0]
    theirs = case.part("output64.")["y"]
    assert error(y.view_as(theirs), theirs) < 1e-9
    (y.view_as(theirs) * case.tensors["cotangent"]).sum().backward()
    inputs["w"].grad = learned.grad
    for name, gradient in case.part("grad64.input.").items():
        assert error(inputs[name].grad, gradient) < 1e-9, name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aft_simple", {"expand": 0.0}, r"expand > 0.*; got expand = 0"),
        ("aft_full", {"max_len": 0}, r"aft_full needs max_len >= 1; got 0"),
        ("aft_local", {"max_len": 0}, r"aft_local needs max_len >= 1; got 0"),
        ("aft_local", {"max_len": 8, "window": 0}, r"aft_local needs window >= 1, .*; got 0"),
        ("aft_conv", {"window": -1}, r"aft_conv needs window >= 1, .*; got -1"),
        ("aft_conv", {"heads": 3}, r"aft_conv: heads = 3 does not divide expand \* d_model = 8"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixer(name, **options).build(8)


def test_a_state_of_another_window_is_refused():
    short, long = (AFTConv(8, window=window) for window in (3, 5))
    with pytest.raises(ValueError, match=r"aft_conv of d_model = 8 has a state of .* from a layer of other sizes"):
        long(torch.zeros(1, 1, 8), short.init_state(1))


def test_a_window_of_one_step():
    layer, x = AFTConv(4, window=1, heads=1).double(), torch.randn(1, 9, 4, dtype=torch.float64)
    y, state = layer(x[:, :5], layer.init_state(1))
    torch.testing.assert_close(torch.cat([y, layer(x[:, 5:], state)[0]], dim=1), layer(x)[0])


def test_official_positions_beyond_the_table_are_refused():
    case = load(PIECES.parent / "aft__local.safetensors")
    with pytest.raises(ValueError, match=r"a two-sided AFT of max_len = 20 cannot serve a sequence of 21"):
        from_official("aft", case.config, case.state(torch.float32))(x=torch.zeros(1, 21, 8))
