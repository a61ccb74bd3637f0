"""One torch thread a worker, and memory that is not conveniently zero."""

import contextlib

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """A context in which torch.empty returns NaN, so a kernel that forgets to write an element is seen."""

    @contextlib.contextmanager
    def poison():
        with monkeypatch.context() as patch:
            for name in ("empty", "empty_like"):
                original = getattr(torch, name)

                def filled(*args, _original=original, **kwargs):
                    tensor = _original(*args, **kwargs)
                    floating = tensor.is_floating_point() or tensor.is_complex()
                    return tensor.fill_(float("nan")) if floating and tensor.device.type != "meta" else tensor

                patch.setattr(torch, name, filled)
            yield

    return poison
