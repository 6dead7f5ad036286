"""The values in etcd: typed records, encoded one way (MessagePack through msgspec), defined only here.

Every record carries its type and the version of the format, so that a newer daemon can say clearly that it
does not understand an older or newer record. Sizes are bytes, times are Unix seconds (for people; no decision
compares clocks of two machines).
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

VERSION = 1
"""What every NBOS reads."""
VERSION_TABLES = 2
"""Records that keep components in tables outside of them: who does not know tables must not read half of them."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything that is stored: frozen, keyword-only."""


class Resources(Record, frozen=True):
    """What one execution asks of a host's GPUs. All zero: a CPU cell, which never waits for a GPU.

    gpus: whole devices. tpcs: a slice of that many TPCs on one device (then gpus is 0). memory: bytes of
    device memory on each device, 0 = all of a whole device, or a slice's proportional share.
    """

    gpus: int = 0
    tpcs: int = 0
    memory: int = 0
    model: str = ""

    @property
    def wants_gpu(self) -> bool:
        return self.gpus > 0 or self.tpcs > 0


class Device(Record, frozen=True):
    """One GPU of a host, or one MIG instance of a GPU. kind says whether NVML found it or the simulator plays it.

    healthy: new cells may get it; if not, reason says why, and passing whether that is expected to end by itself (cells
    wait for it). sms, capability ('9.0'): 0 and '' where they are not told. parent: of a MIG instance, its GPU's UUID.
    """

    uuid: str
    index: int
    model: str
    tpcs: int
    memory: int
    kind: Literal["nvml", "simulated"]
    mechanism: str = ""
    """What holds slices of it: green, percentage or cooperative (docs/slices.md); '' where that is not known yet."""
    why: str = ""
    """What stands in the way of a stronger one."""
    healthy: bool = True
    reason: str = ""
    passing: bool = False
    sms: int = 0
    capability: str = ""
    parent: str = ""


class GPUProcess(Record, frozen=True):
    """A process on a device. memory: bytes, -1 where NVML does not tell. kernel, replica, owner: whose it is; '' where
    it is no replica of this host."""

    pid: int
    memory: int = -1
    kernel: str = ""
    replica: int = -1
    owner: str = ""


class Reading(Record, frozen=True):
    """How one device was when it was looked at last. -1: not told; `untold` says why, by field.

    memory: bytes in use. utilisation: percent of the time. temperature: °C. power, power_limit: watts. ecc:
    uncorrected memory errors since the last reset. notes: what an admin should know though it stops nothing.
    """

    uuid: str
    memory: int = -1
    utilisation: int = -1
    temperature: int = -1
    power: int = -1
    power_limit: int = -1
    ecc: int = -1
    processes: tuple[GPUProcess, ...] = ()
    notes: tuple[str, ...] = ()
    untold: dict[str, str] = {}


class WarmRecord(Record, frozen=True):
    """Replicas of an image that a host has started ahead; '' is the host's own environment. note: why there are fewer
    than wanted, or how they differ. modules: what they have imported; refused: what enough kernels import and they have
    not, with the reason."""

    image: str = ""
    ready: int = 0
    wanted: int = 0
    note: str = ""
    modules: tuple[str, ...] = ()
    refused: dict[str, str] = {}


class Leftover(Record, frozen=True):
    """What an idle replica's process has on a device; tier `checkpoint`: what the driver holds of it in host memory,
    and brings back to a device before its next cell. Otherwise `tier` is the last that it went through since its
    cell."""

    uuid: str
    kernel: str
    replica: int
    owner: str
    memory: int
    tier: Literal["warm", "offload", "checkpoint", "restart"] = "warm"


class HostRecord(Record, frozen=True, tag="host"):
    """readings: of real devices, refreshed as often as the daemon looks. closed: devices (UUID) that an admin took out
    of use, and why. reopened: how often an admin has said of a device that it may be used again. clocks: by device
    (UUID) whose clocks the daemon has locked: to how many MHz, of how many. left: what idle processes have."""

    name: str
    address: str
    pid: int
    devices: tuple[Device, ...] = ()
    cpus: int = 0
    memory: int = 0
    max_replicas: int = 64
    version: str = ""
    draining: bool = False
    since: float = 0.0
    driver: str = ""
    readings: tuple[Reading, ...] = ()
    closed: dict[str, str] = {}
    reopened: dict[str, int] = {}
    warm: tuple[WarmRecord, ...] = ()
    clocks: dict[str, tuple[int, int]] = {}
    left: tuple[Leftover, ...] = ()


