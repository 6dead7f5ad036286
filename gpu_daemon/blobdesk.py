"""The daemon's way to the blob store: threads, time limits, group commit, and the fence that keeps the collection away.

Guarantees: what `put` returned for is safe on the store; a store that hangs costs its own requests a clear `away`, and
nothing else of the daemon; a record that names blobs gets into etcd (`commit`) only if every one of them is in the
store and no collection has begun since that was seen (`collecting` says how the two exclude each other).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpu_daemon import collecting
from gpu_daemon.blobs import BlobCorrupt, BlobError, BlobMissing, BlobStore, BlobStoreAway, Draft, folder_of
from gpu_daemon.collecting import Fence
from gpu_daemon.metrics.meters import Meters
from gpu_daemon.site import Refused
from nbos_cluster.kv import Txn, TxnResult

T = TypeVar("T")
Send = Callable[[Txn], Awaitable[TxnResult]]

THREADS = min(16, max(4, 2 * (os.cpu_count() or 1)))
SEEN = 400_000
"""Addresses that are remembered as being in the store."""
AT_ONCE = 4096
"""Addresses that are looked up, or named as missing, together."""

TOGETHER = 32 * 1024 * 1024
"""Bytes that are settled together when there are as many: what a disk takes in about the time of one settling."""
GATHER = 0.02
"""Seconds that written blobs wait for others of their owner that are being written, at most."""


@dataclass(eq=False)
class _Batch:
    written: list[tuple[str, Draft | None]] = field(default_factory=list)
    failed: dict[str, BlobError] = field(default_factory=dict)
    size: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing more of this owner is being written, or it is large enough."""
    task: asyncio.Task[None] | None = None


