"""Whose first kernel may be asked for soon, as the gateway's records say: followed, and told as a whole.

A record stands under a lease of a few minutes and goes by itself; one that cannot be read hides itself only. Without
these records, or the right to read them, replicas start as ever: nothing but warmth depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_daemon.site import log
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.kv import KV, Snapshot
from nbos_cluster.records import ExpectedRecord, RecordError


async def follow_expected(etcd: Etcd, tell: Callable[[Sequence[tuple[str, str]]], None]) -> None:
    """Never returns. tell: is given owner and image of each, whenever that changed."""
    known: dict[str, tuple[str, str]] = {}
    async for item in etcd.watch(keys.EXPECTED):
        if isinstance(item, Snapshot):
            known.clear()
            for kv in item.kvs:
                _put(known, kv)
        else:
            for event in item.events:
                if event.kind == "put":
                    _put(known, event.kv)
                else:
                    known.pop(event.kv.key, None)
        tell(list(known.values()))


def _put(known: dict[str, tuple[str, str]], kv: KV) -> None:
    try:
        record = records.decode(kv.value, ExpectedRecord)
    except RecordError as err:
        log.warning("%s: %s", kv.key, err)
        known.pop(kv.key, None)
    else:
        known[kv.key] = record.owner, record.image