class DeviceShare(Record, frozen=True):
    """The part of one device that a grant holds. tpcs are TPC numbers; all of them for a whole device."""

    uuid: str
    index: int
    model: str
    tpcs: tuple[int, ...]
    memory: int
    whole: bool
    kind: Literal["nvml", "simulated"]
    mechanism: str = ""
    """What holds it: mig, green, percentage, cooperative, or '' where that is not known."""
    why: str = ""
    """What stands in the way of a stronger one."""
    of: int = 0
    """TPCs of the whole device."""
    mps: str = ""
    """Pipe folder of the MPS daemon to use, '' for none."""
    lent: tuple[int, ...] = ()
    """Those of `tpcs` that are on loan: they go back during the cell when somebody is to have them."""
    clock: float = 1.0
    """Of a simulated device: its clock as a part of the highest, when it was granted."""


class GrantRecord(Record, frozen=True, tag="grant"):
    """What one execution holds. asked: TPCs that the cell asked for, where right-sizing had a word in what it got (else
    0); why: what it said, for people; code: the fingerprint by which it knows the cell."""

    grant: str
    host: str
    owner: str
    kernel: str
    replica: int
    n: int
    shares: tuple[DeviceShare, ...]
    since: float = 0.0
    groups: tuple[str, ...] = ()
    asked: int = 0
    why: str = ""
    code: str = ""
    wants: int = 0
    version: int = 0
    loan: str = ""


class Move(Record, frozen=True):
    """A replica that goes from one host to another: `target`, a new index, takes the place of `source`.

    joining: both run cells, the target catches up. leaving: the source takes no new cells. returning: the target takes
    none, the source stays. done, undone: how it ended. why: an administrator asked for it, or the source's host drains.
    since: Unix seconds, for people. reason: why it returned.
    """

    source: int
    target: int
    from_host: str
    to_host: str
    why: Literal["asked", "drain"] = "asked"
    phase: Literal["joining", "leaving", "returning", "done", "undone"] = "joining"
    since: float = 0.0
    reason: str = ""

    @property
    def leaver(self) -> int | None:
        """The replica that takes no new cells now."""
        return {"leaving": self.source, "returning": self.target}.get(self.phase)


class KernelSpec(Record, frozen=True, tag="kernel"):
    """What a kernel should be. Written by the gateway; the daemons carry out the part `placement` gives them.

    placement: host name by replica index. incarnation rises on restart by the user: daemons replace the
    processes. key and the CurveZMQ pair (Z85) belong to this kernel alone and are given to its own replicas
    and router. memory_limit: bytes of resident memory per replica, 0 = none. lazy: bytes from which standbys leave
    variables in the store until they are looked up, 0 = never. server: which of its owner's Jupyter Servers takes it up
    again; '' is the default one. groups: those of the owner when the kernel was made, for its shares and accounts.
    """

    kernel: str
    owner: str
    replicas: int
    placement: dict[str, str]
    key: str
    curve_publickey: str
    curve_secretkey: str
    server: str = ""
    image: str = ""
    resources: Resources = Resources()
    max_resources: Resources = Resources()
    incarnation: int = 1
    memory_limit: int = 0
    durable: bool = False
    lazy: int = 0
    rerun: bool = True
    cwd: str = ""
    env: dict[str, str] = {}
    created: float = 0.0
    groups: tuple[str, ...] = ()
    move: Move | None = None
    moved: Move | None = None


class Epoch(Record, frozen=True, tag="epoch"):
    epoch: int
    incarnation: int


class Ports(Record, frozen=True):
    shell: int
    iopub: int
    stdin: int
    control: int
    hb: int


class ReplicaRecord(Record, frozen=True, tag="replica"):
    """A replica that runs (or is being started) on a host; under the daemon's lease. memory: bytes that its host had
    left when this was written, roughly; 0: not told. lacks: variables that it has lost because the store no longer has
    what the log names for them; the executor, which may still have them, writes them again."""

    index: int
    host: str
    state: Literal["starting", "ready", "failed"]
    pid: int = 0
    container: str = ""
    ip: str = ""
    ports: Ports | None = None
    applied: int = -1
    incarnation: int = 1
    python: str = ""
    lost: dict[str, str] = {}
    reason: str = ""
    memory: int = 0
    lacks: tuple[str, ...] = ()


class ClaimRecord(Record, frozen=True, tag="claim"):
    """Makes one replica the executor of n. Its mod_revision is the fencing token."""

    n: int
    replica: int
    host: str
    attempt: int = 1
    grant: str = ""
    started: float = 0.0
    ahead: bool = False
    """Made together with entry n-1: the cell may not have been asked for yet."""


class Frame(Record, frozen=True):
    """A run of bytes: inline, or blobs (content hashes, in order) that joined give it. marks: eight bytes for each of
    the blobs, its XXH3 as who wrote the entry found it; or none (`nbos_cluster.marks`)."""

    size: int
    data: bytes | None = None
    blobs: tuple[str, ...] = ()
    marks: bytes = b""


class Component(Record, frozen=True):
    """Variables that share objects, pickled together. frames[0] is the pickle stream (protocol 5), the rest
    are its out-of-band buffers in order."""

    names: tuple[str, ...]
    digest: str
    frames: tuple[Frame, ...]


