"""Within frozen(model) what follows from weights alone is derived once, and nobody else is affected."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from longwave.nn import derived, frozen
from longwave.nn.module import checksums


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2)), 0

    @derived
    def twice(self, power=1):
        self.calls += 1
        return 2 * self.weight**power


@pytest.fixture
def module():
    return Doubler()


def test_derived_once_an_argument(module):
    with torch.no_grad(), frozen(module):
        assert module.twice() is module.twice()
        assert module.twice(2) is module.twice(2)
    assert module.calls == 2
    with torch.no_grad():
        assert module.twice() is not module.twice()


def test_gradients_are_recorded_within(module):
    with frozen(module):
        module.twice().sum().backward()
        module.twice()
    assert module.weight.grad is not None
    assert module.calls == 2


def test_is_gone_at_its_end_and_kept_where_entered_again(module):
    keep = frozen(module)
    with torch.no_grad():
        with keep:
            before = module.twice()
        module.weight.fill_(3)
        with frozen(module):
            assert module.twice()[0] == 6
        with keep:
            assert module.twice() is before


def test_inner_shares_what_the_outer_keeps(module):
    with torch.no_grad(), frozen(module):
        before = module.twice()
        with frozen(nn.Sequential(module)):
            assert module.twice() is before
        assert module.twice() is before


def test_copies_threads_and_other_models_derive_anew(module):
    results = []
    with torch.no_grad(), frozen(module):
        before, twin, other = module.twice(), copy.deepcopy(module), Doubler()
        twin.weight.fill_(5)
        assert twin.twice()[0] == 10
        assert other.twice() is not other.twice()
        thread = threading.Thread(target=lambda: results.append(module.twice()))
        thread.start()
        thread.join()
        assert results[0] is not before
        assert torch.equal(results[0], before)


def test_two_threads_enter_one(module):
    """Who came first leaves first; each leaves what it entered, and both have what is kept."""
    keep, turn = frozen(module), threading.Barrier(2, timeout=60)

    @torch.no_grad()
    def first():
        with keep:
            kept = module.twice()
            turn.wait()
            turn.wait()
        turn.wait()
        assert module.twice() is not kept
        return kept

    @torch.no_grad()
    def second():
        turn.wait()
        with keep:
            turn.wait()
            turn.wait()
            kept = module.twice()
        assert module.twice() is not kept
        return kept

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.submit(first), threads.submit(second)
        assert one.result() is other.result()


def test_a_checksum_is_of_shape_dtype_and_values_also_where_sharded(module):
    (before,) = checksums(module).values()
    for other in (torch.ones(1, 2), torch.ones(2).double(), torch.tensor([1.0, 2.0])):
        module.weight.data = other
        assert checksums(module)["weight"] != before
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module.weight = nn.Parameter(distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,))))
        assert checksums(module)["weight"] == before
        with frozen(module, check=True):
            pass
    finally:
        dist.destroy_process_group()


def test_an_error_ends_it(module):
    with torch.no_grad():
        with pytest.raises(KeyError), frozen(module):
            raise KeyError
        assert module.twice() is not module.twice()


@pytest.mark.parametrize("change", ["in place", "data"])
def test_check_names_what_changed(module, change):
    def run():
        with torch.no_grad(), frozen(nn.Sequential(module), check=True):
            (module.weight if change == "in place" else module.weight.data).add_(1)

    with pytest.raises(RuntimeError, match=r"0.weight was changed within frozen\(model\)"):
        run()
