"""Our plain records of `nbos_cluster.kv` to and from etcd's protobuf messages."""

from __future__ import annotations

from typing import Any

from aetcd import rpc

from .kv import KV, Compare, Event, Op, TxnResult, prefix_end

_TARGETS = {
    "create": rpc.Compare.CREATE,
    "mod": rpc.Compare.MOD,
    "value": rpc.Compare.VALUE,
    "lease": rpc.Compare.LEASE,
}
_FIELDS = {"create": "create_revision", "mod": "mod_revision", "value": "value", "lease": "lease"}
_RESULTS = {"=": rpc.Compare.EQUAL, ">": rpc.Compare.GREATER}


def key_value(kv: Any) -> KV:
    return KV(kv.key.decode(), kv.value, kv.mod_revision, kv.create_revision, kv.lease)


def kvs_of(response: Any) -> list[KV]:
    return [key_value(kv) for kv in response.kvs]


def event_of(event: Any) -> Event:
    return Event("delete" if event.type == rpc.Event.DELETE else "put", key_value(event.kv))


def compare_message(compare: Compare) -> Any:
    return rpc.Compare(
        key=compare.key.encode(),
        target=_TARGETS[compare.target],
        result=_RESULTS[compare.result],
        **{_FIELDS[compare.target]: compare.operand},
    )


def range_request(op: Op) -> Any:
    newest = {"limit": 1, "sort_order": rpc.RangeRequest.DESCEND} if op.newest else {}
    return rpc.RangeRequest(key=op.key.encode(), range_end=op.end.encode(), keys_only=op.keys_only, **newest)


def op_message(op: Op) -> Any:
    if op.kind == "put":
        put = rpc.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease)
        return rpc.RequestOp(request_put=put)
    if op.kind == "delete":
        delete = rpc.DeleteRangeRequest(key=op.key.encode(), range_end=op.end.encode())
        return rpc.RequestOp(request_delete_range=delete)
    return rpc.RequestOp(request_range=range_request(op))


def txn_request(compare: Any, success: Any, failure: Any) -> Any:
    return rpc.TxnRequest(
        compare=[compare_message(c) for c in compare],
        success=[op_message(op) for op in success],
        failure=[op_message(op) for op in failure],
    )


def txn_result(response: Any) -> TxnResult:
    answers = [
        kvs_of(one.response_range) if one.WhichOneof("response") == "response_range" else []
        for one in response.responses
    ]
    return TxnResult(response.succeeded, response.header.revision, answers)


def watch_request(prefix: str, start_revision: int) -> Any:
    """No progress notifications: etcd 3.4.23 may send them ahead of events (etcd issue 15220), so a resume
    could skip."""
    create = rpc.WatchCreateRequest(
        key=prefix.encode(), range_end=prefix_end(prefix).encode(), start_revision=start_revision
    )
    return rpc.WatchRequest(create_request=create)
