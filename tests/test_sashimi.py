"""SaShiMi: streams of any chunks are the parallel run, at constant memory; mu-law; the authors' options."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from derived import DERIVED
from official import drawn, error, golden, series
from torch.utils._pytree import tree_leaves, tree_map

from longwave.mixers import mixer, state_bytes
from longwave.models import LM, Block, Level, Sashimi, SashimiSpec, generate, load, save
from longwave.models.sashimi import Pool
from longwave.nn import MLP, mu_law_decode, mu_law_encode, reset, set_rate
from longwave.official import SYSTEMS, from_official
from longwave.train.config import load_recipe

B, L, D = 2, 29, 4  # L is prime
POOLS = [(), (1,), (4,), (2, 3), (4, 4), (3, 1, 2)]
CHUNKINGS = [[1] * L, [L], [3, 1, 7, 11, 7], [5] * 5 + [4], [16, 13]]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def build(pool=(2, 3), name="s4d", d_model=D, **options):
    torch.manual_seed(0)
    spec = mixer(name, **options)
    levels = [
        Level([Block(spec.build(d_model * 2**i), torch.nn.LayerNorm, MLP) for _ in range(2)])
        for i in range(len(pool) + 1)
    ]
    return Sashimi(levels, pool, torch.nn.LayerNorm(d_model)).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_in_chunks(model, x, sizes, mask=None):
    state, ys = model.init_state(len(x)), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    for chunk, m in zip(x.split(sizes, dim=1), masks, strict=True):
        y, state = model(chunk, state, mask=m)
        ys.append(y)
    return torch.cat(ys, dim=1), state


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("sizes", CHUNKINGS, ids=["steps", "prefill", "3-1-7", "5", "16-13"])
@torch.no_grad()
def test_chunks_are_the_parallel_run(pool, sizes):
    model, x = build(pool), noise(B, L, D)
    y, none = model(x)
    assert none is None
    chunked, state = run_in_chunks(model, x, sizes)
    close(chunked, y)
    _, whole = run_in_chunks(model, x, [L])
    close(tree_leaves(state), tree_leaves(whole))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("s4", {"d_state": 4}),
        ("mamba", {"d_state": 4}),
        ("lstm", {}),
        ("attention", {"heads": 2}),
        ("hyena", {"max_len": 64}),
    ],
)
@torch.no_grad()
def test_any_mixer_streams(name, options):
    model, x = build((2, 3), name, **options), noise(B, L, D)
    for sizes in CHUNKINGS:
        close(run_in_chunks(model, x, sizes)[0], model(x)[0])


@torch.no_grad()
def test_by_its_definition():
    """Window by window, one step at a time; the levels' blocks see whole sequences."""

    def level(i, x):
        part = model.levels[i]
        if i < len(model.pools):
            pool, p = model.pools[i], model.pools[i].factor
            windows = [
                F.linear(x[:, w * p : (w + 1) * p].transpose(1, 2).flatten(1), pool.down.weight, pool.down.bias)
                for w in range(x.shape[1] // p)
            ]
            added = torch.zeros_like(x)
            if windows:
                coarse = level(i + 1, torch.stack(windows, dim=1))
                for t in range(p, x.shape[1]):
                    up = F.linear(coarse[:, t // p - 1], pool.up.weight, pool.up.bias)
                    added[:, t] = up[:, t % p :: p]
            x = x + added
        y = x
        for block in part.blocks:
            y, _ = block(y)
        return x + y

    for pool in POOLS:
        model = build(pool)
        for length in (1, 5, 12, L):
            x = noise(B, length, D)
            close(model(x)[0], model.norm(level(0, x)))


def test_causal():
    """Nothing sees the future; across a pool nothing sees its own window."""
    model, x = build((4,)), noise(1, 16, D).requires_grad_()
    for t in range(16):
        (g,) = torch.autograd.grad(model(x)[0][0, t, 0], x)
        assert g[:, t + 1 :].abs().sum() < 1e-12
        assert g[:, : t + 1].abs().sum() > 1e-3
    lower = Pool(D, D, 4).double()
    z, _ = lower.lower(x, x[:, :0])
    y, _ = lower.lift(z, lower.init_state(1).pending, 16)
    for t in range(4, 16):
        (g,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = g.abs().sum(2)[0].nonzero()[:, 0].tolist()
        assert seen == list(range(t // 4 * 4 - 4, t // 4 * 4))


@torch.no_grad()
def test_state_has_one_size_for_ever():
    model, x = build((4, 4)), noise(B, 40, D)
    state, sizes = model.init_state(B), set()
    for t in range(40):
        sizes.add(state_bytes(state))
        state = model(x[:, t : t + 1], state)[1]
    assert sizes == {state_bytes(state)}
    after = model(x[:, :39], model.init_state(B))[1]
    for t in tree_leaves(after.pools):
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()  # no view of all that was read
    assert len(state.layers) == len(model.mixers) == 6


@pytest.mark.parametrize("grad", [True, False])
def test_state_is_never_modified(grad):
    model, x = build((2, 3)), noise(B, L, D)
    with torch.set_grad_enabled(grad):
        _, state = model(x[:, :11], model.init_state(B))
        before = tree_map(torch.clone, state)
        _, one = model(x[:, 11:16], state)
        model(-x[:, 11:16], state)
        close(tree_leaves(state), tree_leaves(before))
        close(model(x[:, 16:], one)[0], model(x)[0][:, 16:])


@torch.no_grad()
def test_state_is_batch_first():
    model, x = build(), noise(3, L, D)
    _, state = model(x[:, :11], model.init_state(3))
    assert all(len(t) == 3 for t in tree_leaves(state))
    close(model(x[1:2, 11:], tree_map(lambda t: t[1:2], state))[0], model(x)[0][1:2, 11:])


def masks():
    """Of 40 steps, 29 real: on the left, on the right, anywhere."""
    generator = torch.Generator().manual_seed(3)
    left = torch.arange(40) >= 40 - L
    anywhere = torch.stack([torch.randperm(40, generator=generator) < L for _ in range(B)])
    return {"left": left.expand(B, -1), "right": left.flip(0).expand(B, -1), "anywhere": anywhere}


@pytest.mark.parametrize("where", ["left", "right", "anywhere"])
@pytest.mark.parametrize("pool", [(4,), (2, 3)], ids=str)
@torch.no_grad()
def test_padding_is_invisible(where, pool):
    model, x, mask = build(pool), noise(B, L, D), masks()[where]
    padded = 100 * noise(B, 40, D, seed=2)
    padded[mask] = x.flatten(0, 1)
    for y in (model(padded, mask=mask)[0], run_in_chunks(model, padded, [3, 1, 1, 20, 15], mask)[0]):
        close(y[mask].unflatten(0, (B, L)), model(x)[0])
        assert torch.isfinite(y).all()


@torch.no_grad()
def test_rows_of_different_lengths_go_on():
    """Behind a mask rows are at different steps of their windows, and are what they are alone."""
    model, x = build((2, 3)), noise(B, L, D)
    mask = torch.stack([torch.arange(12) >= 0, torch.arange(12) >= 5])
    _, state = model(torch.cat([x[:, :0], x[:, :12]], dim=1), model.init_state(B), mask=mask)
    kept = tree_map(torch.clone, state)
    y, after = run_on(model, x[:, 12:], state)
    close(y[0], model(x[:1])[0][0, 12:])
    close(y[1], model(x[1:, 5:])[0][0, 7:])
    close(tree_leaves(state), tree_leaves(kept))
    assert state_bytes(after) == state_bytes(state)
    assert len(after.layers) == len(model.mixers)


def run_on(model, x, state):
    ys = []
    for chunk in x.split([1, 1, 4, 11], dim=1):
        y, state = model(chunk, state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


def test_masks_hide_the_future_windows_from_mixers_that_look_ahead():
    model, x = build((2, 3), "bidirectional", inner="s4d"), noise(B, L, D)
    padded = torch.cat([noise(B, 4, D, seed=2), x, noise(B, 9, D, seed=3)], dim=1)
    mask = (torch.arange(42) >= 4) & (torch.arange(42) < 4 + L)
    close(model(padded, mask=mask.expand(B, -1))[0][:, 4 : 4 + L], model(x)[0])
    with pytest.raises(ValueError, match="bidirectional looks ahead, so it has no state"):
        model.init_state(1)
    with pytest.raises(ValueError, match="bidirectional sees it; use causal mixers"):
        LM(model, 8)


def test_gradients():
    model, x = build((2,), d_state=2), noise(1, 5, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x)[0], x, fast_mode=True)
    _, state = model(noise(1, 3, D, seed=2), model.init_state(1))
    state = tree_map(lambda t: t.detach().requires_grad_(), state)
    carried = tree_leaves(state)

    def resumed(x, *tensors):
        given = dict(zip(map(id, carried), tensors))
        y, after = model(x, tree_map(lambda t: given[id(t)], state))
        return y, *tree_leaves(after)

    assert torch.autograd.gradcheck(resumed, (x, *carried), fast_mode=True)
    model(noise(B, L, D))[0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_compiles_whole():
    torch._dynamo.reset()
    model, x = build((2,)), noise(B, L, D)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x)[0], model(x)[0])
    state = model(x, model.init_state(B))[1]
    close(compiled(x[:, :2], state)[0], model(x[:, :2], state)[0])
    mask = masks()["left"][:, -L:].clone()
    mask[:, 0] = False
    close(compiled(x, mask=mask)[0], model(x, mask=mask)[0])


def test_builds_on_meta():
    with torch.device("meta"):
        ghost = SashimiSpec(vocab=9, d_model=4, layers=1, pool=[2]).build()
    model = ghost.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    assert all(torch.isfinite(p).all() for p in reset(model).parameters())


@torch.no_grad()
def test_bfloat16_and_autocast_resume():
    model, x = build((2, 3)), noise(B, L, D)
    y = model(x)[0]
    low = copy.deepcopy(model).bfloat16()
    out, _ = run_in_chunks(low, x.bfloat16(), [3, 1, 25])
    assert out.dtype == torch.bfloat16
    assert (out.double() - y).abs().max() < 0.15
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = run_in_chunks(copy.deepcopy(model).float(), x.float(), [3, 1, 25])
    assert (out.double() - y).abs().max() < 0.15


@torch.no_grad()
def test_rate_reaches_every_level():
    """At twice the step a filter is itself at every other tap, as far as its zero-order hold allows."""
    model, x = build((2, 3)), noise(B, L, D)
    y = model(x)[0]
    filters = [m.kernel for m in model.mixers]
    before = [f(64) for f in filters]
    set_rate(model, 2.0)
    for f, k in zip(filters, before, strict=True):
        assert f.rate == 2
        close(f(32).cumsum(1), k.cumsum(1)[:, 1::2])
    assert (model(x)[0] - y).abs().max() > 1e-3
    for sizes in CHUNKINGS:
        close(run_in_chunks(model, x, sizes)[0], model(x)[0])
    close(set_rate(model, 1.0)(x)[0], y)


def tiny():
    torch.manual_seed(0)
    return SashimiSpec(vocab=16, d_model=8, layers=1, pool=[2, 3]).build().double()


@torch.no_grad()
def test_generates():
    model = tiny()
    prompt = torch.randint(0, 16, (2, 7))
    for row, new in zip(prompt.tolist(), generate(model, prompt, 9), strict=True):
        for token in new:
            assert model(torch.tensor([row]))[0][0, -1].argmax() == token
            row.append(token)


@torch.no_grad()
def test_generates_from_prompts_of_different_lengths():
    model = tiny()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]
    together = generate(model, prompts, 8)
    assert together == [generate(model, [prompt], 8)[0] for prompt in prompts]


RECIPE = """
model: {kind: sashimi, d_model: 8, layers: 1, pool: [2], pattern: [mamba]}
task: {kind: induction_heads, vocab_size: 16, length: 32}
steps: 2
batch: 2
lr: 1.0e-3
"""


def test_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml", ["model.pool=[4, 4]", "model.expand=3"])
    model = recipe.model.build()
    assert isinstance(recipe.model, SashimiSpec)
    assert recipe.model.vocab == recipe.task.inputs.vocab
    assert [m.d_model for m in model.backbone.mixers] == [8, 24, 72]
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    for change, message in [
        ("model.pol=[2]", r"model.pol: 'sashimi' has no field 'pol'; did you mean 'pool'\?"),
        ("model.pool=[0]", r"model.pool.0: .* greater than or equal to 1; got 0"),
        ("model.expand=0", r"model.expand: .*; got 0"),
        ("model.kind=sashimy", r"no model is called 'sashimy'; there are .*did you mean 'sashimi'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "r.yaml", [change])


def test_saves_and_loads(tmp_path):
    spec = SashimiSpec(vocab=9, d_model=4, layers=1, pool=[2, 2])
    model, ids = spec.build(), torch.randint(0, 9, (2, 13))
    save(tmp_path / "m", model, spec)
    again, loaded = load(tmp_path / "m")
    assert loaded == spec
    assert torch.equal(again(ids)[0], model.eval()(ids)[0])
    paper = SashimiSpec(vocab=256, pattern=["s4"])
    assert (paper.d_model, paper.layers, paper.pool, paper.expand, paper.channel.expand) == (64, 8, [4, 4], 2, 2)


def test_bad_models_are_named():
    level = Level([Block(mixer("s4d").build(4))])
    with pytest.raises(ValueError, match="2 pools lie between 3 levels; got 1"):
        Sashimi([level], [2, 2], torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match="factor >= 1 steps; got factor = 0"):
        Sashimi([level, level], [0], torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match="blocks of one d_model; got no block"):
        Level([])
    with pytest.raises(ValueError, match=r"blocks of one d_model; got \[4, 8\]"):
        Level([Block(mixer("s4d").build(4)), Block(mixer("s4d").build(8))])


def official_formula(system, config, state, x):
    """The authors' forward, layer by layer, with their list of outputs; S4 layers are tested on their own."""
    trained = system == "sashimisrc"
    pool, expand, ff = (
        config.get("pool", [] if trained else [4, 4]),
        config.get("expand", 1 if trained else 2),
        config.get("ff", 2),
    )
    H, unet, outputs = config["d_model"], config.get("unet", False), []
    own = {"d_model", "n_layers", "pool", "expand", "ff", "unet"}
    prenorm = config.get("prenorm", not trained)

    def part(prefix):
        return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}

    def norm(x, tensors):
        if "norm.m" in tensors:
            x = x - x.mean(-1, keepdim=True)
            return tensors["norm.s"] * (x + tensors["norm.m"]) / x.square().mean(-1, keepdim=True).sqrt()
        if trained and config.get("norm") in (None, "none"):
            return x
        prefix = "norm." if trained else ""
        return F.layer_norm(x, x.shape[-1:], tensors[f"{prefix}weight"], tensors[f"{prefix}bias"])

    def s4(x, tensors, prefix):
        if trained:
            central = prefix.startswith("c_layers") and config.get("center_layer")
            options = dict(config["center_layer" if central else "layer"])
            del options["_name_"]
        else:
            options = {"d_state": 64, **{key: value for key, value in config.items() if key not in own}}
        options |= {"d_model": x.shape[-1], "transposed": False}
        return from_official("s4", options, tensors)(x=x)

    def residual(x, prefix):
        tensors = part(prefix)
        y = norm(x, part(prefix + "norm.")) if prenorm else x
        layer = part(prefix + "layer.")
        if "ff.2.bias" in layer:
            hidden = y @ layer["ff.0.0.weight"].reshape(-1, y.shape[-1]).T + layer["ff.0.0.bias"]
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            y = hidden @ layer["ff.2.weight"].reshape(y.shape[-1], -1).T + layer["ff.2.bias"]
        else:
            y = s4(y, layer, prefix)
        assert tensors
        return x + y if prenorm else norm(x + y, part(prefix + "norm."))

    def linear(x, prefix):
        tensors = part(prefix + "linear.")
        if trained:
            v = tensors["weight_v"]
            weight = tensors["weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()
        else:
            weight = tensors["weight"][..., 0]
        return x @ weight.T + tensors["bias"]

    def down(x, prefix, p):
        rows, length, width = x.shape
        x = x.reshape(rows, length // p, p, width).permute(0, 1, 3, 2).reshape(rows, length // p, width * p)
        return linear(x, prefix)

    def up(x, prefix, p):
        rows, length, _ = x.shape
        x = linear(x, prefix)
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return x.reshape(rows, length, -1, p).permute(0, 1, 3, 2).reshape(rows, length * p, -1)

    count = config["n_layers"] * (2 if ff > 0 else 1)
    outputs.append(x)
    index = 0
    for p in pool:
        for _ in range(count if unet else 0):
            x = residual(x, f"d_layers.{index}.")
            outputs.append(x)
            index += 1
        x = down(x, f"d_layers.{index}.", p)
        outputs.append(x)
        index += 1
        H *= expand
    for i in range(count):
        x = residual(x, f"c_layers.{i}.")
    x = x + outputs.pop()
    for u, p in enumerate(reversed(pool)):
        x = up(x, f"u_layers.{u}.0.", p) + outputs.pop()
        entry = x
        for i in range(count):
            x = residual(x, f"u_layers.{u}.{i + 1}.")
            x = x + outputs.pop() if unet else x
        x = x if unet else x + entry
    assert not outputs
    return F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"])


DIAG = {"mode": "diag", "init": "diag-lin"}
LAYER = {"_name_": "s4", "d_state": 4, **DIAG}
OFFICIAL = [
    ("sashimi", {"d_model": 4, "n_layers": 1, "pool": [2, 2], "unet": True, **DIAG}),
    ("sashimi", {"d_model": 2, "n_layers": 2, "pool": [3], "unet": True, "bidirectional": True, "n_ssm": 1, **DIAG}),
    ("sashimi", {"d_model": 2, "n_layers": 2, "pool": [2, 2], "unet": True, "ff": 0, "expand": 1, **DIAG}),
    ("sashimi", {"d_model": 2, "n_layers": 1, "pool": [4], "ff": 0, "expand": 3, "channels": 2, **DIAG}),
    ("sashimi", {"d_model": 2, "n_layers": 1, "bidirectional": True, "final_act": None, "l_max": 5, **DIAG}),
    ("sashimi", {"d_model": 2, "n_layers": 1, "pool": [4, 4], "bidirectional": True, "disc": "bilinear", **DIAG}),
    ("sashimisrc", {"d_model": 4, "n_layers": 1, "layer": LAYER}),
    ("sashimisrc", {"d_model": 4, "n_layers": 2, "pool": [2, 2], "expand": 2, "norm": "layer", "layer": LAYER}),
    (
        "sashimisrc",
        {"d_model": 4, "n_layers": 1, "pool": [4], "norm": "layer", "transposed": False, "layer": LAYER, "ff": 3},
    ),
    (
        "sashimisrc",
        {
            "d_model": 4,
            "n_layers": 1,
            "pool": [2],
            "ff": 0,
            "prenorm": True,
            "norm": "none",
            "residual": "R",
            "layer": LAYER,
            "center_layer": {"_name_": "s4", "d_state": 8, "bidirectional": True, **DIAG},
        },
    ),
]


@pytest.mark.parametrize(("system", "config"), OFFICIAL, ids=str)
@torch.no_grad()
def test_official_options_by_their_formula(system, config):
    module, state = drawn(system, config)
    x = series(2, 48, config["d_model"])
    y = module(x=x)
    assert error(y, official_formula(system, config, state, x)) < 1e-9
    if "bidirectional" not in str(config) and "l_max" not in config:
        for sizes in ([1] * 48, [5, 1, 11, 31]):
            assert error(run_in_chunks(module.model, x, sizes)[0], y) < 1e-9
        assert error(module(x=x[:, :43]), y[:, :43]) < 1e-9


@pytest.mark.parametrize(
    ("stem", "change", "word"),
    [
        ("sashimi__H4_n2_p3_L45", {"mode": "ssd"}, "mode = 'ssd'"),
        ("sashimi__H4_n2_p3_L45", {"gate": 2}, "gate = 2"),
        ("sashimi__H4_n2_p3_L45", {"unet": True}, "unexpected key 'd_layers.0.linear.bias'"),
        ("sashimi__H4_n2_p3_L45", {"d_state": 32}, "no option 'd_state'"),
        ("sashimi__H4_n2_p3_L45", {"n_layers": 0}, "n_layers = 0"),
        ("sashimisrc__H4_n1_p2_L16", {"interp": 2}, "interp = 2"),
        ("sashimisrc__H4_n1_p2_L16", {"act_pool": "gelu"}, "act_pool = 'gelu'"),
        ("sashimisrc__H4_n1_p2_L16", {"norm": "batch"}, "norm = 'batch'"),
        ("sashimisrc__H4_n1_p2_L16", {"residual": "H"}, "residual = 'H'"),
        ("sashimisrc__H4_n1_p2_L16", {"layer": {"_name_": "lstm"}}, "layer = .*_name_ 's4'"),
        ("sashimisrc__H4_n1_p2_L16", {"layer": {"_name_": "s4", "gate": 2}}, "layer: .*gate = 2"),
        ("sashimisrc__H4_n1_p2_L16", {"layer": {"_name_": "s4", "d_stat": 2}}, "layer: .*did you mean 'd_state'"),
    ],
)
def test_official_options_that_are_not_carried_over_are_named(stem, change, word):
    case = golden(stem)
    with pytest.raises(ValueError, match=f"^{case.system}: .*{word}"):
        from_official(case.system, {**case.config, **change}, case.state(torch.float32))


@torch.no_grad()
def test_an_official_backbone_makes_a_language_model():
    torch.manual_seed(0)
    model = LM(golden("sashimi__H4_n1_p2_L32").module().model, 7).double()
    prompts = [[1, 2, 3], [4, 5, 6, 0, 1, 2]]
    for prompt, new in zip(prompts, generate(model, prompts, 4), strict=True):
        for token in new:
            assert model(torch.tensor([prompt]))[0][0, -1].argmax() == token
            prompt.append(token)


def in_version_3(state):
    names = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag", "l_kernel": "L"}
    old = {}
    for key, t in state.items():
        before, kernel, name = key.rpartition(".layer.layer.kernel.")
        t = -t if name == "A_imag" else t[:, 0] if name == "inv_dt" else t
        key = f"{before}.layer.kernel.kernel.{names.get(name, name)}" if kernel else key
        old[key.replace(".layer.layer.D", ".layer.D")] = t
    return old


@pytest.mark.parametrize("derived", DERIVED, ids=lambda derived: derived.stem)
@torch.no_grad()
def test_a_published_checkpoint_is_an_ordinary_model(derived, tmp_path):
    """It is told by its shapes, in both versions, and is saved, loaded and streamed."""
    case = derived.case()
    state, ids = case.state(torch.float64), case.tensors["input.input_ids"]
    (source,) = SYSTEMS["sashimi_lm"].sources
    shapes = [{key: tuple(t.shape) for key, t in names.items()} for names in (state, in_version_3(state))]
    found, older = (source.found({"model": {"_name_": "sashimi"}}, names) for names in shapes)
    config = {key: value for key, value in case.config.items() if key not in ("L", "dt_transform")}
    assert config.items() <= found.items()
    assert older == {**found, "dt_transform": "exp"}
    with pytest.raises(ValueError, match=r"^sashimi_lm: the option 'dt_transform' is missing, which the tensors"):
        from_official("sashimi_lm", found, state)
    told = {**found, "dt_transform": case.config["dt_transform"]}
    module = from_official("sashimi_lm", told, in_version_3(state))
    assert error(module(ids), case.tensors["output64.y"]) < 1e-9
    save(tmp_path / "model", module.model, source.read(told).spec())
    model, _ = load(tmp_path / "model")
    held, parts = model.init_state(2), []
    for part in ids.split([7, 1, 1, 16], dim=1):
        y, held = model(part, held)
        parts.append(y)
    assert error(torch.cat(parts, dim=1), case.tensors["output64.y"]) < 1e-9
    row = generate(model, ids, 2, temperature=0)[0]
    assert row[0] == case.tensors["output64.y"][0, -1].argmax()
    assert source.found({}, {key: shape for key, shape in shapes[0].items() if "encoder" not in key}) is None


@pytest.mark.parametrize("levels", [2, 255, 256, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mu_law_round_trips(levels, dtype):
    tokens = torch.arange(levels)
    x = mu_law_decode(tokens, levels, dtype)
    assert x.dtype == dtype
    assert torch.equal(mu_law_encode(x, levels), tokens)
    torch.testing.assert_close(x[[0, -1]], torch.tensor([-1, 1], dtype=dtype))
    assert x.abs().max() <= 1
    assert (x.diff() > 0).all()
    torch.testing.assert_close(x, -x.flip(0), rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


def test_mu_law_by_its_formula():
    x = torch.cat([torch.linspace(-1, 1, 1000), torch.logspace(-12, 0, 99), torch.zeros(1)]).double()
    x, mu = x.reshape(4, -1), 255
    tokens = mu_law_encode(x)
    assert tokens.shape == x.shape
    for value, token in zip(x.flatten().tolist(), tokens.flatten().tolist()):
        f = math.copysign(math.log(1 + mu * abs(value)) / math.log(1 + mu), value)
        assert abs(token - mu * (f + 1) / 2) <= 0.5 + 1e-9
        decoded = mu_law_decode(torch.tensor(token), dtype=torch.float64).item()
        g = math.copysign(math.log(1 + mu * abs(decoded)) / math.log(1 + mu), decoded)
        assert abs(f - g) <= 1 / mu + 1e-12
    assert mu_law_encode(torch.zeros(1)).item() == 128
    assert abs(mu_law_decode(torch.tensor([128])).item()) < 1e-4


def test_mu_law_refuses():
    for x in (torch.tensor([0.5, 1.01]), torch.tensor([math.nan]), torch.tensor([-math.inf])):
        with pytest.raises(ValueError, match=r"samples in \[-1, 1\]; got "):
            mu_law_encode(x)
    with pytest.raises(ValueError, match=r"got torch\.int16: divide integers"):
        mu_law_encode(torch.zeros(2, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"tokens in 0..255; got 256"):
        mu_law_decode(torch.tensor([3, 256]))
    with pytest.raises(ValueError, match="got -1"):
        mu_law_decode(torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"integer tokens; got torch\.float32"):
        mu_law_decode(torch.zeros(1))
    for levels in (1, 0):
        with pytest.raises(ValueError, match=f"levels >= 2; got {levels}"):
            mu_law_encode(torch.zeros(1), levels)
