"""The state directory of one embedded NBOS: where everything lies, who may read it, and that only one `nbos
up` uses it.

    lock  nbos.json  ports.json  password  admin-password  token  secrets.json
    tls/  etcd/  hub/  homes/<user>/  hosts/<host>/  logs/<process>.log

It must guarantee: the directory and every secret in it are for this user alone, from the moment they exist;
files are replaced whole or not at all; two `nbos up` never work on the same directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SOCKET_ROOM = 70
"""Bytes a host's run directory may have: its sockets lie 30 deeper, and a Unix socket's path has 107 at
most."""


class StateError(RuntimeError):
    """The state directory cannot be used; says why and the way out."""


def default_state_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "nbos"


@dataclass(frozen=True)
class StateDir:
    path: Path

    @classmethod
    def at(cls, path: str | Path | None) -> StateDir:
        return cls(Path(path).expanduser().absolute() if path else default_state_dir())

    @property
    def info_file(self) -> Path:
        return self.path / "nbos.json"

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def password_file(self) -> Path:
        return self.path / "password"

    @property
    def admin_password_file(self) -> Path:
        return self.path / "admin-password"

    @property
    def secrets_file(self) -> Path:
        return self.path / "secrets.json"

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def etcd(self) -> Path:
        return self.path / "etcd"

    @property
    def hub(self) -> Path:
        return self.path / "hub"

    @property
    def homes(self) -> Path:
        return self.path / "homes"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def host(self, name: str) -> Path:
        return self.path / "hosts" / name

    def run_dir(self, host: str) -> Path:
        """Where a host's daemon keeps its sockets: in the state directory unless that path is too long for
        them."""
        near = self.host(host) / "run"
        if len(os.fsencode(near)) <= SOCKET_ROOM:
            return near
        return Path(tempfile.gettempdir()) / f"nbos-{os.getuid()}-{self.mark}" / host

    @property
    def mark(self) -> str:
        """Tells this state directory from any other, in few characters."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]

    def create(self) -> None:
        """Make the directory and what is in it. Raises StateError when it belongs to somebody else."""
        try:
            for folder in (self.path, self.tls, self.etcd, self.hub, self.homes, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.path.stat().st_uid
            if owner != os.getuid():
                raise StateError(f"{self.path} belongs to user {owner}, not to you; choose another --state-dir")
            self.path.chmod(0o700)
        except OSError as err:
            raise StateError(f"{self.path} cannot be used: {err.strerror}; choose another --state-dir") from err

    def make_run_dir(self, host: str) -> Path:
        """The host's run directory, for this user alone. Raises StateError when somebody else made it
        first."""
        path = self.run_dir(host)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (path, path.parent):
            found = folder.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise StateError(f"{folder} belongs to somebody else; choose a shorter --state-dir or remove it")
            folder.chmod(0o700)
        return path

    def lock(self) -> IO[bytes]:
        """Take the directory for this process; hold what is returned. Raises StateError when it is in use."""
        file = open(self.path / "lock", "ab")  # noqa: SIM115  held until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            file.close()
            pid = self.info().get("pid", "?")
            raise StateError(
                f"an `nbos up` (process {pid}) is already running on {self.path}; use it, end it, or give this one "
                "another --state-dir"
            ) from err
        return file

    def in_use(self) -> bool:
        """Whether an `nbos up` works on the directory now."""
        try:
            self.lock().close()
        except StateError:
            return True
        except OSError:
            return False
        return False

    def info(self) -> dict[str, Any]:
        """What the last `nbos up` wrote about itself; empty when there was none."""
        return read_json(self.info_file)

    def secret(self, file: Path, size: int) -> str:
        """The secret in `file`, made of `size` random bytes when it is not there yet."""
        if not file.exists():
            write_private(file, secrets.token_urlsafe(size) + "\n")
        return file.read_text().strip()


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_private(path: Path, text: str) -> None:
    """Write `text`, whole or not at all, in a file only this user can read."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # created with mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, value: object) -> None:
    write_private(path, json.dumps(value, indent=2) + "\n")
