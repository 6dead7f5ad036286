"""The dashboard: one page, rendered here, for a browser that is logged in to JupyterHub.

It must guarantee: everything shown is escaped (the template engine does it by default and nothing turns it
off); no inline script or style, so the Content-Security-Policy can forbid them; works without a script, too.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated
from tornado.template import Loader
from tornado.web import HTTPError, RequestHandler, StaticFileHandler, authenticated

from ..sizes import show_size
from .auth import HubUsers
from .errors import ApiError
from .kernels import Kernels
from .models import status_model
from .watching import ClusterWatch

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_loader = Loader(str(HERE / "templates"), autoescape="xhtml_escape")


def render_dashboard(
    status: dict[str, Any], *, name: str, admin: bool, prefix: str, hub: str = "/hub/", problem: str = ""
) -> bytes:
    """The page for the caller `name`."""
    return _loader.load("dashboard.html").generate(
        status=status,
        caller=name,
        admin=admin,
        prefix=prefix,
        hub=hub,
        problem=problem,
        size=show_size,
        since=_since,
        now=_now,
    )


def _now(reading: dict[str, Any] | None) -> str:
    """`11G in use, 87 % busy, 64 °C, 410 W`: what of it the device tells."""
    if reading is None:
        return ""
    told = {
        "memory": f"{show_size(reading['memory'])} in use",
        "utilisation": f"{reading['utilisation']} % busy",
        "temperature": f"{reading['temperature']} °C",
        "power": f"{reading['power']} W",
    }
    return ", ".join([text for name, text in told.items() if reading[name] >= 0] + reading["notes"])


def _since(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else ""


class SafeHeaders(RequestHandler):
    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "same-origin")


class DashboardHandler(HubOAuthenticated, SafeHeaders):
    def initialize(self, kernels: Kernels, watch: ClusterWatch, users: HubUsers) -> None:
        self.kernels = kernels
        self.watch = watch
        self.users = users
        self.hub_auth = users.auth

    async def prepare(self) -> None:
        # JupyterHub's mixin would ask the hub while blocking the loop; ask first, and let it find the answer.
        model = await self.users.auth.get_user(self, sync=False)
        self._model = model
        self._hub_auth_user_cache = model or None

    @authenticated
    async def get(self) -> None:
        try:
            # Only a login has a session; a token in the header, the address or its cookie is as good as on the API.
            caller = await self.users.of_model(self._model, browser=bool(self._model.get("session_id")))
        except ApiError as err:
            raise HTTPError(err.status, "%s", err.message) from err
        problem = ""
        if not self.watch.ready.is_set():
            problem = "The gateway has not read the cluster's records yet. Is etcd running?"
        status = status_model(self.kernels.copy, caller)
        self.set_header("Cache-Control", "no-store")
        self.finish(
            render_dashboard(
                status,
                name=caller.name,
                admin=caller.admin,
                prefix=self.users.auth.base_url,
                hub=self.users.auth.hub_prefix,
                problem=problem,
            )
        )


class CallbackHandler(HubOAuthCallbackHandler, SafeHeaders):
    """Where JupyterHub sends the browser back after its login."""


class AssetHandler(SafeHeaders, StaticFileHandler):
    """The page's own script and style."""
