"""`nbos accounts`: what was used, as CSV. Asks the gateway of an `nbos up`, or a cluster's (--url, --token-file)."""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from .state import StateDir
from .status import NotRunning, message_of


def arguments(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "accounts", help="who used how much of the GPUs, as CSV (docs/sharing.md)"
    )
    command.add_argument(
        "--since", metavar="TIME", help="2026-11-01 or 2026-11-01T10:00 (UTC unless it says otherwise)"
    )
    command.add_argument("--until", metavar="TIME", help="not included (now)")
    command.add_argument("--by", choices=("user", "group", "kernel"), default="user", help="one row for each (user)")
    command.add_argument("--url", help="the gateway's API: https://hub.example.org/services/nbos/api")
    command.add_argument("--token-file", metavar="FILE", help="with --url: a file that holds a JupyterHub token")
    return command


def run(options: argparse.Namespace) -> int:
    """Print it; the exit status."""
    try:
        url, token = _where(options)
        sys.stdout.write(fetch(url, token, since=options.since, until=options.until, by=options.by))
    except NotRunning as err:
        print(f"nbos accounts: {err}", file=sys.stderr)
        return 1
    return 0


def _where(options: argparse.Namespace) -> tuple[str, str]:
    """The API's address and a token. Raises NotRunning."""
    state = StateDir.at(options.state_dir)
    info = state.info()
    if options.url and not options.token_file:
        raise NotRunning("--url needs --token-file: a file that holds a JupyterHub token of an administrator, or yours")
    if not options.url and not info:
        raise NotRunning(f"there is no NBOS in {state.path}; name a cluster's gateway with --url, or a --state-dir")
    file = Path(options.token_file) if options.token_file else state.token_file
    try:
        return options.url or info["api_url"], file.read_text().strip()
    except OSError as err:
        raise NotRunning(f"the token file {file} cannot be read: {err.strerror}") from err


def fetch(url: str, token: str, **query: str | None) -> str:
    """The CSV. Raises NotRunning."""
    asked = urlencode({k: v for k, v in query.items() if v} | {"format": "csv"})
    request = urllib.request.Request(f"{url}/accounts?{asked}", headers={"Authorization": f"token {token}"})
    # Never through a proxy of the environment, as `nbos status`: a token goes nowhere else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as err:
        raise NotRunning(f"{url} refuses with {err.code}: {message_of(err)}") from err
    except (OSError, ValueError) as err:
        raise NotRunning(f"the gateway at {url} does not answer ({err}); is it running?") from err
