"""One torch thread a worker, and memory that is not conveniently zero."""

import contextlib
import io
import sys

import numpy as np
import pytest
import torch

from longwave import cli, own
from longwave.mixers import MIXERS
from longwave.nn import FILTERS
from longwave.tasks import TASKS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _malloc_as_it_is(monkeypatch):
    """The command line in this process would change it for the tests after it, some of which measure memory."""
    monkeypatch.setattr("longwave.train.memory.keep_freed_memory", lambda: True)


@pytest.fixture(autouse=True)
def _own_classes_stay_in_their_test():
    tables, files = (MIXERS, FILTERS, TASKS), dict(own._modules)
    before = [dict(table) for table in tables]
    yield
    own._modules.clear()
    own._modules.update(files)
    for table, names in zip(tables, before):
        table.clear()
        table.update(names)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call("show", "demo")`` in this process -> (exit code, stdout, stderr)."""

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["longwave", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def poisoned_memory(monkeypatch):
    """A context in which memory from torch and numpy is NaN at first, so a kernel that forgets an element is seen."""

    @contextlib.contextmanager
    def poison():
        with monkeypatch.context() as patch:
            places = [(torch, ("empty", "empty_like", "empty_strided"))]
            places.append((torch.Tensor, ("new_empty", "new_empty_strided")))
            for place, name in ((place, name) for place, names in places for name in names):
                original = getattr(place, name)

                def filled(*args, _original=original, **kwargs):
                    tensor = _original(*args, **kwargs)
                    floating = tensor.is_floating_point() or tensor.is_complex()
                    return tensor.fill_(float("nan")) if floating and tensor.device.type != "meta" else tensor

                patch.setattr(place, name, filled)
            empty = np.empty

            def filled_array(shape, dtype=float, *args, **kwargs):
                array = empty(shape, dtype, *args, **kwargs)
                if array.dtype.kind == "f":
                    array.fill(np.nan)
                return array

            patch.setattr(np, "empty", filled_array)
            yield

    return poison
