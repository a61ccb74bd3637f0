"""Filters without a state space become sums of modes: how near, and that the model is an ordinary one."""

import pytest
import torch

from longwave.mixers import state_bytes
from longwave.models import LMSpec, distill, load, save
from longwave.nn import ModalFilter

HYENA = {"kind": "hyena", "max_len": 128, "width": 8, "emb_dim": 5, "frequency": 1.0}


def model_of(*pattern):
    torch.manual_seed(0)
    spec = LMSpec(d_model=8, vocab=11, pattern=list(pattern))
    return spec.build().double().eval(), spec


def test_modes_are_found_again():
    """Taps that are sums of modes, real ones and some that hardly decay among them, are fitted to rounding."""
    torch.manual_seed(0)
    teacher, student = ModalFilter(5, 8).double(), ModalFilter(5, 8).double()
    with torch.no_grad():
        teacher.angle[:, 0], teacher.C[:, 0, 1] = 0.0, 0.0
        teacher.log_decay[0, 1] = -12.0
    k = teacher(300).detach()
    k[:, 0] += 3.0
    error, skip = student.fit(k)
    assert error.max() < 1e-6
    torch.testing.assert_close(skip, torch.full_like(skip, 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student(300)[:, 1:], k[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_taps_give_finite_modes_whose_error_is_told(dtype):
    """Noise, an impulse, silence, taps that grow: what is fitted is stable, and as far off as it says."""
    torch.manual_seed(0)
    k = torch.stack([torch.randn(64), torch.eye(64)[7], torch.zeros(64), 1.05 ** torch.arange(64.0), torch.ones(64)])
    filter = ModalFilter(5, 6).to(dtype)
    error, skip = filter.fit(k)
    ours = filter(64).double().detach()
    ours[:, 0] += skip
    assert (filter.realize().a.abs() < 1).all()
    torch.testing.assert_close(ours[:, 0], k[:, 0].double(), rtol=1e-4, atol=1e-4)
    off = (ours - k)[:, 1:].norm(dim=1) / k[:, 1:].norm(dim=1).double().clamp(min=1e-30)
    torch.testing.assert_close(off, error, rtol=1e-3, atol=1e-4)
    assert error[4] < 1e-4


@pytest.mark.parametrize("order", [2, 16])
def test_a_short_filter_takes_fewer_modes_than_there_are(order):
    filter = ModalFilter(2, order).double()
    k = torch.tensor([[1.0, 0.5, 0.25], [1.0, -0.5, 0.25]], dtype=torch.float64)
    error, _ = filter.fit(k)
    assert torch.isfinite(error).all()


@pytest.mark.parametrize(
    "pattern",
    [
        [HYENA],
        [{**HYENA, "order": 3, "d_conv": 4}, "s4d"],
        [{"kind": "dss_softmax", "max_len": 128, "d_state": 4}],
        [{"kind": "long_conv", "max_len": 24, "channels": 2}],
    ],
    ids=["hyena", "order-3-hybrid", "dss_softmax", "long_conv"],
)
def test_a_model_is_distilled_into_an_ordinary_one(pattern, tmp_path):
    model, spec = model_of(*pattern)
    result = distill(model, spec, order=32)
    assert result.logits < 0.02
    assert all(error.max() <= 1 for error in result.filters.values())  # least squares is no worse than nothing
    ids = torch.randint(11, (2, 24))
    torch.testing.assert_close(result.model(ids)[0], model(ids)[0], rtol=0.1, atol=0.1)
    sizes = []
    state = result.model.init_state(1)
    for _ in range(2):
        _, state = result.model(torch.randint(11, (1, 300)), state)
        sizes.append(state_bytes(state))
    assert sizes[0] == sizes[1]
    save(tmp_path, result.model, result.spec)
    again, _ = load(tmp_path)
    assert torch.equal(again(ids)[0], result.model(ids)[0])


def test_more_modes_are_nearer():
    model, spec = model_of(HYENA)
    few, many = (distill(model, spec, order=order) for order in (4, 24))
    assert many.logits < few.logits / 3
    assert sum(e.sum() for e in many.filters.values()) < sum(e.sum() for e in few.filters.values())


def test_what_cannot_be_distilled_is_named():
    with pytest.raises(ValueError, match=r"nothing to distill in s4d, mamba; it fits the filters of hyena, long_conv"):
        distill(*model_of("s4d", "mamba"))
    with pytest.raises(ValueError, match=r"ckconv has a matrix for every lag"):
        distill(*model_of({"kind": "ckconv", "max_len": 32}, HYENA))
    with pytest.raises(ValueError, match=r"must be even"):
        distill(*model_of(HYENA), order=3)
    with pytest.raises(ValueError, match=r"for language models.*Linear"):
        distill(torch.nn.Linear(1, 1), model_of(HYENA)[1])
