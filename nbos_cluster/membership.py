"""What the gateway changes about a kernel: made, planned anew, restarted by its user, deleted. Transactions,
no IO.

Guarantees: a kernel comes into being whole (spec, epoch and entry 0, the origin, in one transaction); every
change of membership raises the epoch, so that no claim made on the old one succeeds; a restart ends all
claims in the same transaction that raises the incarnation, so nothing the old processes still run reaches the
log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from . import keys, records
from .kv import Txn, TxnResult, created_at, exists, missing, mod_is, op_delete_prefix, op_get, op_put
from .records import Epoch, KernelSpec, LogEntry

if TYPE_CHECKING:
    from .kernelview import KernelView


@dataclass(frozen=True, slots=True)
class Created:
    revision: int


@dataclass(frozen=True, slots=True)
class Exists:
    """The id is in use; `spec` is the kernel that has it (its owner decides what the caller may know)."""

    spec: KernelSpec


def create(spec: KernelSpec) -> Txn:
    """Make the kernel, unless its id is in use. Read the outcome with `classify_create`."""
    k = spec.kernel
    origin = LogEntry(n=0, kind="origin", incarnation=spec.incarnation, at=spec.created)
    return Txn(
        [missing(keys.spec(k)), missing(keys.epoch(k))],
        [
            op_put(keys.spec(k), records.encode(spec)),
            op_put(keys.epoch(k), records.encode(Epoch(epoch=1, incarnation=spec.incarnation))),
            op_put(keys.log_entry(k, 0), records.encode(origin)),
        ],
        [op_get(keys.spec(k))],
    )


def classify_create(spec: KernelSpec, result: TxnResult) -> Created | Exists:
    """What came of `create`; finding exactly our own spec means that an earlier try went through."""
    if result.succeeded:
        return Created(result.revision)
    found = result.responses[0]
    if not found:
        raise records.RecordError(f"kernel {spec.kernel} has an epoch but no spec; delete what is left of it first")
    if found[0].value == records.encode(spec):
        return Created(found[0].mod_revision)
    return Exists(records.decode(found[0].value, KernelSpec))


def replan(view: KernelView, placement: dict[str, str]) -> Txn:
    """Give the kernel's replicas other hosts; the epoch rises. Fails when anybody changed spec or epoch since
    `view`. While a replica moves, `placement` holds both its old and its new place."""
    spec, _ = _known(view)
    extra = 1 if spec.move is not None else 0
    return change(view, replace(spec, placement=placement, replicas=len(placement) - extra))


def change(view: KernelView, spec: KernelSpec) -> Txn:
    """Replace the spec, and raise the epoch: no claim made on the old membership succeeds. Fails when anybody changed
    spec or epoch since `view`."""
    _, epoch = _known(view)
    return _change(view, spec, Epoch(epoch=epoch.epoch + 1, incarnation=epoch.incarnation))


def respec(view: KernelView, spec: KernelSpec) -> Txn:
    """Replace the spec (resources, durable, …) without touching the epoch; fails when it changed since
    `view`."""
    return Txn(
        [mod_is(keys.spec(spec.kernel), view.spec_rev)],
        [op_put(keys.spec(spec.kernel), records.encode(spec))],
    )


def restart(view: KernelView, *, at: float = 0.0, reason: str = "restarted by its user") -> Txn:
    """A new incarnation with an empty namespace. Every claim ends; the reset is entry last+1 of the log.

    Fails when the kernel moved on since `view`: bring the view up to date and try again.
    """
    spec, epoch = _known(view)
    k, incarnation, n = spec.kernel, epoch.incarnation + 1, view.last + 1
    new = replace(spec, incarnation=incarnation)
    change = _change(view, new, Epoch(epoch=epoch.epoch + 1, incarnation=incarnation))
    reset = LogEntry(n=n, kind="reset", incarnation=incarnation, reason=reason, at=at)
    return Txn(
        [*change.compare, exists(keys.log_entry(k, n - 1)), missing(keys.log_entry(k, n))],
        [
            *change.success,
            op_delete_prefix(keys.claims(k)),
            op_put(keys.log_entry(k, n), records.encode(reset)),
        ],
    )


def delete(kernel: str, born: int = 0) -> Txn:
    """Remove everything the kernel has in etcd; its daemons end the replicas when they see the spec go.

    born: the revision at which its spec was made (`KernelView.born`). With it, a kernel that was deleted and made
    again under the same id meanwhile, perhaps by somebody else, stays.
    """
    same = [created_at(keys.spec(kernel), born)] if born else []
    return Txn(same, [op_delete_prefix(keys.kernel(kernel))])


def _change(view: KernelView, spec: KernelSpec, epoch: Epoch) -> Txn:
    k = spec.kernel
    return Txn(
        [mod_is(keys.spec(k), view.spec_rev), mod_is(keys.epoch(k), view.epoch_rev)],
        [op_put(keys.spec(k), records.encode(spec)), op_put(keys.epoch(k), records.encode(epoch))],
    )


def _known(view: KernelView) -> tuple[KernelSpec, Epoch]:
    if view.spec is None or view.epoch is None:
        raise LookupError(f"kernel {view.kernel} is not (or no longer) in etcd")
    return view.spec, view.epoch
