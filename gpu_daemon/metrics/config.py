"""What a site says about the metrics' endpoint: the options `c.Metrics.…`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traitlets import Bool, List, TraitError, Unicode, validate
from traitlets.config import Configurable

from nbos_cluster.access import READER

LEAST_TOKEN = 16
"""Characters of a bearer token, at least."""


class MetricsError(ValueError):
    """The endpoint cannot be opened as it is configured; says which option, and the way out."""


@dataclass(frozen=True)
class Endpoint:
    """Where to listen, and who may ask. `token_file` or `client_ca` is set, or both: both are asked for then."""

    address: str
    port: int
    token_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    clients: tuple[str, ...] = ()


class Metrics(Configurable):
    """The daemon's metrics for Prometheus (docs/metrics.md)."""

    listen = Unicode(
        "", help="address:port where Prometheus asks, for example 127.0.0.1:9755. Empty: the daemon does not listen."
    ).tag(config=True)
    token_file = Unicode(
        "", help="File (mode 0600) with the bearer token that Prometheus must send. Read anew at every request."
    ).tag(config=True)
    cert = Unicode("", help="PEM file of the endpoint's own certificate. Needed beyond 127.0.0.1.").tag(config=True)
    key = Unicode("", help="PEM file of its key.").tag(config=True)
    client_ca = Unicode("", help="PEM file of the CA of the certificates that may ask (mutual TLS).").tag(config=True)
    clients = List(Unicode(), [READER], help="Common names of the certificates that may ask.").tag(config=True)
    owners = Bool(False, help="Whether grants and waits are also told by the user's name, as a label `owner`.").tag(
        config=True
    )

    @validate("listen")
    def _valid_listen(self, proposal: Any) -> Any:
        if proposal["value"]:
            try:
                _split(proposal["value"])
            except ValueError as err:
                raise TraitError(
                    f"Metrics.listen must be an IP address and a port such as 127.0.0.1:9755 or [::1]:9755, not "
                    f"{proposal['value']!r}"
                ) from err
        return proposal["value"]

    def endpoint(self) -> Endpoint | None:
        """What to open; None: nothing. Raises MetricsError."""
        if not self.listen:
            return None
        ip, port = _split(self.listen)
        paths = {name: _file(name, getattr(self, name)) for name in ("token_file", "cert", "key", "client_ca")}
        if (paths["cert"] is None) != (paths["key"] is None):
            raise MetricsError("of Metrics.cert and Metrics.key one is set and one is not; set both, or none")
        if paths["token_file"] is None and paths["client_ca"] is None:
            raise MetricsError(
                f"Metrics.listen = {self.listen!r} would let anybody ask; set Metrics.token_file, or Metrics.cert, "
                "Metrics.key and Metrics.client_ca for mutual TLS"
            )
        if paths["cert"] is None and paths["client_ca"] is not None:
            raise MetricsError("Metrics.client_ca asks clients for certificates; set Metrics.cert and Metrics.key, too")
        if paths["cert"] is None and not ip.is_loopback:
            raise MetricsError(
                f"Metrics.listen = {self.listen!r} can be reached from other machines, and the token would travel in "
                "clear; set Metrics.cert and Metrics.key, or listen at 127.0.0.1"
            )
        if paths["token_file"] is not None:
            read_token(paths["token_file"])
        return Endpoint(str(ip), port, clients=tuple(self.clients), **paths)


def read_token(path: Path) -> str:
    """The token in the file. Raises MetricsError when others can read it, or it is too short to keep anybody out."""
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except (OSError, UnicodeDecodeError) as err:
        raise MetricsError(f"Metrics.token_file {path} cannot be read: {err}") from err
    if mode & 0o077:
        raise MetricsError(f"Metrics.token_file {path} can be read by others; run: chmod 600 {path}")
    if len(token) < LEAST_TOKEN or not token.isascii():
        raise MetricsError(
            f"Metrics.token_file {path} holds {len(token)} characters; a token has at least {LEAST_TOKEN}, all ASCII: "
            f"openssl rand -hex 32 > {path}"
        )
    return token


def _split(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """The address and the port in `text`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    number = int(port)
    if not (port.isascii() and port.isdigit()) or number > 65535:
        raise ValueError(text)
    return ipaddress.ip_address(host), number


def _file(name: str, path: str) -> Path | None:
    """Raises MetricsError when it is named and not there."""
    if not path:
        return None
    if not Path(path).is_file():
        raise MetricsError(f"Metrics.{name} = {path!r} is not a file")
    return Path(path)
