"""The spawner's Docker form: each single-user server a container of the hub machine's Engine, through dockerspawner.

It must guarantee, besides what the mixin does: the container has no capability and gains no privilege; it gets the
memory and CPUs of the user's limits as they are at its start; it is found again, with the server in it, after a restart
of the hub (dockerspawner keeps its name and id in the hub's database).
"""

from __future__ import annotations

from typing import Any

from dockerspawner import DockerSpawner
from traitlets import Integer, default

from .spawner import NBOSSpawnerMixin


class NBOSDockerSpawner(NBOSSpawnerMixin, DockerSpawner):
    """Options: those of NBOSSpawnerMixin and of DockerSpawner (image, volumes, network_name, …)."""

    pids_limit = Integer(1024, min=64, help="Processes and threads that a user's server may have.").tag(config=True)

    mem_limit: Any
    cpu_limit: Any
    _own_bounds: tuple[Any, Any] | None = None
    """mem_limit and cpu_limit as the site configured them, for users whose limits name none."""

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

    async def start(self) -> Any:
        if self._own_bounds is None:
            self._own_bounds = (self.mem_limit, self.cpu_limit)
        memory, cpus = self._own_bounds
        limits = self.limits_of_user()
        # As the limits are now: the user's groups may have changed since the last start.
        self.mem_limit = limits.server_memory or memory
        self.cpu_limit = float(limits.server_cpus) if limits.server_cpus else cpus
        return await super().start()
