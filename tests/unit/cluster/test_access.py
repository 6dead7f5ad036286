"""The roles in etcd as data: no host's role reaches into another's, whatever the hosts are called."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nbos_cluster import access, keys
from nbos_cluster.access import Permission

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)


def covers(permission: Permission, key: str) -> bool:
    return permission.key <= key < permission.end if permission.end else key == permission.key


def may(role: frozenset[Permission], kind: str, key: str) -> bool:
    return any(kind in p.kind and covers(p, key) for p in role)


def of_host(host: str) -> list[str]:
    return [keys.host(host), keys.grant(host, "g"), keys.ticket(host, "t")]


@given(NAMES, NAMES)
def test_a_daemon_writes_its_own_hosts_records_and_no_others(mine: str, other: str) -> None:
    assume(mine != other)
    role = access.daemon(mine)
    assert all(may(role, "write", key) and may(role, "read", key) for key in of_host(mine))
    assert not any(may(role, "write", key) for key in of_host(other))
    assert not may(role, "read", keys.ticket(other, "t"))


@given(NAMES)
def test_a_users_name_says_which_host_it_is(host: str) -> None:
    assert access.host_of(access.daemon_user(host)) == host
    assert access.daemon_user(host) not in (access.ROOT, access.GATEWAY, access.READER, access.MEMBER)


@pytest.mark.parametrize("name", [access.ROOT, access.GATEWAY, access.READER, access.MEMBER, ""])
def test_who_is_no_daemon_has_no_host(name: str) -> None:
    assert access.host_of(name) == ""


def test_no_role_reaches_beyond_nbos_and_members_have_none() -> None:
    roles = access.roles(["a", "b"])
    assert set(roles) == {"gateway", "reader", "daemon-a", "daemon-b"}
    for role in roles.values():
        for permission in role:
            assert permission.key.startswith(keys.PREFIX + "/")
            assert not permission.end or permission.end.startswith(keys.PREFIX + "/")


def test_a_reader_is_told_no_secret_and_writes_nothing() -> None:
    role = access.reader()
    assert not may(role, "read", keys.spec("k"))
    assert not any("write" in permission.kind for permission in role)


def test_a_host_with_a_name_that_is_no_key_gets_no_role() -> None:
    with pytest.raises(ValueError, match="host"):
        access.roles(["../gateway"])
