"""Who calls: JupyterHub's word for a token, and what the hub knows of that user (admin, groups).

Only the Authorization header counts for the API, never a cookie, so another site's page can do nothing in a
user's name. What a caller may do follows from the token's scopes, not from who its user is: the token in an
administrator's notebook is no administrator's. Answers of the hub are kept for some seconds: a token that
ended or was revoked stops working then.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from jupyterhub.services.auth import HubOAuth
from tornado.web import HTTPError, RequestHandler

from ..scopes import ADMIN, KERNELS, METRICS
from .errors import ApiError, unavailable

REMEMBER = 10
"""Seconds that the hub's answers are believed."""


@dataclass(frozen=True)
class Caller:
    """kind is 'user' or 'service'. A service has no kernels of its own. kernels: may have some, use and end them.
    metrics: may read those of the gateway."""

    name: str
    kind: str
    admin: bool
    groups: tuple[str, ...] = ()
    kernels: bool = False
    metrics: bool = False


class HubUsers:
    """Resolves tokens to callers. `auth` is JupyterHub's own client."""

    def __init__(self, auth: HubOAuth, clock: Callable[[], float] = time.monotonic) -> None:
        self.auth = auth
        self._clock = clock
        self._known: dict[str, tuple[float, Caller]] = {}

    async def caller(self, handler: RequestHandler) -> Caller:
        """The caller of an API request. Raises ApiError 401 without a token, 403 with one that does not reach
        us."""
        token = self.auth.get_token(handler, in_cookie=False)
        if not token:
            raise ApiError(401, "no_token", "send 'Authorization: token <your JupyterHub token>'")
        model = await _from_hub(self.auth.user_for_token(token, sync=False))
        if model is None:
            raise ApiError(
                403,
                "unknown_token",
                "JupyterHub does not know this token: it has ended or was revoked. In a notebook: stop your server and "
                "start it again from the hub's control panel (your kernels live on)",
            )
        return await self.of_model(model)

    async def of_model(self, model: dict[str, Any], browser: bool = False) -> Caller:
        """The caller behind the hub's answer for a token. Raises ApiError 403 when its scopes do not reach
        us.

        browser: a login of the dashboard, which only shows things: there its user counts, as the scopes of such a
        login are always the narrowest.
        """
        if not self.auth.check_scopes(self.auth.access_scopes, model):
            wanted = ", ".join(sorted(self.auth.access_scopes))
            raise ApiError(403, "scope", f"this token may not use NBOS; it needs the scope {wanted}")
        name, admin = model["name"], ADMIN in model.get("scopes", ())
        metrics = METRICS in model.get("scopes", ())
        if model.get("kind") == "service":
            return Caller(name, "service", admin, metrics=metrics)
        known = await self._user(name)
        if browser:
            return known
        kernels = bool(self.auth.check_scopes({f"{KERNELS}!user={name}"}, model))
        return replace(known, admin=known.admin and admin, kernels=kernels, metrics=metrics)

    async def _user(self, name: str) -> Caller:
        """Asked with our own token: a token's scopes may hide its owner's groups."""
        at, known = self._known.get(name, (0.0, None))
        if known is not None and self._clock() - at < REMEMBER:
            return known
        model = await _from_hub(self._user_model(name))
        caller = Caller(name, "user", bool(model.get("admin")), tuple(model.get("groups", ())))
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[name] = (self._clock(), caller)
        return caller

    async def _user_model(self, name: str) -> Any:
        return await self.auth._api_request("GET", f"{self.auth.api_url}/users/{quote(name, safe='')}")


def check_may_change(caller: Caller) -> None:
    """Raise ApiError 403 unless the caller's token may make, restart and delete kernels."""
    if not (caller.kernels or caller.admin):
        raise ApiError(
            403, "scope", f"this token may look, but not make or change kernels; it needs the scope {KERNELS}"
        )


async def _from_hub(asking: Awaitable[Any]) -> Any:
    try:
        return await asking
    except HTTPError as err:
        raise unavailable(f"JupyterHub cannot be asked who you are: {err.log_message or err}; try again soon") from err
