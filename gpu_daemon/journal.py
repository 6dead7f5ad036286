"""The accounts on this host's disk: SQLite in the daemon's run directory, written by a thread of its own.

Guarantees: what was written survives a daemon that is killed (each change is committed at once, into the write-ahead
log), and a power cut but for its last seconds (the log is synced every SYNC seconds). A line and the time up to which
grants are accounted change together, so nothing is counted twice. A disk that is full or broken stops no cell: what is
to be written waits in memory, and the log says so. A file that is no database any more is set aside.

Why SQLite: in the standard library, whole or not at all at every kill, readable with any tool. Why a thread: a disk may
take seconds, the daemon's event loop has milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpu_daemon.rundir import RunDirError
from gpu_daemon.site import log
from nbos_cluster import records
from nbos_cluster.records import GrantRecord, UseLine

T = TypeVar("T")

_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)

SYNC = 5.0
RETRY = 1.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS open (grant_id TEXT PRIMARY KEY, record BLOB NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (
    hour INTEGER, owner TEXT, groups TEXT, kernel TEXT, cells INTEGER NOT NULL, seconds REAL NOT NULL,
    device_seconds REAL NOT NULL, tpc_seconds REAL NOT NULL, byte_seconds REAL NOT NULL, joules REAL NOT NULL,
    PRIMARY KEY (hour, owner, groups, kernel)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unpublished (hour INTEGER PRIMARY KEY);
"""
_AMOUNTS = ("cells", "seconds", "device_seconds", "tpc_seconds", "byte_seconds", "joules")
_ADD = f"INSERT INTO uses VALUES ({', '.join('?' * 10)}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in _AMOUNTS
)


@dataclass(frozen=True)
class Change:
    """One step. settled: up to when open grants are accounted, 0: unchanged."""

    lines: Sequence[UseLine] = ()
    settled: float = 0.0
    begun: GrantRecord | None = None
    at: float = 0.0
    ended: str = ""


@dataclass(frozen=True)
class Known:
    """What the journal says when it is opened. open: grants, and up to when each is accounted."""

    journal: str
    open: tuple[tuple[GrantRecord, float], ...]
    unpublished: tuple[int, ...]


