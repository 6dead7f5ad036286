"""`nbos etcd-setup`: the users and roles of `nbos_cluster.access` in an etcd that is there already."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from nbos_cluster import access, etcdauth, keys
from nbos_cluster.certs import CertError
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, TLSFiles
from nbos_cluster.etcdauth import AuthError

from .certbook import CertBook


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        for line in asyncio.run(_run(options)):
            print(line)
    except (CertError, AuthError, EtcdError, EtcdUnavailable, ValueError, OSError) as err:
        print(f"nbos etcd-setup: {err}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> list[str]:
    endpoints = [part.strip() for part in options.endpoints.split(",") if part.strip()]
    tls = admin_files(options.dir)
    hosts = hosts_of(options)
    async with Etcd(endpoints, tls, timeout=10.0) as etcd:
        await etcd.status()  # says in plain words when etcd is not there
        if options.disable:
            await etcdauth.turn_off(etcd)
            return ["access control is off: whoever has a certificate of the authority may do everything in etcd"]
        await etcdauth.check_safe(etcd, tls)
        done = await etcdauth.setup(etcd, hosts, options.remove)
    return done or [f"nothing to do: the roles of gateway, reader and {len(hosts)} hosts stand already"]


def admin_files(book: Path) -> TLSFiles:
    """The admin's certificate. Raises CertError when it is not there."""
    folder = book / "admin"
    for name in ("ca.pem", "cert.pem", "key.pem"):
        if not (folder / name).is_file():
            raise CertError(f"{folder / name} is not there; run: nbos certs issue admin --dir {book}")
    return TLSFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")


def hosts_of(options: argparse.Namespace) -> list[str]:
    """Those named, else all that have a certificate in the book and are not to be removed. Raises ValueError."""
    named = [keys.checked(host, "host name") for host in options.hosts]
    both = sorted(set(named) & set(options.remove))
    if both:
        raise ValueError(f"{', '.join(both)}: to be set up and removed at once?")
    found = [access.host_of(name) for name in CertBook(options.dir).names() if access.host_of(name)]
    return named or [host for host in found if host not in options.remove]
