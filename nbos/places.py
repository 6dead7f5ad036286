"""Where this installation keeps what is not Python: the drop-in configuration, and our packages' own
folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that holds our packages: site-packages, or a checkout."""


def drop_in_config() -> Path:
    """`configs/jupyterhub_config.py`: inside the installed package, or beside it in a checkout."""
    for path in (
        PACKAGES / "nbos" / "configs" / "jupyterhub_config.py",
        PACKAGES / "configs" / "jupyterhub_config.py",
    ):
        if path.is_file():
            return path
    raise FileNotFoundError(f"configs/jupyterhub_config.py is neither in {PACKAGES / 'nbos'} nor in {PACKAGES}")


def examples() -> list[Path]:
    """The example notebooks: inside the installed package, or beside it in a checkout."""
    for folder in (PACKAGES / "nbos" / "examples", PACKAGES / "examples"):
        if found := sorted(folder.glob("*.ipynb")):
            return found
    return []


def embedded_config() -> Path:
    return PACKAGES / "nbos" / "embedded_config.py"


def child_environment(**more: str) -> dict[str, str]:
    """The environment of everything `nbos up` starts: ours, with this Python and our packages in reach."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTERHUB_", "CONFIGPROXY_", "NBOS_"))}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    if not any(Path(p or ".").resolve() == PACKAGES for p in _site_folders()):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGES), env.get("PYTHONPATH", "")]))
    return env | more


def _site_folders() -> list[str]:
    import site

    return [*site.getsitepackages(), site.getusersitepackages()]
