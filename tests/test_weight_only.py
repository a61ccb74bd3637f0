"""Weights kept in 8 or 16 bits: the op's rounding, the modules that stand in Linears' places, models and files."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from longwave.mixers import MIXERS
from longwave.models import ClassifierSpec, LMSpec, MaskedLMSpec, SashimiSpec, generate, load, save
from longwave.nn import Filter, OutputGLU, WeightOnlyLinear, weight_only
from longwave.ops import weight_only_linear
from longwave.ops._numba import rows
from longwave.ops.weight_only_linear import packed, rounded, unpacked

B, L, D = 2, 13, 8
CASES = [pytest.param(name, kw, id=f"{name}-{i}") for name, cls in MIXERS.items() for i, kw in enumerate(cls.examples)]
FORMS = ["int8", "bf16"]


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stored(kind, M, K, group=None):
    """(weight, scale) of M rows, and what they stand for in float64."""
    w = noise(M, K, dtype=torch.float32)
    weight, scale = packed(w, group) if kind is torch.int8 else (w.to(kind), None)
    return weight, scale, unpacked(weight, scale, torch.float64)


class TestOp:
    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
    @pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 32])
    @pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 7), (5, 31), (12, 32), (17, 33), (64, 100), (130, 257)])
    def test_is_the_product_of_what_is_stored(self, kind, backend, rows, M, K, poisoned_memory):
        weight, scale, exact = stored(kind, M, K)
        x, bias = noise(rows, K, dtype=torch.float32), noise(M, dtype=torch.float32)
        taken = x.double()
        if kind is torch.int8:
            most = x.abs().amax(1, keepdim=True)
            steps = torch.full_like(most, 32767) / most
            taken = (x * steps).round().double() * most.double() / 32767
        with poisoned_memory():
            y = weight_only_linear(x, weight, bias, scale, backend=backend)
        limit = 1e-6 * (taken.abs() @ exact.abs().T + bias.abs()).amax()
        assert (y - (taken @ exact.T + bias)).abs().max() <= limit

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.int8], ids=str)
    def test_is_exact_in_float64(self, kind, backend):
        weight, scale, exact = stored(kind, 9, 40, group=16 if kind is torch.int8 else None)
        x = noise(2, 3, 40)
        if kind is torch.int8:
            most = x.abs().amax(-1, keepdim=True)
            exact_x = (x * 32767 / most).round() * most / 32767
        else:
            exact_x = x
        y = weight_only_linear(x, weight, None, scale, backend=backend)
        torch.testing.assert_close(y, exact_x @ exact.T, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("group", [1, 5, 16, 40, 100])
    @pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
    def test_parts_of_a_row_have_their_own_scale(self, group, backend):
        weight, scale, exact = stored(torch.int8, 6, 100, group)
        w, x = noise(6, 100, dtype=torch.float32), noise(4, 100, dtype=torch.float32)
        assert scale.shape == (6, -(-100 // group))
        assert ((w - exact).abs() <= scale.repeat_interleave(-(-100 // scale.shape[1]), 1)[:, :100] * 0.5001).all()
        y = weight_only_linear(x, weight, None, scale, backend=backend)
        torch.testing.assert_close(y, (x.double() @ exact.T).float(), rtol=0, atol=2e-3)

    def test_sums_of_the_longest_part_do_not_overflow(self):
        """Everything at its largest, of one sign: what 4096 products in a row come to."""
        weight, scale = torch.full((4, 8192), -127, dtype=torch.int8), torch.ones(4, 2)
        x = torch.full((1, 8192), 3.0)
        y = weight_only_linear(x, weight, None, scale, backend="numba")
        torch.testing.assert_close(y, torch.full((1, 4), -127 * 3.0 * 8192))

    def test_rounds_to_the_nearest_and_halves_to_even(self):
        w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.6, 0.0]])
        weight, scale = packed(w)
        assert weight.tolist() == [[127, 0, 2, 2, 0, -2, -127, 0]]
        assert scale.tolist() == [[1.0]]
        weight, scale = packed(torch.zeros(1, 3))
        assert weight.tolist() == [[0, 0, 0]]
        assert not weight_only_linear(torch.ones(1, 3), weight, None, scale).any()

    @pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_row_that_is_not_finite_is_seen_and_stays_alone(self, backend, bad):
        weight, scale, _ = stored(torch.int8, 6, 20)
        x = noise(3, 20, dtype=torch.float32)
        x[1, 7] = bad
        y = weight_only_linear(x, weight, None, scale, backend=backend)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], weight_only_linear(x[[0, 2]], weight, None, scale, backend=backend))

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_any_number_of_threads_and_slices(self, threads):
        before = torch.get_num_threads()
        weight, scale, exact = stored(torch.bfloat16, 1003, 300)
        x = noise(1, 300, dtype=torch.float32)
        try:
            torch.set_num_threads(threads)
            for _ in range(20):
                y = weight_only_linear(x, weight, None, scale, backend="numba")
                torch.testing.assert_close(y, (x.double() @ exact.T).float(), rtol=1e-5, atol=1e-4)
        finally:
            torch.set_num_threads(before)

    def test_refuses(self):
        x, w = torch.ones(2, 8), torch.ones(3, 8)
        weight, scale = packed(w)
        with pytest.raises(ValueError, match=r"got torch.int8 and no scale"):
            weight_only_linear(x, weight)
        with pytest.raises(ValueError, match=r"got torch.float32 and a scale"):
            weight_only_linear(x, w, None, scale)
        with pytest.raises(ValueError, match=r"G = 9"):
            weight_only_linear(x, weight, None, torch.ones(3, 9))
        with pytest.raises(ValueError, match=r"weight must be floating point or int8; got torch.int32"):
            weight_only_linear(x, w.int())
        with pytest.raises(ValueError, match=r"group = 5000"):
            packed(w, 5000)
        with pytest.raises(ValueError, match="infinity or NaN"):
            packed(w / 0)
        with pytest.raises(ValueError, match="33 rows"):
            weight_only_linear(torch.ones(33, 8), w, backend="numba")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5,)], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(8, 21), (40, 64), (33, 100)])
class TestFusedRows:
    """What stands before and behind a linear map, in its kernels; against torch's modules on the stored weights."""

    def drawn(self, kind, shape, width, hidden):
        x = noise(*shape, width, dtype=torch.float32)
        weight, scale, exact = stored(kind, hidden, width)
        bias = noise(hidden, seed=2, dtype=torch.float32)
        return x, rows.Weights(weight, bias, scale), exact, bias.double()

    def near(self, ours, exact, kind):
        limit = 2e-6 if kind is not torch.int8 else 2e-4  # inputs of 16 bits
        assert (ours - exact).abs().max() <= limit * (1 + exact.abs().max())

    @pytest.mark.parametrize("residual", [False, True])
    def test_rms_norm(self, kind, shape, width, hidden, residual, poisoned_memory):
        x, other, weight = (noise(*shape, width, seed=i, dtype=torch.float32) for i in range(3))
        weight = weight.reshape(-1)[:width].contiguous()
        with poisoned_memory():
            s, y = rows.rms_norm(x, weight, 1e-5, other if residual else None)
        exact = x.double() + other.double() if residual else x.double()
        self.near(s, exact, kind)
        self.near(y, F.rms_norm(exact, (width,), weight.double(), 1e-5), kind)

    def test_norm_and_linear(self, kind, shape, width, hidden, poisoned_memory):
        x, weights, exact, bias = self.drawn(kind, shape, width, hidden)
        norm, other = noise(width, seed=3, dtype=torch.float32), noise(*shape, hidden, seed=4, dtype=torch.float32)
        with poisoned_memory():
            y = rows.linear(x, weights, before=rows.NORM, norm=norm, eps=1e-5, after=rows.ADD, other=other)
        z = F.rms_norm(x.double(), (width,), norm.double(), 1e-5)
        self.near(y, other + F.linear(z, exact, bias), kind)

    def test_swiglu(self, kind, shape, width, hidden, poisoned_memory):
        x, up, exact_up, bias = self.drawn(kind, shape, width, 2 * hidden)
        weight, scale, exact_down = stored(kind, width, hidden)
        norm = noise(width, seed=3, dtype=torch.float32)
        with poisoned_memory():
            y = rows.swiglu(x, norm, 1e-5, up, rows.Weights(weight, None, scale))
        z = F.rms_norm(x.double(), (width,), norm.double(), 1e-5)
        a, b = F.linear(z, exact_up, bias).chunk(2, dim=-1)
        self.near(y, x + F.linear(F.silu(a) * b, exact_down), kind)

    def test_gelu_and_glu(self, kind, shape, width, hidden, poisoned_memory):
        x, weights, exact, bias = self.drawn(kind, shape, width, 2 * hidden)
        with poisoned_memory():
            y = rows.gelu_glu(x, weights)
        self.near(y, F.glu(F.linear(F.gelu(x.double()), exact, bias), dim=-1), kind)


