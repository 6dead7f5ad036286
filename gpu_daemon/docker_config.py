"""What a site may say about its replicas' containers: the options `c.Docker.…`, checked when the daemon starts."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Dict, Enum, Float, Integer, List, TraitError, Unicode, validate
from traitlets.config import Configurable

from gpu_daemon.container_spec import DockerOptions
from gpu_daemon.sizes import parse_bytes
from gpu_daemon.walls import place


class Docker(Configurable):
    """Replicas in Docker (GPUDaemon.runtime = "docker")."""

    image = Unicode("nbos/kernel", help="The image of kernels whose users chose none.").tag(config=True)
    pull = Enum(
        ["missing", "always", "never"],
        "missing",
        help="When an image is got from its registry: where it is missing, at every start, or never.",
    ).tag(config=True)
    python = Unicode("python3", help="The Python of the images that runs the kernel, on their PATH or a path.").tag(
        config=True
    )
    user = Unicode(
        "1000:1000",
        help="uid:gid of replicas; 'owner': those of the Unix user of the owner's name on this host.",
    ).tag(config=True)
    home = Unicode(
        "/home/jovyan", help="The home folder in the container. {username} and {owner} may stand in it."
    ).tag(config=True)
    volumes = Dict(
        default_value={"nbos-home-{username}": "{home}"},
        help="What is mounted: {source: target} or {source: {'bind': target, 'mode': 'ro'}}. A source that begins with "
        "'/' is a folder of this host (NFS), else a named volume. {username}: the owner's name, made safe; {owner}: "
        "as it is; {home}: the home folder.",
    ).tag(config=True)
    environment = Dict(help="Environment of every replica.").tag(config=True)
    read_only = Bool(
        True,
        help="Whether the image's files cannot be changed. False: for images that must write outside HOME and /tmp.",
    ).tag(config=True)
    tmp = Unicode("1G", help="Room in /tmp (memory of the replica); 0: half of the host's memory.").tag(config=True)
    shm = Unicode("1G", help="Room in /dev/shm, which PyTorch's data loaders use (memory of the replica).").tag(
        config=True
    )
    memory = Unicode("0", help="Memory of a replica whose owner's limits name none; 0: no bound.").tag(config=True)
    cpus = Float(0.0, min=0.0, help="CPUs that a replica may use, for example 2.5; 0: all.").tag(config=True)
    pids = Integer(4096, min=64, help="Processes and threads that a replica may have.").tag(config=True)
    gpus = Enum(
        ["auto", "nvidia", "cdi", "none"],
        "auto",
        help="How containers get real GPUs: nvidia (also auto): through nvidia-container-toolkit's hook; cdi: by CDI "
        "names (nvidia.com/gpu=0); none: not at all. Simulated GPUs need nothing.",
    ).tag(config=True)
    network = Unicode(
        "", help="A Docker network of the site's own; empty: one that the daemon makes, with walls around it."
    ).tag(config=True)
    internet = Bool(True, help="Whether replicas may reach beyond this host at all.").tag(config=True)
    allow = List(
        Unicode(), help="Networks (10.1.0.0/16, 10.1.2.3:53) that replicas may reach whatever `deny` says."
    ).tag(config=True)
    deny = List(
        Unicode(),
        ["169.254.0.0/16"],
        help="Networks that replicas may not reach. etcd's members and this host itself are always among them.",
    ).tag(config=True)
    walls = Enum(
        ["required", "auto", "off"],
        "required",
        help="Firewall rules (iptables) for allow, deny and this host: the daemon does not start without them; it goes "
        "on with a warning; none.",
    ).tag(config=True)
    engine = Unicode("", help="URL of the Engine; empty: as DOCKER_HOST says, else the local socket.").tag(config=True)

    @validate("tmp", "shm", "memory")
    def _valid_size(self, proposal: Any) -> Any:
        try:
            parse_bytes(proposal["value"])
        except ValueError as err:
            raise TraitError(str(err)) from err
        return proposal["value"]

    @validate("allow", "deny")
    def _valid_places(self, proposal: Any) -> Any:
        for text in proposal["value"]:
            try:
                place(text)
            except ValueError as err:
                raise TraitError(str(err)) from err
        return proposal["value"]

    @validate("user")
    def _valid_user(self, proposal: Any) -> Any:
        uid, colon, gid = proposal["value"].partition(":")
        if proposal["value"] != "owner" and not (uid.isdigit() and (not colon or gid.isdigit())):
            raise TraitError(f"Docker.user must be 'uid:gid' in numbers or 'owner', not {proposal['value']!r}")
        return proposal["value"]

    def options(self) -> DockerOptions:
        plain = {name: getattr(self, name) for name in self.class_own_traits(config=True)}
        sizes = {name: parse_bytes(plain[name]) for name in ("tmp", "shm", "memory")}
        return DockerOptions(**{**plain, **sizes, "allow": tuple(self.allow), "deny": tuple(self.deny)})
