"""What runs first in a replica's container: looks whether the image can be a replica, says what is missing, then
becomes the replica. `python3 start.py FOLDER COMMAND… -f FILE`, or, of a container that is started ahead,
`python3 start.py --wait COMMAND…`; standard library only, any Python from 3.6 on.

Guarantees: an image that cannot work ends at once with status 78 and a line that says what is missing and how to add
it; a notebook's folder that is not there does not keep the kernel from starting.
"""

import os
import sys

MARK = "NBOS: "
"""Lines for the kernel's user begin with it."""
UNFIT = 78
WAIT = "--wait"
NEEDED = (
    ("nbos_kernel", "nbos"),
    ("nbos_cluster", "nbos"),
    ("ipykernel", "ipykernel"),
    ("cloudpickle", "cloudpickle"),
    ("blake3", "blake3"),
)
"""Modules, and the package that brings each."""
IPYKERNEL = (7, 4)


def missing() -> str:
    """What the image lacks, in words; '' when it can be a replica."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  the image's Python, not ours
        return f"it has Python {version}, a kernel needs 3.11 or later; build the image from a newer base"
    from importlib.util import find_spec

    lacking = sorted({package for module, package in NEEDED if find_spec(module) is None})
    if lacking:
        what = f"its Python ({sys.executable}, {version}) lacks {', '.join(lacking)}"
        return f"{what}; add this line to its Dockerfile: RUN pip install 'nbos[kernel]'"
    return old_ipykernel() or unwritable()


def old_ipykernel() -> str:
    from importlib.metadata import version

    found = version("ipykernel")
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if parts < IPYKERNEL:
        wanted = ".".join(map(str, IPYKERNEL))
        return f"it has ipykernel {found}, a kernel needs {wanted} or later: pip install 'nbos[kernel]'"
    return ""


def unwritable() -> str:
    home = os.environ.get("HOME", "/")
    if os.path.isdir(home) and not os.access(home, os.W_OK | os.X_OK):
        return (
            f"user {os.getuid()}:{os.getgid()} may not write in the home folder {home} of the container; its volume "
            "belongs to somebody else, or the image has no such folder of that user (the administrator's options are "
            "Docker.volumes, Docker.home and Docker.user)"
        )
    return ""


def go_to(folder: str) -> None:
    for place in (folder, os.environ.get("HOME", "/"), "/tmp"):
        try:
            os.chdir(place)
        except OSError as err:
            print(f"{MARK}the folder {place} cannot be used ({err.strerror})", flush=True)
        else:
            return


def connection_file(path: str) -> None:
    """Copy the connection file that lies beside this program to `path`: ipykernel writes in its own."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "connection.json")) as source:
        content = source.read()
    if os.path.lexists(path):
        os.unlink(path)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def main() -> None:
    trouble = missing()
    if trouble:
        print(MARK + trouble, flush=True)
        sys.exit(UNFIT)
    command = sys.argv[2:]
    if sys.argv[1] == WAIT:
        # Empty, and in every container: `python -m` looks for modules where it is started.
        os.chdir("/dev/shm")
    else:
        go_to(sys.argv[1])
        connection_file(command[-1])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
