"""Whether an MPS control daemon can be used. Blocking: called from a thread.

It is asked through its own command where that is on the PATH; elsewhere (a daemon in a container) its pid file is read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

COMMAND = "nvidia-cuda-mps-control"
PIPE = "/tmp/nvidia-mps"
"""The folder that MPS itself takes when it is told none."""
WITHIN = 5.0


def look(pipe: str) -> str:
    """Why the MPS daemon whose pipes are in the folder `pipe` cannot be used; '' when it can."""
    folder = Path(pipe)
    if not (folder / "control").exists():
        return f"no MPS daemon runs on this host (nothing in {pipe}); start {COMMAND} -d, or set Slicing.mps_pipe"
    command = shutil.which(COMMAND)
    return _ask(command, pipe) if command else _by_pid(folder)


def from_containers(user: str, pipe: str) -> str:
    """Why replicas in containers that run as `user` (Docker.user) cannot use that daemon; '' when they can.

    A server of MPS serves one Unix user; a control daemon of root's starts one for whoever comes first.
    """
    if user == "owner":
        return (
            "each user's replicas run as another Unix user (Docker.user is 'owner'), and an MPS server serves one; "
            "give Docker.user one uid to use MPS"
        )
    uid = int(user.partition(":")[0])
    try:
        owner = (Path(pipe) / "control").stat().st_uid
    except OSError:
        return ""  # `look` says what is missing
    if owner not in (0, uid):
        return (
            f"the MPS daemon of {pipe} belongs to the Unix user {owner}, replicas run as {uid} (Docker.user), and an "
            f"MPS server serves one; start {COMMAND} as {uid}"
        )
    return ""


def _ask(command: str, pipe: str) -> str:
    environ = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipe}
    try:
        done = subprocess.run(
            [command],
            input="get_server_list\n",
            env=environ,
            capture_output=True,
            text=True,
            timeout=WITHIN,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the MPS daemon of {pipe} has not answered for {WITHIN:.0f} s; restart it"
    except OSError as err:
        return f"{command} cannot be run: {err}"
    if done.returncode:
        return f"the MPS daemon of {pipe} does not answer: {(done.stdout + done.stderr).strip()[:200]}; start it again"
    return ""


def _by_pid(folder: Path) -> str:
    try:
        pid = int((folder / f"{COMMAND}.pid").read_text())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, PermissionError):
        return ""  # not told, or alive and another user's: its pipes are there
    except ProcessLookupError:
        return f"the MPS daemon of {folder} has ended (process {pid}); start it again"
    return ""
