"""A sampling rate: state spaces trained at one hear signals at another, by their step sizes alone."""

import math

import pytest
import torch

from longwave.mixers import MIXERS
from longwave.models import ClassifierSpec, SashimiSpec
from longwave.nn import DPLRFilter, S4DFilter, set_rate

D = 4
LAYERS = {
    "s4": lambda: MIXERS["s4"](D, d_state=16),
    "s4-legt": lambda: MIXERS["s4"](D, d_state=16, init="legt"),
    "s4d": lambda: MIXERS["s4d"](D, d_state=16),
    "s4d-bilinear": lambda: MIXERS["s4d"](D, d_state=16, init="legs", discretization="bilinear"),
    "s5": lambda: MIXERS["s5"](D, d_state=16),
    "s5-bilinear": lambda: MIXERS["s5"](D, d_state=16, discretization="bilinear"),
    "dss": lambda: MIXERS["dss"](D, d_state=8),
    "sashimi": lambda: sashimi([2], "s4d"),
    "sashimi-s4": lambda: sashimi([2, 2], "s4"),
}


def sashimi(pool, mixer):
    """SaShiMi's stack, whose pools treat the steps of a window alike: else they mark the output with the rate."""
    stack = SashimiSpec(d_model=D, layers=1, vocab=2, pool=pool, pattern=[mixer]).build().backbone
    with torch.no_grad():
        for part in stack.pools:
            for joined in (part.down.weight, part.up.weight.T, part.up.bias[None]):  # (..., D p)
                steps = joined.unflatten(1, (-1, part.factor))
                steps.copy_(steps.mean(2, keepdim=True).expand_as(steps))
    return stack


def waves(step, length=2048):
    """(1, length / step, D) of a smooth signal, a sample every ``step``: at most 8 waves in ``length``, silent at
    first."""
    t = torch.arange(0, length, step, dtype=torch.float64)[:, None] / length
    wave = torch.sin(2 * math.pi * torch.tensor([2.0, 3.0, 5.0, 8.0]) * t + torch.tensor([0.0, 1.0, 2.0, 3.0]))
    return (wave * torch.sin(math.pi * t).square())[None]


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_half_the_samples_at_twice_the_rate_give_half_the_outputs(build):
    """The finer the signal, the nearer: what is left is the error of holding or joining samples."""
    torch.manual_seed(0)
    layer = build().double()

    @torch.no_grad()
    def error(step):
        fine = set_rate(layer, step)(waves(step))[0][:, ::2]
        coarse = set_rate(layer, 2 * step)(waves(2 * step))[0]
        wrong = set_rate(layer, step)(waves(2 * step))[0]
        late = slice(fine.shape[1] // 8, None)  # SaShiMi's first windows hear silence for p samples at any rate
        scale = (fine - fine.mean(1, keepdim=True)).norm()
        return tuple(((y - fine)[:, late].norm() / scale).item() for y in (coarse, wrong))

    (first, wrong), (second, _), (third, _) = error(4.0), error(2.0), error(1.0)
    assert first < 0.15
    assert second < 0.7 * first
    assert third < 0.7 * second
    assert wrong > 2.5 * first  # half the samples without being told


@pytest.mark.parametrize("filter", [S4DFilter, DPLRFilter])
def test_taps_are_resampled(filter):
    """Twice the step: every second tap, of twice the weight."""
    torch.manual_seed(0)
    kernel = filter(3, 8, dt_min=1e-2, dt_max=1e-1).double()

    @torch.no_grad()
    def error(rate):
        fine, coarse = set_rate(kernel, rate)(401)[:, ::2], set_rate(kernel, 2 * rate)(201)
        return ((coarse - 2 * fine).norm() / coarse.norm()).item()

    errors = [error(rate) for rate in (1 / 4, 1 / 8, 1 / 16)]
    assert errors[0] < 0.15
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_a_rate_at_construction_is_a_rate_set_later(name):
    torch.manual_seed(0)
    layer, other = MIXERS[name](D, d_state=8).double(), MIXERS[name](D, d_state=8, rate=2.0).double()
    other.load_state_dict(layer.state_dict())
    x = waves(16)
    assert not torch.equal(layer(x)[0], other(x)[0])
    assert torch.equal(set_rate(layer, 2.0)(x)[0], other(x)[0])


def tones(rows, generator):
    """Noisy waveforms x (rows, 256, 1) of one tone each, about 4, 8 or 16 waves long, and which it is (rows,)."""
    labels = torch.randint(3, (rows,), generator=generator)
    jitter, phase = torch.rand(2, rows, 1, generator=generator)
    t = torch.arange(256) / 256
    x = torch.sin(2 * math.pi * (4 * 2.0 ** labels[:, None] * (0.85 + 0.3 * jitter) * t + phase))
    return (x + torch.randn(rows, 256, generator=generator))[..., None], labels


@pytest.mark.parametrize("name", ["s4d", "s4", "s5"])
def test_what_was_trained_at_one_rate_classifies_at_half_of_it(name):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    mixer = {"kind": name, "d_state": 16}
    model = ClassifierSpec(d_model=8, pattern=[mixer], channel=None, features=1, classes=3).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        x, labels = tones(32, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    x, labels = tones(512, generator)

    @torch.no_grad()
    def accuracy(x):
        return (model(x).argmax(1) == labels).float().mean().item()

    full, untold = accuracy(x), accuracy(x[:, ::2])
    set_rate(model, 2.0)
    half = accuracy(x[:, ::2])
    assert full > 0.9
    assert half > full - 0.05
    assert untold < 0.5  # an octave too high
