"""The contract of longwave/contract/mixers.py, kept by every mixer that there is, and what some keep besides.

A new mixer is tested by existing: nothing of the contract names one.
"""

import math
import shutil
import sys

import pytest
import torch

from longwave.contract.mixers import (
    EVERY,
    PLACES,
    STATES,
    B,
    D,
    L,
    build,
    close,
    noise,
    parameter_gradients,
    real,
    run_in_chunks,
    with_padding,
)
from longwave.mixers import MIXERS, mixer, state_bytes

CASES = [pytest.param(name, kw, id=f"{name}-{i}") for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]
CAUSAL = [case for case in CASES if MIXERS[case.values[0]].causal]
TWO_SIDED = [case for case in CASES if not MIXERS[case.values[0]].causal]


@pytest.mark.parametrize(("name", "kw"), CASES)
@pytest.mark.parametrize("clause", EVERY)
def test_contract(clause, name, kw):
    EVERY[clause](name, kw)


@pytest.mark.parametrize(("name", "kw"), CAUSAL)
@pytest.mark.parametrize("clause", STATES)
def test_states(clause, name, kw):
    STATES[clause](name, kw)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("name", "kw"), CASES)
def test_compiles_with_inductor(name, kw):
    torch._dynamo.reset()
    layer, x = build(name, kw), noise(B, L, D)
    y, exact = torch.compile(layer, fullgraph=True)(x)[0], layer(x)[0]
    close(y, exact)
    close(parameter_gradients(layer, y), parameter_gradients(layer, exact))


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_docstring_has_a_source(name, kw):
    assert "Source" in sys.modules[MIXERS[name].__module__].__doc__


@pytest.mark.parametrize(("name", "kw"), TWO_SIDED)
def test_what_looks_ahead_has_no_state(name, kw):
    layer = build(name, kw)
    with pytest.raises(ValueError, match=f"{name} looks ahead, so it has no state"):
        layer.init_state(B)
    with pytest.raises(ValueError, match=f"{name} looks ahead"):
        layer(noise(B, L, D), ())


