# A host of the compose cluster (docker/compose.yaml). configs/gpu_daemon.py is the example for a real one.
import os

c = get_config()  # noqa: F821  traitlets provides it

c.GPUDaemon.host = os.environ["NBOS_HOST"]
c.GPUDaemon.ip = os.environ["NBOS_IP"]
c.GPUDaemon.run_dir = "/var/lib/nbos"
c.GPUDaemon.etcd_endpoints = os.environ["NBOS_ETCD_ENDPOINTS"].split(",")
c.GPUDaemon.etcd_ca = "/etc/nbos-tls/ca.pem"
c.GPUDaemon.etcd_cert = "/etc/nbos-tls/cert.pem"
c.GPUDaemon.etcd_key = "/etc/nbos-tls/key.pem"
c.GPUDaemon.blob_store = "file:///shared/blobs"

# GPUs are played: there is no container toolkit in these machines.
c.GPUDaemon.devices = "simulated"
c.GPUDaemon.simulated_devices = int(os.environ.get("NBOS_GPUS", "2"))

c.GPUDaemon.runtime = "docker"
c.Docker.image = os.environ.get("NBOS_KERNEL_IMAGE", "nbos/kernel")
c.Docker.volumes = {"/shared/home/{username}": "{home}"}
c.Docker.memory = "2G"
c.Docker.pids = 1024
# The other machines of the cluster: of all hosts, a replica may reach none.
c.Docker.deny = ["169.254.0.0/16", os.environ["NBOS_NETWORK"]]
