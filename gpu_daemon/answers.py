"""The daemon's answers to a replica's requests (docs/protocol.md, 1): one method a request, found by its type.

Each reads its message through `requests` and hands it to the part of the daemon that knows; those about blobs are in
`blobanswers`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from gpu_daemon import requests
from gpu_daemon.bidding import Bidding
from gpu_daemon.blobanswers import BlobAnswers, check_peer
from gpu_daemon.commits import Commits, free
from gpu_daemon.pythons import other_python
from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import RequestError
from gpu_daemon.sessions import Reply, Session, members_message
from gpu_daemon.site import RECOVERY, Refused, Site, log, plain
from gpu_daemon.touching import Touching
from nbos_cluster import keys, records
from nbos_cluster.content import ALGORITHM
from nbos_cluster.etcd import EtcdUnavailable
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import HostRecord, KernelSpec, LogEntry
from nbos_cluster.wire import BLOB_CHUNK, FORMAT, OLDEST, Message

KNOWN_WITHIN = 5.0
"""Seconds that `hello` waits for the kernel's records (after a restart of the daemon they may be on their way)."""
HOLD_OUTCOME = 1.0
HOSTS_FRESH = 2.0
UNUSED_CLAIM = 5.0
"""Seconds that a replica has, after `hello`, to ask again for what it was granted while it was not connected."""

MAX_HASHES = 4096

Heard = Callable[[LocalReplica], None]