class Table(Record, frozen=True):
    """Components that stand outside the record, because they are too many for etcd: the blobs joined have `size`
    bytes (the form: `tables`). names: how many variables it holds."""

    blobs: tuple[str, ...]
    size: int
    names: int = 0


class Effects(Record, frozen=True):
    """What a cell changed outside the namespace. None or missing: unchanged. environ: None removes the
    variable."""

    cwd: str | None = None
    environ: dict[str, str | None] = {}
    sys_path: tuple[str, ...] | None = None
    packages: dict[str, str] = {}


EntryKind = Literal["origin", "cell", "sync", "abandoned", "reset"]


class LogEntry(Record, frozen=True, tag="entry"):
    """What execution n changed. An abandoned entry changes nothing and says why in `reason`.

    components replace, name by name, what stood before; `deleted` names are gone; `lost` names hold values
    that could not be replicated, with the reason. digest-named blobs stand in the blob store before the entry
    is appended. table: holds the components and deleted names instead, when they are too many for the entry;
    `cured` then says which names in it were lost before.
    """

    n: int
    kind: EntryKind
    token: int = 0
    replica: int = -1
    incarnation: int = 1
    status: Literal["ok", "error", "aborted"] = "ok"
    execution_count: int = 0
    source: str = ""
    components: tuple[Component, ...] = ()
    deleted: tuple[str, ...] = ()
    lost: dict[str, str] = {}
    effects: Effects = Effects()
    reason: str = ""
    at: float = 0.0
    table: Table | None = None
    cured: tuple[str, ...] = ()


class Checkpoint(Record, frozen=True, tag="checkpoint"):
    """The log up to and including `upto`, folded. `history` holds (execution_count, source) of the latest
    cells.

    The components are those of `tables`, oldest first, each over the ones before it; without the names in `gone`;
    and over them `components`.
    """

    upto: int
    incarnation: int = 1
    execution_count: int = 0
    components: tuple[Component, ...] = ()
    lost: dict[str, str] = {}
    effects: Effects = Effects()
    history: tuple[tuple[int, str], ...] = ()
    tables: tuple[Table, ...] = ()
    gone: tuple[str, ...] = ()


class QueueTicket(Record, frozen=True, tag="ticket"):
    ticket: str
    host: str
    owner: str
    kernel: str
    n: int
    resources: Resources
    position: int
    reason: str
    since: float = 0.0
    estimate: float = -1.0


class UseLine(Record, frozen=True):
    """What one kernel used in one hour (Unix hours) on one host. seconds: of its grants; device_seconds: half a
    device's TPCs for a second are 0.5; byte_seconds: of device memory; joules: where the devices tell, by TPCs.
    """

    hour: int
    owner: str
    kernel: str
    groups: tuple[str, ...] = ()
    cells: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    tpc_seconds: float = 0.0
    byte_seconds: float = 0.0
    joules: float = 0.0


class HourRecord(Record, frozen=True, tag="hour"):
    """The accounts of one host and hour: a copy of what stands in its daemon's journal."""

    host: str
    lines: tuple[UseLine, ...] = ()


class Collection(Record, frozen=True, tag="collection"):
    """A collection of blobs: who did it, when (by the store's clock; 0 = none has ended yet), and what came of it."""

    host: str
    at: float = 0.0
    kept: int = 0
    kept_bytes: int = 0
    condemned: int = 0
    removed: int = 0


class ExpectedRecord(Record, frozen=True, tag="expected"):
    """A kernel of this owner may be asked for soon. image: '' is the hosts' own."""

    owner: str
    image: str = ""


class Versioned(msgspec.Struct, frozen=True, array_like=True):
    version: int
    body: msgspec.Raw


R = TypeVar("R", bound=Record)


class RecordError(ValueError):
    """A value in etcd that cannot be read: names the key's type, the version and what was expected."""


_encoder = msgspec.msgpack.Encoder()


def encode(record: Record) -> bytes:
    outside = getattr(record, "table", None) is not None or bool(getattr(record, "tables", ()))
    version = VERSION_TABLES if outside else VERSION
    return _encoder.encode(Versioned(version, msgspec.Raw(_encoder.encode(record))))


def decode(raw: bytes, kind: type[R]) -> R:
    """The record in `raw`. Raises RecordError when it is of another kind or version."""
    try:
        envelope = msgspec.msgpack.decode(raw, type=Versioned)
        if envelope.version not in (VERSION, VERSION_TABLES):
            raise RecordError(
                f"a {kind.__name__} of format version {envelope.version}, this NBOS reads up to {VERSION_TABLES}; "
                "run the same NBOS version on every host"
            )
        return msgspec.msgpack.decode(envelope.body, type=kind)
    except msgspec.MsgspecError as err:
        raise RecordError(f"not a {kind.__name__}: {err}") from err
