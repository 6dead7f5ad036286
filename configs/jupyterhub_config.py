# What a JupyterHub (6.1 or later) needs to give its users NBOS kernels.
#
# Add it to yours, at the end of your own jupyterhub_config.py:
#
#     load_subconfig("/path/to/this/jupyterhub_config.py")
#
# It expects an etcd and a `gpu_daemon` on every host. The values that differ from site to site stand in
# environment variables, so that you need not edit this file; every one has a comment. `nbos up` loads this
# very file, too.
import json
import os
import sys

c = get_config()  # noqa: F821  JupyterHub provides it

# --- What users may ask for
# Per user and group: replicas (1 to 5), gpus (whole devices per cell), tpcs (of a slice), memory (GPU memory per
# device), replica_memory (resident memory of one replica; 0: no bound), server_memory and server_cpus (of the user's
# Jupyter Server, where that is a container; 0: no bound), kernels (at a time) and images (those that a kernel may run
# in besides the hosts' own, where replicas run in Docker). A user's own entry wins over groups, of
# several groups the most generous value counts. NBOS_LIMITS may hold the same as JSON.
limits = {
    "default": {"replicas": 5, "gpus": 4, "tpcs": 132, "memory": "192G", "replica_memory": 0, "kernels": 10},
    # In Docker, as well: "images": ["nbos/kernel-torch", "lab/bio:3"]
    "groups": {
        # "students": {"gpus": 0, "tpcs": 16, "memory": "20G", "kernels": 2},
    },
    "users": {
        # "ada": {"gpus": 8},
    },
}
if os.environ.get("NBOS_LIMITS"):
    limits = json.loads(os.environ["NBOS_LIMITS"])

# --- Single-user servers
# Started as processes on the hub's machine, as the hub's own user: for one machine and for trying out.
c.JupyterHub.spawner_class = "nbos_spawner.spawner.NBOSSpawner"
# As containers of the hub machine's Docker Engine (pip install 'nbos[dockerspawner]'; docs/cluster.md):
#
#     c.JupyterHub.spawner_class = "nbos_spawner.docker_spawner.NBOSDockerSpawner"
#
# … or of the least loaded host's, which the hub must then be able to reach (docs/cluster.md):
#
#     c.NBOSDockerSpawner.hosts = {"gpu-1": {"url": "tcp://10.0.0.11:2376", "ca": …, "cert": …, "key": …}}
#
# In any form:
c.NBOSSpawnerMixin.limits = limits
# Whether standbys leave large variables in the store until a cell uses them (docs/state.md): off, on (from 64M), or
# the size from which. A user may choose otherwise in the form.
c.NBOSSpawnerMixin.lazy = os.environ.get("NBOS_LAZY", "off")

# --- The gateway: a service that JupyterHub starts and watches
# Where it listens. Single-user servers must be able to reach it.
gateway = os.environ.get("NBOS_GATEWAY", "http://127.0.0.1:8765")
c.NBOSSpawnerMixin.gateway_url = f"{gateway}/services/nbos/"

# Where etcd is (host:port, separated by commas), and the PEM files with which the gateway proves who it is.
# Only the gateway gets them; no user's process ever does.
etcd = {
    name: os.environ[name]
    for name in ("NBOS_ETCD_ENDPOINTS", "NBOS_ETCD_CA", "NBOS_ETCD_CERT", "NBOS_ETCD_KEY")
    if name in os.environ
}
etcd.setdefault("NBOS_ETCD_ENDPOINTS", "127.0.0.1:2379")

c.JupyterHub.services.append(
    {
        "name": "nbos",
        "url": gateway,
        "command": [sys.executable, "-m", "nbos_spawner.gateway"],
        "environment": {
            **etcd,
            "NBOS_LIMITS": json.dumps(limits),
            # Seconds a host may be away before its replicas are placed elsewhere.
            "NBOS_HOST_GRACE": os.environ.get("NBOS_HOST_GRACE", "10"),
            "NBOS_AT_A_TIME": os.environ.get("NBOS_AT_A_TIME", "4"),
            # A hub that was killed starts a new gateway; the old one must not keep its port.
            "NBOS_DIE_WITH_PARENT": "1",
        },
        # Users of the hub see the dashboard without being asked whether they trust the hub's own service.
        "oauth_no_confirm": True,
    }
)

c.JupyterHub.load_roles.append(
    # The gateway looks up its callers' groups and who is an administrator. It may do nothing else on the hub.
    {"name": "nbos-gateway", "scopes": ["read:users"], "services": ["nbos"]}
)
# A scope of its own for having kernels, so that a token can be given nothing but that (a single-user server's has it),
# or everything but that.
c.JupyterHub.custom_scopes.update(
    {"custom:nbos:kernels": {"description": "Make NBOS kernels, use them, restart and delete them"}}
)
c.JupyterHub.load_roles.append(
    # Every user may use NBOS. If you define the role "user" yourself, add the last two scopes to yours and
    # delete this.
    {"name": "user", "scopes": ["self", "access:services!service=nbos", "custom:nbos:kernels!user"]}
)

# --- The proxy
# JupyterHub's own default (Node's configurable-http-proxy) is fine. With the Python one, start it this way:
# as it comes it holds every second websocket message back for 40 ms, and it does not stream.
#
#     c.ConfigurableHTTPProxy.command = [sys.executable, "-m", "nbos_spawner.proxy"]
