"""The replicas of one kernel as its router sees them: who is up, who is the current executor, whose output counts.

Guarantees: output passes only from the current executor, under its current fencing token, a newer one of its own, or,
until it has said something under the current one, an older one since which it has been the executor: a lead comes on
another connection than outputs, and may overtake what was said before it;
what a candidate says before its lead is known is held, in order and bounded, and thrown away when another one leads;
a replica whose record has gone, as all do when etcd stands still for longer than a lease, is doubted, and not given up
while its connection stands and it answers: what it says counts, since its token says whether it may.
"""

from __future__ import annotations

from typing import Any

from .election import Absent
from .instructions import Connect, Disconnect, Instruction, Member

HOLD_MESSAGES = 2000
"""Messages held per candidate. Shell and iopub are two connections: a lead may arrive after the first outputs."""

GONE = ("lost", "missing")
"""States of a member of which no record speaks, as daemons and as the gateway say."""

DOUBT = 5.0
"""Seconds in which a record that went may come back: its daemon writes it again as soon as etcd answers."""

_PREFIX = b"nbos."


def token_of(topic: bytes) -> tuple[int, bytes] | None:
    """(token, the topic without the prefix) of a replica's topic `nbos.<token>.<topic>`."""
    parts = topic.split(b".", 2)
    if len(parts) != 3 or parts[0] != b"nbos" or not parts[1].isdigit():
        return None
    return int(parts[1]), parts[2]


