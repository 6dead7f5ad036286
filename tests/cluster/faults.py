"""The faults of the random run: what is done to the cluster, and how it is mended. A seed chooses them, so that a run
can be repeated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tests.cluster.machines import HOSTS, MEMBERS, Machines
from tests.system.cluster import after
from tests.system.hubclient import eventually

KINDS = (
    "host dead",
    "host cut off",
    "host paused",
    "daemon killed",
    "replica killed",
    "etcd member dead",
    "etcd member cut off",
    "etcd quorum lost",
    "gateway killed",
    "hub killed",
    "host's Engine killed",
    "disk of a host full",
    "blob store full",
    "clock an hour ahead",
    "clock an hour behind",
)


@dataclass(frozen=True)
class Fault:
    kind: str
    where: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}, {self.seconds:.1f} s"


def plan(seed: int, count: int) -> list[Fault]:
    """Every kind as often as the others, in an order of the seed's."""
    chance = random.Random(seed)
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    chance.shuffle(kinds)
    return [Fault(kind, _where(kind, chance), chance.choice([0.5, 2.0, 4.0, 8.0])) for kind in kinds]


def _where(kind: str, chance: random.Random) -> str:
    if kind in ("gateway killed", "hub killed"):
        return "hub"
    if kind == "blob store full":
        return "blobs"
    return chance.choice(MEMBERS if kind.startswith("etcd") else HOSTS)


@asynccontextmanager
async def done(fault: Fault, machines: Machines) -> AsyncIterator[None]:
    """Does it, and mends it at the end of the block."""
    async with AsyncExitStack() as stack:
        match fault.kind:
            case "host dead" | "etcd member dead":
                await stack.enter_async_context(machines.dead(fault.where))
            case "host cut off" | "etcd member cut off":
                await stack.enter_async_context(machines.cut_off(fault.where))
            case "disk of a host full" | "blob store full":
                await stack.enter_async_context(machines.full(fault.where))
            case "clock an hour ahead" | "clock an hour behind":
                hour = 3600 if fault.kind.endswith("ahead") else -3600
                await stack.enter_async_context(machines.clock_off(fault.where, hour))
            case "host paused":
                await stack.enter_async_context(machines.paused(fault.where))
            case "etcd quorum lost":
                for member in MEMBERS:
                    if member != fault.where:
                        await stack.enter_async_context(machines.dead(member))
            case "daemon killed":
                await _kill(machines, fault.where, "gpu_daemon", "--config")
            case "host's Engine killed":
                await _kill(machines, fault.where, "dockerd", "--host")
            case "gateway killed":
                await _kill(machines, "hub", "nbos_spawner.gateway")
            case "hub killed":
                await _kill(machines, "hub", "jupyterhub", "--config")
            case "replica killed":
                machines.inside(
                    fault.where,
                    "bash",
                    "-c",
                    # By their names: a replica that was started ahead has no label that says so.
                    "docker ps -q --filter 'name=-[0-9a-f]{12}-[0-9]+$' | head -n 1 | xargs -r docker kill",
                )
        await after(fault.seconds)
        yield


async def _kill(machines: Machines, service: str, *words: str) -> None:
    """Also a process that the fault before has ended: it is being started again, and nobody need have noticed."""

    async def there() -> bool:
        try:
            await asyncio.to_thread(machines.process, service, *words)
        except LookupError:
            return False
        return True

    await eventually(there, f"{words[0]} runs on {service}", 30, every=0.2)
    machines.kill(service, *words)
