"""Continuous kernels: the authors' layers with options that no file has, by plain formulas, and our filters."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import GOLDEN, error, load, series
from torch import Tensor

from longwave.mixers import CKConv
from longwave.nn import CKConvFilter, FlexConvFilter, dense_conv, set_rate
from longwave.official import SYSTEMS, from_official

ACTIVATIONS = {
    "Sine": torch.sin,
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,
    "Swish": lambda h: h * torch.sigmoid(h),
}


def drawn_state(system: str, config: dict, **fixed) -> dict[str, Tensor]:
    """An official state, drawn at random but for what must be whole or positive."""
    rng = torch.Generator().manual_seed(1)
    family = SYSTEMS[system]
    state = {}
    for key, shape in family.keys(family.read(config)).items():
        name = key.rpartition(".")[2]
        state[key] = torch.randn(shape, generator=rng, dtype=torch.float64)
        if name in fixed:
            state[key] = torch.as_tensor(fixed[name], dtype=torch.float64).expand(shape).clone()
        elif name in ("weight_g", "running_var", "omega_0"):
            state[key] = state[key].abs() + 0.5
        elif name in ("num_batches_tracked", "train_length"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif name == "mask_threshold":
            state[key] = torch.full(shape, 0.1, dtype=torch.float64)
    return state


def linear(state: dict[str, Tensor], name: str, h: Tensor, bias: bool = True) -> Tensor:
    """An official map of h (in, P), with or without weight norm."""
    if f"{name}.weight_v" in state:
        g, v = (state[f"{name}.weight_{key}"].flatten(1) for key in "gv")
        weight = g * v / v.square().sum(1, keepdim=True).sqrt()
    else:
        weight = state[f"{name}.weight"].flatten(1)
    y = weight @ h
    return y + state[f"{name}.bias"][:, None] if bias and f"{name}.bias" in state else y


def normed(state: dict[str, Tensor], name: str, kind: str, h: Tensor) -> Tensor:
    """An official norm of h (H, P)."""
    if kind == "LayerNorm":
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-12).sqrt()
        name = f"{name}.layer_norm"
    elif kind == "BatchNorm":
        h = (h - state[f"{name}.running_mean"][:, None]) / (state[f"{name}.running_var"][:, None] + 1e-5).sqrt()
    else:
        return h
    return h * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def correlated(x: Tensor, k: Tensor) -> Tensor:
    """y[t] = sum_s k[:, :, K - 1 - s] x[t - s]."""
    L, K = x.shape[2], k.shape[2]
    columns = []
    for t in range(L):
        terms = [torch.einsum("ed,bd->be", k[:, :, K - 1 - s], x[:, :, t - s]) for s in range(min(K, t + 1))]
        columns.append(sum(terms))
    return torch.stack(columns, dim=2)


def ckconv_kernel(state: dict[str, Tensor], config: dict, L: int) -> Tensor:
    """(E, D, L), the oldest first, for a state that knows its length of training T."""
    T, kind = int(state["train_length"]), config["activation_function"]
    ratio = round(T / L) if T > L else 1 / round(L / T)
    step = 2 / (T - 1)
    p = torch.tensor([-1 + i * (1 if T == L else 0) * step for i in range(L)], dtype=torch.float64)
    if T != L:
        end = 1 - (T - 1) % ratio * step if ratio > 1 else 1 + (L - 1) % round(1 / ratio) * step * ratio
        p = torch.tensor([-1 + i * (end + 1) / (L - 1) for i in range(L)], dtype=torch.float64)
    h, norm = p[None], "" if kind == "Sine" else config.get("norm_type", "")
    for at in (0, 4, 8):
        h = linear(state, f"Kernel.kernel_net.{at}", h)
        if at < 8:
            h = normed(state, f"Kernel.kernel_net.{at + 2}", norm, config["omega_0"] * h if kind == "Sine" else h)
            h = ACTIVATIONS[kind](h)
    k = h.view(-1, config["in_channels"], L)
    if ratio < 1:
        n = round(1 / ratio)
        gauss = [math.exp(-(j**2) / 0.5) / (0.5 * math.sqrt(2 * math.pi)) for j in range(-n, n + 1)]
        smooth = k.clone()
        for i in range(n, L - n):
            smooth[..., i] = sum(g * k[..., i + j] for g, j in zip(gauss, range(-n, n + 1)))
        k = smooth
    return ratio * k


@pytest.mark.parametrize(
    ("options", "T", "L"),
    [
        ({}, 12, 12),
        ({"bias": False}, 12, 24),
        ({}, 12, 38),
        ({}, 13, 12),
        ({}, 30, 11),
        ({"activation_function": "ReLU"}, 10, 10),
        ({"activation_function": "LeakyReLU", "norm_type": "LayerNorm"}, 20, 9),
        ({"activation_function": "Swish", "norm_type": "BatchNorm"}, 10, 10),
        ({"norm_type": "BatchNorm"}, 10, 10),
    ],
    ids=str,
)
def test_ckconv_by_its_formula(options, T, L):
    config = {"in_channels": 2, "out_channels": 3, "hidden_channels": 4, "omega_0": 2.5}
    config |= {"activation_function": "Sine", **options}
    state = drawn_state("ckconv", config, train_length=T)
    module = from_official("ckconv", config, state).eval()
    k, x = ckconv_kernel(state, config, L), series(2, 2, L)
    assert error(module.kernel(L), k) < 1e-9
    y = correlated(x, k) + state.get("bias", torch.zeros(3))[:, None]
    assert error(module(x=x), y) < 1e-9
    x.requires_grad_()
    module(x=x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in module.parameters())


def test_an_odd_length_by_fft_is_resampled_as_the_authors_code_does():
    """The correlation on a circle of 17 steps, whose spectrum the inverse takes for one of 16."""
    config = {"in_channels": 2, "out_channels": 3, "hidden_channels": 4, "omega_0": 2.5, "activation_function": "Sine"}
    state = drawn_state("ckconv", config, train_length=9)
    x, k = series(1, 2, 9), ckconv_kernel(state, config, 9)
    padded = F.pad(x, (8, 0))
    circle = torch.stack(
        [sum(torch.einsum("ed,bd->be", k[..., j], padded[..., (i + j) % 17]) for j in range(9)) for i in range(17)], -1
    )
    y = torch.fft.irfft(torch.fft.rfft(circle), n=16)[..., :9] + state["bias"][:, None]
    assert error(from_official("ckconv", config, state)(x=x), y) < 1e-9


def test_a_kernel_that_was_never_trained_takes_the_length_of_its_input():
    config = {"in_channels": 1, "out_channels": 2, "hidden_channels": 4, "omega_0": 2.5, "activation_function": "Sine"}
    state = drawn_state("ckconv", config, train_length=0)
    module = from_official("ckconv", config, state)
    for L in (8, 10):
        assert error(module.kernel(L), ckconv_kernel({**state, "train_length": torch.tensor(L)}, config, L)) < 1e-12


@pytest.mark.parametrize("cls", ["CKCNN", "seqImg_CKCNN", "CopyMemory_CKCNN", "AddProblem_CKCNN"])
def test_networks_of_blocks(cls):
    kernel = {"kernelnet_hidden_channels": 4, "kernelnet_activation_function": "Sine", "omega_0": 3.0}
    config = {"cls": cls, "in_channels": 1, "hidden_channels": 3, "num_blocks": 2, "pool": False, **kernel}
    if cls == "seqImg_CKCNN":
        config["out_channels"] = 5
    state = drawn_state("ckconv", config, train_length=12)
    h = x = series(2, 1, 12)
    for i in range(2):
        block = {key.removeprefix(f"backbone.{i}."): t for key, t in state.items()}
        config_i = {"in_channels": h.shape[1], "out_channels": 3, **kernel}
        h = from_official(
            "ckconv", config_i, {k: t for k, t in block.items() if not k.startswith(("backbone", "fin"))}
        )(x=h)
    y = from_official("ckconv", config, state)(x=x)
    if cls != "CKCNN":
        h = h.transpose(1, 2) if cls == "CopyMemory_CKCNN" else h[:, :, -1]
        h = F.linear(h, state["finallyr.weight"], state["finallyr.bias"])
    assert error(y, h) < 1e-12


def flexconv_kernel(state: dict[str, Tensor], config: dict, points: int) -> Tensor:
    """(E, D, ...): cut where the mask says, so its size is part of what is tested."""
    dim, kind = config["kernel_dim_linear"], config["kernel_type"]
    axes = []
    for d in range(dim):
        axis = [-1 + 2 * i / (points - 1) for i in range(points)]
        if "mask_params" in state and config.get("mask_dynamic_cropping", True):
            mean, width = state["mask_params"][d].tolist()
            ends = [mean + sign * width * math.sqrt(-2 * math.log(0.1)) for sign in (-1, 1)]
            if dim == 1 and abs(min(ends)) < 1:
                axis = [p for p in axis if p > min(ends)]
            elif dim == 2 and max(map(abs, ends)) < 1:
                axis = [p for p in axis if abs(p) < max(map(abs, ends))]
        axes.append(axis)
    sizes = [len(axis) for axis in axes]
    p = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in axes)).view(-1, dim).T  # (dim, P)
    net = {key.removeprefix("Kernel."): t for key, t in state.items()}
    layers = config.get("kernel_no_layers", 3)
    if kind in ("SIREN", "nSIREN", "MLP"):
        h, stride = p, 3 if kind == "MLP" else 2
        for i in range(layers):
            name = f"kernel_net.{i * stride}"
            if i == layers - 1 or kind == "MLP":
                h = linear(net, name, h)
            elif kind == "SIREN":
                h = net[f"{name}.omega_0"] * linear(net, name, h)
            else:
                h = net[f"{name}.omega_0"] * linear(net, name, h, bias=False) + net[f"{name}.bias"][:, None]
            if i < layers - 1 and kind == "MLP":
                h = normed(net, f"kernel_net.{3 * i + 1}", config.get("kernel_norm", "BatchNorm"), h)
            if i < layers - 1:
                h = ACTIVATIONS[config.get("kernel_activ_function", "ReLU") if kind == "MLP" else "Sine"](h)
    else:
        h = None
        for i in range(layers + 1):
            g = torch.sin(linear(net, f"filters.{i}.linear", p))
            if kind != "Fourier":
                gamma, mu = net[f"filters.{i}.gamma"], net[f"filters.{i}.mu"]
                for row in range(len(g)):
                    offset = p - mu[row][:, None]
                    if f"filters.{i}.theta" in net:
                        angle = 2 * math.pi * net[f"filters.{i}.theta"][row]
                        c, s = torch.cos(angle), torch.sin(angle)
                        offset = torch.stack([c * offset[0] + s * offset[1], -s * offset[0] + c * offset[1]])
                    g[row] *= torch.exp(-0.5 * (gamma[row][:, None] * offset).square().sum(0))
            h = g if h is None else g * linear(net, f"linear.{i - 1}", h)
        h = linear(net, "output_linear", h)
    k = config.get("kernel_sampling_rate_norm", 1.0) * h
    if "mask_params" in state and config.get("mask_use", True):
        for d in range(dim):
            mean, width = state["mask_params"][d]
            k = k * torch.exp(-0.5 * ((p[d] - mean) / width) ** 2)
    return k.view(-1, config["in_channels"], *sizes)


MASKS = {1: [[0.9, 0.4]], 2: [[0.1, 0.3], [-0.2, 0.6]]}


@pytest.mark.parametrize(
    ("options", "flex"),
    [
        ({"kernel_type": "SIREN", "kernel_dim_linear": 1}, True),
        ({"kernel_type": "SIREN", "kernel_weight_norm": True, "horizon": "9"}, False),
        ({"kernel_type": "nSIREN", "kernel_dim_linear": 1, "horizon": "full", "kernel_no_layers": 2}, False),
        ({"kernel_type": "MAGNet", "kernel_dim_linear": 1, "kernel_no_layers": 2, "horizon": "15"}, True),
        ({"kernel_type": "MAGNet", "kernel_steerable": True}, True),
        ({"kernel_type": "MAGNet", "mask_dynamic_cropping": False, "kernel_sampling_rate_norm": 2.0}, True),
        ({"kernel_type": "MAGNet", "mask_use": False}, True),
        ({"kernel_type": "Gabor", "kernel_no_layers": 1}, True),
        ({"kernel_type": "Gabor", "kernel_dim_linear": 1, "horizon": "full"}, False),
        ({"kernel_type": "Fourier"}, False),
        ({"kernel_type": "MLP", "kernel_activ_function": "Swish", "horizon": "5"}, False),
        ({"kernel_type": "MLP", "kernel_dim_linear": 1, "kernel_norm": "LayerNorm", "kernel_weight_norm": True}, True),
        ({"kernel_type": "MLP", "kernel_norm": "", "kernel_activ_function": "LeakyReLU"}, True),
    ],
    ids=str,
)
def test_flexconv_by_its_formula(options, flex):
    config = {"in_channels": 2, "out_channels": 3, "kernel_no_hidden": 4, "horizon": "same", "kernel_dim_linear": 2}
    config |= options
    dim, L = config["kernel_dim_linear"], 13
    config["cls"] = "FlexConv" if flex else "CKConv"
    state = drawn_state("flexconv", config, mask_params=MASKS[dim])
    module = from_official("flexconv", config, state).eval()
    points = {"same": L, "full": 2 * L - 1}.get(config["horizon"]) or int(config["horizon"])
    k = flexconv_kernel(state, config, points)
    assert error(module.kernel(L), k) < 1e-9
    if dim == 1:
        x = series(2, 2, L)
        y = correlated(x, k) + state["bias"][:, None]
    else:
        x = series(2, 2, 7, L)
        y = F.conv2d(x, k, state["bias"], padding=tuple(size // 2 for size in k.shape[2:]))
    assert error(module(x=x), y) < 1e-9


@pytest.mark.parametrize(("dim", "horizon"), [(1, "same"), (1, "51"), (2, "53")])
@pytest.mark.parametrize("flex", [True, False])
def test_flexconv_by_fft(dim, horizon, flex):
    config = {"in_channels": 2, "out_channels": 3, "kernel_type": "SIREN", "kernel_no_hidden": 4, "horizon": horizon}
    config |= {"kernel_dim_linear": dim, "cls": "FlexConv" if flex else "CKConv"}
    state = drawn_state("flexconv", config, mask_params=[[0.2, 5.0]] * dim)
    x = series(1, 2, 52) if dim == 1 else series(1, 2, 9, 12)
    y = from_official("flexconv", config, state)(x=x)
    assert error(from_official("flexconv", {**config, "conv_use_fft": True}, state)(x=x), y) < 1e-9


def test_a_centred_kernel_by_fft_with_two_sizes_is_shifted_as_the_authors_code_does():
    config = {"in_channels": 1, "out_channels": 1, "kernel_type": "SIREN", "horizon": "61", "conv_use_fft": True}
    state = drawn_state("flexconv", config | {"cls": "FlexConv"}, mask_params=[[0.0, 0.43], [0.0, 5.0]])
    module = from_official("flexconv", config, state)
    k = module.kernel(70)
    assert 50 < k.shape[2] < k.shape[3] == 61
    x = series(1, 1, 70, 70)
    y = F.conv2d(F.pad(x, [30, 30, 30, 30]), k, state["bias"])[:, :, :70]
    assert error(module(x=x), y) < 1e-9


@pytest.mark.parametrize("path", [p for p in GOLDEN if p.stem.startswith(("ckconv", "flexconv"))], ids=lambda p: p.stem)
def test_kernels_against_the_authors(path):
    case = load(path)
    module, length = case.module(), case.part("input.")["x"].shape[-1]
    kernels = {key: t for key, t in case.part("extra.").items() if key.endswith("conv_kernel")}
    assert kernels
    for key, theirs in kernels.items():
        part = getattr(module, key.partition(".")[0]) if key.startswith("cconv") else module
        assert error(part.kernel(length).detach(), theirs) < 1e-5, key


def test_our_filter_is_the_authors_at_the_length_of_training():
    config = {"in_channels": 2, "out_channels": 3, "hidden_channels": 4, "omega_0": 2.5}
    official = from_official("ckconv", config, drawn_state("ckconv", config, train_length=20))
    filter = CKConvFilter(6, 20, width=4, omega=2.5).double()
    filter.kernel_net.load_state_dict(official.net.state_dict())
    assert error(filter(20).view(3, 2, 20).flip(2), official.kernel(20)) < 1e-12
    assert error(filter(7), filter(20)[:, :7]) < 1e-12
    x = series(2, 20, 2)
    y = dense_conv(x, filter(20).view(3, 2, 20)) + official.bias
    assert error(y.transpose(1, 2), official(x=x.transpose(1, 2))) < 1e-9


@pytest.mark.parametrize("mask", [[0.9, 0.3], [0.2, 2.0], [1.8, 0.2]])
def test_our_flexible_filter_is_the_authors_at_the_length_of_training(mask):
    config = {"in_channels": 2, "out_channels": 3, "horizon": "same", "kernel_no_hidden": 4, "kernel_dim_linear": 1}
    config["cls"] = "FlexConv"
    official = from_official("flexconv", config, drawn_state("flexconv", config, mask_params=[mask]))
    filter = FlexConvFilter(6, 20, width=4).double()
    filter.kernel_net.load_state_dict(official.net.state_dict())
    filter.mask_params.data.copy_(torch.tensor([mask], dtype=torch.float64))
    theirs = official.kernel(20)
    ours = filter(20).view(3, 2, 20).flip(2)
    assert error(ours[..., 20 - theirs.shape[2] :], theirs) < 1e-12
    assert not ours[..., : 20 - theirs.shape[2]].any()


def test_a_filter_at_another_rate():
    filter = CKConvFilter(3, 33, width=8, omega=4.0).double()
    at_one = filter(33)
    set_rate(filter, 2.0)
    assert error(filter(17), 2 * at_one[:, ::2]) < 1e-12
    with pytest.raises(ValueError, match=r"max_len = 33 at rate = 2 has no taps for a sequence of 18.*max_len >= 35"):
        filter(18)
    set_rate(filter, 0.5)
    assert error(filter(65)[:, ::2], 0.5 * at_one) < 1e-12


def test_a_dense_convolution_by_its_sum():
    for L, K in ((1, 1), (9, 9), (9, 4), (9, 12)):
        u, k = series(2, L, 3), torch.randn(4, 3, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = correlated(u.transpose(1, 2), k.flip(2)).transpose(1, 2)
        assert error(dense_conv(u, k), expected) < 1e-12
        assert dense_conv(u.bfloat16(), k).dtype == torch.bfloat16


def test_every_parameter_of_the_filters_is_trained():
    for filter in (CKConvFilter(4, 16, width=4), FlexConvFilter(4, 16, width=4, mask_width=0.3)):
        (filter(16) ** 2).sum().backward()
        assert [name for name, p in filter.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert filter.bfloat16()(16).dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CKConvFilter(2, 0), r"max_len >= 1; got 0"),
        (lambda: CKConvFilter(2, 8, layers=1), r"layers >= 2 and omega > 0; got width = 32, layers = 1"),
        (lambda: CKConvFilter(2, 8, omega=0.0), r"omega = 0.0"),
        (lambda: CKConvFilter(2, 8, rate=-1.0), r"got rate = -1.0"),
        (lambda: FlexConvFilter(2, 8, layers=0), r"layers >= 1; got width = 32, layers = 0"),
        (lambda: FlexConvFilter(2, 8, mask_width=0.0), r"got mask_width = 0.0, threshold = 0.1"),
        (lambda: FlexConvFilter(2, 8, threshold=1.0), r"threshold = 1.0"),
        (lambda: FlexConvFilter(2, 8)(9), r"max_len = 8 at rate = 1 has no taps for a sequence of 9.*max_len >= 9"),
        (lambda: CKConv(4, 8)(torch.zeros(1, 9, 4)), r"max_len = 8 .*sequence of 9; build it with max_len >= 9"),
        (lambda: CKConv(4, 8, filter="ckcon"), r"no continuous filter is called 'ckcon'.*did you mean 'ckconv'"),
    ],
)
def test_bad_continuous_kernels_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CK = {"in_channels": 2, "out_channels": 2, "hidden_channels": 4, "omega_0": 1.0}
FLEX = {"in_channels": 2, "out_channels": 2, "horizon": "same", "cls": "FlexConv"}


@pytest.mark.parametrize(
    ("system", "config", "message"),
    [
        ("ckconv", {**CK, "dim_linear": 2}, "dim_linear = 2 is not carried over"),
        ("ckconv", {**CK, "activation_function": "Tanh"}, "activation_function = 'Tanh'"),
        ("ckconv", {**CK, "omega": 1.0}, "no option 'omega' .*did you mean 'omega_0'"),
        ("ckconv", {"in_channels": 2}, "is missing"),
        ("ckconv", {"cls": "seqImg_CKCNN", "in_channels": 1, "hidden_channels": 2, "num_blocks": 1, "omega_0": 1.0,
                    "kernelnet_hidden_channels": 2}, "'out_channels' is missing"),
        ("flexconv", {**FLEX, "horizon": "8"}, "horizon = '8' is not 'full', 'same' or an odd number"),
        ("flexconv", {**FLEX, "mask_type": "sigmoid"}, "mask_type = 'sigmoid'"),
        ("flexconv", {**FLEX, "conv_bias": False}, "conv_bias = False makes no MAGNet"),
        ("flexconv", {**FLEX, "kernel_steerable": True, "kernel_dim_linear": 1}, "kernel_dim_linear = 2"),
        ("flexconv", {**FLEX, "kernel_type": "SIREN", "kernel_no_layers": 1}, "kernel_no_layers = 1 makes no SIREN"),
        ("flexconv", FLEX, "no key 'train_length'"),
    ],
    ids=str,
)  # fmt: skip
def test_official_options_that_cannot_be_are_named(system, config, message):
    with pytest.raises(ValueError, match=f"^{system}: .*{message}"):
        from_official(system, config, {})


def test_a_centred_kernel_of_even_size_is_refused():
    module = from_official("flexconv", FLEX, drawn_state("flexconv", FLEX, mask_params=[[0.0, 9.0]] * 2))
    with pytest.raises(ValueError, match=r"odd sizes; got \(8, 8\)"):
        module(x=series(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"kernel_dim_linear = 2 has 4 axes; got 3"):
        module(x=series(1, 2, 8))
