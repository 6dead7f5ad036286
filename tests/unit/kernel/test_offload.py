"""Tensors go to host memory and come back into the same objects. Memory of this machine plays the device."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbos_kernel.capture import parked
from nbos_kernel.gpu import offload
from nbos_kernel.gpu.offload import Moved

torch = pytest.importorskip("torch")


class Device:
    """Storages that count as on the device, by address."""

    def __init__(self) -> None:
        self.holds: set[int] = set()
        self.copies = 0

    def put(self, *tensors: Any) -> None:
        self.holds |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def has(self, tensor: Any) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self.holds

    def to_host(self, storage: Any) -> tuple[Any, Any]:
        memory = np.frombuffer(bytes(storage.tolist()), np.uint8).copy()
        return torch.from_numpy(memory).untyped_storage(), memory

    def copied(self) -> None:
        self.copies += 1

    def offload(self) -> Moved:
        moved = offload.offload(torch, self.has, self.to_host, self.copied)
        self.holds.clear()
        return moved

    def bring_home(self) -> None:
        def move(storage: Any, home: str) -> Any:
            back = storage.clone()
            self.holds.add(back.data_ptr())
            return back

        parked.bring_home(move)


@pytest.fixture
def device() -> Iterator[Device]:
    yield Device()
    parked._homes.clear()
    parked._waiting.clear()


def test_a_tensor_and_its_view_go_and_come_back_as_the_same_objects(device: Device) -> None:
    whole = torch.arange(6.0)
    part, turned = whole[2:], whole.view(2, 3).t()
    device.put(whole)
    before = whole.untyped_storage().data_ptr()
    assert device.offload() == Moved(3, 24, {})
    assert (device.copies, parked.anything()) == (1, True)
    assert whole.untyped_storage().data_ptr() != before
    assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]
    device.bring_home()
    assert all(device.has(tensor) for tensor in (whole, part, turned))
    whole[2] = 20.0
    assert (part[0].item(), turned[2, 0].item()) == (20.0, 20.0)


def test_the_devices_memory_is_free_afterwards(device: Device) -> None:
    array = np.zeros(4096, np.uint8)
    gone: list[int] = []
    weakref.finalize(array, gone.append, 1)
    tensor = torch.from_numpy(array)
    hidden = tensor[1:][1:]  # its base is a tensor that Python does not name
    device.put(tensor)
    del array
    assert device.offload().bytes == 4096
    gc.collect()
    assert gone == [1]
    assert hidden.shape == (4094,)


def test_a_base_that_python_does_not_name_goes_with_its_view(device: Device) -> None:
    view = torch.arange(8.0)[2:]
    device.put(view)
    assert device.offload() == Moved(2, 32, {})
    assert view.tolist() == [2, 3, 4, 5, 6, 7]


def test_a_gradient_that_nobody_has_looked_at_goes_too(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(777, requires_grad=True)
    (weight * 2).sum().backward()
    monkeypatch.setattr(device, "has", lambda tensor: tensor.shape == (777,))
    assert device.offload() == Moved(2, 2 * 4 * 777, {})
    assert weight.grad[0] == 2.0


def test_training_goes_on_where_it_was(device: Device) -> None:
    def train(steps: int, pause: bool) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        x = torch.ones(5, 3)
        losses = []
        for _ in range(steps):
            loss = (net(x) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del loss
            if pause:
                tensors = [*net.parameters(), *(p.grad for p in net.parameters()), x]
                tensors += [v for s in optimizer.state.values() for v in s.values()]
                device.put(*tensors)
                assert device.offload().tensors >= len(tensors)
                device.bring_home()
        return losses

    assert train(4, pause=True) == train(4, pause=False)


@pytest.mark.parametrize("offset", [0, 100])
def test_what_dlpack_made_of_it_goes_on_sharing_its_memory(device: Device, offset: int) -> None:
    shared = torch.zeros(256)
    other = torch.from_dlpack(torch.utils.dlpack.to_dlpack(shared[offset:]))
    device.put(shared, other)
    moved = device.offload()
    assert (moved.tensors, list(moved.left)) == (0, [offload.HELD])
    shared[offset] = 7.0
    assert other[0] == 7.0


def test_beside_a_library_that_may_look_at_the_memory_nothing_moves(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    tensor = torch.ones(2)
    device.put(tensor)
    assert device.offload() == Moved(0, 0, {"cupy is loaded, and may look at the same memory": 8})


def test_a_graph_that_is_still_to_be_run_backward_keeps_its_values(device: Device) -> None:
    weight = torch.full((8,), 3.0, requires_grad=True)
    middle = weight.exp()  # exp saves its result
    device.put(weight, middle)
    moved = device.offload()
    assert moved.left == {offload.HELD: 32}
    device.bring_home()
    middle.sum().backward()
    assert torch.allclose(weight.grad, torch.full((8,), 3.0).exp())


def test_conjugate_views_stay_with_all_that_shares_their_memory(device: Device) -> None:
    number = torch.tensor([1 + 2j])
    mirrored = number.conj()
    device.put(number)
    assert device.offload().left == {offload.KIND: 8}
    assert mirrored.resolve_conj().tolist() == [1 - 2j]


def test_with_a_captured_graph_nothing_moves(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    graph, tensor = Graph(), torch.ones(2)
    device.put(tensor)
    assert device.offload() == Moved(0, 0, {offload.GRAPH: 8})
    del graph


def test_a_copy_that_fails_leaves_everything_where_it_is(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = torch.ones(2), torch.ones(3)
    device.put(one, two)
    places = [one.untyped_storage().data_ptr(), two.untyped_storage().data_ptr()]

    def full(storage: Any) -> Any:
        if storage.nbytes() == 12:
            raise RuntimeError("no host memory left")
        return Device.to_host(device, storage)

    monkeypatch.setattr(device, "to_host", full)
    with pytest.raises(RuntimeError, match="no host memory"):
        device.offload()
    assert [one.untyped_storage().data_ptr(), two.untyped_storage().data_ptr()] == places
    assert not parked.anything()


def test_while_it_is_away_a_tensor_is_known_as_its_devices(device: Device) -> None:
    tensor = torch.ones(2)
    device.put(tensor)
    device.offload()
    assert parked.home_of(tensor.untyped_storage()) == "cpu"  # the device that is played here
    address = tensor.untyped_storage().data_ptr()
    del tensor
    gc.collect()
    assert address not in parked._homes


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=5))
def test_any_pattern_of_sharing_survives(shapes: list[tuple[int, list[int]]]) -> None:
    device = Device()
    groups = [
        [base, *(base[offset:] for offset in offsets if offset < size)]
        for size, offsets in shapes
        for base in [torch.arange(float(size))]
    ]
    device.put(*(group[0] for group in groups))
    values = [[tensor.tolist() for tensor in group] for group in groups]
    device.offload()
    device.bring_home()
    assert [[tensor.tolist() for tensor in group] for group in groups] == values
    for group in groups:
        assert len({tensor.untyped_storage().data_ptr() for tensor in group}) == 1
        group[0][-1] = -1.0
        assert all(tensor[-1].item() == -1.0 for tensor in group)


def test_what_came_of_it_reads_well() -> None:
    text = str(Moved(3, 2 << 30, {offload.HELD: 1 << 30}))
    assert text.startswith("3 tensors (2.00 GiB) moved to host memory; 1.00 GiB stay: held by something else too")
