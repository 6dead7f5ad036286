"""What `nbos move` makes of what a person says, and what the gateway lets an administrator ask."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nbos.movecommand import MoveFailed, find_kernel
from nbos_cluster import keys, records
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import KV, Snapshot
from nbos_cluster.placement import HostLoad, loads
from nbos_cluster.records import KernelSpec, Move, ReplicaRecord
from nbos_spawner.gateway import moverequests
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.errors import ApiError
from nbos_spawner.gateway.moverequests import MoveWanted, read_move_wanted

from .cluster_data import host, kernel_kvs, replica, spec

KERNELS = [
    {"kernel_id": "3f2a-1", "owner": "ada", "notebook": "/home/ada/work/a.ipynb"},
    {"kernel_id": "3f2a-2", "owner": "ada", "notebook": "/home/ada/old/a.ipynb"},
    {"kernel_id": "77", "owner": "bob", "notebook": ""},
]


@pytest.mark.parametrize(
    ("name", "found"),
    [("3f2a-1", "3f2a-1"), ("77", "77"), ("ada/work/a.ipynb", "3f2a-1"), ("ada/home/ada/old/a.ipynb", "3f2a-2")],
)
def test_a_kernel_is_named_by_its_id_or_by_its_users_notebook(name: str, found: str) -> None:
    assert find_kernel(KERNELS, name)["kernel_id"] == found


@pytest.mark.parametrize("name", ["ada/a.ipynb", "3f2a"])
def test_a_name_of_several_kernels_lists_their_ids(name: str) -> None:
    with pytest.raises(MoveFailed, match=r"3f2a-1 .*, 3f2a-2 .*use the id"):
        find_kernel(KERNELS, name)


@pytest.mark.parametrize("name", ["bob/a.ipynb", "bob/", "7", "a.ipynb"])
def test_a_name_of_no_kernel_says_how_to_name_one(name: str) -> None:
    with pytest.raises(MoveFailed, match="USER/NOTEBOOK"):
        find_kernel(KERNELS, name)


def view_of(one: KernelSpec, *more: ReplicaRecord) -> KernelView:
    view = KernelView(one.kernel)
    kvs = [KV(keys.replica(one.kernel, record.index), records.encode(record), 2, 2) for record in more]
    view.apply(Snapshot([*kernel_kvs(one), *kvs], 3))
    return view


def on(one: KernelSpec, *names: str) -> dict[str, HostLoad]:
    return loads([host(name) for name in names], [one])


def refused(view: KernelView, wanted: MoveWanted, hosts: dict[str, HostLoad]) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        moverequests.begin(view, wanted, hosts)
    return caught.value.status, caught.value.code


def test_what_cannot_be_moved_is_refused_with_the_reason() -> None:
    one = spec("k", "ada", "a", "b")
    view, hosts = view_of(one), on(one, "a", "b", "c")
    hosts["full"] = HostLoad(replace(host("full"), max_replicas=1), replicas=1)
    hosts["leaving"] = HostLoad(host("leaving", draining=True))
    assert refused(view, MoveWanted(to="z"), hosts) == (400, "no_such_host")
    assert refused(view, MoveWanted(source="c"), hosts) == (409, "not_there")
    assert refused(view, MoveWanted(source="a", to="b"), hosts) == (409, "there_already")
    assert refused(view, MoveWanted(to="full"), hosts) == (409, "no_room")
    assert refused(view, MoveWanted(to="leaving"), hosts) == (409, "draining")
    assert refused(view, MoveWanted(), on(one, "a", "b")) == (409, "there_already")
    moves = replace(one, move=Move(source=0, target=2, from_host="a", to_host="c"))
    assert refused(view_of(moves), MoveWanted(), hosts) == (409, "moving")


def test_only_a_move_that_was_asked_for_is_taken_back_and_only_to_a_replica_that_is_ready() -> None:
    one = spec("k", "ada", "a", "c")
    asked = replace(one, replicas=1, move=Move(source=0, target=1, from_host="a", to_host="c"))
    drained = replace(one, replicas=1, move=Move(source=0, target=1, from_host="a", to_host="c", why="drain"))
    for view, code in (
        (view_of(one), "not_moving"),
        (view_of(drained), "draining"),
        (view_of(asked), "not_ready"),
    ):
        with pytest.raises(ApiError) as caught:
            moverequests.take_back(view)
        assert caught.value.code == code
    assert moverequests.take_back(view_of(asked, replica(0, "a"))).success


def test_only_administrators_move_replicas() -> None:
    with pytest.raises(ApiError, match="only an administrator"):
        moverequests.check_admin(Caller("ada", "user", admin=False, kernels=True))
    moverequests.check_admin(Caller("root", "user", admin=True))


def test_a_body_that_is_no_request_is_refused() -> None:
    assert read_move_wanted(b"") == MoveWanted()
    assert read_move_wanted(b'{"from": "a", "to": "b"}') == MoveWanted(source="a", to="b")
    for body in (b'{"source": "a"}', b"[]", b'{"to": 3}', b"\xff"):
        with pytest.raises(ApiError):
            read_move_wanted(body)