def linears(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def rounded_floats(layer, small, monkeypatch):
    """The layer with the weights that another one keeps, as floats, meeting inputs that are rounded as there."""
    twin, kept = copy.deepcopy(layer), {}
    for name, module in small.named_modules():
        if isinstance(module, WeightOnlyLinear):
            weight = twin.get_submodule(name).weight
            weight.data.copy_(unpacked(module.weight, module.scale, torch.float64))
            kept[id(weight)] = module.weight
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(rounded(x, kept[id(w)]) if id(w) in kept else x, w, b))
    return twin


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "kw"), CASES)
class TestMixers:
    """Every mixer runs on such weights: nothing here names one."""

    def build(self, name, kw, form, dtype=torch.float64):
        torch.manual_seed(0)
        layer = MIXERS[name](D, **kw).to(dtype)
        return layer, weight_only(copy.deepcopy(layer), form)

    def test_is_the_layer_of_the_rounded_weights(self, name, kw, form, monkeypatch):
        layer, small = self.build(name, kw, form)
        x = noise(B, L, D)
        y = small(x)[0]
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, rounded_floats(layer, small, monkeypatch)(x)[0], rtol=1e-10, atol=1e-10)

    def test_is_near_the_layer(self, name, kw, form):
        layer, small = self.build(name, kw, form)
        x = noise(B, L, D)
        exact = layer(x)[0]
        assert (small(x)[0] - exact).norm() <= 0.05 * exact.norm()

    def test_no_linear_is_left_outside_filters(self, name, kw, form):
        layer, small = self.build(name, kw, form)
        filters = [m for m in small.modules() if isinstance(m, Filter)]
        assert set(linears(small)) == {m for f in filters for m in linears(f)}
        assert not any(p.requires_grad for p in small.parameters())
        assert len([m for m in small.modules() if isinstance(m, WeightOnlyLinear)]) == len(linears(layer)) - sum(
            len(linears(f)) for f in filters
        )

    def test_chunked_is_parallel(self, name, kw, form):
        _, small = self.build(name, kw, form, torch.float32)
        if not small.causal:
            pytest.skip("looks ahead")
        x = noise(B, L, D, dtype=torch.float32)
        whole = small(x)[0]
        for sizes in ([1] * L, [5, 1, 7]):
            state, ys = small.init_state(B), []
            assert all(t.dtype in (torch.float32, torch.complex64, torch.bool, torch.int64) for t in tree_leaves(state))
            for chunk in x.split(sizes, dim=1):
                y, state = small(chunk, state)
                ys.append(y)
            torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=2e-4, atol=2e-4)


