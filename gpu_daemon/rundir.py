"""What a daemon keeps on its own disk, so that after a crash it finds its lease, its replicas and their grants again.

    <run>/lease.json                the lease's id
    <run>/accounts.db               what was used (SQLite; see journal)
    <run>/r/<12 digits>-<index>/    one replica: replica.json, grant, left.json, log; the runtime's own:
                                    connection.json, process.json and s (the socket), or a folder d with what its
                                    container sees
    <run>/w/<8 digits>/             one container that waits: its folder d

Everything is for this user alone (folders 0700, files 0600). Names are short because the path of a Unix socket may have
107 bytes only.

A full disk: what only a restart would ask for (lease, health) is left out, and the log says so; what would be unsafe to
leave out (a grant: a restarted daemon could give the same device twice) raises OSError, for whoever asked to refuse.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gpu_daemon.fleet import ReplicaId
from nbos_cluster import records
from nbos_cluster.records import GrantRecord

log = logging.getLogger("gpu_daemon")

SOCKET_PATH_LIMIT = 107
"""Bytes of `sun_path` on Linux, without the final zero."""


class RunDirError(RuntimeError):
    """The run directory cannot be used; says why and the way out."""


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.replicas = self.path / "r"
        self._lock: IO[bytes] | None = None
        self._failing = ""

    def open(self) -> None:
        """Make the folders and take the lock. Raises RunDirError when another daemon has it, its path is too long, or
        nothing can be written there."""
        longest = self.folder(ReplicaId("k", 99)) / "d" / "s"
        size = len(os.fsencode(longest))
        if size > SOCKET_PATH_LIMIT:
            raise RunDirError(
                f"run directory {self.path} leads to socket paths of {size} bytes, Unix allows {SOCKET_PATH_LIMIT}; "
                f"choose one that is at least {size - SOCKET_PATH_LIMIT} bytes shorter"
            )
        try:
            for folder in (self.path, self.replicas):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
            self._lock = open(self.path / "lock", "wb")  # noqa: SIM115  held as long as the daemon lives
        except OSError as err:
            raise RunDirError(
                f"the run directory {self.path} cannot be used: {err}; make room, or choose another"
            ) from err
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise RunDirError(
                f"another gpu_daemon uses {self.path}; give each daemon a run directory of its own"
            ) from err

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def folder(self, id: ReplicaId) -> Path:
        return self.replicas / f"{hashlib.sha256(id.kernel.encode()).hexdigest()[:12]}-{id.index}"

    def make_folder(self, id: ReplicaId) -> Path:
        folder = self.folder(id)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def forget(self, id: ReplicaId) -> None:
        shutil.rmtree(self.folder(id), ignore_errors=True)

    def saved_replicas(self) -> Iterator[tuple[ReplicaId, dict[str, Any]]]:
        """The replicas that were started here, with what `save_replica` was given. Unreadable ones are left out."""
        for folder in sorted(self.replicas.iterdir()):
            saved = read_json(folder / "replica.json")
            if saved is not None and isinstance(saved.get("kernel"), str) and isinstance(saved.get("index"), int):
                yield ReplicaId(saved["kernel"], saved["index"]), saved

    def save_replica(self, id: ReplicaId, **fields: object) -> None:
        write_json(self.folder(id) / "replica.json", {"kernel": id.kernel, "index": id.index, **fields})

    def load_replica(self, id: ReplicaId) -> dict[str, Any]:
        return read_json(self.folder(id) / "replica.json") or {}

    def save_grant(self, id: ReplicaId, grant: GrantRecord | None) -> None:
        path = self.folder(id) / "grant"
        if grant is None:
            path.unlink(missing_ok=True)
        else:
            write(path, records.encode(grant))

    def load_grant(self, id: ReplicaId) -> GrantRecord | None:
        try:
            return records.decode((self.folder(id) / "grant").read_bytes(), GrantRecord)
        except (OSError, records.RecordError):
            return None

    def save_left(self, id: ReplicaId, left: Mapping[str, int]) -> None:
        """What its process has on devices between cells."""
        write_json(self.folder(id) / "left.json", dict(left))

    def load_left(self, id: ReplicaId) -> dict[str, int]:
        left = read_json(self.folder(id) / "left.json") or {}
        return {uuid: size for uuid, size in left.items() if isinstance(size, int)}

    def save_lease(self, lease: int) -> None:
        """Without it a restarted daemon waits until this lease has ended, and claims anew what runs."""
        self._write_if_possible("lease.json", {"lease": lease})

    def load_lease(self) -> int:
        lease = (read_json(self.path / "lease.json") or {}).get("lease", 0)
        return lease if isinstance(lease, int) else 0

    def save_health(self, **fields: object) -> None:
        """What is known of the GPUs' health and cannot be measured again."""
        self._write_if_possible("health.json", fields)

    def load_health(self) -> dict[str, Any]:
        return read_json(self.path / "health.json") or {}

    def _write_if_possible(self, name: str, value: object) -> None:
        try:
            write_json(self.path / name, value)
        except OSError as err:
            if str(err) != self._failing:
                log.error("%s: a restart of this daemon will not find what it should; make room there", err)
            self._failing = str(err)
        else:
            self._failing = ""


def write(path: Path, data: bytes) -> None:
    """Whole or not at all, readable for this user only. Not synced: after a power cut no replica is left to find."""
    new = path.with_name(f".new-{path.name}")
    with open(new, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    write(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
