"""The network of this host's replicas: a bridge of their own, with walls around it (`walls`).

Guarantees, with `walls = "required"`: the daemon does not start replicas that could reach what they must not.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

from docker.errors import NotFound

from gpu_daemon.container_spec import LABEL, DockerOptions, Site
from gpu_daemon.docker_engine import Engine, Trouble, words
from gpu_daemon.runtime import RuntimeFailed
from gpu_daemon.site import log
from gpu_daemon.walls import WallsFailed, raise_walls, remove_walls


async def make_network(engine: Engine, options: DockerOptions, site: Site, etcd: Sequence[str]) -> str:
    """Name of the network, which is there. Raises RuntimeFailed."""
    if options.network:
        await _must_exist(engine, options.network)
        log.warning(
            "replicas are on the site's own network %s: what they may reach is the site's care", options.network
        )
        return options.network
    try:
        await engine.call(lambda api: _make(api, site))
    except Trouble as err:
        raise RuntimeFailed(f"the network {site.network} cannot be made: {words(err)}") from err
    await _fence(options, site, etcd)
    return site.network


async def remove_network(engine: Engine, options: DockerOptions, site: Site) -> None:
    """Take away what `make_network` made, unless containers are still on it."""
    if options.network:
        return
    try:
        await engine.call(lambda api: api.remove_network(site.network))
    except Trouble as err:
        log.info("the network %s stays: %s", site.network, words(err))
    else:
        await asyncio.to_thread(remove_walls, site.interface)


async def _must_exist(engine: Engine, network: str) -> None:
    try:
        await engine.call(lambda api: api.inspect_network(network))
    except NotFound:
        raise RuntimeFailed(
            f"there is no Docker network {network!r}; make it (docker network create {network}), or leave the option "
            "Docker.network empty"
        ) from None
    except Trouble as err:
        raise RuntimeFailed(f"the network {network} cannot be looked at: {words(err)}") from err


def _make(api: Any, site: Site) -> None:
    try:
        api.inspect_network(site.network)
        return
    except NotFound:
        log.info("making the network %s", site.network)
    bridge = "com.docker.network.bridge."
    api.create_network(
        site.network,
        driver="bridge",
        options={f"{bridge}enable_icc": "false", f"{bridge}name": site.interface},
        labels={**site.labels, f"{LABEL}run-dir": site.run_dir},
        check_duplicate=True,
    )


async def _fence(options: DockerOptions, site: Site, etcd: Sequence[str]) -> None:
    if options.walls == "off":
        log.warning("Docker.walls is off: replicas can reach this host's own services")
        return
    deny = (*options.deny, *await asyncio.to_thread(_addresses, etcd))
    try:
        await asyncio.to_thread(raise_walls, site.interface, options.allow, deny, options.internet)
    except WallsFailed as err:
        if options.walls == "required":
            raise RuntimeFailed(
                f"the firewall rules around replicas cannot be set: {err}. Run the daemon as root (or with "
                'CAP_NET_ADMIN), or set Docker.walls = "auto" to go on without them'
            ) from err
        log.warning("replicas can reach services of this host: the firewall rules cannot be set (%s)", err)


def _addresses(endpoints: Sequence[str]) -> list[str]:
    """The IPv4 addresses of etcd's members; those on this very host are behind the wall anyway."""
    found = set()
    for endpoint in endpoints:
        name = endpoint.rpartition(":")[0].strip("[]")
        try:
            answers = socket.getaddrinfo(name, None, socket.AF_INET)
        except OSError as err:
            log.warning("the address of etcd member %s is not known (%s): name it in Docker.deny", name, err)
            continue
        found |= {str(answer[4][0]) for answer in answers}
    return sorted(a for a in found if not ipaddress.ip_address(a).is_loopback)