class TestModules:
    def test_what_stands_around_the_product_stays(self):
        layer = OutputGLU(12, 6)
        small = weight_only(copy.deepcopy(layer), "int8")
        assert isinstance(small, WeightOnlyLinear)
        x = noise(4, 12, dtype=torch.float32)
        torch.testing.assert_close(small(x), layer(x), rtol=0.05, atol=0.05)
        assert not torch.equal(small(x), layer(x))

    @pytest.mark.parametrize("form", FORMS)
    def test_gradients_reach_the_input_and_training_is_refused(self, form):
        small = weight_only(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), form)
        x = noise(3, 8, dtype=torch.float32).requires_grad_()
        small(x).sum().backward()
        assert x.grad.abs().min() > 0
        with pytest.raises(ValueError, match=f"weights kept in {form} cannot be trained"):
            small.train()
        assert not [p for p in small.parameters() if p.requires_grad]

    def test_refuses(self):
        layer = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match="did you mean 'int8'"):
            weight_only(layer, "int4")
        with pytest.raises(ValueError, match="group = 2"):
            weight_only(layer, "bf16", group=2)
        weight_only(layer, "int8")
        with pytest.raises(ValueError, match="converted already"):
            weight_only(layer, "int8")

    def test_a_tied_embedding_stays(self):
        model = LMSpec(d_model=8, pattern=["mamba"], layers=1, vocab=10).build()
        table = model.embedding.weight.detach().clone()
        weight_only(model, "int8")
        assert torch.equal(model.embedding.weight, table)
        assert torch.equal(model.head.weight, packed(table)[0])

    def test_shared_modules_stay_shared(self):
        shared = nn.Linear(4, 4)
        model = weight_only(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), "int8")
        assert model["a"] is model["b"][0]


