"""Whose first kernel may be asked for soon: said by the user's Jupyter Server when it starts, kept for the hosts.

It must guarantee: a user says this of nobody else, of one image at a time, and only of one that the limits allow; the
record goes by itself; however often a server says it, etcd is written to once in a while.
"""

from __future__ import annotations

import time

import msgspec

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd, EtcdError
from nbos_cluster.records import ExpectedRecord

from ..limits import LimitTable
from ..options import OptionError, parse_options
from .auth import Caller
from .errors import ApiError, unavailable

EXPECTED_FOR = 600.0
"""Seconds."""
AGAIN_AFTER = 60.0
"""Seconds in which the same is not written again."""


class ExpectedWanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST api/expected. image: '' is the hosts' own."""

    image: str = ""


def read_expected(body: bytes) -> ExpectedWanted:
    """Raises ApiError 400."""
    try:
        return msgspec.json.decode(body or b"{}", type=ExpectedWanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise ApiError(400, "malformed", f"the body is not what is expected: {err}") from err


class Expecting:
    def __init__(self, etcd: Etcd, limits: LimitTable) -> None:
        self._etcd, self._limits = etcd, limits
        self._said: dict[str, tuple[str, float]] = {}
        """By owner: image, and when it was written."""

    async def note(self, caller: Caller, wanted: ExpectedWanted) -> None:
        """Raises ApiError 400, 403, 503."""
        if caller.kind != "user":
            raise ApiError(403, "not_a_user", f"{caller.name} is a Hub service; only users have kernels")
        try:
            parse_options({"image": wanted.image}, self._limits.of(caller.name, caller.groups))
        except OptionError as err:
            raise (
                ApiError(403, "over_limit", str(err)) if err.limit else ApiError(400, "malformed", str(err))
            ) from err
        now = time.monotonic()
        self._said = {owner: said for owner, said in self._said.items() if now - said[1] < AGAIN_AFTER}
        if caller.name in self._said and self._said[caller.name][0] == wanted.image:
            return
        record = ExpectedRecord(owner=caller.name, image=wanted.image)
        try:
            lease = await self._etcd.lease_grant(EXPECTED_FOR)
            await self._etcd.put(keys.expected(caller.name), records.encode(record), lease)
        except EtcdError as err:
            raise unavailable(
                f"etcd refused it ({err}); after an upgrade the administrator runs `nbos etcd-setup` again"
            ) from err
        self._said[caller.name] = wanted.image, now
