"""The kernel of a replica: ipykernel's, with numbered executions, a fence around its outputs and a daemon behind
it.

What differs from ipykernel, each for a reason in docs/protocol.md, section 2:
- an execute_request of the main shell runs only when this replica wins its claim; a yield leaves no trace on iopub;
- `busy` of such a request is the router's to publish, and messages of NBOS's own never show as status;
- an error does not abort what is queued: the router does that, for all replicas alike;
- the control thread answers NBOS's questions while a cell runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import zmq
from ipykernel.jsonutil import json_clean
from ipykernel.zmqshell import ZMQInteractiveShell
from traitlets import Type, Unicode

from nbos_cluster.wire import FORMAT

from . import __version__, binding, lost, magics
from .blobchannel import BlobChannel, BlobFailed, Target
from .departure import Departure
from .entries import has_blobs
from .execution import Execution
from .gpu import budget
from .iopub import MEMBERS_TOPIC
from .lazy.kernel import PERMANENT, LoadingKernel
from .lazy.loading import BlobMissing, Lazy, NotLoadedError
from .link import DaemonAway, Link
from .replay import hush, marking
from .replica import Replica
from .reports.reporter import Reporter
from .reports.views import Views
from .settings import RecordingShell

Message = dict[str, Any]

GATHER = 0.05
"""Seconds in which a standby gathers entries before it applies them: while cells follow each other it is woken, and
tells its daemon how far it is, once for many. Entries with blobs are worth being woken for."""

THAW_PAUSE = 0.5
"""Seconds between two questions whether this process may use its GPU again."""

SOON = 0.05
"""Seconds after which it is looked again whether device memory can be given back now."""

ASK_AGAIN = 0.02
"""Seconds until a question for input is sent again that could not reach the router."""

DIRECT = (
    "this is one replica of an NBOS kernel; cells go through the kernel's router (the ports that the Jupyter Server "
    "gives), which numbers them in metadata.nbos_execution"
)


class NBOSShell(RecordingShell, ZMQInteractiveShell):
    """IPython's shell; a NameError about a lost name gets the reason, an error for want of device memory its budget."""

    lost_names: dict[str, str] | None = None
    lazy: Lazy | None = None

    def showtraceback(self, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
        error = exc_tuple[1] if exc_tuple else sys.exc_info()[1]
        if self.lost_names or self.lazy:
            lost.explain(error, self.lost_names or {}, self.lazy)
        budget.explain(error, binding.grant())
        super().showtraceback(exc_tuple, *args, **kwargs)

    def ask_exit(self) -> None:
        """`exit` is answered as ipykernel does, but ends no replica: another one would only take over."""
        self.payload_manager.write_payload({"source": "ask_exit", "keepkernel": self.keepkernel_on_exit})
        print("NBOS: a replicated kernel does not end with `exit`; restart it or shut it down.", file=sys.stderr)


class NBOSKernel(LoadingKernel):
    """`nbos_socket`: path of the daemon's socket; the socket is this replica's identity."""

    implementation = "nbos"
    implementation_version = __version__
    shell_class = Type(NBOSShell)
    nbos_socket = Unicode().tag(config=True)

    msg_types: ClassVar[list[str]] = [*LoadingKernel.msg_types, "nbos_sync_request"]
    control_msg_types: ClassVar[list[str]] = [
        *LoadingKernel.control_msg_types,
        "nbos_cancel_request",
        "nbos_outcome_request",
        "nbos_status_request",
        "nbos_outputs_request",
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._main_loop: asyncio.AbstractEventLoop | None = None
        self._led: str = ""
        self._answering: set[asyncio.Task[None]] = set()
        self._applying: asyncio.Task[None] | None = None
        self._gathering = False
        self.departure = Departure()
        self.link = Link(self.nbos_socket, self._hello, self._greeted, self._pushed, self.log)
        self.blobs = BlobChannel(self.link, self.nbos_socket, self.log)
        self.replica = Replica(self.shell, self._read, self.log, self.read_now)
        self.reporter = Reporter(self.link, self.replica.ledger, self._publish_progress, self.log)
        self.execution = Execution(self.shell, self.link, self.replica, self, self.blobs, self.reporter)
        self.shell.lost_names = self.replica.capture.lost
        self.shell.lazy = self.replica.lazy
        self.load_before_callbacks()
        self.shell.settings = self.replica.settings
        marking.install(self.shell, self.replica.records)
        views = Views(self.shell, self.link, self.execution, self.replica, self.reporter)
        self.shell.register_magics(magics.NBOSMagics(self.shell, views.status, views.survey, views.gpu))
        self._execute_sleep = (
            0.0  # outputs and reply take different sockets here and in the router: waiting orders nothing
        )

    def start(self) -> None:
        super().start()
        self.departure.watch(self.shell_channel_thread.shell_stream)
        self._main_loop = self.io_loop.asyncio_loop
        # Has asyncio watch for signals: without it an interrupt of `await asyncio.sleep(60)` sets a future in a loop
        # that goes on sleeping (ipykernel's handler calls tornado's add_callback, which does not wake its own thread).
        self._main_loop.add_signal_handler(signal.SIGURG, lambda: None)
        self.link.start()
        # Reading every package's version takes a while: beside the first cell, before one can have installed any.
        threading.Thread(target=self.replica.watcher.prepare, name="NBOS packages", daemon=True).start()

    # The daemon: these run on the link's thread ------------------------------------------------------------------

    def _hello(self) -> Message:
        ports = {name.removesuffix("_port"): port for name, port in self._recorded_ports.items()}
        return {
            "format": FORMAT,
            "nbos": __version__,
            "pid": os.getpid(),
            "python": sys.version.split()[0],
            "ports": ports,
            "ip": self.parent.ip if self.parent is not None else "127.0.0.1",
            "applied": self.replica.applied,
            "running": self.execution.state(),
            "left": binding.left().left,
            "site": sys.prefix,
        }

    def _greeted(self, reply: Message) -> None:
        self.execution.greeting = reply
        self.reporter.lazy = int(reply.get("lazy") or 0)
        self.replica.leave_unloaded(int(reply.get("lazy") or 0))
        said = reply.get("blobs") or {}
        self.blobs.renew(files=bool(said.get("files")), addresses=bool(said.get("addresses")))
        if isinstance(reply.get("members"), dict):
            self._publish_members(reply["members"])

    def _pushed(self, message: Message, payload: bytes) -> None:
        kind = message.get("type")
        if kind in ("state", "entry"):
            self.replica.arrived(message, payload)
            if not self._gathering:
                self._gathering = True
                self._soon(self._gather, 0.0 if kind == "state" or has_blobs(message) else GATHER)
        elif kind == "waiting":
            if not self.execution.touching.waiting(message):
                self._soon(self.execution.waiting, message)
        elif kind == "members":
            self._publish_members({key: value for key, value in message.items() if key != "type"})
        elif kind == "token":
            self.execution.renewed(message["n"], message["token"])  # at once: a cell may hold the main thread
        elif kind == "give_back":
            self._soon(self._give_back, message)
        elif kind == "slice":
            self.execution.loans.borrower.told(message)
        elif kind == "gpu_moved":
            binding.moved(str(message.get("from")), str(message.get("to")))
        elif kind == "thawed":
            self.execution.thawed()
        elif kind == "gpu_misuse":
            self._misuse(str(message.get("stage", "")), str(message.get("text", "")))
        elif kind == "exit":
            self._leave(message.get("reason", ""))

    def _soon(self, call: Any, *args: Any) -> None:
        if self._main_loop is not None:
            self._main_loop.call_soon_threadsafe(call, *args)

    def _publish_progress(self, content: Message, parent: Message) -> None:
        """On any thread, within the fence: what is said by a replica that was cut off reaches nobody."""
        self.session.send(self.iopub_socket, "nbos_progress", content, parent=parent, ident=b"nbos_progress")

    def touch(self, content: Message) -> None:
        """How the running cell's wait for a GPU stands that it touched. On any thread: it holds the main one up."""
        content = {**content, "host": self.execution.greeting.get("host", "")}
        self.session.send(self.iopub_socket, "nbos_touch", content, parent=self.execution.latest, ident=b"nbos_touch")

    def _misuse(self, stage: str, text: str) -> None:
        """The daemon saw this kernel use a GPU beyond its grant: say so under the latest cell, and interrupt that while
        it runs. On the link's thread, since the cell may hold the main one."""
        content = {"name": "stderr", "text": f"{text}\n"}
        self.session.send(self.iopub_socket, "stream", content, parent=self.execution.latest, ident=b"stream.stderr")
        if stage == "interrupt" and self.execution.cell_runs():
            os.kill(os.getpid(), signal.SIGINT)

    def _publish_members(self, content: Message) -> None:
        members = content.get("members")
        members = members if isinstance(members, list) else []
        self.reporter.members(members)
        self.replica.lacking.heard(members)
        self.session.send(self.iopub_socket, "nbos_members", content, parent={}, ident=MEMBERS_TOPIC)

    def _leave(self, reason: str) -> None:
        """Leave in an orderly way when the main thread is free, within two seconds in any case."""
        self.log.info("NBOS: the daemon ends this replica: %s", reason)
        timer = threading.Timer(2.0, os._exit, (0,))
        timer.daemon = True
        timer.start()
        self._soon(self.io_loop.stop)

    # The main thread ---------------------------------------------------------------------------------------------

    def _gather(self, seconds: float) -> None:
        """Apply what has arrived within `seconds`. A replica that bids does so before, without waiting for this."""

        def apply() -> None:
            self._gathering = False
            self._applying = asyncio.ensure_future(self._apply_between_messages())

        asyncio.get_running_loop().call_later(seconds, apply)

    async def dispatch_shell(self, msg: Any, *args: Any, **kwargs: Any) -> Any:
        """Whatever is asked may touch the GPU, and would stand still for ever while the driver holds this process."""
        if self.execution.rests and not self._bids_first(msg):
            await self._thaw()
        return await super().dispatch_shell(msg, *args, **kwargs)

    def _bids_first(self, msg: Any) -> bool:
        """Whether it is a cell whose bid has this process thawed, and is told meanwhile what it waits for."""
        _, frames = self.session.feed_identities(msg, copy=False)
        parent = self.session.deserialize(frames, content=False, copy=False)
        return parent["header"].get("msg_type") == "execute_request" and _numbered(parent) and not self.replica.behind

    async def _thaw(self) -> None:
        while self.execution.rests:
            try:
                await asyncio.wrap_future(self.link.request({"type": "thaw"}).future)
            except DaemonAway:
                return  # this replica is ending
            if self.execution.rests:
                await asyncio.sleep(THAW_PAUSE)

    async def _apply_between_messages(self) -> None:
        await self.execution.settled()
        async with self._main_asyncio_lock:
            await self._thaw()
            await self.execution.catch_up()

    def _give_back(self, message: Message) -> None:
        """Between cells, or while one only waits for its turn: in one step of the main loop, so that no cell and no
        capture is in the middle of anything. A cell that got a GPU meanwhile has it; its end tells what is left."""
        execution, rests = self.execution, message.get("ask") == "checkpoint"
        # Once an append is answered the variables are looked into, which may call CUDA: not while the process rests.
        busy = self._main_asyncio_lock.locked() or (rests and execution.storing)
        if not busy or (execution.queues and not rests):
            execution.give_back(message)
        elif binding.grant() is None:
            asyncio.get_running_loop().call_later(SOON, self._give_back, message)

    async def _read(self, hashes: Sequence[str], target: Target, chunk: int) -> int:
        try:
            return await self.blobs.read(hashes, target, chunk)
        except BlobFailed as err:
            raise BlobMissing(f"its data: {err}", again=err.code not in PERMANENT) from err

    async def execute_request(self, stream: Any, ident: Any, parent: Message) -> None:
        if parent["header"].get("subshell_id") is not None:
            self.replica.capture.before_other_code()
            self.replica.capture.note_source(parent["content"].get("code", ""))
            await super().execute_request(stream, ident, parent)
        elif _numbered(parent):
            await self.execution.cell(stream, ident, parent)
        elif threading.current_thread() is not threading.main_thread():
            await super().execute_request(stream, ident, parent)  # on the control channel: runs beside the cells
        elif parent["header"].get("session") == self.session.session:
            await super().execute_request(stream, ident, parent)  # ipykernel's own: its debugger starts debugpy so
        else:
            content = {"status": "error", "ename": "NBOSError", "evalue": DIRECT, "traceback": [DIRECT]}
            self.session.send(stream, "execute_reply", content, parent, ident=ident)

    async def nbos_sync_request(self, stream: Any, ident: Any, parent: Message) -> None:
        if _numbered(parent):
            await self.execution.sync(ident, parent)
        else:
            self.log.warning("NBOS: an nbos_sync_request without a number was ignored")

    async def run_cell(self, stream: Any, ident: Any, parent: Message) -> None:
        """ipykernel's own way of running a cell, replying included."""
        self._led = parent["header"]["msg_id"]
        self.iopub_thread.keeper.begin(parent)
        standing = self.shell.user_ns.get("__builtins__")
        if isinstance(standing, lost.LostBuiltins):
            standing.refresh()
        await super().execute_request(stream, ident, parent)

    async def do_execute(self, *args: Any, **kwargs: Any) -> Message:
        if threading.current_thread() is not threading.main_thread() or not _numbered(self.get_parent("shell")):
            # a subshell, or the debugger
            return self.not_loaded(*args, **kwargs) or await super().do_execute(*args, **kwargs)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            await self.execution.takes_over()
            reply: Message = self.not_loaded(*args, **kwargs) or await super().do_execute(*args, **kwargs)
        except KeyboardInterrupt:
            # It hit ipykernel's code around the cell; to the user it is the same.
            reply = {"status": "error", "ename": "KeyboardInterrupt", "evalue": "", "traceback": [], "payload": []}
            reply |= {"execution_count": self.replica.history.last(), "user_expressions": {}}
        self.iopub_thread.keeper.replied(self._led, json_clean(reply))
        await self.execution.replied(reply["status"])
        return reply

    def finish_metadata(self, parent: Message, metadata: Message, reply_content: Message) -> Message:
        metadata = super().finish_metadata(parent, metadata, reply_content)
        used = self.execution.used(parent["header"]["msg_id"])
        return {**metadata, "nbos_used": used} if used else metadata

    async def run_again(self, code: str) -> BaseException | None:
        """Run a cell that an earlier executor ran; it cannot ask the user anything."""
        self._forward_input(False)
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.replica.lazy.before(code)
            return await hush.run(self.shell, code, self._cancel_on_sigint)
        except (KeyboardInterrupt, NotLoadedError) as err:
            return err  # it hit IPython's code around the cell; or what the cell names is not to be had now
        finally:
            signal.signal(signal.SIGINT, previous)
            self._restore_input()

    def reply(self, kind: str, content: Message, parent: Message, ident: Any) -> None:
        """A message of NBOS's own on the shell channel, with `parent` as its request."""
        stream = self.shell_channel_thread.manager.get_subshell_to_shell_channel_socket(None)
        self.session.send(stream, kind, content, parent, ident=ident)

    def _input_request(self, *args: Any, **kwargs: Any) -> str:
        """A cell may ask before the connection that carries questions is up: the router has one for each channel."""
        while True:
            try:
                return str(super()._input_request(*args, **kwargs))
            except zmq.ZMQError as err:
                if err.errno != zmq.EHOSTUNREACH:
                    raise
            time.sleep(ASK_AGAIN)

    def fence(self, token: int) -> None:
        self.iopub_thread.fence(token)

    def die(self, reason: str) -> None:
        """This process's state is no longer the kernel's: leave; the daemon starts a fresh replica from the log."""
        self.log.warning("NBOS: this replica was fenced off (%s) and ends", reason)
        self.io_loop.call_later(0.3, os._exit, 1)  # long enough for the last words to leave

    # ipykernel's hooks -------------------------------------------------------------------------------------------

    def _publish_status(self, status: str, channel: str, parent: Message | None = None) -> None:
        request = parent or self.get_parent(channel)
        header = request.get("header") or {}
        kind = header.get("msg_type", "")
        if kind.startswith("nbos_"):
            return
        cell = kind == "execute_request" and channel == "shell" and _numbered(request)
        main = header.get("subshell_id") is None
        if cell and main and (status == "busy" or header.get("msg_id") != self._led):
            return
        super()._publish_status(status, channel, parent)

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        if subshell_id is not None:
            super()._abort_queues(subshell_id)

    # The control thread ------------------------------------------------------------------------------------------

    async def nbos_cancel_request(self, stream: Any, ident: Any, parent: Message) -> None:
        content = parent["content"]
        self.execution.cancel(int(content["n"]), str(content.get("msg_id", "")))
        self.session.send(stream, "nbos_cancel_reply", {"status": "ok"}, parent, ident=ident)

    async def nbos_outcome_request(self, stream: Any, ident: Any, parent: Message) -> None:
        content = parent["content"]
        ask = {"type": "outcome", "n": int(content["n"]), "abandon": bool(content.get("abandon"))}
        self._answer_later(ask, "nbos_outcome_reply", stream, ident, parent)

    async def nbos_outputs_request(self, stream: Any, ident: Any, parent: Message) -> None:
        """From the router: `forget`, `file`: requests whose outputs are settled; `publish`: say the rest on iopub."""
        content = parent["content"]
        self.iopub_thread.keeper.settle(content.get("forget") or (), content.get("file") or ())
        if content.get("publish"):
            self.iopub_thread.publish_kept(self.session)
        self.session.send(stream, "nbos_outputs_reply", {"status": "ok"}, parent, ident=ident)

    async def nbos_status_request(self, stream: Any, ident: Any, parent: Message) -> None:
        self._answer_later({"type": "status"}, "nbos_status_reply", stream, ident, parent)

    def _answer_later(self, ask: Message, kind: str, stream: Any, ident: Any, parent: Message) -> None:
        """Pass a question to the daemon. Not awaited by the handler: an interrupt must not wait behind it."""

        async def answer() -> None:
            content = await self._ask(ask)
            self.session.send(stream, kind, content, parent, ident=ident)

        task = asyncio.ensure_future(answer())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _ask(self, ask: Message) -> Message:
        if not self.link.connected:
            return {"status": "error", "ename": "unavailable", "evalue": self.link.since()}
        request = self.link.request(ask)
        try:
            reply, _ = await asyncio.wait_for(asyncio.wrap_future(request.future), 5.0)
        except (TimeoutError, DaemonAway):
            self.link.withdraw(request, "not answered in time")
            return {"status": "error", "ename": "unavailable", "evalue": self.link.since()}
        content = {key: value for key, value in reply.items() if key not in ("re", "ok", "error")}
        if reply.get("ok"):
            return {"status": "ok", **content}
        return {"status": "error", "ename": str(reply.get("error")), "evalue": str(reply.get("reason", "")), **content}


def _numbered(request: Message) -> bool:
    """Whether the router gave this request its number."""
    number = (request.get("metadata") or {}).get("nbos_execution")
    return isinstance(number, dict) and isinstance(number.get("n"), int)