class Fleet:
    """`up`: connected replicas; `executor`: whoever forwarded requests go to (None: nobody is up)."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.up: set[int] = set()
        self.connected_to: dict[int, tuple[str, tuple[tuple[str, int], ...], int]] = {}
        self.executor: int | None = None
        self.token = -1
        self.since = -1
        """The executor's oldest token that counts: nobody else has led since, and nothing of it came under a newer."""
        self.epoch = -1
        self.revision = 0
        self.debugged: int | None = None
        """The replica that the debugger is attached to: breakpoints stand there and nowhere else."""
        self.subshells: dict[str, int] = {}
        """The replica that each subshell is a thread of: by its id, or by the request that makes it."""
        self.banned: set[tuple[int, int]] = set()
        self.retired: set[int] = set()
        """Members no more, whose connections stand until their processes end: what they said is on its way."""
        self.doubted: dict[int, float] = {}
        """Connected members without a record, and until when they are believed."""
        self._held: dict[int, list[list[Any]]] = {}
        self._renewed: set[int] = set()
        self.prefix = b"nbos.-1."

    def name(self, index: int) -> str:
        member = self.members.get(index)
        return f"replica {index} on host {member.host}" if member and member.host else f"replica {index}"

    def absent(self) -> dict[int, Absent]:
        """The members that are not connected."""
        away = [member for index, member in self.members.items() if index not in self.up]
        return {member.index: Absent(self.name(member.index), member.state) for member in away}

    def appoint(self, index: int | None, token: int = -1) -> None:
        """Make `index` the executor. Without a token the next output of it tells which one it has."""
        if index != self.executor:
            self.since = token
        self.executor, self.token = index, token
        self.prefix = _PREFIX + b"%d." % token

    def candidates(self) -> set[int]:
        """Who may be asked to run a cell: those that are up; those that leave only where there is nobody else."""
        return self.up - self.retired or self.up

    def best(self) -> int | None:
        """The replica that has applied most; the lowest index among equals."""
        candidates = self.candidates()
        if not candidates:
            return None
        return min(candidates, key=lambda index: (-self._applied(index), index))

    def _applied(self, index: int) -> int:
        member = self.members.get(index)
        return member.applied if member else -1

    def lost(self, index: int) -> list[Instruction]:
        """Its connection ended and is made anew, to the same address: what comes up there next is a successor, of
        which the lists of members may tell later than its own messages. A retired one has no successor."""
        self.up.discard(index)
        self.doubted.pop(index, None)
        self.subshells = {name: where for name, where in self.subshells.items() if where != index}
        if index in self.retired:
            return self._part(index)
        if index in self.connected_to:
            self._renewed.add(index)
        return []

    def _part(self, index: int) -> list[Instruction]:
        self.retired.discard(index)
        self.connected_to.pop(index, None)
        self._renewed.discard(index)
        return [Disconnect(index)]

    def current(self) -> int | None:
        """The executor, after choosing one when there is none."""
        if self.executor is None or self.executor not in self.up:
            best = self.best()
            if best != self.executor or best is None:
                self.appoint(best)
        return self.executor

    def admit(self, replica: int, topic: bytes) -> bytes | None:
        """The topic for the client when this message of `replica` is to be passed on."""
        found = token_of(topic)
        if found is None or replica != self.executor or found[0] < self.since:
            return None
        if found[0] > self.token:
            self.appoint(replica, found[0])
        self.since = found[0]
        return found[1]

    def hold(self, replica: int, topic: bytes, frames: list[Any]) -> bool:
        """Keep what a candidate says under a token that is newer than the current one; whether it was such."""
        found = token_of(topic)
        if found is None or found[0] <= self.token:
            return False
        held = self._held.setdefault(replica, [])
        if len(held) < HOLD_MESSAGES:
            held.append(frames)
        return True

    def released(self, replica: int) -> list[list[Any]]:
        """What `replica` said before its lead was known; what the others said is dropped."""
        held = self._held.pop(replica, [])
        self._held.clear()
        return held

    def reasons(self) -> list[str]:
        """Why members are not there yet, in their daemons' words; said once where several say the same."""
        said: dict[str, list[str]] = {}
        for member in self.members.values():
            if member.reason:
                said.setdefault(member.reason, []).append(member.host)
        return [f"{', '.join(hosts)}: {reason}" for reason, hosts in said.items()]

    def update(
        self, epoch: int, members: tuple[Member, ...], revision: int = 0, now: float = 0.0
    ) -> tuple[list[Instruction], list[tuple[int, str]]]:
        """Take in a membership list, unless it is older than what is known: (connections to make and end, replicas
        lost by it).
        """
        if epoch < self.epoch or (epoch == self.epoch and revision < self.revision):
            return [], []
        same = epoch == self.epoch
        if not same:
            self._renewed.clear()
        self.epoch, self.revision = epoch, revision
        old, self.members = self.members, {member.index: member for member in members}
        for index in old:
            if index in self.members and self.members[index].applied < old[index].applied:
                self._keep_applied(index, old[index].applied)
        todo: list[Instruction] = []
        self._doubt(now if same else None)
        lost = self._leave(todo, old)
        for member in members:
            target = (member.ip, tuple(sorted(member.ports.items())), member.pid)
            fresh = (member.index, member.pid) not in self.banned
            if member.reachable and fresh and self.connected_to.get(member.index) != target:
                self.connected_to[member.index] = target
                todo.append(Connect(member.index, member.ip, member.ports))
        return todo, lost

    def _doubt(self, now: float | None) -> None:
        """Which members have lost their records and are believed. now: None where the membership itself has changed."""
        gone = {index for index, member in self.members.items() if member.state in GONE and index in self.up}
        until = {index: self.doubted.get(index, now + DOUBT) for index in gone} if now is not None else {}
        self.doubted = {index: at for index, at in until.items() if now is not None and now < at}

    def believed(self) -> float | None:
        """When the list of members has to be looked at again, for those that are doubted."""
        return min(self.doubted.values(), default=None)

    def _keep_applied(self, index: int, applied: int) -> None:
        now = self.members[index]
        if now.applied == -1 and now.state == "ready":
            self.members[index] = Member(
                now.index, now.host, now.state, now.ip, now.ports, applied, now.pid, now.reason
            )

    def _leave(self, todo: list[Instruction], old: dict[int, Member]) -> list[tuple[int, str]]:
        lost = []
        for index, (ip, ports, pid) in list(self.connected_to.items()):
            member = self.members.get(index)
            if member is not None and (index in self.doubted or self._stands(member, ip, ports, pid)):
                self.retired.discard(index)
                continue
            if member is None and index in self.up:
                self.retired.add(index)
                continue
            self.retired.discard(index)
            reason = "it is no longer a member" if member is None else member.reason or f"it is {member.state}"
            if index in old and member is not None and member.reachable:
                reason = "it was started again"
            del self.connected_to[index]
            self._renewed.discard(index)
            todo.append(Disconnect(index))
            if index in self.up:
                lost.append((index, reason))
        return lost

    def _stands(self, member: Member, ip: str, ports: tuple[tuple[str, int], ...], pid: int) -> bool:
        """Whether the connection is one to this member, whose process may be the successor of the one it was made to.

        Ending it for the new pid would lose outputs that are on their way.
        """
        renewed = member.index in self._renewed
        if not member.reachable:
            return renewed and member.index in self.up and member.state == "starting"
        if (member.ip, tuple(sorted(member.ports.items()))) != (ip, ports):
            return False
        if member.pid != pid and renewed:
            self._renewed.discard(member.index)
            self.connected_to[member.index] = (ip, ports, member.pid)
            return True
        return member.pid == pid

    def reset(self) -> list[Instruction]:
        """Forget every process there is: the replicas that follow are new ones."""
        self.banned = {(index, target[2]) for index, target in self.connected_to.items() if target[2]}
        gone: list[Instruction] = [Disconnect(index) for index in self.connected_to]
        self.connected_to.clear()
        self._renewed.clear()
        self.retired.clear()
        self.up.clear()
        self.doubted.clear()
        self.members.clear()
        self._held.clear()
        self.debugged = None
        self.subshells.clear()
        self.appoint(None)
        return gone
