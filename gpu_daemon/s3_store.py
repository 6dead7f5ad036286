"""Blobs as objects `<prefix>/<owner>/<address>` in an S3 bucket, through `obstore`.

Guarantees, besides those of every store: a call ends within about `PATIENCE` seconds and says that the store is away
when it does not answer; credentials stay in the daemon. A blob that the collection condemned is `<address>.old` for
one more period of grace, and comes back by itself when anybody reads or asks for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from gpu_daemon.blobs import (
    FOLDER,
    BlobError,
    BlobMissing,
    BlobStore,
    BlobStoreAway,
    BlobStoreFull,
    Draft,
    Stored,
    check_address,
    check_size,
    damaged,
    folder_of,
    missing,
    too_long,
    wrong_bytes,
)
from nbos_cluster.content import address, is_address

CONNECT = timedelta(seconds=3)
REQUEST = timedelta(seconds=30)
"""For one request, with the bytes of one blob (16 MiB at most): half a megabyte a second is the least that works."""
PATIENCE = timedelta(seconds=10)
"""Requests that fail are repeated for this long."""

OLD, DAMAGED = ".old", ".corrupt"
_KEY = re.compile(r"(?P<folder>[0-9a-f]{32})/(?P<name>[^/]+)")
_FULL = ("StorageFull", "QuotaExceeded", "InsufficientStorage", "507 ", "TooManyBuckets")
_ANSWERED = ("AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidBucketName")


class S3Store(BlobStore):
    def __init__(self, bucket: str, prefix: str, options: Mapping[str, str]) -> None:
        try:
            import obstore
            from obstore.store import S3Store as Remote
        except ImportError as err:
            raise ValueError("a blob store in S3 needs obstore; install it with: pip install 'nbos[s3]'") from err
        if not bucket:
            raise ValueError("a blob store in S3 is named s3://bucket/prefix")
        self._s3: Any = obstore
        plain = options.get("endpoint", "").startswith("http://") or options.get("allow_http") == "true"
        self.where = f"the blob store s3://{bucket}/{prefix}"
        # http only where the configured endpoint itself says so, for a server on the same machine or network.
        settings: Any = {k: v for k, v in options.items() if k != "allow_http"}
        self._store: Any = Remote(
            bucket,
            prefix=prefix or None,
            config=settings,
            client_options={"timeout": REQUEST, "connect_timeout": CONNECT, "allow_http": plain},
            retry_config={
                "max_retries": 6,
                "retry_timeout": PATIENCE,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )

    # -- blobs --------------------------------------------------------------------------------------------------------

    def write(self, owner: str, digest: str, data: bytes | memoryview) -> None:
        check_size(memoryview(data).nbytes)
        key = _key(owner, digest)
        if (actual := address(data)) != digest:
            raise wrong_bytes(digest, actual)
        self._send(key, digest, data)

    def write_unnamed(self, owner: str, data: bytes | memoryview) -> tuple[str, None]:
        check_size(memoryview(data).nbytes)
        self._send(_key(owner, digest := address(data)), digest, data)
        return digest, None

    def _send(self, key: str, digest: str, data: bytes | memoryview) -> None:
        with self._asking(f"blob {digest[:12]}… of {memoryview(data).nbytes} bytes could not be stored"):
            self._s3.put(self._store, key, data, use_multipart=False)

    def settle(self, owner: str, written: Iterable[tuple[str, Draft | None]]) -> dict[str, BlobError]:
        """S3 answers when it is safe."""
        return {}

    def read_into(self, owner: str, digest: str, target: memoryview) -> int:
        data = self._read(owner, digest)
        size = memoryview(data).nbytes
        if size > target.nbytes:
            raise too_long(digest, size, target.nbytes)
        target[:size] = memoryview(data).cast("B")
        return size

    def get(self, owner: str, digest: str) -> bytes:
        return bytes(self._read(owner, digest))

    def _read(self, owner: str, digest: str) -> Any:
        key = _key(owner, digest)
        with self._asking(f"blob {digest[:12]}… could not be read"):
            try:
                data = self._s3.get(self._store, key).buffer()
            except FileNotFoundError:
                if not self._bring_back(key):
                    raise missing(self.where, digest) from None
                data = self._s3.get(self._store, key).buffer()
            if address(memoryview(data)) != digest:
                self._move(key, key + DAMAGED)
                raise damaged(self.where, digest)
            return data

    def have(self, owner: str, digests: Iterable[str]) -> set[str]:
        there = set()
        for digest in digests:
            key = _key(owner, digest)
            with self._asking(f"blob {digest[:12]}… could not be looked up"):
                if self._there(key) or self._bring_back(key):
                    there.add(digest)
        return there

    # -- collection ---------------------------------------------------------------------------------------------------

    def folders(self) -> list[str]:
        with self._asking("the namespaces could not be listed"):
            found = self._s3.list_with_delimiter(self._store)["common_prefixes"]
        names = (str(path).strip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if FOLDER.fullmatch(name))

    def contents(self, folder: str) -> Iterator[Stored]:
        with self._asking("the blobs could not be listed"):
            for some in self._s3.list(self._store, folder):
                for meta in some:
                    if (match := _KEY.fullmatch(meta["path"])) is not None:
                        yield _stored(match["name"], meta["size"], meta["last_modified"].timestamp())

    def now(self) -> float:
        with self._asking("the store's clock could not be read"):
            self._s3.put(self._store, "clock", b"", use_multipart=False)
            return float(self._s3.head(self._store, "clock")["last_modified"].timestamp())

    def condemn(self, folder: str, found: Stored) -> None:
        key = f"{folder}/{found.key}"
        with self._asking(f"blob {found.address[:12]}… could not be set aside"):
            self._move(key, key + OLD)

    def remove(self, folder: str, found: Stored) -> None:
        with self._asking(f"{found.key} could not be deleted"), contextlib.suppress(FileNotFoundError):
            self._s3.delete(self._store, f"{folder}/{found.key}")

    def restore(self, folder: str, found: Stored) -> None:
        with self._asking(f"blob {found.address[:12]}… could not be brought back"):
            self._bring_back(f"{folder}/{found.key}".removesuffix(OLD))

    def identity(self, propose: str) -> str:
        with self._asking("the store's identity could not be read"):
            with contextlib.suppress(FileNotFoundError):
                return bytes(self._s3.get(self._store, "cluster").bytes()).decode()
            try:
                self._s3.put(self._store, "cluster", propose.encode(), mode="create", use_multipart=False)
            except self._s3.exceptions.AlreadyExistsError:
                return bytes(self._s3.get(self._store, "cluster").bytes()).decode()
            return propose

    # -- objects ------------------------------------------------------------------------------------------------------

    def _there(self, key: str) -> bool:
        try:
            self._s3.head(self._store, key)
        except FileNotFoundError:
            return False
        return True

    def _bring_back(self, key: str) -> bool:
        """A blob that was condemned and is wanted again. It was copied before it was deleted: it is never nowhere."""
        try:
            self._s3.copy(self._store, key + OLD, key)
        except FileNotFoundError:
            return self._there(key)
        return True

    def _move(self, key: str, to: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._s3.copy(self._store, key, to)
            self._s3.delete(self._store, key)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except BlobError:
            raise
        except FileNotFoundError as err:
            raise BlobMissing(f"{what}: it is not in {self.where}") from err
        except Exception as err:
            if not isinstance(err, self._s3.exceptions.BaseError | OSError):
                raise
            raise self._failed(what, str(err)) from err

    def _failed(self, what: str, text: str) -> BlobError:
        reason = _short(text)
        if any(word in text for word in _FULL):
            return BlobStoreFull(
                f"{what}: {self.where} is full or over its quota ({reason}); delete kernels or enlarge it"
            )
        if any(word in text for word in _ANSWERED):
            return BlobError(
                f"{what}: {self.where} refuses ({reason}); see GPUDaemon.blob_store and blob_store_options"
            )
        return BlobStoreAway(f"{what}: {self.where} does not answer ({reason}); it is tried again")


def _key(owner: str, digest: str) -> str:
    check_address(digest)
    return f"{folder_of(owner)}/{digest}"


def _stored(name: str, size: int, at: float) -> Stored:
    base = name.removesuffix(OLD)
    if not is_address(base):
        return Stored(name, "", size, at)
    return Stored(name, base, size, at, condemned=base != name)


def _short(text: str) -> str:
    """The innermost reason that obstore gives, without its debug output."""
    causes = re.findall(r"Caused by:|source: |: ([A-Z][^:{}()\n]+(?:\(os error \d+\))?)\s*$", text, re.MULTILINE)
    reasons = [cause for cause in causes if cause]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (reasons[-1] if reasons else lines[0] if lines else "no reason given")[:200]
