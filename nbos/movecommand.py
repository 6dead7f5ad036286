"""`nbos move`: one replica of a kernel goes to another host while the kernel is used; shows how far it is, and how it
ended.

Asks the gateway, which does it: the command may be ended at any time (`--back` has the replica stay after all).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .state import StateDir
from .status import NotRunning, message_of

EVERY = 0.3
PATIENCE = 60.0
"""Seconds in which a gateway that is away is asked again."""


class MoveFailed(RuntimeError):
    """Says why and the way out."""


@dataclass(frozen=True)
class Api:
    """The gateway's API at `url` (…/services/nbos/api) with an administrator's token."""

    url: str
    token: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises MoveFailed when it is refused, NotRunning when nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Authorization": f"token {self.token}"})
        request.method = method
        # Never through a proxy of the environment, as `nbos status`.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as err:
            said = message_of(err)
            if err.code in (502, 503, 504):
                raise NotRunning(f"the gateway at {self.url} does not answer now ({err.code}: {said})") from err
            raise MoveFailed(said) from err
        except (OSError, ValueError) as err:
            raise NotRunning(f"the gateway at {self.url} does not answer ({err})") from err


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        api = _api(options)
        kernel = find_kernel(api.call("GET", "kernels"), options.kernel)
        path = f"kernels/{urllib.parse.quote(kernel['kernel_id'])}"
        if options.back:
            model = api.call("DELETE", f"{path}/move")
        else:
            model = api.call("POST", f"{path}/move", {"from": options.source, "to": options.to})
        begun = model["move"] or model["moved"]  # a short one may be over already
        print(f"kernel {model['kernel_id']}: {describe(begun)}", flush=True)
        if begun["source"] == model["executor"] and model["lost"] and not options.back:
            print(f"  not replicated, so not moved with it: {', '.join(sorted(model['lost']))} (nbos status says why)")
        if not options.no_wait:
            print(_until_over(api, path, begun))
    except (MoveFailed, NotRunning) as err:
        print(f"nbos move: {err}", file=sys.stderr)
        return 1
    return 0


def _api(options: argparse.Namespace) -> Api:
    if options.url:
        if not options.token_file:
            raise MoveFailed("--url needs --token-file, a file with an administrator's JupyterHub token")
        return Api(options.url.rstrip("/") + "/services/nbos/api", _token(Path(options.token_file)))
    state = StateDir.at(options.state_dir)
    info = state.info()
    if not info:
        raise NotRunning(
            f"there is no NBOS in {state.path}; name it with --state-dir, or a cluster with --url and --token-file"
        )
    return Api(str(info["api_url"]), _token(state.token_file))


def _token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as err:
        raise MoveFailed(f"the token file {file} cannot be read: {err.strerror}") from err


def find_kernel(kernels: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The kernel with this id (or the beginning of one), or of this user's notebook (`ada/work/a.ipynb`, or the end of
    that path: `ada/a.ipynb`). Raises MoveFailed."""
    found = [kernel for kernel in kernels if kernel["kernel_id"] == name]
    found = found or [kernel for kernel in kernels if _is_notebook(kernel, name)]
    found = found or [kernel for kernel in kernels if len(name) >= 4 and kernel["kernel_id"].startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise MoveFailed(f"no kernel {name!r} is there; name it by its id or as USER/NOTEBOOK, as `nbos status` shows")
    ids = ", ".join(f"{kernel['kernel_id']} ({kernel['owner']}/{kernel['notebook']})" for kernel in found[:5])
    raise MoveFailed(f"{name!r} may be any of {ids}; use the id")


def _is_notebook(kernel: dict[str, Any], name: str) -> bool:
    owner, _, path = name.partition("/")
    notebook = "/" + str(kernel.get("notebook") or "").strip("/")
    return bool(path) and kernel["owner"] == owner and notebook.endswith("/" + path.strip("/"))


def _until_over(api: Api, path: str, begun: dict[str, Any]) -> str:
    """How it ended. Raises MoveFailed when the replica stayed where it was."""
    said, heard = "", time.monotonic()
    while True:
        try:
            model = api.call("GET", path)
        except NotRunning:
            if time.monotonic() > heard + PATIENCE:
                raise
            time.sleep(1.0)
            continue
        heard = time.monotonic()
        move = model["move"]
        if move is None or (move["target"], move["since"]) != (begun["target"], begun["since"]):
            return _ended(model, begun)
        if move["progress"] != said:
            said = move["progress"]
            print(f"  {said}", flush=True)
        time.sleep(EVERY)


def _ended(model: dict[str, Any], begun: dict[str, Any]) -> str:
    moved = model["moved"]
    if moved is None or (moved["target"], moved["since"]) != (begun["target"], begun["since"]):
        raise MoveFailed("how the move ended is not known: another one followed; see nbos status")
    if moved["phase"] == "done":
        return f"replica {moved['target']} on host {moved['to_host']} has taken the place of replica {moved['source']}"
    why = f": {moved['reason']}" if moved["reason"] else ""
    raise MoveFailed(f"replica {moved['source']} stays on host {moved['from_host']}{why}")


def describe(move: dict[str, Any]) -> str:
    return (
        f"replica {move['source']} from host {move['from_host']} to host {move['to_host']}, as replica {move['target']}"
    )
