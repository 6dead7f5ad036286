"""GPUs that are played: for machines without one, so that everything but CUDA itself can be tried and tested.

They are marked `simulated` wherever they are shown; user code that asks for one gets a grant, not a device.
"""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from nbos_cluster.records import Device


def simulated(host: str, count: int, model: str, tpcs: int, memory: int) -> tuple[Device, ...]:
    """`count` devices. model: one name, or several with commas between them, which the devices have in turn.

    The same host name always gets the same UUIDs, as real devices keep theirs.
    """
    if count < 0 or tpcs < 1 or memory < 1:
        raise ValueError(f"cannot simulate {count} devices with {tpcs} TPCs and {memory} bytes of memory")
    models = [name.strip() for name in model.split(",")]
    return tuple(
        Device(
            uuid=f"SIM-{uuid5(NAMESPACE_URL, f'nbos:{host}/{index}')}",
            index=index,
            model=models[index % len(models)],
            tpcs=tpcs,
            memory=memory,
            kind="simulated",
        )
        for index in range(count)
    )
