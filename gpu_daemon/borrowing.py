"""Who may borrow what: a request that is not within its owner's quota gets of others' idle quota what is lent. No IO.

It keeps until its end what is owed to nobody (its own quota included), and has the rest on loan. Memory is never lent:
a cell has it until its end, so it comes from what is owed to nobody, too.
"""

from __future__ import annotations

from collections.abc import Collection

from gpu_daemon.ledger import Kept, Ledger, Request, share_of
from gpu_daemon.loans import Loans
from gpu_daemon.order import Policy
from gpu_daemon.owed import Owed
from gpu_daemon.shares import Holdings, principals
from nbos_cluster.records import GrantRecord


class Borrowing:
    def __init__(self, ledger: Ledger, loans: Loans, policy: Policy, holdings: Holdings) -> None:
        self._ledger, self._loans, self._policy = ledger, loans, policy
        self._owed = Owed(ledger, policy.shares, holdings)

    def changed(self) -> None:
        """Something was granted, given back, or failed."""
        self._owed.changed(self._loans.lendable)

    def concerns(self, request: Request) -> bool:
        """Whether others' quotas are kept from it: slices of replicas that can give back are told so."""
        return self._policy.lend and bool(self._owed) and request.resources.tpcs > 0 and request.borrow is not None

    def owed(self, request: Request) -> Kept:
        return self._owed.to_others(principals(request.owner, request.groups, request.kernel))

    def aside(self) -> dict[str, int]:
        """TPCs of each device that are lent to nobody, since their owners have cells running."""
        return self._owed.to_active() if self._policy.lend and self._owed else {}

    def wants(self, request: Request) -> int:
        """TPCs that the cell can use, what is lent to it included; 0: it borrows nothing."""
        if request.borrow is None or request.borrow < 0 or not request.resources.tpcs:
            return 0
        return request.resources.tpcs + request.borrow

    def reserve(self, request: Request, priority: int, closed: Collection[str], kept: Kept) -> GrantRecord | None:
        """What the request gets though it does not fit beside what is `kept`; None where nothing is lent to it now.

        All that it asks for is there, on one device: of those the one where it keeps most.
        """
        if request.borrow is None or request.borrow < 0:
            return None
        wants, found = request.resources.tpcs, []
        for book in self._ledger.suitable(request.resources):
            tpcs, memory = kept.get(book.uuid, (0, 0))
            size = share_of(book.device, request.resources)
            room = self._loans.obtainable(book.uuid, priority)
            no_room = book.room(request.holder) - memory < max(size, request.away)
            if book.uuid in closed or book.uuid not in self._loans.lendable or no_room:
                continue
            if room >= wants:
                keeps = min(wants, max(0, book.free_tpcs - tpcs))
                found.append(((-keeps, room, book.device.index), book, keeps, size))
        if not found:
            return None
        _, book, keeps, size = min(found, key=lambda one: one[0])
        return self._ledger.reserve_on(request, book, keeps, size)
