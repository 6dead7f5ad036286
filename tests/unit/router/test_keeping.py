"""A page, the routers that come and go, and a replica that keeps what its cells show: whatever breaks off when, a page
that is back shows all of it, in order, once, and its cells have their reply.

Router and replica's keeper are the real ones; what is made up is the connections between them, which lose what they
carry when an end of them is gone.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbos_cluster.kept import Bounds
from nbos_kernel.keeping import Keeper
from nbos_provisioner.filing import outputs
from nbos_provisioner.instructions import (
    Client,
    FromReplica,
    Member,
    Members,
    Output,
    Publish,
    Tell,
    ToClient,
    ToReplica,
    Up,
)
from nbos_provisioner.keeping import AGAIN
from nbos_provisioner.messages import Message, Signer, parse
from nbos_provisioner.router_core import RouterCore
from nbos_provisioner.websocket import Offline

KEY = b"key"
OTHER = 1


class Chain:
    """One replica (0) that runs cells, another one (1) that does not, a router, a page with the session `page`."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.page, self.replica = Signer(KEY, "page"), Signer(KEY, "replica")
        self.keeper = Keeper()
        self.n, self.routers = 0, 0
        self.running: Message | None = None
        self.connected = True
        self.truth: dict[str, str] = {}
        self.screen: dict[str, str] = {}
        self.done: dict[str, set[str]] = {}
        self.told: list[Any] = []
        self.start_router()

    # -- the router, and what reaches it

    def start_router(self, order: tuple[int, ...] = (0, OTHER)) -> None:
        self.routers += 1
        self.core = RouterCore(Signer(KEY, f"router-{self.routers}"), keep=self.bounds)
        self.inbox: list[tuple[int, Message]] = []
        self.shown: list[list[Any]] = []
        self.asker = self.routers
        ports = {"shell": 1}
        members = [Member(i, f"host-{i}", "ready", "127.0.0.1", ports, pid=1 + i) for i in (0, OTHER)]
        self.event(Members(1, tuple(members)))
        for index in order:
            self.event(Up(index))
            self.control()

    def event(self, event: Any) -> None:
        for item in self.core.handle(event, 0.0):
            if isinstance(item, ToReplica):
                self.inbox.append((item.replica, parse(item.frames)))
            elif isinstance(item, Publish) and self.connected:
                self.see(item.frames)
            elif isinstance(item, Tell):
                self.told.append(item.event)
            elif isinstance(item, ToClient) and self.connected:
                message = parse(item.frames)
                if message.msg_type == "execute_reply":
                    self.done[message.parent["msg_id"]].add("reply")

    def see(self, frames: list[Any]) -> None:
        """What JupyterLab makes of a message."""
        if frames[0].startswith(AGAIN) and frames[0] != AGAIN + b"page":
            return
        message = parse(frames)
        key = message.parent.get("msg_id", "")
        if key not in self.screen:
            return
        if message.msg_type == "clear_output":
            self.screen[key] = ""
        elif message.msg_type == "stream":
            self.screen[key] += message.content["text"]
        elif message.msg_type == "status" and message.content["execution_state"] == "idle":
            self.done[key].add("idle")

    # -- the replica

    def control(self) -> None:
        """Replicas read what the router has asked of them."""
        while self.inbox:
            index, message = self.inbox.pop(0)
            if message.msg_type == "nbos_status_request":
                content = {"status": "ok", "next": self.n + 1, "executor": 0 if self.n else -1}
                _, frames = self.replica.make("nbos_status_reply", content, message.header)
                self.event(FromReplica(index, "control", parse(frames)))
            elif message.msg_type == "nbos_outputs_request" and index == 0:
                self.keeper.settle(message.content.get("forget") or (), message.content.get("file") or ())
                if message.content.get("publish"):
                    self.publish("nbos_outputs", self.keeper.dump(), {})
            elif message.msg_type == "execute_request" and index == 0:
                self.lead(message)
            elif message.msg_type == "execute_request":
                content = {"n": message.metadata["nbos_execution"]["n"], "code": "behind", "reason": "", "next": None}
                _, frames = self.replica.make("nbos_yield", content, message.header)
                self.event(FromReplica(index, "shell", parse(frames)))

    def lead(self, message: Message) -> None:
        self.n, self.running, self.asker = message.metadata["nbos_execution"]["n"], message, self.routers
        self.shell("nbos_lead", {"n": self.n, "token": self.n, "host": "host-0"})
        content, header, metadata = message.content, message.header, message.metadata
        self.keeper.begin({"header": header, "metadata": metadata, "content": content})
        self.publish("execute_input", {"execution_count": self.n}, header)

    def shell(self, kind: str, content: dict[str, Any]) -> None:
        """To the router that asked for the cell; another one never hears it."""
        assert self.running is not None
        _, frames = self.replica.make(kind, content, self.running.header)
        if self.asker == self.routers:
            self.event(FromReplica(0, "shell", parse(frames)))

    def publish(self, kind: str, content: dict[str, Any], parent: dict[str, Any]) -> None:
        topic = b"stream.stdout" if kind == "stream" else kind.encode()
        _, frames = self.replica.make(kind, content, parent)
        self.keeper.see([topic, *frames])
        self.shown.append([b"nbos.%d." % self.n + topic, *frames])

    def write(self, text: str) -> None:
        assert self.running is not None
        self.truth[self.running.msg_id] += text
        self.publish("stream", {"name": "stdout", "text": text}, self.running.header)

    def clear(self) -> None:
        assert self.running is not None
        self.truth[self.running.msg_id] = ""
        self.publish("clear_output", {"wait": False}, self.running.header)

    def finish(self) -> None:
        assert self.running is not None
        content = {"status": "ok", "execution_count": self.n, "user_expressions": {}, "payload": []}
        self.keeper.replied(self.running.msg_id, content)
        self.shell("execute_reply", content)
        self.publish("status", {"execution_state": "idle"}, self.running.header)
        self.shell("nbos_committed", {"n": self.n})
        self.running = None

    # -- the page

    def execute(self) -> str:
        content = {"code": "x", "silent": False}
        key, frames = self.page.make("execute_request", content, metadata={"cellId": f"cell-{len(self.truth)}"})
        self.truth[key], self.screen[key], self.done[key] = "", "", set()
        self.event(Client("shell", self.core.out.signer.check([b"page", *frames])))
        self.control()
        return key

    def ask(self, content: dict[str, Any]) -> None:
        _, frames = self.page.make("nbos_outputs_request", content)
        self.event(Client("control", self.core.out.signer.check([b"page", *frames])))

    def connect(self) -> None:
        self.connected = True
        self.ask({"session": "page"})

    def hear(self) -> None:
        self.event(Output(0, self.shown.pop(0)))

    def drain(self) -> None:
        while self.shown or self.inbox:
            self.control()
            if self.shown:
                self.hear()


class ChainMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.chain = Chain()
        self.count = 0

    @precondition(lambda self: self.chain.running is None and self.chain.connected)
    @rule()
    def execute(self) -> None:
        self.chain.drain()
        self.chain.execute()

    @precondition(lambda self: self.chain.running)
    @rule()
    def write(self) -> None:
        self.count += 1
        self.chain.write(f"{self.count}\n")

    @precondition(lambda self: self.chain.running)
    @rule()
    def clear(self) -> None:
        self.chain.clear()

    @precondition(lambda self: self.chain.running)
    @rule()
    def finish(self) -> None:
        self.chain.finish()

    @precondition(lambda self: self.chain.shown)
    @rule()
    def hear(self) -> None:
        self.chain.hear()

    @rule()
    def control(self) -> None:
        self.chain.control()

    @rule()
    def page_goes(self) -> None:
        self.chain.connected = False

    @rule()
    def page_comes(self) -> None:
        self.chain.connect()

    @rule(order=st.permutations((0, OTHER)), page=st.booleans())
    def server_dies(self, order: list[int], page: bool) -> None:
        """With what was on its way to it; its page is given nothing before it has come again."""
        self.chain.connected = False
        self.chain.start_router(tuple(order))
        if page:
            self.chain.connect()

    @invariant()
    def nothing_is_shown_twice(self) -> None:
        if hasattr(self, "chain"):
            for text in self.chain.screen.values():
                numbers = [int(word) for word in text.split()]
                assert numbers == sorted(set(numbers))

    def teardown(self) -> None:
        if not hasattr(self, "chain"):
            return
        if self.chain.running:
            self.chain.finish()
        self.chain.drain()
        if not self.chain.connected:  # a page that is there has to be content with what it was given
            self.chain.connect()
            self.chain.drain()
        assert self.chain.screen == self.chain.truth
        told = {event["msg_id"] for event in self.chain.told if event["event"] == "cell_ended"}
        assert told == set(self.chain.done), "the server is told of every end"
        assert all(done == {"reply", "idle"} for done in self.chain.done.values()), self.chain.done


ChainMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestChain = ChainMachine.TestCase


def test_the_executor_of_a_running_cell_may_be_connected_after_another_replica() -> None:
    chain = Chain()
    key = chain.execute()
    chain.write("before\n")
    chain.connected = False
    chain.start_router((OTHER, 0))
    chain.connect()
    chain.write("after\n")
    chain.drain()
    assert chain.screen[key] == "before\nafter\n"


def test_a_page_that_comes_between_reply_and_idle_has_both() -> None:
    """The reply went to a server that keeps none for a page that is away; idle is still to come."""
    chain = Chain()
    key = chain.execute()
    chain.connected = False
    chain.finish()
    chain.connect()
    chain.drain()
    assert chain.done[key] == {"reply", "idle"}


def test_what_is_settled_is_forgotten_by_the_replica_as_well() -> None:
    chain = Chain()
    key = chain.execute()
    chain.write("x")
    chain.finish()
    chain.drain()
    chain.ask({"forget": [key]})
    chain.control()
    assert (chain.keeper.dump()["cells"], chain.core.keeping.kept.dump()) == ([], [])


def test_what_is_missing_stands_first_with_how_much() -> None:
    chain = Chain(Bounds(20_000, 100))
    key = chain.execute()
    for i in range(200):
        chain.write(f"{i:_>1000}\n")
        chain.hear()
    chain.drain()
    chain.connect()
    first, second, *_ = chain.screen[key].splitlines()
    assert first.startswith("NBOS: ")
    assert f"{int(second.strip('_'))} earlier messages" in first
    [cell] = chain.core.keeping.kept.dump()
    [note, text, runs] = outputs({**cell, "note": f"{first}\n"})
    assert (note["text"], text["text"][-4:]) == (f"{first}\n", "199\n")
    assert "still runs" in runs["text"]


@pytest.mark.parametrize("cells", [7, [7], [{}], [{"header": 3}], [{"header": {"msg_id": "m"}, "pieces": [[1]]}]])
def test_nonsense_of_a_replica_changes_nothing(cells: Any) -> None:
    chain = Chain()
    key = chain.execute()
    chain.publish("nbos_outputs", {"cells": cells}, {})
    chain.write("x")
    chain.drain()
    assert chain.screen[key] == "x"


def test_the_server_keeps_what_the_router_does_not_and_no_more_than_its_bound() -> None:
    def frames(kind: str, parent: str, size: int = 10) -> list[Any]:
        header = {"msg_id": "p", "msg_type": parent}
        return [b"", *Signer(KEY, "s").make(kind, {"text": "x" * size}, header)[1]]

    offline = Offline(100_000, 50)
    offline.take("iopub", frames("stream", "execute_request"))
    assert not offline, "the router has it"
    for _ in range(200):
        offline.take("iopub", frames("comm_msg", "execute_request"))
        offline.take("iopub", frames("stream", "comm_msg"))
    assert (len(offline), offline.dropped) == (50, 350)
    for _ in range(20):
        offline.take("shell", frames("complete_reply", "complete_request", 30_000))
    assert len(offline) <= 3
