"""Which packets a host's replicas may send: firewall rules in front of what Docker gives. Rules are made without IO.

Guarantees, once `raise_walls` returned: nothing on this host's network may be opened from a replica (daemons, etcd, the
Engine, published ports of other replicas), nor what `deny` names, nor other containers; answers on connections that
others opened to a replica pass. Chains are replaced whole, so that a daemon's restart leaves no gap.

Docker itself already keeps replicas from other Docker networks, and (`enable_icc=false`) from one another.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess

_PLACE = re.compile(r"(?P<net>[0-9./]+)(?::(?P<port>\d{1,5}))?")
_RETURN, _REJECT = "RETURN", "REJECT --reject-with icmp-admin-prohibited"


class WallsFailed(RuntimeError):
    """The rules could not be set; says why and the way out."""


def place(text: str) -> tuple[str, str]:
    """The network and the port ('' for every port) in `10.0.0.0/8` or `10.1.2.3:53`. Raises ValueError."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no IPv4 network with an optional port, such as 10.0.0.0/8 or 10.1.2.3:53")
    return str(ipaddress.ip_network(found["net"], strict=False)), found["port"] or ""


def chains(interface: str) -> tuple[str, str]:
    """Names of the chains for what leaves the host, and for what is meant for the host itself."""
    return f"NBOS-{interface}-O", f"NBOS-{interface}-H"


def rules(interface: str, allow: tuple[str, ...], deny: tuple[str, ...], internet: bool) -> str:
    """Input of `iptables-restore --noflush`: both chains, whole. `allow` wins over `deny`."""
    out, here = chains(interface)
    lines = ["*filter", f":{out} - [0:0]", f":{here} - [0:0]"]
    for chain in (out, here):
        lines.append(f"-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j {_RETURN}")
        lines += [f"-A {chain} {match} -j {_RETURN}" for text in allow for match in _matches(text)]
    # To the bridge itself: another replica.
    lines.append(f"-A {out} -o {interface} -j {_REJECT}")
    lines += [f"-A {out} {match} -j {_REJECT}" for text in deny for match in _matches(text)]
    lines.append(f"-A {out} -j {_RETURN if internet else _REJECT}")
    lines.append(f"-A {here} -j {_REJECT}")
    return "\n".join([*lines, "COMMIT", ""])


def jumps(interface: str) -> list[list[str]]:
    """The rules that lead into the chains, as arguments after -I or -C."""
    out, here = chains(interface)
    return [["DOCKER-USER", "-i", interface, "-j", out], ["INPUT", "-i", interface, "-j", here]]


def _matches(text: str) -> list[str]:
    network, port = place(text)
    return [f"-d {network} -p {protocol} --dport {port}" for protocol in ("tcp", "udp")] if port else [f"-d {network}"]


def raise_walls(interface: str, allow: tuple[str, ...], deny: tuple[str, ...], internet: bool) -> None:
    """Set the rules. Blocking. Raises WallsFailed."""
    if shutil.which("iptables") is None:
        raise WallsFailed("the program iptables is not there; install it")
    _run(["iptables-restore", "-w", "10", "--noflush"], rules(interface, allow, deny, internet))
    for jump in jumps(interface):
        if subprocess.run(["iptables", "-w", "10", "-C", *jump], capture_output=True, check=False).returncode:
            _run(["iptables", "-w", "10", "-I", *jump])


def remove_walls(interface: str) -> None:
    """Take them away, as far as they stand. Blocking."""
    if shutil.which("iptables") is None:
        return
    removals = [["-D", *jump] for jump in jumps(interface)]
    removals += [[flag, chain] for chain in chains(interface) for flag in ("-F", "-X")]
    for removal in removals:
        subprocess.run(["iptables", "-w", "10", *removal], capture_output=True, check=False)


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[:300]
        raise WallsFailed(f"{' '.join(command)}: {said}; it needs root (CAP_NET_ADMIN) in the host's network namespace")
