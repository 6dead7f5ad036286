"""A made-up world behind the router's state machine: clients, replicas, and one log that decides claims."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from nbos_provisioner.election import ABSENCE
from nbos_provisioner.execution import Phase
from nbos_provisioner.instructions import (
    Client,
    Connect,
    Disconnect,
    Event,
    FromReplica,
    Lost,
    Member,
    Members,
    Output,
    Publish,
    Tick,
    ToClient,
    ToReplica,
    Up,
)
from nbos_provisioner.messages import Message, Signer, dump, parse, split
from nbos_provisioner.router_core import RouterCore

KEY = b"key"


@dataclass
class Replica:
    """A process: what reached it, what it said and nobody has heard yet, what it runs."""

    session: str
    alive: bool = True
    linked: bool = False
    busy: bool = False
    idle_due: bool = False
    token: int = 0
    inbox: list[tuple[str, list[Any]]] = field(default_factory=list)
    said: list[tuple[str, list[Any]]] = field(default_factory=list)
    shown: list[list[Any]] = field(default_factory=list)
    running: tuple[Any, int] | None = None
    uncommitted: tuple[Any, int] | None = None
    waiting: list[tuple[Any, int]] = field(default_factory=list)
    slow: bool = False
    """Its callbacks last until it is `done`, and keep its main thread occupied."""
    open: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Requests without a number that it has begun with: their channel and message."""
    latest: Any = None
    """The cell that it ran last."""

    @property
    def called_back(self) -> bool:
        return any(message.msg_type == "comm_msg" and message.subshell is None for _, message in self.open.values())


SUBSHELL = "a subshell"
GRANT = {"shares": [{"model": "Simulated GPU", "tpcs": [0, 1], "memory": 1 << 30, "whole": False}]}
USED = {"held": 5.0, "tpcs": 2, "peak": 0}


