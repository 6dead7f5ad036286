"""A browser's websocket to an NBOS kernel: what its session's cells have shown is given to it again when it comes.

Guarantees: a websocket of a session whose earlier one broke off, or whose server was another one, is given all that is
kept of its cells (`keeping.py`), in order with what follows; nobody else's; the limit on the rate of outputs, which
would throw most of it away, does not count for it. Kernels that are not NBOS's are as ever.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from jupyter_client.session import DELIM
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from tornado.ioloop import IOLoop

from nbos_cluster.kept import SHOWN

from .keeping import AGAIN
from .messages import BadMessage, parse
from .provisioner import NBOSProvisioner


class NBOSWebsocketConnection(ZMQChannelsWebsocketConnection):
    """Set by the extension as the server's `kernel_websocket_connection_class`, where that is the stock one."""

    _again = False
    _expects_welcome = False

    def connect(self) -> Any:
        """Called when the websocket is open; what is returned resolves when messages flow."""
        if not is_nbos(self.kernel_manager):
            return super().connect()
        # While a cell runs, a websocket is opened without waiting for its subscription to outputs. What was said again
        # before that would be lost: the router's iopub_welcome tells.
        buffered = self.multi_kernel_manager._kernel_buffers.get(self.kernel_id, {}).get("session_key")
        busy = getattr(self.kernel_manager, "execution_state", "") == "busy"
        self._expects_welcome = busy and buffered != self.session_key
        connected = super().connect()
        if connected is not None and not self._expects_welcome:
            connected.add_done_callback(lambda connected: self._ask())
        elif connected is not None:
            IOLoop.current().call_later(WELCOME, self._welcomed)
        return connected

    def _welcomed(self) -> None:
        if self._expects_welcome:
            self._expects_welcome = False
            self._ask()

    def request_kernel_info(self) -> Any:
        """Called before the websocket opens. On control, which answers while a cell runs: a new server finds kernels
        that run one, and no websocket would open before its end (or for a minute)."""
        if is_nbos(self.kernel_manager) and not hasattr(self.kernel_manager, "_kernel_info_future"):
            self.kernel_info_channel = self.multi_kernel_manager.connect_control(self.kernel_id)
        return super().request_kernel_info()

    def _ask(self) -> None:
        control = self.channels.get("control")
        if control is not None and not control.closed():
            self.session.send(control, "nbos_outputs_request", {"session": self.session.session})
            self.multi_kernel_manager.nbos_connected(self.kernel_id, self.session.session)

    def handle_outgoing_message(self, stream: Any, outgoing_msg: list[Any]) -> None:
        topic = outgoing_msg[0]
        if topic == DELIM:
            self._welcomed()
        if not topic.startswith(AGAIN):
            super().handle_outgoing_message(stream, outgoing_msg)
        elif topic[len(AGAIN) :] == self.session.bsession:
            self._again = True
            try:
                super().handle_outgoing_message(stream, outgoing_msg)
            finally:
                self._again = False

    def _limit_rate(self, channel: str, msg: dict[str, Any], msg_list: list[Any]) -> bool:
        """Called for each message that goes out; whether it is left out."""
        return not self._again and bool(super()._limit_rate(channel, msg, msg_list))


def is_nbos(km: Any) -> bool:
    return isinstance(getattr(km, "provisioner", None), NBOSProvisioner)


def open_websocket(kernel_id: str, session: str) -> Any:
    """The handler of this session's open websocket to this kernel, or None."""
    return ZMQChannelsWebsocketConnection._open_sessions.get(f"{kernel_id}:{session}")


WELCOME = 2.0
"""Seconds after which a subscription is taken to be in force, should no iopub_welcome say so."""

_OF_CELLS = SHOWN | {"status", "execute_input", "execute_reply"}


class Offline(deque[tuple[str, list[Any]]]):
    """What the server keeps for a session that is away, besides what the router does: comms, replies, other outputs.

    Jupyter Server's own list has no bound. `dropped`: messages that were too many.
    """

    def __init__(self, size: int, messages: int) -> None:
        super().__init__()
        self._left, self._most = size, messages
        self.dropped = 0

    def take(self, channel: str, frames: list[Any]) -> None:
        if kept_by_router(frames):
            return
        self.append((channel, frames))
        self._left -= sum(map(len, frames))
        while len(self) > self._most or (self._left < 0 and self):
            _, oldest = self.popleft()
            self._left += sum(map(len, oldest))
            self.dropped += 1


def kept_by_router(frames: list[Any]) -> bool:
    """Whether this is what a numbered cell shows or answers (a page that has its end takes no outputs any more), or
    what was given again."""
    if frames[0].startswith(AGAIN):
        return True
    try:
        message = parse(frames)
        parent = message.parent
    except BadMessage:
        return False
    of_cell = parent.get("msg_type") == "execute_request" and parent.get("subshell_id") is None
    return of_cell and message.msg_type in _OF_CELLS
