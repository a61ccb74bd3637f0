"""Filters: one impulse response however it is computed, and HiPPO matrices against their closed forms."""

import copy
import inspect
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longwave import nn
from longwave.nn import (
    FreeFilter,
    HyenaFilter,
    LongConv,
    Rotary,
    S4DFilter,
    ShiftFilter,
    StateSpaceFilter,
    Truncated,
    append_time,
    hippo,
    nplr,
    set_rate,
)
from longwave.nn.filters import Smooth, SmoothFrequencies
from longwave.nn.hippo import MEASURES, low_rank

FILTERS = {
    "lin": lambda: S4DFilter(6, 8),
    "inv-bilinear": lambda: S4DFilter(6, 8, init="inv", discretization="bilinear", systems=2),
    "quad": lambda: S4DFilter(6, 8, init="quad", dt_max=0.01),
    "legs": lambda: S4DFilter(6, 8, init="legs"),
    "real": lambda: S4DFilter(6, 8, init="real"),
    "shift": lambda: ShiftFilter(6, 5),
    "hyena": lambda: HyenaFilter(6, 40, emb_dim=5, width=8),
    "taps": lambda: FreeFilter(6, 40, squash=0.001, smooth=Smooth(3)),
    "frequencies": lambda: FreeFilter(6, 40, squash=0.0001, smooth=SmoothFrequencies(5), decay=True),
    "truncated": lambda: Truncated(6, S4DFilter(6, 8), 7),
}


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=FILTERS)
def filter(request):
    torch.manual_seed(0)
    return FILTERS[request.param]().double()


@pytest.mark.parametrize("name", [*FILTERS, *nn.FILTERS])
def test_autocast_does_not_reach_inside(name):
    torch.manual_seed(0)
    kind = nn.FILTERS.get(name)
    needs = {"max_len": 40} if kind and "max_len" in inspect.signature(kind.__init__).parameters else {}
    filter = kind(6, **needs) if kind else FILTERS[name]()
    conv, u = LongConv(filter), torch.randn(2, 23, 6)

    def run():
        y, state = conv(u[:, :17], conv.init_state(2))
        return filter(23), y, conv(u[:, 17:], state)[0]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run()
    assert all(torch.equal(a, b) for a, b in zip(ours, exact))


def test_positions_stay_exact_in_a_16_bit_model():
    filter = HyenaFilter(4, 5000, emb_dim=3, width=8)
    low = filter.bfloat16()
    assert len(low.pos_emb.t.unique()) == 5000
    rounded = copy.deepcopy(low).double()(5000)
    assert (low(5000) - rounded).abs().max() < 1e-4 * rounded.abs().max()


def test_taps_are_the_impulse_response(filter):
    """In parallel and step by step, whatever the state is."""
    conv, L = LongConv(filter), 23
    conv.D.data.zero_()
    impulse = torch.zeros(1, L, 6, dtype=torch.float64)
    impulse[:, 0] = 1
    taps = torch.nn.functional.pad(filter(L), (0, L - filter(L).shape[1])).T[None]
    close(conv(impulse)[0], taps)
    state, ys = conv.init_state(1), []
    for t in range(L):
        y, state = conv(impulse[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, dim=1), taps)


def test_prefix_consistent(filter):
    """The taps do not depend on how many are asked for."""
    close(filter(30)[:, :11], filter(11)[:, :11])


def test_state_space_taps_are_powers(filter):
    if not isinstance(filter, StateSpaceFilter):
        assert filter(9).dtype == torch.float64
        return
    a, b, c = filter.realize()
    close(filter(9), 2 * torch.einsum("cn,cnl->cl", b * c, a[..., None] ** torch.arange(9)).real)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_discretizations_approach_the_continuous_system(discretization):
    """h' = A h + u held constant: with a smaller step both rules meet (exp(A t) - 1) / A."""
    errors = []
    for steps in (50, 100):
        f = S4DFilter(1, 2, discretization=discretization).double()
        f.log_dt.data.fill_(math.log(1 / steps))
        f.A_imag.data.fill_(2.0)
        a, b, _ = f.realize()
        h = torch.zeros_like(a)
        for _ in range(steps):
            h = a * h + b
        A = torch.complex(-f.log_A_real.exp(), f.A_imag)
        errors.append((h - (A.exp() - 1) / A).abs().max().item())
    assert errors[0] < (1e-12 if discretization == "zoh" else 1e-3)
    assert discretization == "zoh" or 3.9 < errors[0] / errors[1] < 4.1  # second order


