"""The Docker Engine of this host, for a daemon that must not block: every call in a thread of a small pool of its own.

Guarantees: the event loop never waits for Docker, and a hanging Engine holds up no other thread of the daemon; what the
Engine reports about containers arrives in the loop within milliseconds, and after a gap (`restarted`) the listener is
told to look for itself; errors are words that name the way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import RequestException

from gpu_daemon.pulling import PullProgress
from gpu_daemon.runtime import RuntimeFailed
from gpu_daemon.site import log

T = TypeVar("T")

THREADS = 8
TIMEOUT = 60
"""Seconds that the Engine has for one call (not for a pull)."""
AGAIN = 0.3
OLDEST_API = "1.41"
"""Engine 20.10."""

Trouble = (DockerException, RequestException, OSError)
"""What a call raises when it does not work, whatever the reason."""


class Engine:
    """base_url: '' for what DOCKER_HOST says, else the local socket."""

    def __init__(self, base_url: str = "") -> None:
        self._base_url = base_url
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="docker")
        # requests' sessions are not made for several threads at once.
        self._local = threading.local()
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._watchers: dict[str, set[Callable[[str], None]]] = {}
        self._begun: set[Future[None]] = set()
        self._events: Any = None
        self._closed = False
        self.version = ""

    # -- calls --------------------------------------------------------------------------------------------------------

    async def connect(self, seconds: float) -> None:
        """Wait until the Engine answers. Raises RuntimeFailed after `seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            try:
                self.version = (await self.call(lambda api: api.version()))["Version"]
                return
            except Trouble as err:
                if loop.time() > deadline:
                    where = self._base_url or "DOCKER_HOST, or /var/run/docker.sock"
                    raise RuntimeFailed(
                        f"the Docker Engine ({where}) does not answer: {words(err)}; start it, and let this user "
                        "reach it (group docker)"
                    ) from err
                log.warning("waiting for the Docker Engine: %s", words(err))
            await asyncio.sleep(1.0)

    async def call(self, work: Callable[[Any], T]) -> T:
        """Do `work` with a client of the Engine, in a thread. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(self._client()))

    def begin(self, work: Callable[[Any], object]) -> None:
        """Do `work` soon; nobody waits for it. That what it names is gone already is no failure."""

        def carry_out() -> None:
            try:
                work(self._client())
            except APIError as err:
                if err.status_code not in (404, 409):
                    log.error("the Docker Engine: %s", words(err))
            except Trouble as err:
                log.warning("the Docker Engine does not answer: %s", words(err))

        if not self._closed:
            self._begun.add(future := self._pool.submit(carry_out))
            future.add_done_callback(self._begun.discard)

    def finish(self) -> None:
        """Wait until what was begun is done. Blocking."""
        wait(tuple(self._begun), TIMEOUT)

    def _client(self) -> Any:
        if not hasattr(self._local, "client"):
            self._local.client = self._new_client(TIMEOUT)
        return self._local.client

    def _new_client(self, timeout: int | None) -> Any:
        if self._base_url:
            client = docker.APIClient(base_url=self._base_url, version=OLDEST_API, timeout=timeout)
        else:
            client = docker.from_env(version=OLDEST_API, timeout=timeout).api
        # With it, REQUESTS_CA_BUNDLE in the daemon's environment would count for more than the CA in DOCKER_CERT_PATH.
        client.trust_env = False
        return client

    # -- images -------------------------------------------------------------------------------------------------------

    async def image_id(self, image: str) -> str:
        """What the name stands for now; '' when the image is not here."""
        try:
            return str((await self.call(lambda api: api.inspect_image(image)))["Id"])
        except ImageNotFound:
            return ""

    async def pull(self, image: str, tell: Callable[[str], None]) -> None:
        """Get an image; replicas that want the same one wait together. Raises RuntimeFailed."""
        watchers = self._watchers.setdefault(image, set())
        watchers.add(tell)
        task = self._pulls.get(image)
        if task is None:
            task = self._pulls[image] = asyncio.create_task(self._pull(image), name=f"pulling {image}")
            task.add_done_callback(lambda _: self._pulls.pop(image, None))
        try:
            await asyncio.shield(task)
        finally:
            watchers.discard(tell)

    async def _pull(self, image: str) -> None:
        loop, progress = asyncio.get_running_loop(), PullProgress(image)

        def say(text: str) -> None:
            for tell in self._watchers.get(image, ()):
                tell(text)

        done: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            said = ""
            try:
                client = self._new_client(None)
                for message in client.pull(*_name_and_tag(image), stream=True, decode=True):
                    progress.take(message)
                    if progress.text != said:
                        said = progress.text
                        _in_loop(loop, say, said)
            except (*Trouble, ValueError) as err:
                progress.error = progress.error or words(err)
            _in_loop(loop, _settle, done)

        say(progress.text)
        # In a thread of its own that ends with the process: pulls take minutes, and a daemon that is told to stop must
        # not wait for one.
        threading.Thread(target=work, name=f"pulling {image}", daemon=True).start()
        await done
        if progress.error:
            raise RuntimeFailed(no_image(image, progress.error))

    # -- events -------------------------------------------------------------------------------------------------------

    def listen(
        self, labels: Mapping[str, str], died: Callable[[str, int], None], restarted: Callable[[], None]
    ) -> None:
        """From now on call, in the loop, `died` with the id of a container that ended and its exit status, and
        `restarted` whenever the line to the Engine is there (again): what happened before was not heard."""
        loop = asyncio.get_running_loop()
        filters = {"type": "container", "event": "die", "label": [f"{k}={v}" for k, v in labels.items()]}

        def tell(work: Callable[..., None], *args: object) -> None:
            if not self._closed:
                _in_loop(loop, work, *args)

        def work() -> None:
            pause = threading.Event()
            while not self._closed:
                try:
                    client = self._new_client(None)
                    self._events = client.events(filters=filters, decode=True)
                    tell(restarted)
                    for event in self._events:
                        actor = event["Actor"]
                        tell(died, actor["ID"], int(actor["Attributes"]["exitCode"]))
                except (*Trouble, ValueError, AttributeError) as err:
                    # The last two: urllib3, when the stream is closed under it.
                    log.debug("the Engine's events: %s", err)
                pause.wait(AGAIN)

        threading.Thread(target=work, name="docker events", daemon=True).start()

    def close(self) -> None:
        """Hear no more. Blocking; finishes what was begun."""
        self._closed = True
        self._pool.shutdown(wait=True)
        stream, self._events = self._events, None
        if stream is not None:
            try:
                stream.close()
            except (*Trouble, AttributeError) as err:
                log.debug("closing the Engine's events: %s", err)


def _in_loop(loop: asyncio.AbstractEventLoop, work: Callable[..., object], *args: object) -> None:
    """From a thread that may outlive the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(work, *args)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _name_and_tag(image: str) -> tuple[str, str | None]:
    name, at, digest = image.partition("@")
    if at:
        return name, digest
    head, colon, tag = image.rpartition(":")
    # A colon before the last slash belongs to a registry's port.
    return (head, tag) if colon and "/" not in tag else (image, "latest")


def no_image(image: str, why: str) -> str:
    return (
        f"the image {image} is not on this host and cannot be got ({why}); choose another image, or let the "
        f"administrator bring it here: docker pull {image}, or docker load"
    )


def words(err: BaseException) -> str:
    """What an error of the Engine says, on one line."""
    text = str(err.explanation) if isinstance(err, APIError) and err.explanation else str(err)
    return " ".join(text.split())[:400]
