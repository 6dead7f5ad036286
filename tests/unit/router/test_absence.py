"""While no replica is there, a client that asks for the kernel is answered once there is a reason to tell."""

from __future__ import annotations

from typing import Any

from nbos_provisioner.instructions import Client, Instruction, Member, Members, Publish, Tick, ToClient
from nbos_provisioner.messages import Signer, parse
from nbos_provisioner.router_core import RouterCore

PULLING = "this host is getting the image lab:1: 3 of 40 MB so far"


def core(reason: str) -> RouterCore:
    router = RouterCore(Signer(b"key"))
    router.handle(Members(1, (Member(0, "gpu-1", "starting", "", {}, -1, 0, reason),), 5), 0.0)
    return router


def ask(router: RouterCore, msg_type: str, now: float, **content: Any) -> list[Instruction]:
    _, frames = Signer(b"key").make(msg_type, content)
    return router.handle(Client("shell", parse([b"client", *frames])), now)


def replies(instructions: list[Instruction]) -> list[str]:
    return [parse(i.frames).msg_type for i in instructions if isinstance(i, ToClient)]


def test_kernel_info_is_answered_after_a_while_and_says_idle() -> None:
    router = core(PULLING)
    assert replies(ask(router, "kernel_info_request", 0.1)) == []
    assert router.deadline() == 2.0
    out = router.handle(Tick(), 2.0)
    assert replies(out) == ["kernel_info_reply"]
    assert len([i for i in out if isinstance(i, Publish)]) == 2
    assert replies(ask(router, "kernel_info_request", 2.5)) == ["kernel_info_reply"]


def test_without_a_reason_it_waits_for_a_replica() -> None:
    router = core("")
    ask(router, "kernel_info_request", 0.1)
    assert replies(router.handle(Tick(), 60.0)) == []


def test_a_waiting_cell_shows_the_reason_as_it_changes() -> None:
    router = core(PULLING)
    ask(router, "execute_request", 0.1, code="1")
    shown = router.handle(Tick(), 1.2)
    assert b"3 of 40 MB so far" in b"".join(b"".join(i.frames) for i in shown if isinstance(i, Publish))
    later = Member(0, "gpu-1", "starting", "", {}, -1, 0, PULLING.replace("3 of", "30 of"))
    shown = router.handle(Members(1, (later,), 6), 2.0)
    assert b"30 of 40 MB so far" in b"".join(b"".join(i.frames) for i in shown if isinstance(i, Publish))
