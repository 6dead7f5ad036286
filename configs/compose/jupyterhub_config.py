# The hub of the compose cluster (docker/compose.yaml): the drop-in file as it is, with this cluster's settings on top.
import os
from pathlib import Path

from jupyterhub.services import service as hub_service
from traitlets import Integer

from nbos.places import drop_in_config

c = get_config()  # noqa: F821  JupyterHub provides it
load_subconfig(str(drop_in_config()))  # noqa: F821


def secret(name):  # type: ignore[no-untyped-def]
    return (Path("/etc/nbos-secrets") / name).read_text().strip()


address = os.environ["NBOS_IP"]

# --- Who may log in: one password for all users' names, another one for the administrator
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = secret("user-password")
c.SharedPasswordAuthenticator.admin_password = secret("admin-password")
c.Authenticator.admin_users = {"admin"}
c.Authenticator.allow_all = True
c.Authenticator.username_pattern = r"^[a-z0-9][a-z0-9._]{0,30}$"  # names become folders

# --- Single-user servers: containers of this machine's Engine
c.JupyterHub.spawner_class = "nbos_spawner.docker_spawner.NBOSDockerSpawner"
c.DockerSpawner.image = os.environ.get("NBOS_SINGLEUSER_IMAGE", "nbos/singleuser")
c.DockerSpawner.volumes = {"/shared/home/{username}": "/home/jovyan"}
c.DockerSpawner.host_ip = address  # the proxy runs elsewhere
c.DockerSpawner.use_internal_ip = False
c.Spawner.default_url = "/lab"
c.Spawner.http_timeout = 60


def make_home(spawner):  # type: ignore[no-untyped-def]
    """On the file system that hub and hosts share. All users have the same id here; on a real site, their own."""
    (Path("/shared/home") / spawner.user.name).mkdir(mode=0o700, exist_ok=True)


c.Spawner.pre_spawn_hook = make_home

# --- Where things are. Servers and the proxy outlive the hub.
c.JupyterHub.hub_bind_url = "http://0.0.0.0:8081"
c.JupyterHub.hub_connect_url = f"http://{address}:8081"
c.JupyterHub.db_url = "sqlite:////srv/jupyterhub/jupyterhub.sqlite"
c.JupyterHub.cookie_secret_file = "/srv/jupyterhub/cookie_secret"
c.JupyterHub.cleanup_servers = False
c.JupyterHub.cleanup_proxy = False
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.auth_token = secret("proxy-token")
c.ConfigurableHTTPProxy.api_url = "http://proxy:8001"
c.JupyterHub.proxy_check_interval = 5

# --- The administrator's programs: `docker/cluster status` and the tests
c.JupyterHub.services.append(
    {"name": "nbos-command", "api_token": secret("api-token"), "admin": True, "display": False}
)


class QuickServiceSpawner(hub_service._ServiceSpawner):
    """JupyterHub looks after its services every 30 s and has no option for that; a dead gateway should not last so
    long."""

    poll_interval = Integer(1)


hub_service._ServiceSpawner = QuickServiceSpawner