class BlobDesk:
    def __init__(
        self, store: BlobStore, keep: float = 3600.0, patience: float = 45.0, meters: Meters | None = None
    ) -> None:
        self.store = store
        self._meters = meters or Meters()
        self.keep, self._patience = keep, patience
        """keep: seconds that a blob stays when nothing names it (yet). patience: seconds after which a call hangs."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")
        self._fences: dict[str, Fence] = {}
        self._seen: dict[tuple[str, str], int] = {}
        """Blobs known to be in the store, with the revision of the fence under which that was seen."""
        self._next: dict[str, _Batch] = {}
        self._last: dict[str, _Batch] = {}
        self._writing: Counter[str] = Counter()

    # -- blobs --------------------------------------------------------------------------------------------------------

    async def put(self, owner: str, digest: str | None, data: bytes | memoryview) -> str:
        """Store it safely; its address. digest: the address that it has to have, if any. Raises BlobError."""
        fence = self._fences.get(folder_of(owner))
        with self._counting("put") as moved:
            stored, batch = await self._write(owner, digest, data)
            assert batch.task is not None
            await asyncio.shield(batch.task)
            if stored in batch.failed:
                raise batch.failed[stored]
            moved(len(data))
        if fence is not None and not fence.locked:
            self._saw(owner, [stored], fence)
        return stored

    async def read_into(self, owner: str, digest: str, target: memoryview) -> int:
        """Read it into `target`; its size. Raises BlobError."""
        with self._counting("get") as moved:
            moved(size := await self._reading(owner, digest, self.store.read_into, target))
        return size

    async def get(self, owner: str, digest: str) -> bytes:
        with self._counting("get") as moved:
            data = await self._reading(owner, digest, self.store.get)
            moved(len(data))
        return data

    async def open_files(self, owner: str, digests: Sequence[str]) -> list[int | None]:
        """Descriptors for reading, of those that can be had so. What they show is not checked. Raises BlobError."""
        with self._counting("get") as moved:
            handles = await self._call("blobs could not be opened", self.store.open_files, owner, digests)
            moved(sum(os.fstat(handle).st_size for handle in handles if handle is not None))
        return handles

    async def have(self, owner: str, digests: Collection[str]) -> set[str]:
        """Which of them are there; they stay for `keep` seconds at least. Raises BlobError."""
        fence = self._fences.get(folder_of(owner))
        there = await self._call("blobs could not be looked up", self.store.have, owner, digests)
        folder = folder_of(owner)
        for digest in set(digests) - there:
            self._seen.pop((folder, digest), None)
        if fence is not None and not fence.locked:
            self._saw(owner, there, fence)
        return there

    async def free(self) -> int | None:
        """Bytes that can still be stored, None where nobody can tell. Raises BlobError."""
        return await self._call("the room left could not be looked up", self.store.free)

    @contextlib.contextmanager
    def _counting(self, operation: str) -> Iterator[Callable[[int], None]]:
        """Tells the meters of one call of the store: the bytes it moved, or that it failed."""
        began = time.perf_counter()
        try:
            yield lambda size: self._meters.blob(operation, time.perf_counter() - began, size)
        except BlobError:
            self._meters.blob_failed(operation)
            raise

    # -- records that name blobs --------------------------------------------------------------------------------------

    async def commit(self, send: Send, owner: str, digests: Collection[str], txn: Txn) -> TxnResult:
        """Carry out `txn`, which makes something name `digests`.

        Raises Refused: `blobs_missing` with the field `missing`, or a store's error. What `send` raises passes.
        """
        if not digests:
            return await send(txn)
        folder = folder_of(owner)
        while True:
            fence = await self._secure(send, owner, digests)
            result = await send(collecting.fenced(folder, fence, txn))
            if result.succeeded or collecting.read_fence(folder, result.responses[-2:]) == fence:
                return TxnResult(result.succeeded, result.revision, result.responses[: len(txn.failure)])

    async def _secure(self, send: Send, owner: str, digests: Collection[str]) -> Fence:
        """The fence under which all of them are in the store."""
        fence = await self._fence(send, folder_of(owner))
        folder = folder_of(owner)
        unknown = {digest for digest in digests if self._seen.get((folder, digest)) != fence.revision}
        gone: set[str] = set()
        order = sorted(unknown)
        for at in range(0, len(order), AT_ONCE):  # what is seen stays seen, also when a later part fails
            some = order[at : at + AT_ONCE]
            try:
                gone |= set(some) - await self.have(owner, some)
            except BlobError as err:
                raise Refused(err.code, str(err)) from err
        if gone:
            reason = f"{len(gone)} of the blobs it names are not in {self.store.where} (any more); put them first"
            raise Refused("blobs_missing", reason, {"missing": sorted(gone)[:AT_ONCE]})
        return fence

    async def _fence(self, send: Send, folder: str) -> Fence:
        """How it stands with the collection of this namespace, once none is under way."""
        while True:
            fence = collecting.read_fence(folder, (await send(collecting.look(folder))).responses)
            self._fences[folder] = fence
            if not fence.locked:
                return fence
            await asyncio.sleep(0.02)

    def _saw(self, owner: str, digests: Iterable[str], fence: Fence) -> None:
        if len(self._seen) > SEEN:
            self._seen.clear()
        folder = folder_of(owner)
        self._seen.update(((folder, digest), fence.revision) for digest in digests)

    # -- threads ------------------------------------------------------------------------------------------------------

    async def _reading(self, owner: str, digest: str, read: Callable[..., T], *more: Any) -> T:
        try:
            return await self._call("a blob could not be read", read, owner, digest, *more)
        except (BlobMissing, BlobCorrupt):
            self._seen.pop((folder_of(owner), digest), None)
            raise

    async def _write(self, owner: str, digest: str | None, data: bytes | memoryview) -> tuple[str, _Batch]:
        """Write it down: its address, and what it is settled with. One settling of an owner's blobs at a time; what
        comes meanwhile is settled together by the next."""
        self._writing[owner] += 1
        try:
            stored, draft = await self._call("a blob could not be stored", self._written, owner, digest, data)
            batch = self._next.get(owner)
            if batch is None:
                batch = self._next[owner] = _Batch()
                batch.task = asyncio.create_task(self._settle(owner, batch))
            batch.written.append((stored, draft))
            batch.size += len(data)
        finally:
            self._writing[owner] -= 1
            self._consider(owner)
        return stored, batch

    def _written(self, owner: str, digest: str | None, data: bytes | memoryview) -> tuple[str, Draft | None]:
        if digest is None:
            return self.store.write_unnamed(owner, data)
        return digest, self.store.write(owner, digest, data)

    def _consider(self, owner: str) -> None:
        """Each settling commits the file system's journal: half a dozen blobs that come together are worth one, not
        one for the first and another for the rest."""
        batch = self._next.get(owner)
        if not self._writing[owner]:
            del self._writing[owner]
        if batch is not None and (owner not in self._writing or batch.size >= TOGETHER):
            batch.full.set()

    async def _settle(self, owner: str, batch: _Batch) -> None:
        before, self._last[owner] = self._last.get(owner), batch
        if before is not None and before.task is not None:
            await asyncio.wait({before.task})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batch.full.wait(), GATHER)
        del self._next[owner]
        try:
            batch.failed = await self._call("blobs could not be made safe", self.store.settle, owner, batch.written)
        finally:
            if self._last.get(owner) is batch:
                del self._last[owner]

    async def _call(self, what: str, work: Callable[..., T], *args: Any) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        done, _ = await asyncio.wait({future}, timeout=self._patience)
        if not done:
            future.add_done_callback(lambda f: f.cancelled() or f.exception())
            raise BlobStoreAway(
                f"{what}: {self.store.where} has not answered for {self._patience:.0f} s; it is tried again"
            )
        return future.result()

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        """Any other call of the store, for the collection."""
        return await self._call("the store could not be looked through", work, *args)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