def test_a_misspelt_mixer_or_option_is_suggested():
    with pytest.raises(ValueError, match=r"no mixer is called 's4dd'; there are .*did you mean 's4d'"):
        mixer("s4dd")
    with pytest.raises(ValueError, match=r"mixer 's4d' has no option 'd_stat'; did you mean 'd_state'"):
        mixer("s4d", d_stat=4)
    with pytest.raises(ValueError, match=r"mixer 'hyena' needs the option 'max_len'"):
        mixer("hyena")
    assert mixer("s4d", d_state=4).build(8).d_model == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"heads": 3}, r"heads = 3 does not divide d_model = 8"),
        ("attention", {"heads": 8}, r"rotary positions need an even head width; got 1"),
        ("attention", {"heads": 4, "kv_heads": 3}, r"kv_heads = 3 does not divide heads = 4"),
        ("attention", {"heads": 4, "kv_heads": 0}, r"kv_heads = 0 does not divide heads = 4"),
        ("attention", {"heads": 4, "window": 0}, r"attention needs window >= 1; got 0"),
        ("attention", {"heads": 3, "head_dim": 0}, r"attention needs head_dim >= 1; got 0"),
        ("attention", {"heads": 4, "positions": {"kind": "rotary", "dim": 4}}, r"dim must be even, 2 to 2, .*; got 4"),
        ("attention", {"heads": 4, "positions": "rotery"}, r"no kind of positions is called 'rotery'.*mean 'rotary'"),
        ("attention", {"heads": 4, "qk_norm": "rns"}, r"no norm is called 'rns'.*did you mean 'rms'"),
        ("h3", {"head_dim": 3}, r"head_dim = 3 does not divide d_model = 8"),
        ("s4d", {"d_state": 5}, r"d_state must be even, >= 2; got 5"),
        ("s4d", {"init": "linn"}, r"no S4D init is called 'linn'; there are lin, .*did you mean 'lin'"),
        ("s4d", {"discretization": "zho"}, r"no discretization is called 'zho'.*did you mean 'zoh'"),
        ("s4d", {"dt_min": 1.0}, r"0 < dt_min <= dt_max; got dt_min = 1.0, dt_max = 0.1"),
        ("s4d", {"systems": 3}, r"systems = 3 does not divide channels = 8"),
        ("hyena", {"max_len": 8, "order": 1}, r"order >= 2 and d_conv >= 1; got order = 1, d_conv = 3"),
        (
            "attention",
            {"heads": 2, "positions": {"kind": "rotary", "base": 0.0}},
            r"rotary positions need base > 0; got 0.0",
        ),
        ("bigs", {"expand": 0.0}, r"expand \* d_model >= 1; got 0.0 \* 8"),
        ("hyena", {"max_len": 8, "width": 0}, r"width >= 1 and inner_layers >= 0; got width = 0"),
        ("hyena", {"max_len": 8, "target": 0.0}, r"target, slowest and fastest > 0; got target = 0.0"),
        ("s4", {"rate": math.inf}, r"> 0; got rate = inf"),
        ("long_conv", {"max_len": 8, "squash": math.nan}, r"squash >= 0; got nan"),
        ("hyena", {"max_len": 0}, r"max_len >= 1; got 0"),
        ("hyena", {"max_len": 8, "emb_dim": 4}, r"odd, >= 3; got 4"),
        ("hyena_two_sided", {"max_len": 8, "order": 1}, r"order >= 2 .*; got order = 1"),
        ("long_conv", {"max_len": 8, "smooth": 4}, r"odd width >= 1; got 4"),
        ("mamba", {"d_conv": 0}, r"mamba needs d_conv >= 1; got 0"),
        ("mamba", {"dt_min": 0.0}, r"0 < dt_min <= dt_max; got dt_min = 0.0, dt_max = 0.1"),
        ("mamba2", {"groups": 3, "head_dim": 4}, r"groups = 3 does not divide the 4 heads"),
        ("mamba2", {"head_dim": 3}, r"head_dim = 3 does not divide expand \* d_model = 16"),
        ("mamba2", {"d_state": 0}, r"mamba2 needs d_state >= 1; got 0"),
        ("mamba2", {"dt_low": 0.2, "dt_high": 0.1}, r"0 <= dt_low <= dt_high; got dt_low = 0.2, dt_high = 0.1"),
        (
            "mamba2",
            {"skip": "heads"},
            r"no kind of skip is called 'heads'; there are head, channel; did you mean 'head'",
        ),
        ("mamba2", {"norm": "norm_gat"}, r"no gated norm is called 'norm_gat'; .*did you mean 'norm_gate'"),
        ("retnet", {"heads": 3}, r"heads = 3 does not divide d_model = 8 into even widths"),
        ("retnet", {"heads": 8}, r"heads = 8 does not divide d_model = 8 into even widths"),
        ("retnet", {"heads": 2, "expand": 0.6}, r"heads = 2 does not divide expand \* d_model = 5"),
        ("retnet", {"norm_eps": 0.0}, r"rotary_base > 0 and norm_eps > 0; got 10000.0 and 0.0"),
        ("retnet", {"normalizer": "score_sum"}, r"no normalizer is called 'score_sum'.*mean 'score_sums'"),
        ("gla", {"heads": 3}, r"heads = 3 does not divide expand_k \* d_model = 4"),
        ("gla", {"expand_v": 0.25}, r"heads = 4 does not divide expand_v \* d_model = 2"),
        ("gla", {"gate_rank": 0}, r"gate_rank >= 1, .*; got 0, 16.0 and 1e-05"),
        ("long_conv", {"max_len": 8, "channels": 0}, r"channels >= 1; got 0"),
        ("s4d", {"rate": 0.0}, r"> 0; got rate = 0.0"),
        ("ckconv", {"max_len": 8, "filter": "flexcon"}, r"no continuous filter is called 'flexcon'.*mean 'flexconv'"),
        ("butterfly_conv", {"max_len": 4, "order": 4}, r"max_len = 4 is too short for transforms of order = 4"),
        ("gated_deltanet", {"heads": 4, "groups": 3}, r"groups = 3 does not divide heads = 4"),
        ("gated_deltanet", {"heads": 16}, r"key_dim >= 1; got 0"),
        ("gated_deltanet", {"dt_min": 0.0}, r"0 < dt_min <= dt_max; got dt_min = 0.0"),
        ("mlstm", {"heads": 3}, r"heads = 3 does not divide key_width = 4 and value_width = 8"),
        ("mlstm", {"value_width": 0}, r"heads = 4 does not divide key_width = 4 and value_width = 0"),
        ("mlstm", {"gate_cap": 0.0}, r"gate_cap > 0, or None for no cap; got 0.0"),
        ("rg_lru", {"heads": 3}, r"heads = 3 does not divide width = 8"),
        ("rg_lru", {"width": 0}, r"width >= 1 and d_conv >= 1; got 0 and 4"),
        ("lfm2_conv", {"d_conv": 0}, r"lfm2_conv needs d_conv >= 1; got 0"),
        ("two_sided", {"filter": "s4dd"}, r"no filter is called 's4dd'.*did you mean 's4d'"),
        ("bidirectional", {"inner": "two_sided"}, r"'two_sided' looks ahead already"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](8, **options)


