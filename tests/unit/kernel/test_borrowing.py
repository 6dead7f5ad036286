"""Following the daemon: at a step, between two lines, stopped, and never where an autograd graph ties the work."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nbos_kernel import binding, borrowed, simgpu
from nbos_kernel.gpu.borrowing import Borrower


class Played:
    """Hands that note what they did. launched: not over before `settle`."""

    def __init__(self) -> None:
        self.at, self.done = frozenset(range(8)), list[str]()
        self.capturing = self.graph = self.launched = False

    def busy(self) -> bool:
        return self.capturing

    def settle(self) -> None:
        self.launched = False
        self.done.append("settle")

    def tied(self) -> bool:
        return self.graph

    def on(self) -> frozenset[int]:
        return self.at

    def move(self, tpcs: frozenset[int], lent: int) -> None:
        assert not self.launched
        self.at = tpcs
        self.done.append(f"move {len(tpcs)}")


class Rig:
    def __init__(self) -> None:
        self.hands, self.said = Played(), list[tuple[int, int]]()
        self.one = Borrower(self.hands, lambda n, version: self.said.append((n, version)))
        self.one.begin("g", 0, self.hands.at, 4)

    def tell(self, version: int, count: int, within: float = 60.0, grant: str = "g") -> None:
        message = {"grant": grant, "n": 3, "version": version, "tpcs": list(range(count)), "lent": 0}
        self.one.told({**message, "within": within})

    def run_until(self, what: Callable[[], bool]) -> None:
        """Lines of Python, as a cell has them."""
        deadline = time.monotonic() + 10
        while not what():
            assert time.monotonic() < deadline, (self.hands.done, self.said)
            time.sleep(0.001)

    def has_said(self, version: int) -> Callable[[], bool]:
        return lambda: (3, version) in self.said


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = signal.getsignal(signal.SIGRTMIN + 11)
    rig = Rig()
    yield rig
    rig.one.end()
    signal.signal(signal.SIGRTMIN + 11, before)


def test_at_the_end_of_a_step_it_settles_moves_and_says_so(rig: Rig) -> None:
    rig.hands.graph = True
    rig.tell(1, 4)
    assert rig.said == []
    rig.one.boundary()
    assert rig.hands.done == ["settle", "move 4"]
    rig.run_until(rig.has_said(1))
    (move,) = rig.one.moves
    assert (move.before, move.after) == (8, 4)


def test_a_cell_without_steps_moves_between_two_lines_when_the_time_is_over(rig: Rig) -> None:
    rig.tell(1, 4, within=0.05)
    rig.run_until(rig.has_said(1))
    assert rig.hands.at == frozenset(range(4))


def test_the_time_is_waited_for(rig: Rig) -> None:
    rig.tell(1, 4, within=60.0)
    rig.run_until(lambda: rig.one._thread is not None)
    assert rig.hands.done == []


def test_a_graph_ties_it_to_its_stream_until_it_stops_and_it_goes_on_when_it_may(rig: Rig) -> None:
    rig.hands.graph = True
    rig.tell(1, 4, within=0.05)
    teller = threading.Thread(target=lambda: (rig.run_until(rig.has_said(1)), rig.tell(2, 8, within=0.05)))
    teller.start()
    rig.run_until(rig.has_said(2))
    teller.join()
    assert "move 4" not in rig.hands.done, "backward would run where the forward pass did"
    assert rig.hands.at == frozenset(range(8))
    assert [move.after for move in rig.one.moves] == [4, 8]


def test_with_nothing_left_it_stands_still_until_it_gets_something(rig: Rig) -> None:
    rig.tell(1, 0)
    lines: list[str] = []
    teller = threading.Thread(target=lambda: (rig.run_until(rig.has_said(1)), lines.append("told"), rig.tell(2, 3)))
    teller.start()
    rig.one.boundary()
    lines.append("next line")
    teller.join()
    assert lines == ["told", "next line"]
    assert rig.hands.at == frozenset(range(3))


def test_a_cell_that_stands_still_can_be_interrupted_and_stops_again(rig: Rig) -> None:
    rig.tell(1, 0, within=0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        rig.run_until(rig.has_said(1))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    teller = threading.Thread(target=interrupt)
    teller.start()
    with pytest.raises(KeyboardInterrupt):
        rig.one.boundary()
    teller.join()
    signal.signal(signal.SIGINT, before)
    again = threading.Thread(target=lambda: (time.sleep(0.01), rig.tell(2, 1, within=0.0)))
    again.start()
    rig.run_until(rig.has_said(2))  # what it does after the interrupt waits, too
    again.join()


def test_a_graph_that_is_being_captured_is_left_alone(rig: Rig) -> None:
    rig.hands.capturing = True
    rig.tell(1, 4, within=0.0)
    rig.run_until(lambda: not rig.one._inbox.qsize())
    rig.one.boundary()
    assert rig.hands.done == []
    rig.hands.capturing = False
    rig.run_until(rig.has_said(1))


def test_what_is_told_of_another_cell_means_nothing(rig: Rig) -> None:
    rig.tell(5, 1, within=0.0, grant="other")
    rig.one.boundary()
    rig.one.end()
    rig.tell(6, 1, within=0.0)
    rig.one.boundary()
    assert rig.hands.done == []


def test_what_was_told_before_the_cell_began_holds_from_its_first_line(rig: Rig) -> None:
    rig.one.end()
    rig.tell(3, 2, grant="next")
    rig.one.begin("next", 1, frozenset(range(8)), 0)
    assert rig.hands.done == ["settle", "move 2"]


# -- this process's hands ---------------------------------------------------------------------------------------------


def hold(tpcs: int, of: int) -> None:
    share: dict[str, Any] = {"uuid": "SIM-1", "index": 0, "model": "m", "tpcs": list(range(tpcs)), "memory": 1 << 30}
    raw = {"grant": "g", "host": "h", "n": 3, "shares": [{**share, "of": of, "whole": False, "kind": "simulated"}]}
    binding._current = binding.from_wire(raw)


def test_simulated_steps_become_slower_and_faster_with_the_tpcs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(8, 16)
    monkeypatch.setattr(simgpu, "_played", None)
    one = borrowed.Loans(lambda n, version: rig.said.append((n, version))).borrower
    one.begin("g", 0, frozenset(range(8)), 0)
    took = []
    for at in range(3):
        message = {"grant": "g", "n": 3, "version": at + 1, "lent": 0, "within": 60.0}
        one.told({**message, "tpcs": [[*range(8)], [0, 1], [*range(2, 14)]][at]})
        simgpu.pace.step()
        took.append(simgpu.run(work=0.12))
    assert took == pytest.approx([0.015, 0.06, 0.01])
    held = binding.grant()
    assert held is not None
    assert held.tpcs == 12
    one.end()
    binding.unbind()


def test_a_running_simulated_kernel_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(4, 8)
    monkeypatch.setattr(simgpu, "_played", None)
    one = borrowed.Loans(lambda n, version: rig.said.append((n, version))).borrower
    one.begin("g", 0, frozenset(range(4)), 0)
    began = time.monotonic()
    message = {"grant": "g", "n": 3, "version": 1, "lent": 0, "within": 0.02, "tpcs": [0]}
    threading.Timer(0.05, one.told, [message]).start()
    simgpu.run(work=1.2)
    rig.run_until(rig.has_said(1))
    assert one.moves[0].took + 0.05 >= 0.25
    assert time.monotonic() - began >= 0.3
    assert simgpu.run(work=0.05) == pytest.approx(0.05), "the next one is on one TPC"
    one.end()
    binding.unbind()


class Tensor:
    """What `graph_alive` asks of torch's."""

    is_cuda = property(lambda self: self.cuda)
    grad_fn = property(lambda self: self.fn)

    def __init__(self, cuda: bool, fn: Any) -> None:
        self.cuda, self.fn = cuda, fn


@pytest.mark.parametrize(("cuda", "fn", "alive"), [(True, object(), True), (True, None, False), (False, {}, False)])
def test_a_graph_is_alive_while_a_cuda_tensor_has_one(cuda: bool, fn: Any, alive: bool) -> None:
    kept = [Tensor(cuda, fn)]
    assert borrowed.graph_alive(SimpleNamespace(Tensor=Tensor)) is alive
    assert kept


def test_torch_itself_has_what_is_asked_of_it() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(3, requires_grad=True)
    loss = (x * 2).sum()
    assert torch.Tensor.grad_fn.__get__(loss) is not None
    assert torch.Tensor.is_cuda.__get__(loss) is False
    assert borrowed.graph_alive(torch) is False
    assert "torch" in sys.modules