class Journal:
    """`open` first; then calls from any one thread. What is written is written in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work: queue.SimpleQueue[Sequence[Change] | Callable[[sqlite3.Connection], None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="writing the accounts", daemon=True)
        self._failing = False

    def open(self) -> Known:
        """Blocking; before anything else. Raises RunDirError where the disk does not let it be read (it is full)."""
        try:
            known = self._look()
        except sqlite3.DatabaseError as err:
            if err.sqlite_errorcode & 0xFF in _DISK:
                # Not its contents' fault: nothing is set aside, the daemon is started again until there is room.
                raise RunDirError(f"the accounts in {self.path} cannot be opened: {err}; make room there") from err
            aside = self.path.with_name(f"{self.path.name}.broken-{int(time.time())}")
            log.error("the accounts in %s cannot be read (%s); they are set aside as %s", self.path, err, aside.name)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
            known = self._look()
        self._thread.start()
        return known

    def _look(self) -> Known:
        with contextlib.closing(_connect(self.path)) as db:
            db.executescript(_SCHEMA)
            db.execute("INSERT OR IGNORE INTO meta VALUES ('journal', ?)", (uuid.uuid4().hex[:12],))
            db.commit()
            meta = dict(db.execute("SELECT name, value FROM meta"))
            settled = float(meta.get("settled", 0.0))
            found = []
            for raw, at in db.execute("SELECT record, at FROM open").fetchall():
                with contextlib.suppress(records.RecordError):  # of another version: its lines stand, it is not resumed
                    found.append((records.decode(raw, GrantRecord), max(at, settled)))
            hours = tuple(hour for (hour,) in db.execute("SELECT hour FROM unpublished ORDER BY hour"))
            return Known(str(meta["journal"]), tuple(found), hours)

    @property
    def works(self) -> bool:
        """Opened, and not closed yet."""
        return self._thread.is_alive()

    def write(self, changes: Sequence[Change]) -> None:
        """Soon, whole or not at all; returns at once."""
        self._work.put(changes)

    async def lines(self, since: int, until: int) -> list[UseLine]:
        """Those of the hours from `since` up to, not including, `until`."""
        return await self._ask(lambda db: _read(db, since, until))

    async def published(self, hour: int) -> None:
        """The hour's lines stand in etcd. Nothing was added since they were read, or the caller says so again."""
        await self._ask(lambda db: _forget(db, hour))

    async def close(self, seconds: float) -> None:
        """Everything is on the disk when this returns, or `seconds` have passed."""
        if not self.works:
            return
        self._work.put(None)
        await asyncio.to_thread(self._thread.join, seconds)

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work(db: sqlite3.Connection) -> None:
            try:
                tell: Callable[[], Any] = _teller(answer, question(db))
            except sqlite3.Error as err:
                tell = _breaker(answer, err)
            with contextlib.suppress(RuntimeError):  # the daemon ended meanwhile
                loop.call_soon_threadsafe(tell)

        self._work.put(work)
        return await answer

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        db = _connect(self.path)
        synced, dirty = time.monotonic(), False
        while True:
            try:
                item = self._work.get(timeout=SYNC if dirty else None)
            except queue.Empty:
                item = ()
            if callable(item):
                item(db)
            elif item:
                self._until_written(db, item)
                dirty = True
            if dirty and (item is None or time.monotonic() - synced >= SYNC):
                self._try(lambda: db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
                synced, dirty = time.monotonic(), False
            if item is None:
                db.close()
                return

    def _until_written(self, db: sqlite3.Connection, changes: Sequence[Change]) -> None:
        while not self._try(lambda: _carry_out(db, changes)):
            time.sleep(RETRY)

    def _try(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except sqlite3.Error as err:
            if not self._failing:
                log.error("the accounts cannot be written to %s (%s); they wait in memory, cells go on", self.path, err)
            self._failing = True
            return False
        if self._failing:
            log.warning("the accounts are written again")
        self._failing = False
        return True


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=10.0, check_same_thread=False)
    path.chmod(0o600)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")  # a commit does not wait for the disk; the checkpoints do
    db.execute("PRAGMA wal_autocheckpoint=0")
    return db


def _carry_out(db: sqlite3.Connection, changes: Sequence[Change]) -> None:
    with db:
        for change in changes:
            _enter(db, change)


def _enter(db: sqlite3.Connection, change: Change) -> None:
    for line in change.lines:
        amounts = [getattr(line, name) for name in _AMOUNTS]
        db.execute(_ADD, (line.hour, line.owner, json.dumps(line.groups), line.kernel, *amounts))
        db.execute("INSERT OR IGNORE INTO unpublished VALUES (?)", (line.hour,))
    if change.settled:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('settled', ?)", (change.settled,))
    if change.begun is not None:
        raw = records.encode(change.begun)
        db.execute("INSERT OR REPLACE INTO open VALUES (?, ?, ?)", (change.begun.grant, raw, change.at))
    if change.ended:
        db.execute("DELETE FROM open WHERE grant_id = ?", (change.ended,))


def _read(db: sqlite3.Connection, since: int, until: int) -> list[UseLine]:
    found = db.execute(
        "SELECT * FROM uses WHERE hour >= ? AND hour < ? ORDER BY hour, owner, groups, kernel", (since, until)
    )
    return [
        UseLine(hour=h, owner=o, groups=tuple(json.loads(g)), kernel=k, **dict(zip(_AMOUNTS, amounts, strict=True)))
        for h, o, g, k, *amounts in found
    ]


def _forget(db: sqlite3.Connection, hour: int) -> None:
    with db:
        db.execute("DELETE FROM unpublished WHERE hour = ?", (hour,))


def _teller(answer: asyncio.Future[T], value: T) -> Callable[[], Any]:
    return lambda: None if answer.done() else answer.set_result(value)


def _breaker(answer: asyncio.Future[T], err: BaseException) -> Callable[[], Any]:
    return lambda: None if answer.done() else answer.set_exception(err)
