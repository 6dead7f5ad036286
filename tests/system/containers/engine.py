"""A Docker Engine for tests, and the kernel image made from this source tree; what tests ask and do with containers.

An Engine that answers is used as it is; else root with dockerd installed gets one for the time of the tests. Images are
built from $NBOS_TEST_BASE, else from the Dockerfile's public default.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.nbosenv import ROOT

TAG = os.environ.get("NBOS_TEST_TAG", "test")
"""Another one for each of several source trees that share an Engine."""
IMAGE = f"nbos/kernel:{TAG}"


def docker(*arguments: str, check: bool = True) -> str:
    """Output of the `docker` command."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def inspect(thing: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", thing))[0]
    return found


def containers(**labels: str) -> list[str]:
    """Ids of all containers with these labels (`nbos.` goes without saying), the ended ones, too."""
    filters = [f"--filter=label=nbos.{name}={value}" for name, value in labels.items()]
    return docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()


def answers() -> bool:
    return shutil.which("docker") is not None and bool(
        docker("version", "--format", "{{.Server.Version}}", check=False)
    )


def running_engine() -> Iterator[None]:
    """An Engine, for as long as the generator is held."""
    if answers():
        yield
        return
    if os.getuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("no Docker Engine answers, and none can be started (root and dockerd are needed)")
    script = str(ROOT / ".ci" / "engine")
    subprocess.run([script, "up"], check=True, timeout=120)
    try:
        yield
    finally:
        subprocess.run([script, "down"], check=True, timeout=60)


def base_image() -> str:
    """'' for the public default; where no registry can be reached, the one that .ci/base-image made."""
    local = "nbos-base:local"
    return os.environ.get("NBOS_TEST_BASE", "") or (local if docker("images", "--quiet", local, check=False) else "")


def build_image() -> None:
    """The kernel image of this source tree."""
    base = ["--base", base_image()] if base_image() else []
    command = [str(ROOT / "docker" / "build"), "--tag", TAG, *base, "kernel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        pytest.fail(f"the kernel image cannot be built: {done.stdout[-1500:]}{done.stderr[-1500:]}")


def variant(name: str, *lines: str) -> str:
    """An image made from the kernel image by these lines of a Dockerfile."""
    return made_from(IMAGE, name, *lines)


def made_from(image: str, name: str, *lines: str) -> str:
    text = "\n".join([f"FROM {image}", *lines])
    command = ["docker", "build", "--quiet", "--tag", name, "-"]
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    subprocess.run(command, input=text, text=True, capture_output=True, timeout=120, check=True, env=environment)
    return name
