"""The HTTP API of docs/protocol.md, section 3.

It must guarantee: nothing of a request is acted on before its token was checked; a body over 1 MiB is refused
with 413 without being held in memory; every refusal is JSON with a code and a sentence.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tornado.web import HTTPError, RequestHandler, stream_request_body

from nbos_cluster import keys
from nbos_cluster.etcd import EtcdError, EtcdUnavailable
from nbos_cluster.records import RecordError

from . import accounts
from .auth import Caller, HubUsers, check_may_change
from .errors import ApiError, unavailable
from .expecting import read_expected
from .kernels import Kernels
from .models import is_ready, kernel_model, may_see, status_model
from .moverequests import read_move_wanted
from .requests import MAX_BODY, read_kernel_wanted
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

_DESCRIPTION = (Path(__file__).parent / "openapi.json").read_bytes()

LONGEST_WAIT = 25
"""Seconds that `wait=ready` holds a request open; below the usual time-outs of proxies."""

NEWS_AFTER = 0.5
"""Seconds that a request is held open at least for what is news, but not that a replica is ready: of a kernel that is
being started there is some every few milliseconds, and whoever asks wants to hear of the replica at once."""


class JsonHandler(RequestHandler):
    """Answers and refusals as JSON."""

    def initialize(self, kernels: Kernels, watch: ClusterWatch, users: HubUsers) -> None:
        self.kernels = kernels
        self.watch = watch
        self.users = users

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")

    def check_xsrf_cookie(self) -> None:
        """No cookie is ever looked at here, so there is nothing to forge."""

    def answer(self, body: Any, status: int = 200) -> None:
        self.set_status(status)
        self.finish(json.dumps(body))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        err = (kwargs.get("exc_info") or (None, None, None))[1]
        if isinstance(err, EtcdUnavailable):
            err = unavailable(str(err))
        if isinstance(err, ApiError):
            self.answer({"error": err.code, "message": err.message}, err.status)
            return
        words = {405: "this call does not exist", 404: "there is nothing here; see docs/protocol.md"}
        message = words.get(status_code, "an error in the gateway; its log says more")
        if isinstance(err, HTTPError) and status_code < 500 and status_code not in words:
            message = err.log_message or err.reason or message
        self.answer({"error": f"http_{status_code}", "message": message}, status_code)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, ApiError | EtcdUnavailable):
            super().log_exception(typ, value, tb)


class NotFoundHandler(JsonHandler):
    def prepare(self) -> None:
        raise HTTPError(404)


class HealthHandler(JsonHandler):
    """GET api/health: no token; says nothing but whether the gateway can work."""

    async def get(self) -> None:
        reason = ""
        if not self.watch.ready.is_set():
            reason = "the gateway has not read the cluster's records yet"
        if not reason:
            try:
                # A read as all others are: it needs the quorum, and our role.
                await self.kernels.etcd.get(keys.KERNELS)
            except EtcdUnavailable:
                reason = "etcd does not answer"
            except EtcdError as err:
                reason = f"etcd refuses: {err}"
        self.answer(
            {"status": "unavailable", "reason": reason} if reason else {"status": "ok"},
            503 if reason else 200,
        )


class DescriptionHandler(JsonHandler):
    """GET api/openapi.json: this API, for programs. No token; it holds no secret."""

    def get(self) -> None:
        self.finish(_DESCRIPTION)


@stream_request_body
class AuthenticatedHandler(JsonHandler):
    """Checks the token when the headers are in, then takes the body, up to its bound."""

    caller: Caller

    async def prepare(self) -> None:
        self._body = bytearray()
        self._too_long = False
        self.caller = await self.users.caller(self)
        if self.request.method not in ("GET", "HEAD"):
            check_may_change(self.caller)
        if not self.watch.ready.is_set() and not await self.watch.until(self.watch.ready.is_set, 3.0):
            raise unavailable("the gateway has not read the cluster's records yet; is etcd running?")

    def data_received(self, chunk: bytes) -> None:
        # What is too long is read on, but not kept: refusing in the middle would break the caller's
        # connection before it can read why.
        self._too_long = self._too_long or len(self._body) + len(chunk) > MAX_BODY
        if self._too_long:
            self._body.clear()
        else:
            self._body += chunk

    def body(self) -> bytes:
        if self._too_long:
            raise ApiError(413, "too_large", f"a request has at most {MAX_BODY} bytes")
        return bytes(self._body)

    def model(self, kernel_id: str) -> dict[str, Any]:
        view = self.kernels.find(self.caller, kernel_id)
        caller = self.caller
        owner = view.spec is not None and view.spec.owner == caller.name and caller.kind == "user"
        return kernel_model(view, secrets=owner and caller.kernels)


class ExpectedHandler(AuthenticatedHandler):
    """POST api/expected: the caller may ask for a first kernel soon."""

    async def post(self) -> None:
        await self.kernels.expecting.note(self.caller, read_expected(self.body()))
        self.set_status(204)
        self.finish()


class KernelsHandler(AuthenticatedHandler):
    def get(self) -> None:
        views = [v for v in self.kernels.copy.living() if v.spec is not None and may_see(self.caller, v.spec)]
        self.answer([self.model(view.kernel) for view in sorted(views, key=lambda v: v.kernel)])

    async def post(self) -> None:
        wanted = read_kernel_wanted(self.body())
        view, made = await self.kernels.make(self.caller, wanted)
        self.answer(self.model(view.kernel), 201 if made else 200)


class KernelHandler(AuthenticatedHandler):
    async def get(self, kernel_id: str) -> None:
        wait = self.get_query_argument("wait", "")
        if wait not in ("", "ready"):
            raise ApiError(400, "malformed", f"wait={wait[:40]!r} is unknown; use wait=ready")
        seen = self._number("after", 2**53 - 1, "the revision of a model")
        within = self._number("within", LONGEST_WAIT, f"seconds, from 0 to {LONGEST_WAIT}")
        self.kernels.find(self.caller, kernel_id)
        if wait:
            patience = LONGEST_WAIT if within is None else within
            calm = min(NEWS_AFTER, patience)
            if not await self.watch.until(lambda: self._worth_telling(kernel_id, None), calm):
                await self.watch.until(lambda: self._worth_telling(kernel_id, seen), patience - calm)
        self.answer(self.model(kernel_id))

    def _number(self, name: str, most: int, what: str) -> int | None:
        """The argument `name`; None when it was not given. Raises ApiError."""
        given = self.get_query_argument(name, "")
        if not given:
            return None
        if not (given.isascii() and given.isdigit() and len(given) < 20 and int(given) <= most):
            raise ApiError(400, "malformed", f"{name}={given[:40]!r} must be {what}")
        return int(given)

    def _worth_telling(self, kernel_id: str, seen: int | None) -> bool:
        """Ready, or gone, or its members say something new since the revision `seen`."""
        view = self.kernels.copy.kernel(kernel_id)
        return view is None or is_ready(view) or (seen is not None and view.members_rev > seen)

    async def delete(self, kernel_id: str) -> None:
        await self.kernels.delete(self.caller, kernel_id)
        self.set_status(204)
        self.finish()


class RestartHandler(AuthenticatedHandler):
    async def post(self, kernel_id: str) -> None:
        self.body()
        await self.kernels.restart(self.caller, kernel_id)
        self.answer(self.model(kernel_id))


class MoveHandler(AuthenticatedHandler):
    """POST api/kernels/<id>/move: begin it (202). DELETE: take it back."""

    async def post(self, kernel_id: str) -> None:
        await self.kernels.move(self.caller, kernel_id, read_move_wanted(self.body()))
        self.answer(self.model(kernel_id), 202)

    async def delete(self, kernel_id: str) -> None:
        await self.kernels.take_back(self.caller, kernel_id)
        self.answer(self.model(kernel_id), 202)


class AccountsHandler(AuthenticatedHandler):
    """GET api/accounts?since=&until=&by=&format=: what was used; a user's own, an administrator's all."""

    async def get(self) -> None:
        names = ("since", "until", "by", "format")
        wanted = accounts.read_wanted({name: self.get_query_argument(name, "") for name in names})
        try:
            lines = await accounts.read_lines(self.kernels.etcd, wanted.since, wanted.until)
        except RecordError as err:
            raise unavailable(f"an hour's accounts cannot be read: {err}") from err
        except EtcdUnavailable:
            raise
        except EtcdError as err:
            log.error("etcd refused to show the accounts: %s", err)
            raise unavailable(
                f"etcd refused it ({err}); after an upgrade the administrator runs `nbos etcd-setup` again"
            ) from err
        rows = accounts.rows(accounts.visible(lines, self.caller), wanted.by)
        if wanted.form == "csv":
            self.set_header("Content-Type", "text/csv; charset=utf-8")
            self.finish(accounts.as_csv(rows, wanted.by))
            return
        since, until = accounts.show_hour(wanted.since), accounts.show_hour(wanted.until)
        self.answer({"since": since, "until": until, "by": wanted.by, "rows": rows})


class StatusHandler(AuthenticatedHandler):
    def get(self) -> None:
        self.answer(status_model(self.kernels.copy, self.caller))
