"""Brings an etcd to the users and roles of `nbos_cluster.access`, and turns its access control on.

Guarantees: may be repeated at any time, and while the cluster works: what is right already stays untouched, so that a
second call only reads; access control is turned on last, when every role stands, and only by who will still be root
afterwards. Users and roles that are not ours are left alone.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

from aetcd import rpc

from . import access
from .access import Kind, Permission
from .certs import read
from .errors import EtcdError, EtcdUnavailable
from .etcd import Etcd, Member, TLSFiles

_KINDS: dict[int, Kind] = {
    rpc.Permission.READ: "read",
    rpc.Permission.WRITE: "write",
    rpc.Permission.READWRITE: "readwrite",
}
_TYPES = {kind: number for number, kind in _KINDS.items()}


class AuthError(RuntimeError):
    """Access control cannot be turned on safely; says why and the way out."""


async def enabled(etcd: Etcd) -> bool:
    """Whether etcd asks who its clients are and what they may. Anybody may ask that."""
    try:
        # etcd before 3.5 has no question for it, but looks into no password while it has no access control.
        await _call(etcd, "Authenticate", rpc.AuthenticateRequest(name=access.READER, password=""))
    except EtcdError as err:
        return "not enabled" not in str(err)
    return True


async def setup(etcd: Etcd, hosts: Iterable[str], remove: Iterable[str] = ()) -> list[str]:
    """Make the roles of gateway, reader and the daemons of `hosts`; then turn access control on.

    remove: hosts that left for good. Returns what was changed, a line each; nothing when all stood already.
    """
    done: list[str] = []
    users = set((await _call(etcd, "UserList", rpc.AuthUserListRequest())).users)
    known = set((await _call(etcd, "RoleList", rpc.AuthRoleListRequest())).roles)
    for name, wanted in sorted(access.roles(hosts).items()):
        await _role(etcd, name, wanted, name in known, done)
        await _user(etcd, name, name in users, done)
    for host in remove:
        await _remove(etcd, access.daemon_user(host), users, known, done)
    if access.ROOT not in known:
        await _call(etcd, "RoleAdd", rpc.AuthRoleAddRequest(name=access.ROOT))
    await _user(etcd, access.ROOT, access.ROOT in users, done)
    if not await enabled(etcd):
        await _call(etcd, "AuthEnable", rpc.AuthEnableRequest())
        done.append("access control is on")
    return done


async def turn_off(etcd: Etcd) -> None:
    """Whoever holds a certificate of the cluster's authority may do everything from now on."""
    await _call(etcd, "AuthDisable", rpc.AuthDisableRequest())


async def check_safe(etcd: Etcd, tls: TLSFiles | None) -> None:
    """Raise AuthError where turning access control on would lock everybody out: not root, or no certificates asked."""
    if tls is None:
        raise AuthError("etcd must be reached with TLS and root's certificate: its clients are known by certificates")
    common = read(tls.cert).common
    if common != access.ROOT:
        raise AuthError(f"{tls.cert} is the certificate of {common!r}; use the admin's, whose common name is 'root'")
    for endpoint in etcd.endpoints:
        if await _lets_in_anybody(endpoint, tls):
            raise AuthError(
                f"etcd at {endpoint} does not ask its clients for certificates; start it with --client-cert-auth and "
                "--trusted-ca-file, or nobody could use it once access control is on"
            )


async def _lets_in_anybody(endpoint: str, tls: TLSFiles) -> bool:
    """Whether a client without a certificate gets a sign of HTTP/2 from it."""
    host, _, port = endpoint.rpartition(":")
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(5.0):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
            try:
                writer.write(_HTTP2_HELLO)
                return bool(await reader.read(1))
            finally:
                writer.close()
    except ssl.SSLCertVerificationError as err:
        raise AuthError(f"etcd at {endpoint} shows a certificate that {tls.ca} does not vouch for: {err}") from err
    except (OSError, TimeoutError):
        return False


_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


async def _role(etcd: Etcd, name: str, wanted: frozenset[Permission], there: bool, done: list[str]) -> None:
    have: frozenset[Permission] = frozenset()
    if there:
        answer = await _call(etcd, "RoleGet", rpc.AuthRoleGetRequest(role=name))
        have = frozenset(Permission(_KINDS[p.permType], p.key.decode(), p.range_end.decode()) for p in answer.perm)
    else:
        await _call(etcd, "RoleAdd", rpc.AuthRoleAddRequest(name=name))
    # What is too much goes first: etcd holds one permission for a range, and granting replaces its kind.
    wanted_ranges = {(p.key, p.end) for p in wanted}
    for p in sorted(have - wanted):
        if (p.key, p.end) not in wanted_ranges:
            request = rpc.AuthRoleRevokePermissionRequest(role=name, key=p.key.encode(), range_end=p.end.encode())
            await _call(etcd, "RoleRevokePermission", request)
    for p in sorted(wanted - have):
        perm = rpc.Permission(permType=_TYPES[p.kind], key=p.key.encode(), range_end=p.end.encode())
        await _call(etcd, "RoleGrantPermission", rpc.AuthRoleGrantPermissionRequest(name=name, perm=perm))
    if have != wanted:
        done.append(f"role {name} {'made' if not there else 'changed'}")


async def _user(etcd: Etcd, name: str, there: bool, done: list[str]) -> None:
    """The user with exactly the role of its name, and without a password: only its certificate lets it in."""
    roles: set[str] = set()
    if there:
        roles = set((await _call(etcd, "UserGet", rpc.AuthUserGetRequest(name=name))).roles)
    else:
        options = rpc.UserAddOptions(no_password=True)
        await _call(etcd, "UserAdd", rpc.AuthUserAddRequest(name=name, options=options))
    if name not in roles:
        await _call(etcd, "UserGrantRole", rpc.AuthUserGrantRoleRequest(user=name, role=name))
    for other in sorted(roles - {name}):
        await _call(etcd, "UserRevokeRole", rpc.AuthUserRevokeRoleRequest(name=name, role=other))
    if roles != {name}:
        done.append(f"user {name} {'made' if not there else 'changed'}")


async def _remove(etcd: Etcd, name: str, users: set[str], roles: set[str], done: list[str]) -> None:
    if name in users:
        await _call(etcd, "UserDelete", rpc.AuthUserDeleteRequest(name=name))
        done.append(f"user {name} removed")
    if name in roles:
        await _call(etcd, "RoleDelete", rpc.AuthRoleDeleteRequest(role=name))


async def _call(etcd: Etcd, method: str, request: Any) -> Any:
    """A repeated call finds its own work done; that is as good as doing it."""

    async def send(member: Member, message: Any, timeout: float) -> Any:
        return await getattr(rpc.AuthStub(member.channel), method)(message, timeout=timeout)

    try:
        return await etcd.call(send, request)
    except EtcdUnavailable:
        raise
    except EtcdError as err:
        if not any(text in str(err) for text in _DONE_BEFORE):
            raise
        return None


_DONE_BEFORE = (
    "user name already exists",
    "role name already exists",
    "user name not found",
    "role name not found",
    "permission is not granted to the role",
)