class World:
    def __init__(self, replicas: int = 3, *, rerun: bool = True, line_after: float = 2.0) -> None:
        self.now = 0.0
        self.grant: Any = None
        """What every cell is granted; and what its reply says that it used."""
        self.used: Any = None
        self.client = Signer(KEY, "client")
        self.signers = {}
        self.core = RouterCore(Signer(KEY, "router"), rerun=rerun, line_after=line_after)
        self.log: dict[int, str] = {}
        self.claims: dict[int, tuple[int, int, str]] = {}
        self.tokens = 0
        self.sent: list[str] = []
        self.asked: list[str] = []
        """Requests without a number."""
        self.states: dict[str, str] = {}
        """What was said last of each request: busy, or idle."""
        self.threads: list[int] = []
        """Replicas whose threads' words clients were given."""
        self.counts: Counter[tuple[str, str]] = Counter()
        self.replies: list[tuple[str, str]] = []
        self.refusing: set[int] = set()
        """Hosts that cannot run any cell, ever."""
        self.refusals: set[tuple[str, int]] = set()
        self.parted: set[int] = set()
        """Replicas that the router has no connection to, nor makes one."""
        self.sent_at: dict[str, float] = {}
        self.notes: defaultdict[str, list[str]] = defaultdict(list)
        self.shown: list[str] = []
        self.displays: defaultdict[str, list[tuple[str, str, str]]] = defaultdict(list)
        self.made = 0
        self.numbers: defaultdict[str, list[int]] = defaultdict(list)
        """The outputs that clients were given, by request."""
        self.heard: dict[int, tuple[int, str, int]] = {}
        """Outputs that have reached the router with their cell in hand: by number, (replica, request, token)."""
        self.unsure: dict[int, tuple[int, str, int]] = {}
        """Those of a replica that has come back, while it is not known whether it may go on."""
        self.led: dict[str, int] = {}
        """The token under which the router takes a cell to run, or to have run."""
        self.published: list[tuple[int, int, str]] = []
        self.runs: Counter[str] = Counter()
        self.processes = 0
        self.replicas = {i: self._process() for i in range(replicas)}
        self.event(Members(1, tuple(self._member(i) for i in self.replicas)))

    def _process(self) -> Replica:
        self.processes += 1
        session = f"process-{self.processes}"
        self.signers[session] = Signer(KEY, session)
        return Replica(session)

    def _member(self, index: int, state: str = "ready") -> Member:
        return Member(index, f"host-{index}", state, "127.0.0.1", {"shell": 1 + index}, pid=1)

    def members(self, states: dict[int, str]) -> None:
        """The daemons tell how the replicas are."""
        self.event(Members(1, tuple(self._member(i, states.get(i, "ready")) for i in self.replicas)))

    # -- the router's side

    def event(self, event: Event) -> None:
        for instruction in self.core.handle(event, self.now):
            if isinstance(instruction, ToReplica):
                replica = self.replicas[instruction.replica]
                if replica.linked and replica.alive:
                    replica.inbox.append((instruction.channel, instruction.frames))
            elif isinstance(instruction, ToClient):
                self._reply(instruction.frames)
            elif isinstance(instruction, Publish):
                self._publish(instruction.frames)
            elif isinstance(instruction, Connect | Disconnect):
                self.replicas[instruction.replica].linked = False
                self.parted.discard(instruction.replica)
                if isinstance(instruction, Disconnect):
                    self._leave(instruction.replica)
        active = self.core.runner.active
        if active is not None and active.led:
            self.led[active.msg_id] = active.token
        if active is None or active.phase is not Phase.SETTLING:
            if active is not None and active.phase is Phase.RUNNING:
                self.heard.update(self.unsure)
            self.unsure.clear()

    def _reply(self, frames: list[Any]) -> None:
        message = parse(frames)
        if message.msg_type == "execute_reply":
            msg_id = message.parent["msg_id"]
            self.counts[msg_id, "reply"] += 1
            if msg_id not in self.sent:  # of a subshell
                return
            self.replies.append((msg_id, message.content["status"]))
            if message.content.get("ename") == "NBOSResourceError":
                self._refused(msg_id)

    def _refused(self, msg_id: str) -> None:
        asked = {index for parent, index in self.refusals if parent == msg_id}
        if self.now < self.sent_at[msg_id] + ABSENCE:
            coming = {i for i, member in self.core.fleet.members.items() if member.state != "failed"}
            assert asked >= coming, f"refused by {asked}, while {coming - asked} may be able to run it"

    def _publish(self, frames: list[Any]) -> None:
        message = parse(frames)
        parent = message.parent
        if message.msg_type == "status":
            state = self.states[parent["msg_id"]] = message.content["execution_state"]
            self.counts[parent["msg_id"], state] += 1
        elif message.msg_type in ("display_data", "update_display_data"):
            text = message.content["data"]["text/plain"]
            self.shown.append(text)
            display = message.content["transient"]["display_id"]
            self.displays[display].append((message.msg_type, parent["msg_id"], text))
        elif message.msg_type == "stream":
            self.notes[parent["msg_id"]].append(message.content["text"])
        elif message.msg_type == "thread":
            self.threads.append(message.content["replica"])
        elif message.msg_type == "made":
            made = message.content
            assert made["replica"] == self.core.fleet.executor, "output of a replica that is not the executor"
            fleet = self.core.fleet
            assert fleet.since <= made["token"] <= fleet.token, "output under a token that is not the executor's"
            assert made["number"] not in self.numbers[parent["msg_id"]], "an output twice"
            self.numbers[parent["msg_id"]].append(made["number"])
            self.published.append((made["replica"], made["token"], parent["msg_id"]))

    def tick(self, seconds: float) -> None:
        """Time passes, with a word at each moment that the router wants one."""
        end = self.now + seconds
        while (due := self.core.deadline()) is not None and self.now < due < end:
            self.now = due
            self.event(Tick())
        self.now = end
        self.event(Tick())

    def send(self, msg_type: str, content: dict[str, Any], channel: Any = "shell", subshell: str | None = None) -> str:
        header = {**self.client.header(msg_type), "subshell_id": subshell}
        body = [dump(header), dump({}), dump({}), dump(content)]
        msg_id: str = header["msg_id"]
        self.sent_at[msg_id] = self.now
        self.event(Client(channel, Signer(KEY).check([b"client", b"<IDS|MSG>", self.client.sign(body), *body])))
        return msg_id

    def ask(self, msg_type: str, content: dict[str, Any], channel: Any = "shell", subshell: str | None = None) -> str:
        msg_id = self.send(msg_type, content, channel, subshell)
        self.asked.append(msg_id)
        return msg_id

    def execute(self, code: str = "x", *, silent: bool = False) -> str:
        msg_id = self.send("execute_request", {"code": code, "silent": silent, "stop_on_error": True})
        self.sent.append(msg_id)
        return msg_id

    def _leave(self, index: int) -> None:
        """The router has ended the connection: what was on its way is gone with it."""
        self.parted.add(index)
        replica = self.replicas[index]
        for queue in (replica.inbox, replica.said, replica.shown):
            queue.clear()
        self._forget_heard(index)

    # -- the replicas' side

    def link(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.alive and not replica.linked and index not in self.parted:
            replica.linked = True
            self.event(Up(index))

    def cut(self, index: int) -> None:
        """The connection goes; the process lives."""
        replica = self.replicas[index]
        if replica.linked:
            replica.linked = False
            replica.inbox.clear()
            replica.said.clear()
            replica.shown.clear()
            self._forget_heard(index)
            self.event(Lost(index, "cut"))

    def kill(self, index: int, fate: str) -> None:
        """The process dies; its claim is abandoned, freed, or was just committed."""
        replica = self.replicas[index]
        for n, (holder, _, session) in list(self.claims.items()):
            if session == replica.session and n not in self.log:
                del self.claims[n]
                if fate != "free":
                    self.log[n] = "abandoned" if fate == "abandoned" else "ok"
                assert holder == index
        linked = replica.linked
        self._forget_heard(index)
        self.replicas[index] = self._process()
        if linked:
            self.event(Lost(index, "killed"))

    def say(self, index: int, msg_type: str, content: dict[str, Any], parent: Any, channel: str = "shell") -> None:
        replica = self.replicas[index]
        metadata = {"nbos_used": self.used} if msg_type == "execute_reply" and self.used is not None else None
        _, frames = self.signers[replica.session].make(msg_type, content, parent.header, metadata)
        replica.said.append((channel, [*parent.idents, *frames]))

    def show(self, index: int, msg_type: str, content: dict[str, Any], parent: Any) -> None:
        replica = self.replicas[index]
        if not replica.linked:
            return
        _, frames = self.signers[replica.session].make(msg_type, content, parent.header)
        replica.shown.append([b"nbos.%d.kernel.x.%s" % (replica.token, msg_type.encode()), *frames])

    def hear(self, index: int, what: str, *, twice: bool = False) -> None:
        """The router hears the next word of a replica, on shell/control or on iopub."""
        replica = self.replicas[index]
        queue: list[Any] = replica.said if what == "said" else replica.shown
        if not queue or not replica.linked:
            return
        item = queue.pop(0)
        for _ in range(2 if twice and what == "said" else 1):
            if what == "said":
                self.event(FromReplica(index, item[0], parse(item[1])))
            else:
                self._hear_output(index, item)

    def _hear_output(self, index: int, frames: list[Any]) -> None:
        message = parse(frames)
        if message.msg_type == "made":
            made = message.content
            active = self.core.runner.active
            if active is not None and active.msg_id == message.parent["msg_id"]:
                heard = self.unsure if active.phase is Phase.SETTLING else self.heard
                heard[made["number"]] = (index, active.msg_id, made["token"])
        self.event(Output(index, frames))

    def _forget_heard(self, index: int) -> None:
        """The router need not pass on what it has of a replica that is lost before its lead was heard."""
        for heard in (self.heard, self.unsure):
            for number in [number for number, what in heard.items() if what[0] == index]:
                del heard[number]

    def check_outputs(self) -> None:
        """Whatever reached the router of the replica that ran a cell has reached the clients, in order."""
        for number, (_, msg_id, token) in self.heard.items():
            if self.led.get(msg_id) == token:
                assert number in self.numbers[msg_id], f"output {number} of {msg_id} was lost"
        assert all(numbers == sorted(numbers) for numbers in self.numbers.values())

    def work(self, index: int, msg_id: str = "") -> None:
        """The replica takes its next message (a running cell keeps its main shell occupied), or the one named."""
        replica = self.replicas[index]
        for position, (channel, frames) in enumerate(replica.inbox):
            message = parse(split(frames)[0] + [b"<IDS|MSG>"] + split(frames)[1])
            occupied = replica.running or replica.waiting or replica.uncommitted or replica.called_back
            if channel == "shell" and occupied and message.subshell is None:
                continue
            if msg_id not in ("", message.msg_id):
                continue
            del replica.inbox[position]
            self._handle(index, replica, channel, message)
            return

    def _handle(self, index: int, replica: Replica, channel: str, message: Any) -> None:
        order = message.metadata.get("nbos_execution")
        if order is not None:
            return self._bid(index, replica, message, order["n"], order["wait"])
        name, content = message.msg_type, message.content
        if name == "nbos_cancel_request":
            for parent, n in replica.waiting:
                self.say(index, "nbos_yield", {"n": n, "code": "cancelled", "next": n}, parent)
            replica.waiting.clear()
        elif name == "nbos_status_request":
            self.say(index, "nbos_status_reply", {"next": self._next(), "executor": -1}, message, "control")
        elif name == "nbos_outcome_request":
            self.say(index, "nbos_outcome_reply", self._outcome(content), message, "control")
        elif name == "interrupt_request" and replica.running:
            self.finish(index, "error")
        elif not name.startswith("nbos") and replica.linked:
            self.show(index, "status", {"execution_state": "busy"}, message)
            replica.open[message.msg_id] = (channel, message)
            if message.subshell is None and not (replica.slow and name == "comm_msg"):
                self.done(index)

    def done(self, index: int) -> None:
        """It has done what it was asked without a number."""
        replica = self.replicas[index]
        for channel, message in replica.open.values():
            kind, content = message.msg_type, {"status": "ok"}
            if kind == "create_subshell_request":
                content["subshell_id"] = SUBSHELL
            if kind.endswith("_request"):
                self.say(index, kind.replace("_request", "_reply"), content, message, channel)
            self.show(index, "status", {"execution_state": "idle"}, message)
        replica.open.clear()

    def thread_prints(self, index: int, parent: Message) -> None:
        self.show(index, "thread", {"replica": index}, parent)

    def _next(self) -> int:
        return max(self.log, default=0) + 1

    def _bid(self, index: int, replica: Replica, parent: Any, n: int, wait: bool) -> None:
        code = "stale" if n < self._next() else "behind" if n > self._next() else ""
        code = code or ("taken" if n in self.claims else "")
        if not code and index in self.refusing and parent.msg_type == "execute_request":
            self.refusals.add((parent.msg_id, index))
            code = "impossible"
        if not code and replica.busy:
            if wait:
                replica.waiting.append((parent, n))
                return self.say(index, "nbos_waiting", {"n": n, "reason": "no room", "position": 1}, parent)
            code = "busy"
        if code:
            content = {"n": n, "code": code, "reason": code, "next": self._next()}
            return self.say(index, "nbos_yield", content, parent)
        self.tokens += 1
        replica.token = self.tokens
        self.claims[n] = (index, self.tokens, replica.session)
        self.say(index, "nbos_lead", {"n": n, "token": self.tokens, "host": "h", "grant": self.grant}, parent)
        if parent.msg_type == "nbos_sync_request":
            replica.uncommitted = (parent, n)
            return
        self.runs[parent.msg_id] += 1
        replica.running, replica.latest = (parent, n), parent
        self.output(index)

    def room(self, index: int) -> None:
        """There is room again: a waiting bid is decided."""
        replica = self.replicas[index]
        replica.busy = False
        waiting, replica.waiting = replica.waiting, []
        for parent, n in waiting:
            if replica.running is None and replica.uncommitted is None:
                self._bid(index, replica, parent, n, False)
            else:
                self.say(index, "nbos_yield", {"n": n, "code": "taken", "next": self._next()}, parent)

    def _outcome(self, asked: dict[str, Any]) -> dict[str, Any]:
        n = asked["n"]
        if n in self.log:
            status = self.log[n]
            return (
                {"state": "abandoned", "reason": "r"}
                if status == "abandoned"
                else {"state": "committed", "status": status, "execution_count": n}
            )
        if n in self.claims:
            return {"state": "claimed", "replica": self.claims[n][0]}
        if asked["abandon"]:
            self.log[n] = "abandoned"
            return {"state": "abandoned", "reason": "given up"}
        return {"state": "free"}

    def output(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.running:
            self.made += 1
            content = {"replica": index, "token": replica.token, "number": self.made}
            self.show(index, "made", content, replica.running[0])

    def progress(self, index: int) -> None:
        """The replica tells how far it is with the changes of the cell that it has run."""
        replica = self.replicas[index]
        if replica.uncommitted is not None and replica.linked:
            parent, n = replica.uncommitted
            self.made += 1
            content = {"n": n, "what": "x", "text": f"replicating x: {self.made}", "seconds": 1.0}
            _, frames = self.signers[replica.session].make("nbos_progress", content, parent.header)
            replica.shown.append([b"nbos.%d.nbos_progress" % replica.token, *frames])

    def touch(self, index: int, state: str) -> None:
        """The running cell needs a GPU on its way: it waits for one, is granted it, or leaves the queue."""
        replica = self.replicas[index]
        if replica.running is not None and replica.linked:
            parent, n = replica.running
            self.made += 1
            place = {"reason": f"no room {self.made}", "position": 1, "of": 1, "host": f"host-{index}"}
            content = {"n": n, "state": state, **(place if state == "waiting" else {"grant": self.grant})}
            _, frames = self.signers[replica.session].make("nbos_touch", content, parent.header)
            replica.shown.append([b"nbos.%d.nbos_touch" % replica.token, *frames])

    def check_displays(self) -> None:
        """Each is made once, in one cell; that of a replication comes to one end."""
        for steps in self.displays.values():
            kinds = [kind for kind, _, _ in steps]
            assert kinds == ["display_data", *["update_display_data"] * (len(steps) - 1)]
            assert len({msg_id for _, msg_id, _ in steps}) == 1
            texts = [text for _, _, text in steps]
            assert not texts[-1].startswith("NBOS: waiting"), "nobody waits any more"
            if "for a GPU" in texts[-1]:
                assert texts[-1].endswith((" held it for 5.0 s, 10 TPC·s", " was lost with it")), texts[-1]
            if texts[0].startswith("NBOS: replicating"):
                assert [text.startswith("NBOS: replicating") for text in texts] == [True] * (len(texts) - 1) + [False]
                assert texts[-1].startswith(("NBOS: replicated x in", "NBOS: not replicated")), texts[-1]

    def finish_durably(self, index: int, status: str) -> None:
        """The entry is in the log before the reply."""
        replica = self.replicas[index]
        if replica.running is None:
            return
        parent, n = replica.running
        if self.claims.get(n, (0, 0, ""))[2] != replica.session or n in self.log:
            return
        replica.running = None
        self.log[n] = "ok"
        del self.claims[n]
        self.say(index, "nbos_committed", {"n": n, "reply": "follows"}, parent)
        self.say(index, "execute_reply", {"status": status}, parent)
        self.show(index, "status", {"execution_state": "idle"}, parent)

    def finish(self, index: int, status: str, *, busy: bool = False) -> None:
        """busy: its idle comes when the changes are stored."""
        replica = self.replicas[index]
        if replica.running is None:
            return
        parent, _ = replica.uncommitted = replica.running
        replica.running = None
        self.say(index, "execute_reply", {"status": status}, parent)
        replica.idle_due = busy
        if not busy:
            self.show(index, "status", {"execution_state": "idle"}, parent)

    def commit(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.uncommitted is None:
            return
        parent, n = replica.uncommitted
        replica.uncommitted = None
        if replica.idle_due:
            replica.idle_due = False
            self.show(index, "status", {"execution_state": "idle"}, parent)
        if self.claims.get(n, (0, 0, ""))[2] == replica.session and n not in self.log:
            self.log[n] = "ok"
            del self.claims[n]
            self.say(index, "nbos_committed", {"n": n}, parent)

    def settle(self, rounds: int = 400) -> None:
        """Everything comes back and goes on until nothing moves any more."""
        self.members({})
        for index in self.replicas:
            self.room(index)
        for _ in range(rounds):
            for index in self.replicas:
                self.link(index)
                self.work(index)
                self.finish(index, "ok")
                self.commit(index)
                self.done(index)
                while self.replicas[index].said or self.replicas[index].shown:
                    self.hear(index, "said")
                    self.hear(index, "shown")
            self.tick(0.1)
            core = self.core
            done = core.runner.active is None and core.runner.settling.current is None
            if done and not core.queue and not any(replica.inbox for replica in self.replicas.values()):
                return
        raise AssertionError(f"does not come to rest: {self.core.runner.active} {list(self.core.queue)}")
