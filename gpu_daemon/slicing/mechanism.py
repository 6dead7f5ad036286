"""Which mechanism holds slices of a device: the strongest that this host has. Pure.

From strong to weak: `mig` (a MIG instance that is granted whole), `green` (green contexts, processes side by side under
MPS), `percentage` (MPS's cap on active threads), `cooperative` (processes take turns, nothing holds them).

MPS wants one trust domain: a fault in one client can end the others. So it is never chosen unless the administrator
has said that all who share the host's devices trust each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from nbos_cluster.records import Device, DeviceShare

Mechanism = Literal["mig", "green", "percentage", "cooperative"]

GREEN_SINCE = 12040
"""The CUDA version (12.4, driver 550) that brought green contexts, as the driver counts."""


@dataclass(frozen=True)
class Facts:
    """What is known of the host. driver: the CUDA version its driver speaks, 0: not known. mps: why no MPS daemon can
    be used, '' when one can; pipe: its folder. one_domain: everybody on this host's devices trusts each other."""

    driver: int = 0
    mps: str = ""
    pipe: str = ""
    one_domain: bool = False


@dataclass(frozen=True)
class Choice:
    """why: what stands in the way of the next stronger one, '' for the strongest. mps: folder of the MPS daemon that
    processes are to use, '' for none."""

    mechanism: Mechanism
    why: str = ""
    mps: str = ""


def choose(facts: Facts, at_most: Mechanism = "mig") -> Choice:
    """For slices of one device. at_most: the strongest that the administrator wants."""
    if at_most == "cooperative":
        return Choice("cooperative", "the administrator chose so (Slicing.at_most)")
    if not facts.one_domain:
        why = "users of this host are not known to trust each other, so MPS is not used (Slicing.one_trust_domain)"
        return Choice("cooperative", why)
    if facts.mps:
        return Choice("cooperative", facts.mps)
    if at_most == "percentage":
        return Choice("percentage", "the administrator chose so (Slicing.at_most)", facts.pipe)
    if facts.driver < GREEN_SINCE:
        has = f"speaks CUDA {version(facts.driver)}" if facts.driver else "does not tell its CUDA version"
        return Choice("percentage", f"the NVIDIA driver {has}; green contexts need 12.4 (driver 550)", facts.pipe)
    return Choice("green", mps=facts.pipe)


def version(number: int) -> str:
    """A CUDA version as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def published(device: Device, choices: Mapping[str, Choice]) -> Device:
    """The device as its host's record shows it."""
    choice = choices.get(device.uuid)
    if choice is None:
        return device
    return msgspec.structs.replace(device, mechanism=choice.mechanism, why=choice.why)


def held(share: DeviceShare, device: Device | None, choices: Mapping[str, Choice]) -> DeviceShare:
    """A share of a new grant, with what will hold it. device: the one it is of."""
    choice = choices.get(share.uuid)
    if choice is None or device is None:
        return share
    mechanism, why = choice.mechanism, choice.why
    if is_mig(device.uuid) and len(share.tpcs) == device.tpcs:
        mechanism, why = "mig", ""
    return msgspec.structs.replace(share, mechanism=mechanism, why=why, of=device.tpcs, mps=choice.mps)


def is_mig(uuid: str) -> bool:
    """Whether a device is an instance of MIG."""
    return uuid.startswith("MIG-")