SPECS = [
    LMSpec(d_model=16, pattern=["mamba", {"kind": "attention", "heads": 2}], layers=2, vocab=11),
    LMSpec(d_model=16, pattern=[{"kind": "hyena", "max_len": 64}, "h3"], layers=2, vocab=11, tied=False),
    LMSpec(d_model=16, pattern=["s4d", "lstm"], layers=2, vocab=11, channel=None),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.pattern[0].kind)
class TestModels:
    def saved(self, spec, folder):
        torch.manual_seed(0)
        model = spec.build().eval()
        save(folder, model, spec)
        return model

    def test_loads_what_conversion_makes(self, spec, form, tmp_path):
        model = weight_only(self.saved(spec, tmp_path), form)
        loaded, _ = load(tmp_path, weights=form)
        ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(ids)[0], model(ids)[0])
        ours, theirs = loaded.state_dict(), model.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        assert not loaded.training

    def test_generates_what_the_whole_forward_says(self, spec, form, tmp_path):
        self.saved(spec, tmp_path)
        model, _ = load(tmp_path, weights=form)
        rows = generate(model, [[1, 2, 3], [4, 5]], 6)
        with torch.no_grad():
            for prompt, new in zip([[1, 2, 3], [4, 5]], rows):
                logits = model(torch.tensor([prompt + new]))[0][0, len(prompt) - 1 : -1]
                assert (logits.gather(1, torch.tensor(new)[:, None])[:, 0] >= logits.amax(1) - 1e-4).all()

    def test_is_not_saved(self, spec, form, tmp_path):
        self.saved(spec, tmp_path)
        model, _ = load(tmp_path, weights=form)
        with pytest.raises(ValueError, match=f"save the float model, and load it with weights='{form}'"):
            save(tmp_path, model, spec)

    def test_a_file_of_another_model_is_refused(self, spec, form, tmp_path):
        self.saved(spec, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "vocab": 12}))
        with pytest.raises(ValueError, match=r"of another model: embedding.weight has shape \(11, 16\)"):
            load(tmp_path, weights=form)


@pytest.mark.parametrize(
    "spec",
    [
        MaskedLMSpec(d_model=16, pattern=[{"kind": "hyena_two_sided", "max_len": 32}], layers=1, vocab=11),
        ClassifierSpec(d_model=16, pattern=["s5"], layers=2, vocab=11, classes=3),
        SashimiSpec(d_model=8, layers=1, vocab=11, pool=[2]),
    ],
    ids=["masked", "classifier", "sashimi"],
)
def test_other_models_are_near_themselves(spec, tmp_path):
    torch.manual_seed(0)
    model = spec.build().eval()
    save(tmp_path, model, spec)
    small, _ = load(tmp_path, weights="int8")
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    exact, ours = (y[0] if isinstance(y, tuple) else y for y in (model(ids), small(ids)))
    assert 0 < (ours - exact).norm() <= 0.05 * exact.norm()


PEAK = """
import re, sys, threading
from pathlib import Path
from longwave.models import load

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

def watch():
    while not done.wait(0.0005):
        most.append(held())

form = {"float": None}.get(sys.argv[1], sys.argv[1])
load(sys.argv[2], weights=form)  # what is imported and compiled on the way
most, done = [before := held()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[3], weights=form)
done.set()
thread.join()
print(max(*most, held()) - before)
"""


def test_the_float_model_never_exists_whole(tmp_path):
    """What loading in int8 takes at its peak stays near what it keeps: a quarter of the floats."""
    for layers in (1, 24):
        spec = LMSpec(d_model=256, pattern=["mamba"], layers=layers, vocab=64, channel=None)
        save(tmp_path / str(layers), spec.build(), spec)

    def taken(form):
        command = [sys.executable, "-c", PEAK, form, str(tmp_path / "1"), str(tmp_path / "24")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    floats = sum(4 * p.numel() for p in spec.build().parameters())
    assert taken("float") > 0.9 * floats
    assert taken("int8") < 0.5 * floats
