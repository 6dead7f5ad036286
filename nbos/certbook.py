"""A lab's certificates as folders: the authority in one, and one for each process, to be copied to where it runs.

    <book>/ca/ca.pem, ca.key              the authority; its key may lie elsewhere, and be encrypted
    <book>/<name>/ca.pem, cert.pem, key.pem   name: etcd-<member>, gateway, daemon-<host>, admin, reader

Guarantees: keys have mode 0600 and stand in folders of mode 0700; what exists is never written over unless it was
asked for by name (`renew`, `replace`); the role of a certificate is its common name, which is its user in etcd.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbos_cluster import access, certs
from nbos_cluster.certs import Authority, CertError, Facts

from .trustarguments import ROLES

SOON = 30
"""Days before its end from which a certificate is worth a warning."""

_ADDRESS = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?")
HOST_ROLES = ("etcd", "daemon")
"""Roles of which each host has one; of the others there is one in the cluster."""


@dataclass(frozen=True)
class Entry:
    """One certificate of the book. problem: why it cannot be used; '' when it can."""

    name: str
    folder: Path
    facts: Facts | None
    problem: str = ""

    @property
    def role(self) -> str:
        return role_of(self.facts) if self.facts else ""

    @property
    def warning(self) -> str:
        """What will be a problem soon; '' when nothing."""
        if self.problem or self.facts is None or self.facts.days_left >= SOON:
            return ""
        days = self.facts.days_left
        when = f"ends in {days} days" if days >= 0 else f"ended on {self.facts.ends:%Y-%m-%d}"
        return f"{when}; run: nbos certs renew {self.name}"

    @property
    def ended(self) -> bool:
        return self.facts is not None and self.facts.days_left < 0


def role_of(facts: Facts) -> str:
    """The role that a certificate's common name stands for; '' for none of ours."""
    if access.host_of(facts.common):
        return "daemon"
    names = {access.MEMBER: "etcd", access.ROOT: "admin", access.GATEWAY: "gateway", access.READER: "reader"}
    return names.get(facts.common, "")


@dataclass(frozen=True)
class Wanted:
    """A certificate to make: its folder's name, its common name, and the names it is good for."""

    name: str
    common: str
    sans: tuple[str, ...]
    server: bool


def wanted(role: str, hosts: Sequence[str]) -> list[Wanted]:
    """What `issue ROLE HOST[,ADDRESS…]…` asks for. Raises CertError."""
    if role not in ROLES:
        raise CertError(f"{role!r} is no role; choose one of {', '.join(ROLES)}")
    if role in HOST_ROLES:
        if not hosts:
            raise CertError(f"for which hosts? nbos certs issue {role} HOST[,ADDRESS…] …")
        return [_for_host(role, host) for host in hosts]
    if hosts:
        raise CertError(f"the role {role} is not one host's; leave out {' '.join(hosts)}")
    return [Wanted(role, {"admin": access.ROOT}.get(role, role), (), False)]


def _for_host(role: str, text: str) -> Wanted:
    host, *more = text.split(",")
    for name in (host, *more):
        if not _ADDRESS.fullmatch(name):
            raise CertError(f"{name!r} in {text!r} is no host name or IP address")
    try:
        user = access.daemon_user(host)
    except ValueError as err:
        raise CertError(str(err)) from err
    names = certs.normal((host, *more))
    if role == "daemon":
        return Wanted(user, user, names, False)
    local = tuple(name for name in ("localhost", "127.0.0.1") if name not in names)
    return Wanted(f"etcd-{host}", access.MEMBER, (*names, *local), True)


