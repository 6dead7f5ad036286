"""What carries a kernel's messages refuses to start without the keys to encrypt them, and says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nbos_provisioner.gateway import GatewayError
from nbos_provisioner.provisioner import _encrypted

from .nbosenv import environment


def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], input=text, capture_output=True, text=True, timeout=60, env=environment()
    )


def test_a_replica_without_keys_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "connection.json"
    file.write_text(json.dumps({"ip": "127.0.0.1", "transport": "tcp", "key": "k", "signature_scheme": "hmac-sha256"}))
    done = run("nbos_kernel", "--nbos-socket", str(tmp_path / "s"), "-f", str(file))
    assert done.returncode == 1
    assert "holds no CurveZMQ keys" in done.stderr


@pytest.mark.parametrize("keys", [{}, {"curve_publickey": "", "curve_secretkey": ""}, {"curve_publickey": "p" * 40}])
def test_a_router_without_keys_does_not_start(keys: dict[str, str]) -> None:
    done = run("nbos_provisioner.router", text=json.dumps({"key": "k", "ip": "127.0.0.1", **keys}) + "\n")
    told = json.loads(done.stdout)
    assert (told["event"], "CurveZMQ" in told["reason"], done.returncode) == ("failed", True, 1)


@pytest.mark.parametrize("keys", [{}, {"curve_publickey": "p", "curve_secretkey": ""}])
def test_a_provisioner_takes_no_kernel_without_keys(keys: dict[str, str]) -> None:
    with pytest.raises(GatewayError, match="CurveZMQ"):
        _encrypted({"key": "k", **keys})
