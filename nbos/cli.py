"""The `nbos` command: reads its arguments and calls the part that does the work. Imports only what a call
needs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, accountscommand
from .trustarguments import certs_arguments, drain_arguments, etcd_arguments, move_arguments

if TYPE_CHECKING:
    from .layout import UpOptions
    from .status import Cluster


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    top = parser()
    options = top.parse_args(argv)
    if options.command in ("status", "gpus") and options.url and not options.token_file:
        top.error("--url needs --token-file, a file with a JupyterHub token")
    commands = {
        "up": _up,
        "status": _status,
        "gpus": _gpus,
        "doctor": _doctor,
        "certs": _certs,
        "etcd-setup": _etcd_setup,
        "drain": _drain,
        "move": _move,
        "accounts": _accounts,
    }
    return commands[options.command](options)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nbos", description="Kernels that outlive their machine and hold a GPU only while a cell runs."
    )
    top.add_argument("--version", action="version", version=f"nbos {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _up_arguments(commands.add_parser("up", help="start everything on this machine; Ctrl-C ends it"))
    status = commands.add_parser("status", help="show hosts, GPUs and kernels of a running `nbos up`")
    status.add_argument("--json", action="store_true", help="for programs")
    gpus = commands.add_parser("gpus", help="show the GPUs of a running `nbos up`, who holds what of them, who waits")
    gpus.add_argument("--json", action="store_true", help="for programs")
    doctor = commands.add_parser("doctor", help="check what this machine has and lacks")
    doctor.add_argument("--port", type=_port, default=8000, help="the port to check (8000)")
    doctor.add_argument(
        "--clean", action="store_true", help="remove replicas' containers and networks whose daemon does not run"
    )
    for command in (status, gpus, doctor, accountscommand.arguments(commands)):
        _state_argument(command)
    for command in (status, gpus):
        command.add_argument(
            "--url", default="", help="the hub of a cluster, http://HOST:PORT/ (this machine's nbos up)"
        )
        command.add_argument(
            "--token-file", default="", metavar="FILE", help="with --url: a JupyterHub token; an admin's sees all"
        )
    doctor.add_argument("--certs", metavar="DIR", help="look at a cluster's certificates in DIR instead")
    certs_arguments(commands)
    etcd_arguments(commands)
    _state_argument(drain_arguments(commands))
    _state_argument(move_arguments(commands))
    return top


def _state_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where everything is kept ($XDG_DATA_HOME/nbos, else ~/.local/share/nbos)",
    )


def _up_arguments(up: argparse.ArgumentParser) -> None:
    _state_argument(up)
    up.add_argument("--ip", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    up.add_argument("--port", type=_port, default=8000, help="port of JupyterHub (8000)")
    up.add_argument("--hosts", type=_between(1, 16), default=3, help="how many hosts to play (3)")
    up.add_argument("--gpus", type=_between(0, 64), default=2, help="simulated GPUs per host (2)")
    up.add_argument("--tpcs", type=_between(1, 1024), default=66, help="TPCs of a simulated GPU (66)")
    up.add_argument("--gpu-memory", type=_size, default=80 << 30, metavar="SIZE", help="its memory (80G)")
    up.add_argument("--gpu-model", default="Simulated H100", help="its name; several with commas: in turn")
    up.add_argument("--simulate", action="store_true", help="simulate GPUs even where there are real ones")
    up.add_argument(
        "--limits",
        type=_limits,
        default={},
        metavar="FILE",
        help='what users may ask for, as JSON: {"default": {...}, "groups": {...}, "users": {...}}; the fields '
        "stand in configs/jupyterhub_config.py",
    )
    up.add_argument(
        "--sharing",
        type=_sharing,
        default={},
        metavar="FILE",
        help='who is owed what of each host\'s GPUs, as JSON: {"shares": {...}, "reservations": [...], '
        '"overdue_after": 3600, ...}: options of the daemons (docs/sharing.md)',
    )
    up.add_argument(
        "--memory-limit", type=_size, metavar="SIZE", help="memory that one replica of a kernel may take (no limit)"
    )
    up.add_argument(
        "--runtime",
        choices=("process", "docker"),
        default="process",
        help="how replicas run: as processes (default), or each in a container of this machine's Docker Engine",
    )
    up.add_argument("--image", default="nbos/kernel", help="their image with --runtime docker (nbos/kernel)")
    up.add_argument(
        "--warm",
        type=_between(0, 64),
        default=1,
        metavar="N",
        help="how many replicas each host has started before they are asked for, at least (1); 0: none, ever",
    )
    up.add_argument(
        "--no-learning",
        action="store_false",
        dest="learn",
        help="do not import ahead what kernels turn out to import (docs/warm.md)",
    )
    up.add_argument(
        "--preload",
        type=_modules,
        default=(),
        metavar="MODULES",
        help="what they have imported besides ipykernel, for example numpy,torch; shared by all of a host's replicas",
    )
    up.add_argument(
        "--host-grace",
        type=_between(0, 3600),
        default=10,
        metavar="SECONDS",
        help="how long a host may be away before its replicas are placed elsewhere (10)",
    )
    up.add_argument(
        "--at-a-time",
        type=_between(1, 1000),
        default=4,
        metavar="N",
        help="replicas that draining hosts move, and that are made anew for lost ones, at the same time (4)",
    )
    up.add_argument("--admin", type=_name, default="admin", help="name of the administrator (admin)")


def _between(low: int, high: int):  # type: ignore[no-untyped-def]  # argparse wants a plain function
    def number(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")
        return int(text)

    return number


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 1 to 65535, not {text!r}")
    return int(text)


def _size(text: str) -> int:
    from nbos_spawner.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise argparse.ArgumentTypeError(f"must be modules with commas between them, not {text!r}")
    return names


def _limits(path: str) -> dict[str, Any]:
    """The table of limits in a file, checked."""
    from nbos_spawner.limits import LimitsError, read_limits

    try:
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict):
            raise LimitsError("the file must hold an object with 'default', 'users' and 'groups'")
        read_limits(table)
    except (OSError, ValueError) as err:
        raise argparse.ArgumentTypeError(f"{path}: {err}") from err
    return table


def _sharing(path: str) -> dict[str, Any]:
    """Options of the daemons in a file, checked as far as it goes without their devices."""
    from gpu_daemon.reservations import ReservationError, read_reservations
    from gpu_daemon.shares import SharesError, read_shares

    known = ("shares", "reservations", "overdue_after", "fair_window", "unknown_run")
    try:
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict) or set(table) - set(known):
            raise SharesError(f"the file must hold an object with some of {', '.join(known)}")
        read_shares(table.get("shares", {}))
        read_reservations(table.get("reservations", []))
    except (OSError, ValueError, SharesError, ReservationError) as err:
        raise argparse.ArgumentTypeError(f"{path}: {err}") from err
    return table


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"must be a user name of a-z, 0-9, '.', '_' and '-', not {text!r}")
    return text


def _up(options: argparse.Namespace) -> int:
    # Before anything imports gRPC: we fork to start processes, and it would complain into the terminal each
    # time.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from .state import StateDir
    from .up import up

    return up(StateDir.at(options.state_dir), up_options(options))


def up_options(options: argparse.Namespace) -> UpOptions:
    from .layout import UpOptions

    chosen = {k: v for k, v in vars(options).items() if k not in ("command", "state_dir", "memory_limit")}
    if options.memory_limit is not None:
        default = {**options.limits.get("default", {}), "replica_memory": options.memory_limit}
        chosen["limits"] = {**options.limits, "default": default}
    return UpOptions(**chosen)


def _status(options: argparse.Namespace) -> int:
    from .state import StateDir
    from .status import status

    return status(StateDir.at(options.state_dir), as_json=options.json, cluster=_cluster(options))


def _gpus(options: argparse.Namespace) -> int:
    from .gpus import gpus
    from .state import StateDir

    return gpus(StateDir.at(options.state_dir), as_json=options.json, cluster=_cluster(options))


def _cluster(options: argparse.Namespace) -> Cluster | None:
    """The cluster that `--url` names; None: the `nbos up` of this machine."""
    if not options.url:
        return None
    from .status import Cluster

    return Cluster(options.url, Path(options.token_file))


def _doctor(options: argparse.Namespace) -> int:
    if options.certs:
        from .certdoctor import doctor_of_certs

        return doctor_of_certs(Path(options.certs))
    from .doctor import doctor
    from .state import StateDir

    return doctor(StateDir.at(options.state_dir), options.port, options.clean)


def _certs(options: argparse.Namespace) -> int:
    from .certcommand import run

    return run(options)


def _drain(options: argparse.Namespace) -> int:
    from .draincommand import run

    return run(options)


def _move(options: argparse.Namespace) -> int:
    from .movecommand import run

    return run(options)


def _accounts(options: argparse.Namespace) -> int:
    return accountscommand.run(options)


def _etcd_setup(options: argparse.Namespace) -> int:
    from .etcdcommand import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
