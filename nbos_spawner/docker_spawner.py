"""The spawner's Docker form: each single-user server a container, on the hub machine or on the least loaded host.

It must guarantee, besides what the mixin does: the container has no capability and gains no privilege; it gets the
memory and CPUs of the user's limits as they are at its start; it is found again, with the server in it and on its host,
after a restart of the hub (name, id and host stand in the hub's database). A server counts as ended only when its
Engine says so, or when its host is lost; what is left of it there is removed when the host is back.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar
from weakref import WeakSet

from docker.errors import APIError
from dockerspawner import DockerSpawner
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest
from traitlets import Dict, Integer, TraitError, default, validate

from nbos_cluster.placement import NoRoom, ServerHost, place_server

from .engines import EnginesError, HostEngine, Line, line, read_engines, unreachable
from .scopes import ACCESS
from .spawner import NBOSSpawnerMixin


class NBOSDockerSpawner(NBOSSpawnerMixin, DockerSpawner):
    """Options: those of NBOSSpawnerMixin and of DockerSpawner (image, volumes, network_name, …)."""

    pids_limit = Integer(1024, min=64, help="Processes and threads that a user's server may have.").tag(config=True)

    hosts = Dict(
        help="Hosts that servers may run on, by the names of their gpu_daemons: {'gpu-1': {'url': "
        "'tcp://10.0.0.11:2376', 'ca': …, 'cert': …, 'key': …}}; url: of the host's Docker Engine (tcp:// with mutual "
        "TLS, or unix://); address: at which its containers publish their ports, the url's host when left out. "
        "Each server then runs on the least loaded one. Empty: on the hub machine.",
    ).tag(config=True)

    host = ""
    """Where its server runs, or was started last; '': the hub machine."""

    mem_limit: Any
    cpu_limit: Any
    host_ip: Any
    use_internal_ip: Any
    _own_bounds: tuple[Any, Any] | None = None
    """mem_limit and cpu_limit as the site configured them, for users whose limits name none."""
    _all: ClassVar[WeakSet[NBOSDockerSpawner]] = WeakSet()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left_on: set[str] = set()
        """Hosts that were lost, or did not answer, with a container of this server on them."""
        self._all.add(self)

    @validate("hosts")
    def _valid_hosts(self, proposal: Any) -> Any:
        try:
            read_engines(proposal["value"])
        except EnginesError as err:
            raise TraitError(f"NBOSDockerSpawner.hosts: {err}") from err
        return proposal["value"]

    @default("image")
    def _default_image(self) -> str:
        return "nbos/singleuser"

    @default("remove")
    def _default_remove(self) -> bool:
        # It holds nothing: homes are volumes, kernels live on the hosts.
        return True

    @default("extra_host_config")
    def _default_extra_host_config(self) -> dict[str, Any]:
        return {
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "pids_limit": self.pids_limit,
            "init": True,
        }

    async def check_allowed(self, image: str) -> str:
        """dockerspawner takes the user's option `image` for the server's. Ours is the kernels', checked by the limits;
        a server's image is the administrator's choice."""
        return str(self.image)

    # -- the Engine ---------------------------------------------------------------------------------------------------

    def _line(self, host: str) -> Line | None:
        """None: the hub machine's own, or a host that is in the table no more."""
        engine: HostEngine | None = read_engines(self.hosts).get(host)
        return line(engine) if engine is not None else None

    @property
    def client(self) -> Any:
        found = self._line(self.host)
        return found.client if found is not None else super().client

    @property
    def executor(self) -> Any:
        found = self._line(self.host)
        return found.executor if found is not None else super().executor

    # -- what the hub remembers ---------------------------------------------------------------------------------------

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.host = state.get("host", "")
        self.left_on = set(state.get("left_on", ()))

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state()
        if self.host and self.object_id:
            state["host"] = self.host
        if self.left_on:
            state["left_on"] = sorted(self.left_on)
        return state

    # -- start and end ------------------------------------------------------------------------------------------------

    async def start(self) -> Any:
        if self._own_bounds is None:
            self._own_bounds = (self.mem_limit, self.cpu_limit)
        memory, cpus = self._own_bounds
        limits = self.limits_of_user()
        # As the limits are now: the user's groups may have changed since the last start.
        self.mem_limit = limits.server_memory or memory
        self.cpu_limit = float(limits.server_cpus) if limits.server_cpus else cpus
        if not self.hosts:
            self.host = ""
            return await super().start()
        return await self._start_on_a_host()

    async def _start_on_a_host(self) -> Any:
        reported, silent = await self._reported(), set[str]()
        await self._remove_left()
        while True:
            try:
                self.host = place_server(self._places(reported), silent)
            except NoRoom as err:
                failure = web.HTTPError(503, "%s", str(err), reason="No host")
                failure.jupyterhub_message = str(err)  # type: ignore[attr-defined]
                raise failure from err
            self.use_internal_ip, self.host_ip = False, read_engines(self.hosts)[self.host].address
            try:
                return await super().start()
            except Exception as err:
                if not unreachable(err):
                    raise
                self.log.warning("%s: the Engine of host %s does not answer: %s", self._log_name, self.host, err)
                silent.add(self.host)
                self.left_on.add(self.host)
                self.object_id = ""

    def _places(self, reported: dict[str, dict[str, Any]] | None) -> list[ServerHost]:
        """Those of the table that live; all of them where nobody can say."""
        servers = [one.host for one in self._all if one.object_id and one is not self]
        names = [name for name in self.hosts if reported is None or name in reported]
        places = []
        for name in names:
            said = (reported or {}).get(name, {})
            draining, cpus, replicas = said.get("draining", False), said.get("cpus", 1), said.get("replicas", 0)
            places.append(ServerHost(name, draining, cpus, replicas, servers.count(name)))
        return places

    async def poll(self) -> Any:
        if not self.host:
            return await super().poll()
        if self.host not in self.hosts:
            return f"host {self.host} is not among those of NBOSDockerSpawner.hosts any more"
        try:
            found = await super().poll()
        except Exception as err:
            if not unreachable(err):
                raise
            reported = await self._reported()
            if reported is None or self.host in reported:
                self.log.warning("%s: whether it runs is not known: %s", self._log_name, err)
                return None
            self.left_on.add(self.host)
            self.object_id = ""
            return f"host {self.host} is lost"
        if self.left_on:
            await self._remove_left()
        return found

    async def stop(self, now: bool = False) -> None:
        try:
            await super().stop(now)
        except Exception as err:
            if not (self.host and unreachable(err)):
                raise
            self.log.warning("%s: it stays on host %s, which does not answer: %s", self._log_name, self.host, err)
            self.left_on.add(self.host)
            self.object_id = ""
            self.clear_state()

    async def _remove_left(self) -> None:
        """What is left on hosts that are back. Where this server runs now is not one of them."""
        for host in sorted(self.left_on):
            found = self._line(host)
            try:
                if found is not None and not (host == self.host and self.object_id):
                    await found.call(lambda api: api.remove_container(self.object_name, v=True, force=True))
            except APIError as err:
                if err.status_code not in (404, 409):
                    self.log.warning("%s: what is left on host %s: %s", self._log_name, host, err)
                    continue
            except Exception as err:
                if not unreachable(err):
                    raise
                continue
            self.left_on.discard(host)

    async def _reported(self) -> dict[str, dict[str, Any]] | None:
        """What the living hosts say, by the gateway; None when that does not answer.

        Asked in the user's name, with a token for this alone: the hub needs no credential of its own at the gateway.
        """
        try:
            token = self.user.new_api_token(note="where to start the server", expires_in=60, scopes=[ACCESS])
            request = HTTPRequest(
                f"{self.gateway_url}api/status", headers={"Authorization": f"token {token}"}, request_timeout=10
            )
            answer = await AsyncHTTPClient().fetch(request)
            return {str(host["name"]): host for host in json.loads(answer.body)["hosts"]}
        except (HTTPError, OSError, ValueError, KeyError) as err:
            self.log.warning("%s: the gateway does not say which hosts there are: %s", self._log_name, err)
            return None