class CertBook:
    """ca_key: where the authority's key lies; inside the book when not given."""

    def __init__(self, path: Path, ca_key: Path | None = None) -> None:
        self.path = path
        self.ca_cert = path / "ca" / "ca.pem"
        self.ca_key = ca_key or path / "ca" / "ca.key"

    def init(self, name: str, days: int, passphrase: bytes | None) -> Facts:
        """A new authority. Raises CertError when there is one."""
        for path in (self.ca_cert, self.ca_key):
            if path.exists():
                raise CertError(
                    f"{path} is there already and is kept; to begin anew choose another --dir, or move it away"
                )
        self._make_folder(self.ca_cert.parent)
        if not self.ca_key.parent.is_dir():
            raise CertError(f"the folder {self.ca_key.parent} for the authority's key is not there; make it first")
        certs.write_authority(self.ca_cert, self.ca_key, name, days=days, passphrase=passphrase)
        return certs.read(self.ca_cert)

    def authority(self, passphrase: bytes | None) -> Authority:
        self._check_there()
        return certs.load_authority(self.ca_cert, self.ca_key, passphrase)

    def key_is_encrypted(self) -> bool:
        try:
            return b"ENCRYPTED" in self.ca_key.read_bytes()
        except OSError as err:
            raise CertError(f"the authority's key {self.ca_key} cannot be read ({err.strerror}); use --ca-key") from err

    def _check_there(self) -> None:
        if not self.ca_cert.exists():
            raise CertError(f"there is no authority in {self.path}; run: nbos certs init --dir {self.path}")

    def issue(self, one: Wanted, authority: Authority, days: int, replace: bool = False) -> str:
        """Make it; what was done, as one line. Raises CertError when another one stands in its place."""
        folder = self.path / one.name
        if folder.exists() and not replace:
            return self._kept(one, folder)
        self._make(one, folder, authority, days)
        names = f" for {', '.join(one.sans)}" if one.sans else ""
        return f"{folder}: made{names}, until {certs.read(folder / 'cert.pem').ends:%Y-%m-%d}"

    def _kept(self, one: Wanted, folder: Path) -> str:
        entry = self.entry(one.name)
        if entry.problem or entry.facts is None:
            raise CertError(f"{folder} is there, but {entry.problem}; to write over it add --replace")
        lacks = [name for name in one.sans if name not in entry.facts.sans]
        if lacks or entry.facts.common != one.common:
            what = f"does not name {', '.join(lacks)}" if lacks else f"is {entry.facts.common}'s"
            raise CertError(f"{folder} is there, but its certificate {what}; to write over it add --replace")
        return f"{folder}: kept, good until {entry.facts.ends:%Y-%m-%d}"

    def renew(self, name: str, authority: Authority, days: int) -> str:
        """A new key and certificate for the same names. Raises CertError."""
        facts = self.facts(name)
        self._make(Wanted(name, facts.common, facts.sans, facts.server), self.path / name, authority, days)
        return f"{self.path / name}: renewed, until {self.facts(name).ends:%Y-%m-%d}"

    def facts(self, name: str) -> Facts:
        self._check_there()
        if name == "ca" or not (self.path / name / "cert.pem").exists():
            raise CertError(f"there is no certificate {name!r} in {self.path}; there are: {', '.join(self.names())}")
        return certs.read(self.path / name / "cert.pem")

    def _make(self, one: Wanted, folder: Path, authority: Authority, days: int) -> None:
        self._make_folder(folder)
        certs.write_leaf(
            folder / "cert.pem",
            folder / "key.pem",
            authority,
            common=one.common,
            sans=one.sans,
            server=one.server,
            days=days,
        )
        certs.write(folder / "ca.pem", self.ca_cert.read_bytes(), 0o644)

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        except OSError as err:
            raise CertError(f"{folder} cannot be made: {err.strerror}; choose another --dir") from err

    def names(self) -> list[str]:
        """Of all certificates but the authority's."""
        folders = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [f.name for f in folders if f.name != "ca" and (f / "cert.pem").exists()]

    def entries(self) -> list[Entry]:
        self._check_there()
        return [self.entry(name) for name in self.names()]

    def entry(self, name: str) -> Entry:
        folder = self.path / name
        return inspect(name, folder / "cert.pem", folder / "key.pem", folder / "ca.pem", self.ca_cert)


def inspect(name: str, cert: Path, key: Path, ca: Path, authority: Path) -> Entry:
    """One certificate as it lies there, looked at with its key and the authority."""
    try:
        facts = certs.read(cert)
    except CertError as err:
        return Entry(name, cert.parent, None, str(err))
    problem = certs.trouble(cert, key, ca) or _open_key(key)
    if not problem and ca != authority and ca.read_bytes() != authority.read_bytes():
        problem = f"{ca} is another authority than {authority}"
    return Entry(name, cert.parent, facts, problem)


def _open_key(key: Path) -> str:
    """Whether others may read the key, as a problem with its way out."""
    return f"others may read {key}; run: chmod 600 {key}" if stat.S_IMODE(key.stat().st_mode) & 0o077 else ""
