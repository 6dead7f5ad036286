"""CUDA tensors wait in host memory until a cell has a GPU. Here a host copy plays the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nbos_kernel.capture import arrays, parked

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    yield
    parked._homes.clear()
    parked._waiting.clear()


def arrived(values: Any, home: str = "cuda:0") -> Any:
    """A storage as a standby gets it from the log."""
    return arrays.rebuild_storage(values.numpy().view("u1").copy(), home)


def played(storage: Any, home: str) -> Any:
    return storage.clone()


def test_a_standby_keeps_cuda_tensors_in_host_memory_and_knows_their_device() -> None:
    storage = arrived(torch.arange(4.0))
    assert storage.device.type == "cpu"
    assert parked.home_of(storage) == "cuda:0"


def test_tensors_that_share_a_storage_share_it_on_the_device() -> None:
    storage = arrived(torch.arange(4.0))
    whole = arrays.rebuild_tensor(False, storage, 0, (4,), (1,), torch.float32, False)
    part = arrays.rebuild_tensor(False, storage, 2, (2,), (1,), torch.float32, False)
    before = whole.untyped_storage().data_ptr()
    parked.bring_home(played)
    assert whole.untyped_storage().data_ptr() != before
    whole[3] = 30.0
    assert part.tolist() == [2.0, 30.0]


def test_a_parameter_and_its_gradient_stay_the_same_objects() -> None:
    weight = arrays.rebuild_tensor(True, arrived(torch.ones(2)), 0, (2,), (1,), torch.float32, True)
    gradient = arrays.rebuild_tensor(False, arrived(torch.full((2,), 0.5)), 0, (2,), (1,), torch.float32, False)
    arrays.set_tensor_state(weight, {"grad": gradient, "dict": None})
    optimizer = torch.optim.SGD([weight], lr=1.0)
    parked.bring_home(played)
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]


def test_what_comes_home_is_not_moved_again() -> None:
    tensor = arrays.rebuild_tensor(False, arrived(torch.ones(2)), 0, (2,), (1,), torch.float32, False)
    parked.bring_home(played)
    moves: list[str] = []
    parked.bring_home(lambda storage, home: moves.append(home))
    assert (moves, tensor.tolist()) == ([], [1.0, 1.0])


def test_a_device_without_room_leaves_the_tensor_waiting() -> None:
    tensor = arrays.rebuild_tensor(False, arrived(torch.ones(2)), 0, (2,), (1,), torch.float32, False)

    def full(storage: Any, home: str) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        parked.bring_home(full)
    parked.bring_home(played)
    assert tensor.tolist() == [1.0, 1.0]
    assert not parked._waiting
