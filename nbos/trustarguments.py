"""The arguments of `nbos certs`, `etcd-setup`, `drain` and `move`, apart from what they do: it is quick to import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_DIR = "nbos-certs"
ROLES = ("etcd", "gateway", "daemon", "admin", "reader")


def certs_arguments(commands: Commands) -> None:
    top = commands.add_parser("certs", help="make and look after the cluster's certificates")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    init = verbs.add_parser("init", help="make the private authority")
    init.add_argument("--name", default="NBOS private CA", help="its name (NBOS private CA)")
    init.add_argument("--encrypt", action="store_true", help="ask for a passphrase for the authority's key")
    init.add_argument("--days", type=_days, default=3650, help="how long it lasts (3650)")
    issue = verbs.add_parser("issue", help="make certificates: issue ROLE [HOST[,ADDRESS...] ...]")
    issue.add_argument("role", choices=ROLES)
    issue.add_argument("hosts", nargs="*", metavar="HOST[,ADDRESS...]", help="for the roles etcd and daemon")
    issue.add_argument("--replace", action="store_true", help="write over one that is there")
    renew = verbs.add_parser("renew", help="make certificates anew, with the same names")
    renew.add_argument("names", nargs="*", metavar="NAME", help="which (those that end soon)")
    renew.add_argument("--within", type=_days, default=60, help="without NAME: those with so many days left (60)")
    for verb in (issue, renew):
        verb.add_argument("--days", type=_days, default=825, help="how long they last (825)")
    show = verbs.add_parser("show", help="who has a certificate until when; status 1 when one is bad or ends soon")
    show.add_argument("--json", action="store_true", help="for programs")
    for verb in (init, issue, renew, show):
        verb.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help=f"where they lie ({DEFAULT_DIR})")
    for verb in (init, issue, renew):
        verb.add_argument("--ca-key", type=Path, metavar="FILE", help="the authority's key (DIR/ca/ca.key)")
        verb.add_argument("--passphrase-file", type=Path, metavar="FILE", help="its passphrase, the file's first line")


def etcd_arguments(commands: Commands) -> None:
    setup = commands.add_parser(
        "etcd-setup", help="give etcd a user and a role for each process, and turn its access control on"
    )
    setup.add_argument("hosts", nargs="*", metavar="HOST", help="hosts of the cluster (those with a certificate)")
    setup.add_argument("--endpoints", required=True, metavar="HOST:PORT,...", help="etcd's members")
    setup.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help=f"certificates, admin's too ({DEFAULT_DIR})")
    setup.add_argument("--remove", action="append", default=[], metavar="HOST", help="a host that left for good")
    setup.add_argument("--disable", action="store_true", help="turn access control off: every certificate may do all")


def drain_arguments(commands: Commands) -> argparse.ArgumentParser:
    drain = commands.add_parser("drain", help="have a host take nothing new and move its replicas away")
    drain.add_argument("hosts", nargs="+", metavar="HOST")
    drain.add_argument("--undo", action="store_true", help="let it take cells and replicas again")
    drain.add_argument("--wait", type=float, metavar="SECONDS", help="until no replica is left there, so long at most")
    drain.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="GPU",
        help="only this GPU of the host (number or UUID; may be repeated); with --undo it may be used again",
    )
    drain.add_argument(
        "--reason", default="an admin has taken it out of use", metavar="TEXT", help="told to those who wait for it"
    )
    drain.add_argument(
        "--endpoints", default="", metavar="HOST:PORT,...", help="etcd's members (those of this machine's nbos up)"
    )
    drain.add_argument(
        "--dir", type=Path, default=Path(DEFAULT_DIR), help=f"with the admin's certificate ({DEFAULT_DIR})"
    )
    return drain


def move_arguments(commands: Commands) -> argparse.ArgumentParser:
    move = commands.add_parser("move", help="move one replica of a kernel to another host while cells run")
    move.add_argument("kernel", metavar="KERNEL", help="its id, or USER/NOTEBOOK, as nbos status shows them")
    move.add_argument("--from", dest="source", default="", metavar="HOST", help="the replica there (most loaded host)")
    move.add_argument("--to", default="", metavar="HOST", help="where it goes (least loaded host without one)")
    move.add_argument("--back", action="store_true", help="have a replica that is on its way stay where it was")
    move.add_argument("--no-wait", action="store_true", help="do not wait until it has moved")
    move.add_argument("--url", default="", help="the hub of a cluster, http://HOST:PORT/ (this machine's nbos up)")
    move.add_argument("--token-file", default="", metavar="FILE", help="with an administrator's JupyterHub token")
    return move


def _days(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 36500:
        raise argparse.ArgumentTypeError(f"must be a number of days from 1 to 36500, not {text!r}")
    return int(text)
