"""The command `python -m gpu_daemon --config FILE`: options, logging, signals. What it runs is `daemon.Daemon`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from traitlets import Bool, Dict, Enum, Float, Integer, List, TraitError, Unicode, default, validate
from traitlets.config import Application

from gpu_daemon import inventory
from gpu_daemon.blobs import open_store
from gpu_daemon.checkpoint.checkpoints import Checkpoints
from gpu_daemon.checkpoint.freezer import Freezer
from gpu_daemon.daemon import Daemon
from gpu_daemon.docker_config import Docker
from gpu_daemon.giving_config import GivingBack
from gpu_daemon.health import Watched
from gpu_daemon.health_config import Health
from gpu_daemon.lending_config import Lending
from gpu_daemon.metrics.config import Metrics
from gpu_daemon.order import Policy
from gpu_daemon.power.clocks import NVMLClocks, SimulatedClocks
from gpu_daemon.power.config import Power
from gpu_daemon.power.watching import PowerWatch, restore_left
from gpu_daemon.process_runtime import ProcessRuntime, clean_environment
from gpu_daemon.reservations import ReservationError, read_reservations
from gpu_daemon.rundir import RunDirError
from gpu_daemon.runtime import ReplicaRuntime, RuntimeFailed
from gpu_daemon.shares import SharesError, read_shares
from gpu_daemon.simulated import simulated
from gpu_daemon.site import Settings
from gpu_daemon.sizes import parse_bytes
from gpu_daemon.slicing.config import Slicing
from gpu_daemon.slicing.offers import Offers, facts
from gpu_daemon.warm_config import Warm
from gpu_daemon.warm_pool import WarmOptions, WarmPool
from gpu_daemon.watchdog.config import Watchdog
from gpu_daemon.watchdog.usage import NVMLUsage
from gpu_daemon.watchdog.watching import GPUWatch
from nbos_cluster import keys
from nbos_cluster.etcd import Etcd, TLSFiles
from nbos_cluster.records import Device


class GPUDaemon(Application):
    """Starts and watches a host's replicas, bids for them, grants its GPUs, keeps its blobs."""

    name = "gpu_daemon"
    description = __doc__

    config_file = Unicode("", help="Configuration file (.py or .json, traitlets format).").tag(config=True)
    host = Unicode(help="Name of this host, unique in the cluster.").tag(config=True)
    address = Unicode(help="What other hosts call this one; the ip when empty.").tag(config=True)
    ip = Unicode("127.0.0.1", help="Address that replicas bind to.").tag(config=True)
    etcd_endpoints = List(Unicode(), ["127.0.0.1:2379"], help="etcd members, 'address:port' each.").tag(config=True)
    etcd_ca = Unicode("", help="PEM file of the CA of etcd's certificate; empty: no TLS.").tag(config=True)
    etcd_cert = Unicode("", help="PEM file of this daemon's client certificate.").tag(config=True)
    etcd_key = Unicode("", help="PEM file of its key.").tag(config=True)
    run_dir = Unicode(help="Folder for sockets, connection files, logs and what is found again. Short.").tag(
        config=True
    )
    blob_store = Unicode(
        help="Where large values are kept: file:///path (shared by all hosts), or s3://bucket/prefix."
    ).tag(config=True)
    blob_store_options = Dict(
        help="For s3://: endpoint, region, access_key_id, secret_access_key, … (obstore's S3Config). What is not here "
        "comes from the environment (AWS_…)."
    ).tag(config=True)
    blob_grace = Float(
        3600.0, min=1.0, help="Seconds that a blob stays though nothing names it (yet), and once more set aside."
    ).tag(config=True)
    blob_patience = Float(
        45.0, min=1.0, help="Seconds after which a blob store that has not answered counts as away."
    ).tag(config=True)
    collect_every = Float(
        600.0, min=0.0, help="Seconds between two collections of blobs that nothing names; 0: this daemon never does."
    ).tag(config=True)
    devices = Enum(
        ["auto", "nvml", "simulated"],
        "auto",
        help="Which GPUs: those NVML finds; simulated ones; auto: simulated ones only where NVML finds none.",
    ).tag(config=True)
    device_uuids = List(
        Unicode(),
        help="Of the GPUs that NVML finds only these; empty: all. For several daemons on one machine.",
    ).tag(config=True)
    simulated_devices = Integer(0, min=0, help="How many GPUs are played.").tag(config=True)
    simulated_model = Unicode(
        "Simulated GPU", help="Their model; several with commas between them: one after the other."
    ).tag(config=True)
    simulated_tpcs = Integer(66, min=1, help="TPCs of each.").tag(config=True)
    simulated_memory = Unicode("80G", help="Memory of each, for example 80G.").tag(config=True)
    shares = Dict(
        help="Who is owed what of this host's GPUs: {'default': {...}, 'users': {name: {...}}, 'groups': {...}, "
        "'kernels': {id: {...}}}; each may set weight (of the fair share), priority, and a guaranteed quota: tpcs (in "
        "slices), devices (whole ones), memory. docs/sharing.md."
    ).tag(config=True)
    reservations = List(
        Dict(),
        help="Room kept for courses: a list of {'name', 'users', 'groups', 'seats', 'tpcs' or 'gpus', 'memory', "
        "'days', 'from', 'to', 'timezone', 'first', 'last'}. docs/sharing.md.",
    ).tag(config=True)
    overdue_after = Float(
        3600.0,
        min=10.0,
        help="Seconds after which a waiting cell gets its turn whatever others' priorities, shares and quotas.",
    ).tag(config=True)
    fair_window = Float(
        24.0, min=1.0, max=720.0, help="Hours of use that count in the fair share: who used less goes first."
    ).tag(config=True)
    unknown_run = Float(
        3600.0,
        min=1.0,
        help="Seconds that a cell is taken to run, of whose kernel and owner none was seen yet: it gets room that is "
        "reserved later only if it ends before.",
    ).tag(config=True)
    accounts_days = Integer(
        100,
        min=1,
        max=3660,
        help="Days that this host's accounts stay in etcd, where `nbos accounts` reads them; the daemon's own journal "
        "keeps them all.",
    ).tag(config=True)
    allowed_slowdown = Float(
        0.04,
        help="Right-sizing: how much slower a cell may become on fewer TPCs than it asks for, as measured on its own "
        "executions; 0.04 is 4 %, 0 switches it off.",
    ).tag(config=True)
    gpu_on_touch = Bool(
        True,
        help="A cell that does not say what it needs begins without a GPU, and gets the kernel's default when it first "
        "uses one. False: every such cell asks for it before it starts. docs/gpus.md.",
    ).tag(config=True)
    lease_ttl = Float(3.0, help="Seconds without a sign of this daemon after which its host counts as lost.").tag(
        config=True
    )
    runtime = Enum(
        ["process", "docker"],
        "process",
        help="Replicas as local processes, or in containers of this host's Docker Engine (options: c.Docker.…).",
    ).tag(config=True)
    cluster = Unicode(
        "nbos", help="Name of the cluster; tells containers of several ones on one Docker Engine apart."
    ).tag(config=True)
    max_replicas = Integer(64, min=0, help="Replicas that this host takes.").tag(config=True)
    stop_replicas_on_exit = Bool(
        True,
        help="On SIGTERM end the replicas and give the lease back (the host shuts down). False: leave both "
        "for the next daemon, as a crash does.",
    ).tag(config=True)
    replica_command = List(Unicode(), help="Command of a replica; '--nbos-socket PATH -f FILE' is added.").tag(
        config=True
    )

    classes: Any = [Docker, GivingBack, Health, Lending, Metrics, Power, Slicing, Warm, Watchdog]  # noqa: RUF012  as traitlets wants it
    aliases: Any = {  # noqa: RUF012  as traitlets wants it
        **Application.aliases,
        "config": "GPUDaemon.config_file",
        "host": "GPUDaemon.host",
        "run-dir": "GPUDaemon.run_dir",
    }

    @default("log_level")
    def _default_log_level(self) -> int:
        return logging.INFO

    @validate("host", "cluster")
    def _valid_host(self, proposal: Any) -> str:
        try:
            return keys.checked(proposal["value"], f"{proposal['trait'].name} name")
        except ValueError as err:
            raise TraitError(str(err)) from err

    @validate("lease_ttl")
    def _valid_ttl(self, proposal: Any) -> float:
        if proposal["value"] < 1:
            raise TraitError("lease_ttl is at least 1 second, the least that etcd counts")
        return float(proposal["value"])

    @validate("shares", "reservations")
    def _valid_sharing(self, proposal: Any) -> Any:
        try:
            (read_shares if proposal["trait"].name == "shares" else read_reservations)(proposal["value"])
        except (SharesError, ReservationError) as err:
            raise TraitError(f"GPUDaemon.{err}") from err
        return proposal["value"]

    @validate("allowed_slowdown")
    def _valid_slowdown(self, proposal: Any) -> float:
        if not 0 <= proposal["value"] <= 1:
            raise TraitError(
                f"allowed_slowdown is a part of a cell's duration from 0 (off) to 1 (twice as long), "
                f"not {proposal['value']}; 0.04 allows 4 %"
            )
        return float(proposal["value"])

    def initialize(self, argv: Any = None) -> None:
        self.parse_command_line(argv)
        if self.config_file:
            path = Path(self.config_file)
            if not path.is_file():
                self.exit_with(f"configuration file {path} is not there")
            command_line: Any = self.cli_config.copy()
            self.load_config_file(path.name, str(path.parent.absolute()))
            self.update_config(command_line)
        for required in ("run_dir", "blob_store"):
            if not getattr(self, required):
                self.exit_with(f"GPUDaemon.{required} is not set; set it in the configuration file")

    _driver = ""
    """The NVIDIA driver's version, once `find_devices` has asked."""

    def exit_with(self, text: str) -> None:
        print(f"gpu_daemon: {text}", file=sys.stderr)
        self.exit(2)

    def find_devices(self) -> tuple[Device, ...]:
        """The devices by the policy in `devices`."""
        played = simulated(
            self.host or socket.gethostname(),
            self.simulated_devices,
            self.simulated_model,
            self.simulated_tpcs,
            parse_bytes(self.simulated_memory),
        )
        if self.devices == "simulated":
            return played
        found = inventory.look()
        self._driver = found.driver
        logging.getLogger("gpu_daemon").info("NVML: %s %s", found.state.value, found.detail)
        for device in found.devices:
            if not device.healthy:
                logging.getLogger("gpu_daemon").warning("GPU %s cannot be granted: %s", device.uuid, device.reason)
        if found.devices or self.devices == "nvml":
            return tuple(d for d in found.devices if not self.device_uuids or d.uuid in self.device_uuids)
        return played

    def make_daemon(self) -> Daemon:
        host = self.host or keys.checked(socket.gethostname(), "host name")
        tls = TLSFiles(Path(self.etcd_ca), Path(self.etcd_cert), Path(self.etcd_key)) if self.etcd_ca else None
        endpoints = [urlsplit(e).netloc if "://" in e else e for e in self.etcd_endpoints]
        settings = Settings(
            host=host,
            run_dir=Path(self.run_dir),
            address=self.address or self.ip,
            ip=self.ip,
            lease_ttl=self.lease_ttl,
            max_replicas=self.max_replicas,
            stop_replicas_on_exit=self.stop_replicas_on_exit,
            replica_command=tuple(self.replica_command),
            blob_grace=self.blob_grace,
            blob_patience=self.blob_patience,
            collect_every=self.collect_every,
            accounts_days=self.accounts_days,
            allowed_slowdown=self.allowed_slowdown,
            metrics_owners=Metrics(parent=self).owners,
            giving_back=GivingBack(parent=self).policy(),
            gpu_on_touch=self.gpu_on_touch,
        )
        devices, blobs = self.find_devices(), open_store(self.blob_store, self.blob_store_options)
        runtime = self.make_runtime(host, devices, endpoints)
        lending = Lending(parent=self)
        policy = Policy(
            shares=read_shares(self.shares),
            reservations=read_reservations(self.reservations),
            overdue_after=self.overdue_after,
            unknown_run=self.unknown_run,
            window=self.fair_window * 3600,
            lend=lending.enabled,
            give_back=lending.patience,
        )
        etcd, offers = Etcd(endpoints, tls), self.make_offers(devices)
        watched = Watched(Health(parent=self).options(), _nvml_for(devices), self._driver)
        watch, freezer = self.make_watch(devices), self.make_freezer(devices, offers)
        power = self.make_power(devices)
        return Daemon(
            settings,
            etcd,
            devices,
            blobs,
            runtime,
            watched,
            offers,
            policy,
            watch,
            lending.terms(),
            power,
            restore_left_by_nvml,
            freezer,
        )

    def make_power(self, devices: tuple[Device, ...]) -> PowerWatch | None:
        """Who sets the devices' clocks. An instance of MIG has none of its own."""
        power = Power(parent=self)
        if not power.enabled:
            return None
        real = [device.uuid for device in devices if device.kind == "nvml" and not device.parent and device.healthy]
        if not real:
            played = [device.uuid for device in devices if device.kind == "simulated"]
            return PowerWatch(power.policy(), power.every, SimulatedClocks(played), real=False)
        import pynvml

        return PowerWatch(power.policy(), power.every, NVMLClocks(pynvml, real), real=True)

    def make_freezer(self, devices: tuple[Device, ...], offers: Offers) -> Freezer | None:
        """Who checkpoints processes on real devices."""
        nvml = _nvml_for(devices)
        if nvml is None:
            return None

        def mps() -> bool:
            return any(device.mechanism in ("green", "percentage") for device in offers.published(devices))

        return Freezer(devices, Checkpoints(), NVMLUsage(nvml, [d.uuid for d in devices]).free, mps)

    def make_watch(self, devices: tuple[Device, ...]) -> GPUWatch | None:
        """Who looks after what processes do on real devices; nobody does on simulated ones."""
        watchdog, real = Watchdog(parent=self), [device.uuid for device in devices if device.kind == "nvml"]
        if not real or not watchdog.every:
            return None
        import pynvml

        return GPUWatch(NVMLUsage(pynvml, real).read, watchdog.policy(), watchdog.every)

    def make_offers(self, devices: tuple[Device, ...]) -> Offers:
        """What may hold slices of the devices. Simulated ones are held by nothing."""
        slicing = Slicing(parent=self)
        if not any(device.kind == "nvml" for device in devices):
            return Offers()
        pipe, domain = slicing.mps_pipe, slicing.one_trust_domain
        user = Docker(parent=self).user if self.runtime == "docker" else ""
        at_most: Any = slicing.at_most
        return Offers(lambda: facts(pipe, domain, user), at_most)

    def make_runtime(self, host: str, devices: tuple[Device, ...], etcd: list[str]) -> ReplicaRuntime:
        if self.runtime == "process":
            warm, env = self.warm_options(), clean_environment(os.environ, {})
            return ProcessRuntime(WarmPool(warm, env, Path(self.run_dir).absolute() / "warm") if warm else None)
        try:
            import docker as _  # noqa: F401
        except ImportError as err:
            raise RuntimeFailed(f"runtime docker needs the package docker: pip install 'nbos[docker]' ({err})") from err
        from gpu_daemon.container_spec import Site
        from gpu_daemon.docker_runtime import DockerRuntime

        site = Site(self.cluster, host, str(Path(self.run_dir).absolute()))
        options = replace(Docker(parent=self).options(), mps=self.mps_for_containers(devices))
        return DockerRuntime(options, site, devices, etcd, self.warm_options(), self.ip)

    def mps_for_containers(self, devices: tuple[Device, ...]) -> str:
        """The pipe folder that containers are to see: only where everybody on this host trusts each other, and MPS is
        wanted for real devices."""
        slicing = Slicing(parent=self)
        wanted = slicing.one_trust_domain and slicing.at_most != "cooperative"
        return slicing.mps_pipe if wanted and any(device.kind == "nvml" for device in devices) else ""

    def warm_options(self) -> WarmOptions | None:
        """None: nothing is started ahead. What replicas with a command of their own run is not known."""
        options = Warm(parent=self).options()
        return None if options.policy.kind == "off" or self.replica_command else options

    def start(self) -> None:
        level: Any = self.log_level
        logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
        try:
            asyncio.run(self._serve())
        except (RunDirError, RuntimeFailed, ValueError, OSError) as err:
            self.exit_with(str(err))

    async def _serve(self) -> None:
        daemon = self.make_daemon()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, daemon.stop)
        # What was imported stays; the collector need not look at it again on every cell.
        gc.freeze()
        endpoint = Metrics(parent=self).endpoint()
        if endpoint is None:
            await daemon.run()
            return
        from gpu_daemon.metrics.endpoint import serving  # tornado is only needed here

        async with serving(endpoint, daemon.metrics.render):
            await daemon.run()


def restore_left_by_nvml(folder: Path) -> None:
    """Reset clocks that a daemon before this one has left locked."""

    def clocks(uuids: Iterable[str]) -> NVMLClocks:
        import pynvml

        return NVMLClocks(pynvml, uuids)

    restore_left(folder, clocks)


def _nvml_for(devices: tuple[Device, ...]) -> Any:
    """The module pynvml where it has something to watch, else None."""
    if not any(device.kind == "nvml" for device in devices):
        return None
    import pynvml

    return pynvml


def main() -> None:
    GPUDaemon.launch_instance()
