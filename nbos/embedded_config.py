"""JupyterHub's configuration under `nbos up`: the drop-in file as it is, with this machine's settings on top.

Read by JupyterHub (`jupyterhub -f`), never imported. What the drop-in takes from the environment, `nbos up`
has set.
"""

import json
import os
import shutil
from pathlib import Path

from jupyterhub.services import service as hub_service
from traitlets import Integer

from nbos.places import drop_in_config, examples

c = get_config()  # type: ignore[name-defined]  # noqa: F821
load_subconfig(str(drop_in_config()))  # type: ignore[name-defined]  # noqa: F821

state = Path(os.environ["NBOS_STATE"])
settings = json.loads((state / "secrets.json").read_text())

# --- Who may log in: one password for all users' names, another one for the administrator
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = settings["user_password"]
c.SharedPasswordAuthenticator.admin_password = settings["admin_password"]
c.Authenticator.admin_users = {settings["admin"]}
c.Authenticator.allow_all = True
c.Authenticator.username_pattern = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # names become folders

# --- Where things are
c.JupyterHub.bind_url = f"http://{settings['ip']}:{settings['port']}"
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{settings['hub_port']}"
c.JupyterHub.db_url = f"sqlite:///{state / 'hub' / 'jupyterhub.sqlite'}"
c.JupyterHub.cookie_secret_file = str(state / "hub" / "cookie_secret")
c.NBOSSpawner.home_dir_template = str(state / "homes" / "{username}")
c.Spawner.environment = {"NBOS_STATE": str(state)}
c.Spawner.default_url = "/lab"
if os.getuid() == 0:
    c.Spawner.args = ["--allow-root"]  # a Jupyter Server refuses to run as root otherwise


def give_examples(spawner):  # type: ignore[no-untyped-def]
    """A new user finds the example notebooks in `examples/`; what is there already is theirs and stays."""
    folder = state / "homes" / spawner.user.name / "examples"
    if not folder.exists():
        folder.mkdir(parents=True)
        for notebook in examples():
            shutil.copy(notebook, folder)


c.Spawner.pre_spawn_hook = give_examples

# --- The proxy and users' servers outlive the hub, so that its restart is felt by nobody
c.JupyterHub.cleanup_servers = False
c.JupyterHub.cleanup_proxy = False
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.auth_token = settings["proxy_token"]
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{settings['proxy_api_port']}"
c.JupyterHub.proxy_check_interval = 5

# --- `nbos status` and programs use this token; its file is for this machine's user alone
c.JupyterHub.services.append(
    {"name": "nbos-command", "api_token": settings["api_token"], "admin": True, "display": False}
)


class QuickServiceSpawner(hub_service._ServiceSpawner):
    """JupyterHub looks after its services every 30 s and has no option for that; a dead gateway should not
    last so long."""

    poll_interval = Integer(1)


hub_service._ServiceSpawner = QuickServiceSpawner
