"""What is done with containers whether they are replicas or wait to be one: image, user, making, reading their end.

Guarantees: never two of one name; what goes wrong is said in words that name the way out.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from docker.errors import APIError

from gpu_daemon import container_check
from gpu_daemon.container_end import memory_end, plain_end, told_end
from gpu_daemon.container_spec import DockerOptions, Site
from gpu_daemon.docker_engine import Engine, Trouble, no_image, words
from gpu_daemon.runtime import Exit, RuntimeFailed
from gpu_daemon.site import log

NAME_FREE_WITHIN = 10.0
"""Seconds that the container before has to be gone."""
TAIL = 200
"""Lines of a container's output that are kept."""
LOG_LIMIT = 4 * 1024 * 1024


class Containers:
    """Of one host."""

    def __init__(self, engine: Engine, options: DockerOptions, site: Site) -> None:
        self.engine, self.options, self.site = engine, options, site

    async def image(self, image: str, tell: Callable[[str], None]) -> str:
        """The id of the image, which is there: got as the site's policy has it. Raises RuntimeFailed."""
        policy = self.options.pull
        try:
            there = await self.engine.image_id(image)
            if policy == "never" and not there:
                raise RuntimeFailed(no_image(image, "this host pulls no images"))
            if policy == "always" or not there:
                await self._pull(image, tell, bool(there))
                there = await self.engine.image_id(image)
        except Trouble as err:
            raise RuntimeFailed(f"the Docker Engine does not answer: {words(err)}; look at its log") from err
        return there

    async def _pull(self, image: str, tell: Callable[[str], None], there: bool) -> None:
        try:
            await self.engine.pull(image, tell)
        except RuntimeFailed as err:
            if not there:
                raise
            log.warning("%s; the one that is there is used", err)

    def user(self, owner: str) -> str:
        """'uid:gid' of the owner's containers. Raises RuntimeFailed."""
        if self.options.user != "owner":
            return self.options.user
        try:
            entry = pwd.getpwnam(owner)
        except KeyError:
            raise RuntimeFailed(
                f"this host knows no Unix user {owner!r}, and the option Docker.user says that replicas run as their "
                "owner; add the user here (or to the directory service), or set Docker.user to fixed ids"
            ) from None
        return f"{entry.pw_uid}:{entry.pw_gid}"

    def usable(self) -> DockerOptions:
        """The options of a container that is made now. The Engine refuses a mount of what is not there; one that is
        made later may find it."""
        there = not self.options.mps or Path(self.options.mps).is_dir()
        return self.options if there else replace(self.options, mps="")

    async def create(self, body: dict[str, Any], name: str) -> str:
        """The id of the new container. Raises Trouble."""

        def create(api: Any) -> str:
            # One of before, which ended: the daemon starts a replica only when none runs in its folder.
            return named(api, name, lambda: str(api.create_container_from_config(body, name)["Id"]))

        return await self.engine.call(create)

    def remove(self, container: str) -> None:
        """Soon."""
        self.engine.begin(lambda api: api.remove_container(container, v=True, force=True))


def named(api: Any, name: str, give: Callable[[], str]) -> str:
    """Do `give`, which gives a container this name. Blocking; raises APIError.

    One that has it is removed. Its removal may be under way already; the Engine then says 409 as well, or 404 when it
    is just over.
    """
    deadline = time.monotonic() + NAME_FREE_WITHIN
    while True:
        try:
            return give()
        except APIError as err:
            if err.status_code != 409 or time.monotonic() > deadline:
                raise
        with contextlib.suppress(APIError):
            api.remove_container(name, force=True)
        time.sleep(0.02)


def read_exit(api: Any, container: str, image: str) -> Exit:
    """How it ended, by all that the Engine can tell. Blocking."""
    found = api.inspect_container(container)
    code = int(found["State"]["ExitCode"])
    return memory_end(found) or plain_end(code) or told_end(code, output(api, container), image)


def output(api: Any, container: str) -> list[str]:
    """The end of it."""
    lines: list[str] = api.logs(container, tail=TAIL).decode(errors="replace").splitlines()
    return lines


def put_check(own: Path) -> None:
    """The check that runs first, into the folder that the container sees. Any user of it may read that; nobody else
    gets there."""
    shutil.copyfile(container_check.__file__, own / "start.py")
    (own / "start.py").chmod(0o644)


def keep(path: Path, lines: list[str]) -> None:
    """The end of the container's output, for who looks for the reason later."""
    mode = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if path.exists() and path.stat().st_size > LOG_LIMIT else os.O_APPEND)
    with open(os.open(path, mode, 0o600), "w", errors="replace") as file:
        file.write("".join(f"{line}\n" for line in lines))
