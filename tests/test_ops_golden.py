"""Ops against the outputs and gradients of the authors' own kernels, where an op is all that they are."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import error, load

from longwave.ops import linear_attention, short_conv

PIECES = Path(__file__).parent / "golden/pieces"


def ssd_minimal(X, A, B, C, initial_states=None):
    state = None if initial_states is None else initial_states[:, 0].transpose(2, 3)
    y, state = linear_attention(C, B, X, A, state, backend="torch")
    return {"y": y, "final_state": state.transpose(2, 3)}


def ssd_scan(x, dt, A, B, C, D, dt_bias, z=None):
    dt = F.softplus(dt + dt_bias)
    y, _ = linear_attention(C, B, x * dt[..., None], dt * A, backend="torch")
    y = y + x * (D if D.ndim == 2 else D[:, None])
    return {"y": y if z is None else y * F.silu(z)}


def causal_conv1d(x, weight, bias, initial_states=None, *, activation=None):
    past = None if initial_states is None else initial_states.transpose(1, 2)
    past = x.new_zeros(len(x), weight.shape[1] - 1, len(weight)) if past is None else past
    y, past = short_conv(x.transpose(1, 2), weight, bias, past, silu=activation == "silu", backend="torch")
    return {"y": y.transpose(1, 2), "final_states": past.transpose(1, 2)}


RUNS = {
    "ssd_minimal": ssd_minimal,
    "ssd_scan": ssd_scan,
    "causal_conv1d": causal_conv1d,
}
FILES = [path for path in sorted(PIECES.glob("*.safetensors")) if path.stem.partition("__")[0] in RUNS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_and_every_gradient(path):
    case = load(path)
    inputs = {key: t.requires_grad_() for key, t in case.inputs(torch.float64).items()}
    options = {"activation": case.config["activation"]} if case.system == "causal_conv1d" else {}
    ours, theirs = RUNS[case.system](**inputs, **options), case.part("output64.")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert error(ours[key], theirs[key]) < 1e-9, key
    cotangents = case.part("cotangent.") or {"y": case.tensors["cotangent"]}
    sum((ours[key] * c).sum() for key, c in cotangents.items()).backward()
    recorded = case.part("grad64.input.")
    assert recorded
    for key, grad in recorded.items():
        assert error(inputs[key].grad, grad) < 1e-9, key


def test_every_kind_of_file_is_there():
    assert {path.stem.partition("__")[0] for path in FILES} == set(RUNS)