def test_inits_are_those_of_the_paper():
    """arXiv:2206.11893, eq. 9 and its neighbours, in the imaginary parts."""
    n = torch.arange(4)
    close(S4DFilter(1, 8).A_imag[0], (math.pi * n).float(), 1e-6)
    close(S4DFilter(1, 8, init="inv").A_imag[0], 8 / math.pi * (8 / (2 * n + 1) - 1), 1e-6)
    close(S4DFilter(1, 8, init="quad").A_imag[0], (1 + 2 * n) ** 2 / math.pi, 1e-6)
    close(S4DFilter(1, 8, init="real").log_A_real[0].exp(), (n + 1).float(), 1e-6)
    A = -torch.tensor([[1, 0, 0, 0], [3**0.5, 2, 0, 0], [5**0.5, 15**0.5, 3, 0], [7**0.5, 21**0.5, 35**0.5, 4]])
    normal = A.double() + torch.outer(*[(torch.arange(4, dtype=torch.float64) + 0.5).sqrt()] * 2)
    eigenvalues = torch.linalg.eigvals(normal)
    positive = eigenvalues.imag[eigenvalues.imag > 0].sort(descending=True).values
    close(S4DFilter(1, 4, init="legs").A_imag[0].double(), positive, 1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [4, 16, 64])
def test_nplr_rebuilds_hippo(measure, N):
    A, B = hippo(measure, N)
    Lambda, P, B_modes, V = nplr(measure, N)
    rebuilt = 2 * (V @ torch.diag(Lambda) @ V.conj().T).real - low_rank(measure, N).T @ low_rank(measure, N)
    close(rebuilt, A, 1e-11)
    close(2 * (V @ B_modes).real, B, 1e-11)
    close(2 * (V @ P.T).real.T, low_rank(measure, N), 1e-11)
    assert A.dtype == torch.float64