class Answers:
    """heard: called when a replica said hello. progressed: when it said how far it has come."""

    def __init__(self, site: Site, bidding: Bidding, commits: Commits, heard: Heard, progressed: Heard) -> None:
        self._site, self._bidding, self._commits = site, bidding, commits
        self._heard, self._progressed = heard, progressed
        self._touching = Touching(site, bidding)
        self._blobs = BlobAnswers(site)
        self._hosts: tuple[float, list[Message]] = (-HOSTS_FRESH, [])
        self._by_type: dict[str, Callable[[Session, Message, bytes], Awaitable[Reply]]] = {
            "hello": self._hello,
            "bid": self._bid,
            "cancel": self._cancel,
            "touch": self._touch,
            "append": self._append,
            "applied": self._applied,
            "release": self._release,
            "gave_back": self._gave_back,
            "sliced": self._sliced,
            "thaw": self._thaw,
            "status": self._status,
            "outcome": self._outcome,
            **self._blobs.by_type,
        }

    async def __call__(self, session: Session, message: Message, payload: bytes) -> Reply:
        """The reply's fields. Raises RequestError or Refused."""
        kind = message.get("type")
        answer = self._by_type.get(kind) if isinstance(kind, str) else None
        if answer is None:
            raise RequestError(f"there is no request {str(kind)[:40]!r}", code="unknown")
        return await answer(session, message, payload)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _hello(self, session: Session, message: Message, payload: bytes) -> Reply:
        said, replica = requests.hello(message), session.replica
        check_peer(session)
        self._check_format(replica, said)
        spec = await self._spec(replica)
        self._check_python(replica, said.python)
        if replica.session is not None and replica.session is not session:
            replica.session.close()
        replica.session = session
        replica.python, replica.applied = said.python[:100], said.applied
        if said.ports is not None:
            replica.ports = said.ports
        if said.running is not None and replica.held is None:
            await self._commits.resume(replica, *said.running)
        elif said.running is None:
            self._expect_use(session)
        left = requests.left(message)
        if left is not None and replica.held is None:
            self._bidding.giving.told(replica, left)
            self._bidding.room_changed()
        self._bidding.lender.connected(replica)
        self._heard(replica)
        view = self._site.known(replica.id.kernel)
        return {
            "kernel": replica.id.kernel,
            "replica": replica.id.index,
            "host": self._site.host,
            "owner": spec.owner,
            "incarnation": replica.incarnation,
            "resources": plain(spec.resources),
            "members": members_message(view),
            "durable": spec.durable,
            "lazy": spec.lazy,
            "touch": self._site.settings.gpu_on_touch,
            "blobs": {
                "hash": ALGORITHM,
                "chunk": BLOB_CHUNK,
                "keep": self._site.blobs.keep,
                "files": self._blobs.hands_out_files(session),
                "addresses": True,
            },
        }, b""

    def _check_format(self, replica: LocalReplica, said: requests.HelloRequest) -> None:
        if OLDEST <= said.format <= FORMAT:
            return
        image = f"nbos {said.nbos}" if said.nbos else "an nbos that does not say its version"
        way = (
            "upgrade the daemons of all hosts" if said.format > FORMAT else "build the image with a newer nbos[kernel]"
        )
        trouble = (
            f"the kernel image has {image}, which speaks format {said.format} with its daemon; the daemon of host "
            f"{self._site.host} is {_nbos()} and takes {OLDEST} to {FORMAT}: {way}"
        )
        replica.end(trouble)
        raise Refused("format", trouble)

    def _check_python(self, replica: LocalReplica, python: str) -> None:
        """Functions travel as bytecode, which only the same minor version of Python runs."""
        trouble = other_python(self._site.known(replica.id.kernel), replica.id.index, python)
        if trouble:
            replica.end(trouble)
            raise Refused("refused", trouble)

    async def _bid(self, session: Session, message: Message, payload: bytes) -> Reply:
        bid, replica = requests.bid(message), session.replica
        session.used.add(bid.n)
        if replica.held is None:
            self._commits.take_up(replica, bid.n)
        return await self._bidding.bid(replica, bid), b""

    async def _cancel(self, session: Session, message: Message, payload: bytes) -> Reply:
        self._bidding.cancel(session.replica, requests.number(message, "n"))
        return {}, b""

    async def _touch(self, session: Session, message: Message, payload: bytes) -> Reply:
        request, token = requests.touch(message)
        return await self._touching.touch(session.replica, request, token), b""

    async def _append(self, session: Session, message: Message, payload: bytes) -> Reply:
        entry = message.get("entry")
        if not isinstance(entry, dict):
            raise RequestError("entry must be an object")
        token = requests.number(message, "token", most=1 << 62)
        session.used.add(requests.number(entry, "n"))
        await self._commits.append(session.replica, entry, token, payload)
        session.replica.imported = requests.imported(message)
        self._progressed(session.replica)
        return {}, b""

    async def _applied(self, session: Session, message: Message, payload: bytes) -> Reply:
        replica = session.replica
        replica.applied, replica.lost = requests.number(message, "n", least=-1), requests.lost(message)
        replica.lacks, replica.imported = tuple(requests.lacks(message)), requests.imported(message)
        self._progressed(replica)
        return {}, b""

    async def _release(self, session: Session, message: Message, payload: bytes) -> Reply:
        replica, n = session.replica, requests.number(message, "n")
        left, peak = requests.left(message), requests.left(message, "peak") or {}
        if left is not None and replica.held is not None and replica.held.n == n:
            self._bidding.giving.told(replica, left, peak)
        self._commits.release(replica, n, requests.took(message))
        return {}, b""

    async def _gave_back(self, session: Session, message: Message, payload: bytes) -> Reply:
        replica = session.replica
        if message.get("ask") == "checkpoint":
            asked = replica.resting is not None and message.get("number") == replica.rest_number
            if asked and replica.resting is not None and not replica.resting.done():
                replica.resting.set_result(None)
        else:
            self._bidding.gave_back(replica, requests.gave_back(message))
        return {}, b""

    async def _thaw(self, session: Session, message: Message, payload: bytes) -> Reply:
        await self._bidding.thaw(session.replica)
        return {}, b""

    async def _sliced(self, session: Session, message: Message, payload: bytes) -> Reply:
        """The cell is on its slice of that version, and nothing of it runs beside it any more."""
        version, held = requests.number(message, "version"), session.replica.held
        if held is not None and held.n == requests.number(message, "n") and held.grant is not None:
            self._bidding.gave(held.grant.grant, version)
        return {}, b""

    async def _status(self, session: Session, message: Message, payload: bytes) -> Reply:
        view = self._site.known(session.replica.id.kernel)
        lost: dict[str, str] = {}
        for record in view.replicas.values():
            lost.update(record.lost)
        applied = {index: record.applied for index, record in view.replicas.items()}
        applied[session.replica.id.index] = session.replica.applied
        return {
            "last": view.last,
            "executor": view.executor,
            "next": view.last + 1,
            "applied": applied,
            "members": session.members(view),
            "hosts": await self._host_list(),
            "lost": lost,
            "queue": self._bidding.room.of(view.kernel),
            "gpu": self._gpus(view),
        }, b""

    async def _outcome(self, session: Session, message: Message, payload: bytes) -> Reply:
        n, abandon = requests.number(message, "n"), requests.flag(message, "abandon")
        kernel = session.replica.id.kernel
        state = await self._decided(kernel, n)
        if state["state"] == "free" and self._site.cut_off:
            # The claim may have ended with everybody's lease while its holder is well, and claims it again right now.
            await self._site.until(lambda: not free(self._site.view(kernel), n), RECOVERY)
            state = await self._decided(kernel, n)
        if state["state"] == "free" and abandon:
            try:
                await self._commits.abandon_free(kernel, n, requests.text(message, "reason", "") or LOST_EXECUTOR)
            except EtcdUnavailable:
                raise Refused("unavailable", self._site.away_text()) from None
            state = await self._decided(kernel, n)
        return state, b""

    def _gpus(self, view: KernelView) -> Message:
        """What a cell of the kernel may use, and what of this host's GPUs is free; not who holds the rest."""
        assert view.spec is not None
        held, ledger = Counter[str](), self._site.ledger
        memory = Counter[str]()
        for share in (share for grant in ledger.grants.values() for share in grant.shares):
            held[share.uuid] += len(share.tpcs)
            memory[share.uuid] += share.memory
        names = ("index", "model", "tpcs", "memory", "healthy", "reason")
        devices = [
            {name: getattr(device, name) for name in names}
            | {"tpcs_free": device.tpcs - held[device.uuid], "memory_free": device.memory - memory[device.uuid]}
            for device in ledger.devices
        ]
        return {
            "default": plain(view.spec.resources),
            "most": plain(view.spec.max_resources),
            "devices": devices,
            "left": self._left(view.kernel),
        }

    def _left(self, kernel: str) -> list[Message]:
        """What this kernel's replicas here have on devices, or of that in host memory, after their cells."""
        index = {device.uuid: device.index for device in self._site.ledger.devices}
        return [
            {
                "replica": row.holder[1],
                "devices": {str(index[uuid]): size for uuid, size in row.left.items()},
                "away": row.away,
                "stays": row.stays,
            }
            for row in self._bidding.giving.rows()
            if row.holder[0] == kernel
        ]

    # -- what they need -----------------------------------------------------------------------------------------------

    async def _decided(self, kernel: str, n: int) -> Message:
        """What became of n; waits a while for an execution that runs."""

        def open_claim(view: KernelView | None) -> bool:
            return view is not None and view.last < n and view.claim_of(n) is not None

        await self._site.until(lambda: not open_claim(self._site.view(kernel)), HOLD_OUTCOME)
        view = self._site.view(kernel)
        if view is None or view.spec is None:
            raise Refused("gone", f"kernel {kernel} is gone")
        if view.last >= n:
            return _outcome_of(view.log.get(n))
        held = view.claim_of(n)
        if held is not None:
            return {"state": "claimed", "replica": held.record.replica, "host": held.record.host}
        return {"state": "free"}

    def _expect_use(self, session: Session) -> None:
        """The replica runs nothing. A claim it holds is one whose answer it never got, and will ask for again."""
        held = session.replica.held
        if held is None:
            view = self._site.view(session.replica.id.kernel)
            claim = view.claim_of(view.last + 1) if view is not None else None
            if claim is None or (claim.record.replica, claim.record.host) != (
                session.replica.id.index,
                self._site.host,
            ):
                self._commits.drop_saved_grant(session.replica)
                return
        self._site.spawn(self._end_unused(session), f"looking after the claim of {session.replica.name}")

    async def _end_unused(self, session: Session) -> None:
        replica = session.replica
        view = self._site.known(replica.id.kernel)
        n = replica.held.n if replica.held is not None else view.last + 1
        await self._site.until(lambda: n in session.used or self._site.known(replica.id.kernel).last >= n, UNUSED_CLAIM)
        claim = self._site.known(replica.id.kernel).claim_of(n)
        if replica.session is not session or n in session.used or claim is None:
            return
        log.warning("%s holds the claim of execution %d and does not run it", replica.name, n)
        reason = f"replica {replica.id.index} on {self._site.host} lost execution {n} when its daemon was restarted"
        self._commits.give_up(replica, n, claim.token, reason)

    async def _spec(self, replica: LocalReplica) -> KernelSpec:
        def known() -> bool:
            view = self._site.view(replica.id.kernel)
            return self._site.synced.is_set() and view is not None and view.spec is not None

        if not await self._site.until(known, KNOWN_WITHIN):
            raise Refused("unavailable", f"the records of kernel {replica.id.kernel} are not known (yet)")
        spec = self._site.known(replica.id.kernel).spec
        assert spec is not None
        return spec

    async def _host_list(self) -> list[Message]:
        """All hosts, for people; at most once in two seconds from etcd, the last known while that is away."""
        if time.monotonic() - self._hosts[0] > HOSTS_FRESH:
            try:
                found, _ = await self._site.etcd.range(keys.HOSTS)
            except EtcdUnavailable:
                self._site.note_away()
                return self._hosts[1]
            self._hosts = (
                time.monotonic(),
                [_host(records.decode(kv.value, HostRecord)) for kv in found if _is_host(kv.key)],
            )
        return self._hosts[1]


def _nbos() -> str:
    try:
        return f"nbos {version('nbos')}"
    except PackageNotFoundError:
        return "nbos from a checkout"


LOST_EXECUTOR = "the host that ran it was lost"


def _outcome_of(entry: LogEntry | None) -> Message:
    if entry is None:
        # Folded: it was decided long ago, and nobody who could still ask needs more.
        return {"state": "committed", "status": "ok", "execution_count": 0}
    if entry.kind in ("abandoned", "reset"):
        return {"state": "abandoned", "reason": entry.reason or "the kernel was restarted"}
    return {"state": "committed", "status": entry.status, "execution_count": entry.execution_count}


def _is_host(key: str) -> bool:
    return "/" not in key[len(keys.HOSTS) :]


def _host(record: HostRecord) -> Message:
    """What a user may know of a host: not who else computes there."""
    devices = [{"model": d.model, "tpcs": d.tpcs, "memory": d.memory, "kind": d.kind} for d in record.devices]
    return {"name": record.name, "address": record.address, "devices": devices, "draining": record.draining}
