"""The instructions of one step of the router, and the messages that the router itself says to clients and replicas."""

from __future__ import annotations

from typing import Any

from .instructions import Channel, Instruction, Log, Publish, Tell, ToClient, ToReplica
from .messages import Message, Signer


class Outbox:
    """Collects instructions until `take` hands them to whoever carries them out."""

    def __init__(self, signer: Signer) -> None:
        self.signer = signer
        self._items: list[Instruction] = []
        self.append = self._items.append

    def take(self) -> list[Instruction]:
        items = self._items[:]
        self._items.clear()
        return items

    def publish(self, msg_type: str, content: dict[str, Any], parent: dict[str, Any], topic: bytes = b"") -> None:
        _, frames = self.signer.make(msg_type, content, parent)
        self.append(Publish([topic or b"kernel.nbos." + msg_type.encode(), *frames]))

    def status(self, state: str, parent: dict[str, Any]) -> None:
        self.publish("status", {"execution_state": state}, parent)

    def note(self, text: str, parent: dict[str, Any]) -> None:
        """A line of the router in a cell's output."""
        self.publish("stream", {"name": "stderr", "text": f"NBOS: {text}\n"}, parent, b"stream.stderr")

    def reply(self, request: Message, content: dict[str, Any], channel: Channel = "shell") -> None:
        msg_type = request.msg_type.removesuffix("_request") + "_reply"
        metadata = {"status": content.get("status", "ok")}
        _, frames = self.signer.make(msg_type, content, request.header, metadata)
        self.append(ToClient(channel, [*request.idents, *frames]))

    def ask(self, replica: int, msg_type: str, content: dict[str, Any]) -> str:
        """A request of the router to a replica's control thread; its msg_id."""
        msg_id, frames = self.signer.make(msg_type, content)
        self.append(ToReplica(replica, "control", frames))
        return msg_id

    def tell(self, event: dict[str, Any]) -> None:
        self.append(Tell(event))

    def log(self, text: str) -> None:
        self.append(Log(text))


def error(ename: str, evalue: str) -> dict[str, Any]:
    """The content of an error reply (and of the error on iopub)."""
    return {"status": "error", "ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}