def test_legs_is_its_closed_form():
    A, B = hippo("legs", 3)
    close(A, -torch.tensor([[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], dtype=torch.float64), 1e-6)
    close(B, torch.tensor([1, 3**0.5, 5**0.5], dtype=torch.float64), 1e-7)


def test_hippo_errors():
    with pytest.raises(ValueError, match=r"no HiPPO measure is called 'leggs'; there are .*did you mean 'legs'"):
        hippo("leggs", 4)
    with pytest.raises(ValueError, match=r"even state size; got N = 5"):
        nplr("legs", 5)


def test_squash_zeroes_small_taps():
    f = FreeFilter(2, 10, squash=0.1)
    f.kernel.data.copy_(torch.linspace(-0.5, 0.5, 20).view(2, 10))
    k, raw = f(10), f.kernel
    assert (k[raw.abs() <= 0.1] == 0).all()
    close(k[raw > 0.1], raw[raw > 0.1] - 0.1, 1e-6)
    close(k[raw < -0.1], raw[raw < -0.1] + 0.1, 1e-6)


def test_window_of_target_one_is_none():
    f = HyenaFilter(3, 20, emb_dim=3, width=4, target=1.0)
    z = f.pos_emb.z
    close(f(20), f.implicit_filter(z)[0].T, 1e-6)


def test_long_state_space_memory_is_linear():
    """One million steps in chunks: the state is that of one pass, and no (C, N, L) tensor was made."""
    torch.manual_seed(0)
    conv, L = LongConv(S4DFilter(2, 8, dt_min=1e-4)), 2**20
    u = torch.randn(1, L, 2)
    with torch.no_grad():
        _, whole = conv(u, conv.init_state(1))
        state = conv.init_state(1)
        for chunk in u.split(2**17, dim=1):
            _, state = conv(chunk, state)
    assert (whole - state).abs().max() <= 1e-4 * whole.abs().max()


class TestAppendTime:
    def test_is_cat(self):
        state, parts = torch.zeros(2, 0, 3), [torch.randn(2, n, 3) for n in (1, 5, 70, 1, 200)]
        for part in parts:
            state = append_time(state, part)
        close(state, torch.cat(parts, dim=1), 0)

    def test_is_amortised(self):
        state, places = torch.zeros(1, 0, 3), set()
        for _ in range(1000):
            state = append_time(state, torch.randn(1, 1, 3))
            places.add(state.data_ptr())
        assert len(places) <= 10

    def test_an_older_state_gets_a_copy(self):
        old = append_time(torch.zeros(1, 0, 1), torch.ones(1, 3, 1))
        one, two = append_time(old, 2 * torch.ones(1, 1, 1)), append_time(old, 3 * torch.ones(1, 1, 1))
        assert one.flatten().tolist() == [1, 1, 1, 2]
        assert two.flatten().tolist() == [1, 1, 1, 3]

    def test_rows_taken_out_go_on(self):
        whole = append_time(torch.zeros(2, 0, 1), torch.arange(6.0).view(2, 3, 1))
        row = append_time(whole[1:], torch.full((1, 1, 1), 9.0))
        other = append_time(whole, torch.full((2, 1, 1), 7.0))
        assert row.flatten().tolist() == [3, 4, 5, 9]
        assert other.flatten().tolist() == [0, 1, 2, 7, 3, 4, 5, 7]
        later = append_time(whole[:, 1:], torch.full((2, 1, 1), 8.0))
        assert later.flatten().tolist() == [1, 2, 8, 4, 5, 8]

    def test_what_autograd_saved_is_not_touched(self):
        weight = torch.ones(3, requires_grad=True)
        state, loss = append_time(torch.zeros(2, 0, 3), torch.randn(2, 5, 3)), 0.0
        states = []
        for _ in range(4):
            loss = loss + (state * weight).sum()
            states.append(state)
            state = append_time(state, torch.randn(2, 1, 3))
        loss.backward()
        close(weight.grad, sum(s.sum((0, 1)) for s in states), 1e-5)

    def test_threads_that_append_to_one_state(self):
        gate = threading.Barrier(8)

        def append(i, state):
            gate.wait()
            return append_time(state, torch.full((1, 1, 2), float(i)))

        with ThreadPoolExecutor(8) as pool:
            for _ in range(250):
                state = append_time(torch.zeros(1, 0, 2), torch.full((1, 3, 2), -1.0))
                for i, after in enumerate(pool.map(append, range(8), [state] * 8)):
                    assert after[0, :, 0].tolist() == [-1, -1, -1, i]

    def test_inference_tensors_outside_inference_mode(self):
        with torch.inference_mode():
            state = append_time(torch.zeros(1, 0, 1), torch.ones(1, 2, 1))
        assert append_time(state, torch.zeros(1, 1, 1)).flatten().tolist() == [1, 1, 0]


def test_rotary_angles_are_exact_far_out():
    """Relative positions only: a query and a key shifted by a million tokens keep their product."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    rotary = Rotary(8)

    def product(at, back):
        return (rotary(q, torch.tensor([at]), 1) * rotary(k, torch.tensor([at - back]), 1)).sum()

    close(product(5, 3), product(1_000_005, 3), 1e-5)


def test_a_rate_resamples_the_filter():
    """Twice the step: every second tap of the finer system, up to the factor that the held input brings."""
    fine = S4DFilter(3, 8, dt_min=1e-3, dt_max=1e-2).double()
    coarse = copy.deepcopy(fine)
    assert set_rate(coarse, 2.0) is coarse
    k, half = fine(41)[:, ::2], coarse(21)
    assert ((half - 2 * k).abs().max() / half.abs().max()) < 0.05
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"rate = {wrong}"):
            set_rate(coarse, wrong)
    with pytest.raises(ValueError, match="nothing in Linear has a sampling rate"):
        set_rate(torch.nn.Linear(2, 2), 2.0)
