"""docs/security.md to the letter: `nbos certs`, three etcd members with its certificates, `nbos etcd-setup`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbos import cli
from nbos_cluster import keys
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, TLSFiles

from .etcdserver import etcd_program, eventually
from .ports import free_port

MEMBERS = ("one", "two", "three")


@dataclass
class Lab:
    """A lab's certificates and its etcd."""

    book: Path
    endpoints: list[str]
    capsys: pytest.CaptureFixture[str]

    async def nbos(self, *words: str) -> tuple[int, str, str]:
        """`nbos WORDS`: exit status, what it printed, what it complained of."""
        status = await asyncio.to_thread(cli.main, [*words, "--dir", str(self.book)])
        return (status, *self.capsys.readouterr())

    async def setup(self, *words: str) -> tuple[int, str, str]:
        return await self.nbos("etcd-setup", "--endpoints", ",".join(self.endpoints), *words)

    def client(self, name: str) -> Etcd:
        folder = self.book / name
        return Etcd(self.endpoints, TLSFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem"))


def options(book: Path, name: str, ports: dict[str, tuple[int, int]], data: Path) -> list[str]:
    """As docs/security.md says, and where a member is."""
    folder = book / f"etcd-{name}"
    files = {"trusted-ca-file": "ca.pem", "cert-file": "cert.pem", "key-file": "key.pem"}
    client, peer = (f"https://127.0.0.1:{port}" for port in ports[name])
    return [
        "--client-cert-auth",
        *(f"--{option}={folder / file}" for option, file in files.items()),
        "--peer-client-cert-auth",
        *(f"--peer-{option}={folder / file}" for option, file in files.items()),
        "--peer-cert-allowed-cn=etcd-member",
        "--enable-grpc-gateway=false",
        f"--name={name}",
        f"--data-dir={data / name}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        "--initial-cluster=" + ",".join(f"{n}=https://127.0.0.1:{p}" for n, (_, p) in ports.items()),
        "--log-level=error",
    ]


@pytest.fixture
async def lab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Lab]:
    book = tmp_path / "nbos-certs"
    ports = {name: (free_port(), free_port()) for name in MEMBERS}
    it = Lab(book, [f"127.0.0.1:{client}" for client, _ in ports.values()], capsys)
    for words in ("init", "issue etcd one two three", "issue gateway", "issue daemon a b", "issue admin"):
        assert (await it.nbos("certs", *words.split()))[0] == 0
    null = asyncio.subprocess.DEVNULL
    members = [
        await asyncio.create_subprocess_exec(etcd_program(), *options(book, name, ports, tmp_path), stderr=null)
        for name in MEMBERS
    ]
    try:
        async with it.client("admin") as admin:

            async def quorum() -> bool:
                try:
                    await admin.put("/ready", b"")
                except EtcdUnavailable:
                    return False
                return True

            await eventually(quorum, "the members found one another", 60)
        yield it
    finally:
        for member in members:
            member.kill()
            await member.wait()


async def test_a_lab_sets_its_etcd_up_as_the_page_says(lab: Lab) -> None:
    status, said, _ = await lab.setup()
    assert status == 0
    assert {"role daemon-a made", "role daemon-b made", "role gateway made", "access control is on"} <= set(
        said.splitlines()
    )
    async with lab.client("daemon-a") as a, lab.client("gateway") as gateway:
        await a.put(keys.host("a"), b"x")
        await gateway.range(keys.HOSTS)
        for etcd in (a, gateway):
            with pytest.raises(EtcdError, match="permission denied"):
                await etcd.put(keys.host("b"), b"x")
        assert "nothing to do" in (await lab.setup())[1]
        assert (await lab.nbos("certs", "issue", "daemon", "c"))[0] == 0
        assert "role daemon-c made" in (await lab.setup())[1]
        assert "user daemon-a removed" in (await lab.setup("--remove", "a"))[1]
        with pytest.raises(EtcdError, match="permission denied"):
            await a.put(keys.host("a"), b"x")
        assert "off" in (await lab.setup("--disable"))[1]
        await a.put(keys.host("a"), b"x")


async def test_what_cannot_work_is_said_before_anything_is_changed(lab: Lab) -> None:
    status, _, complaint = await lab.setup("a", "--remove", "a")
    assert (status, "at once" in complaint) == (1, True)
    status, _, complaint = await lab.setup("no/host")
    assert (status, "host name" in complaint) == (1, True)
    for file in (lab.book / "admin").iterdir():
        file.write_bytes((lab.book / "gateway" / file.name).read_bytes())
    status, _, complaint = await lab.setup()
    assert (status, "common name is 'root'" in complaint) == (1, True)
    (lab.book / "admin" / "key.pem").unlink()
    status, _, complaint = await lab.setup()
    assert (status, "nbos certs issue admin" in complaint) == (1, True)
    async with lab.client("gateway") as gateway:
        await gateway.put("/still/open", b"x")
