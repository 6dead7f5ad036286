"""The spawner: a user's single-user server, told where the gateway is and what the user's kernels start with.

It must guarantee: options pass the user's limits whichever way they came (form or REST); the server gets no
credential but its own JupyterHub token; that token may reach the service `nbos`. What is ours stands in the
mixin, so that a Docker form needs only another base class.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from jupyterhub.spawner import SimpleLocalProcessSpawner
from tornado import web
from traitlets import Dict, TraitError, Unicode, default, validate
from traitlets.config import Configurable

from .form import options_form
from .limits import Limits, LimitTable, read_limits
from .options import KernelOptions, OptionError, options_from_form, parse_lazy, parse_options
from .scopes import ACCESS, KERNELS, SERVICE
from .sizes import show_size

SERVER_SCOPES = ("users:activity!user", "access:servers!server", ACCESS, f"{KERNELS}!user")
"""What $JUPYTERHUB_API_TOKEN may do: JupyterHub's own two, reach the gateway, and have this user's kernels there."""

SERVER_ARGS = (
    "--ServerApp.jpserver_extensions=nbos_provisioner=True",
    "--ServerApp.kernel_manager_class=nbos_provisioner.kernelmanager.NBOSKernelManager",
)
"""As arguments, not as a file: they reach the server in a container, too."""


class NBOSSpawnerMixin(Configurable):
    """NBOS's part of a spawner: put it before any Spawner class. Options for every form: c.NBOSSpawnerMixin.…"""

    gateway_url = Unicode(
        f"http://127.0.0.1:8765/services/{SERVICE}/",
        help="Where single-user servers reach the gateway: the URL of the service with its prefix.",
    ).tag(config=True)

    limits = Dict(
        help="What users may ask for: {'default': {...}, 'groups': {name: {...}}, 'users': {name: {...}}}; each may "
        "set replicas, gpus, tpcs, memory, replica_memory, kernels and images. The gateway needs the same."
    ).tag(config=True)

    lazy = Unicode(
        "off",
        help="What `lazy` is unless the user chooses: off, on (64M), or the size from which standbys leave variables "
        "in the store until they are used.",
    ).tag(config=True)

    @validate("lazy")
    def _check_lazy(self, proposal: Any) -> Any:
        try:
            parse_lazy(proposal.value)
        except OptionError as err:
            raise TraitError(f"NBOSSpawnerMixin.lazy: {err}") from err
        return proposal.value

    @validate("limits")
    def _check_limits(self, proposal: Any) -> Any:
        read_limits(proposal.value)  # a wrong entry ends the hub's start, not a user's spawn
        return proposal.value

    def limits_of_user(self) -> Limits:
        table: LimitTable = read_limits(self.limits)
        user = self.user  # type: ignore[attr-defined]
        return table.of(user.name, [group.name for group in user.groups])

    @default("options_form")
    def _default_options_form(self) -> Any:
        return lambda spawner: options_form(spawner.limits_of_user(), spawner.chosen_options())

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return lambda form: options_from_form(form, self.limits_of_user(), parse_lazy(self.lazy))

    @default("apply_user_options")
    def _default_apply_user_options(self) -> Any:
        """Called by JupyterHub before each start, with the options of the form or of the REST call."""
        return lambda spawner, options: spawner.check_user_options(options)

    def check_user_options(self, options: dict[str, Any]) -> KernelOptions:
        """Raise HTTP 400 that says which option is wrong and what is allowed."""
        try:
            return parse_options(options, self.limits_of_user(), parse_lazy(self.lazy))
        except OptionError as err:
            failure = web.HTTPError(400, "%s", str(err), reason="Bad options")
            failure.jupyterhub_message = str(err)  # type: ignore[attr-defined]
            raise failure from err

    def chosen_options(self) -> KernelOptions:
        """The user's last choice, or the default when it is not allowed any more."""
        limits = self.limits_of_user()
        try:
            stored = self.orm_spawner.user_options or {}  # type: ignore[attr-defined]
            return parse_options(stored, limits, parse_lazy(self.lazy))
        except OptionError:
            return parse_options({}, limits, parse_lazy(self.lazy))

    @default("server_token_scopes")
    def _default_server_token_scopes(self) -> list[str]:
        return list(SERVER_SCOPES)

    def get_args(self) -> list[str]:
        """The Jupyter Server's own options go last, so that a site's `args` can still change ours."""
        return [*SERVER_ARGS, *super().get_args()]  # type: ignore[misc]

    def nbos_env(self) -> dict[str, str]:
        """What NBOS's part of the Jupyter Server reads. No secret is in it."""
        options = self.check_user_options(self.user_options)  # type: ignore[attr-defined]
        return {
            "NBOS_GATEWAY_URL": self.gateway_url,
            "NBOS_REPLICAS": str(options.replicas),
            "NBOS_LAZY": str(options.lazy),
            "NBOS_RESOURCES": json.dumps(options.resources()),
            "NBOS_IMAGE": options.image,
        }

    def get_env(self) -> dict[str, str]:
        return {**super().get_env(), **self.nbos_env()}  # type: ignore[misc]

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """Called by JupyterHub while the spawn is pending; it ends us when the server answers."""
        yield {"progress": 10, "message": _describe(self.check_user_options(self.user_options))}  # type: ignore[attr-defined]
        yield {"progress": 25, "message": "Starting your Jupyter Server…"}
        began, shown = time.monotonic(), 30
        while True:
            await asyncio.sleep(2)
            shown = min(90, shown + 10)
            waited = int(time.monotonic() - began)
            yield {
                "progress": shown,
                "message": f"The server's process runs; waiting for it to answer ({waited} s)",
            }


def _describe(options: KernelOptions) -> str:
    if options.gpus:
        asked = f"{options.gpus} whole GPU{'s' if options.gpus > 1 else ''}"
    elif options.tpcs:
        asked = f"a slice of {options.tpcs} TPCs"
    else:
        asked = "no GPU"
    memory = f" with {show_size(options.memory)} of memory" if options.memory else ""
    model = f" of model {options.model}" if options.model else ""
    count = f"{options.replicas} replica{'s' if options.replicas > 1 else ''}"
    image = f" in the image {options.image}" if options.image else ""
    return f"Your kernels will have {count}{image}; a cell gets {asked}{memory}{model} unless it asks otherwise"


class NBOSSpawner(NBOSSpawnerMixin, SimpleLocalProcessSpawner):
    """The local form: single-user servers are processes of the hub's own user, for one machine and trying
    out."""

    @default("cmd")
    def _default_cmd(self) -> list[str]:
        return [sys.executable, "-m", "jupyterhub.singleuser"]