@pytest.mark.parametrize("name", ["hyena", "long_conv", "ckconv", "aft_full", "aft_local", "learned_positions"])
def test_a_sequence_above_max_len_is_refused(name):
    layer = MIXERS[name](8, max_len=16)
    with pytest.raises(ValueError, match=r"max_len = 16.*17.*max_len >= 17"):
        layer(torch.zeros(1, 17, 8))
    _, state = layer(torch.zeros(1, 16, 8), layer.init_state(1))
    with pytest.raises(ValueError, match=r"max_len = 16"):
        layer(torch.zeros(1, 1, 8), state)


@pytest.mark.parametrize("name", ["hyena", "long_conv", "ckconv", "aft_full", "aft_local"])
def test_padding_is_no_part_of_max_len(name):
    """Nor is it in chunks, where one row waits for the other."""
    layer = MIXERS[name](D, **{"max_len": L, **({"order": 3} if name == "hyena" else {})}).double()
    x = noise(B, L, D)
    for place in PLACES:
        padded, mask = with_padding(x, place)
        close(real(layer(padded, mask=mask)[0], mask), layer(x)[0])
        for sizes in ([17], [6, 9, 2], [1] * 17):
            close(real(run_in_chunks(layer, padded, sizes, mask)[0], mask), layer(x)[0])
    first = torch.arange(B) == torch.tensor([[0], [1]])  # one row, then the other
    turns = torch.cat([first, first, ~first, ~first] * 5, dim=1)[:, : 2 * L - 6]
    count = int(turns.sum(1).min())
    taken = torch.zeros(*turns.shape, D, dtype=torch.float64)
    taken[turns] = torch.cat([row[: int(n)] for row, n in zip(x, turns.sum(1))])
    y = run_in_chunks(layer, taken, [2] * (turns.shape[1] // 2), turns)[0]
    for row, outputs, on in zip(x, y, turns):
        close(outputs[on][:count], layer(row[None, :count])[0][0])


@pytest.mark.parametrize("name", ["s4d", "s5", "h3", "liquid_s4", "mamba", "mamba2", "lstm"])
def test_recurrent_states_do_not_grow(name):
    layer = MIXERS[name](8)
    sizes = [state_bytes(layer(torch.zeros(1, L, 8), layer.init_state(1))[1]) for L in (100, 1000)]
    assert sizes[0] == sizes[1]
