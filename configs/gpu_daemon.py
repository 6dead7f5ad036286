# A host's daemon whose replicas run in Docker: an example, every line of it a choice of yours.
#
#     python -m gpu_daemon --config /etc/nbos/gpu_daemon.py
#
# `python -m gpu_daemon --help-all` lists every option with its default. docs/docker.md explains the section Docker.
c = get_config()  # noqa: F821  traitlets provides it

# --- This host
c.GPUDaemon.host = "gpu-1"  # unique in the cluster
c.GPUDaemon.ip = "10.0.0.11"  # where routers reach its replicas, ports 15000 to 32000; never a public address
c.GPUDaemon.run_dir = "/var/lib/nbos"  # short; in a container: the same path inside and outside

# --- etcd and the blobs, the same on every host
c.GPUDaemon.etcd_endpoints = ["10.0.0.2:2379", "10.0.0.3:2379", "10.0.0.4:2379"]
c.GPUDaemon.etcd_ca = "/etc/nbos/tls/ca.pem"
c.GPUDaemon.etcd_cert = "/etc/nbos/tls/gpu-1.pem"
c.GPUDaemon.etcd_key = "/etc/nbos/tls/gpu-1.key"
c.GPUDaemon.blob_store = "file:///shared/nbos/blobs"  # on a file system that all hosts share; or s3://bucket/prefix

# --- Replicas started ahead (docs/warm.md). In Docker, modules must be in the images
# c.Warm.modules = ["numpy", "torch"]
# c.Warm.keep = 2
# --- Metrics for Prometheus (docs/metrics.md): nothing listens unless this is set
# c.Metrics.listen = "10.0.0.11:9755"
# c.Metrics.cert, c.Metrics.key = "/etc/nbos/tls/metrics.pem", "/etc/nbos/tls/metrics.key"
# c.Metrics.client_ca = "/etc/nbos/tls/ca.pem"  # its certificate for `reader` may ask; or c.Metrics.token_file

# --- Replicas in containers
c.GPUDaemon.runtime = "docker"
c.GPUDaemon.stop_replicas_on_exit = False  # an upgrade of the daemon leaves kernels running; True: the host shuts down

# Who is owed what of this host's GPUs, and room for courses: docs/sharing.md.
c.GPUDaemon.shares = {
    # "users": {"ann": {"devices": 1}},
    # "groups": {"vision": {"tpcs": 40, "weight": 2}, "interns": {"priority": -1}},
}
c.GPUDaemon.reservations = [
    # {"name": "ml101", "groups": ["ml101"], "seats": 6, "tpcs": 20, "days": ["tuesday"], "from": "10:00",
    #  "to": "12:00", "timezone": "Europe/Berlin"},
]
c.GPUDaemon.overdue_after = 3600.0  # seconds after which a waiting cell gets its turn whatever others are owed

# Slices of a GPU run side by side only under MPS, and only where all users of this host trust each other:
# docs/slices.md.
c.Slicing.one_trust_domain = False

# A sick GPU gets no new cells: docs/gpus.md says what counts as sick, and how it comes back.
c.Health.every = 10.0
c.Health.ecc_limit = 0  # uncorrected memory errors since its last reset with which a GPU is still used

# A slice gets fewer TPCs than asked for where that was measured to make its cell at most this much slower; 0: never.
# docs/rightsizing.md.
c.GPUDaemon.allowed_slowdown = 0.04

# The image of kernels whose users chose none. What users may choose stands in the hub's `limits` ("images").
c.Docker.image = "nbos/kernel"

# Homes: a named volume on this host, or a folder that all hosts share, so that a notebook's files are where the kernel
# is, whichever host it runs on. With folders, the ids must be the users' own.
c.Docker.volumes = {"nbos-home-{username}": "{home}"}
# c.Docker.volumes = {"/shared/home/{owner}": "{home}", "/shared/datasets": {"bind": "/datasets", "mode": "ro"}}
# c.Docker.user = "owner"

# Bounds of one replica. Memory: what the hub's limits say ("replica_memory"), else this.
c.Docker.memory = "16G"
c.Docker.cpus = 8.0
c.Docker.pids = 4096

# What replicas may not reach, besides this host itself and etcd: your management and storage networks.
c.Docker.deny = ["169.254.0.0/16", "10.0.0.0/8"]
c.Docker.allow = ["10.0.0.53/32:53"]  # the name server, when it is in one of them
