"""The private CA: who may read the keys, what a certificate is good for, what a second start keeps."""

from __future__ import annotations

import datetime as dt
import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from nbos_cluster import certs


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def days(cert: x509.Certificate) -> float:
    return (cert.not_valid_after_utc - cert.not_valid_before_utc) / dt.timedelta(days=1)


def test_a_server_certificate_is_good_for_its_addresses(tmp_path: Path) -> None:
    ca = load(certs.make_ca(tmp_path))
    cert = load(certs.issue(tmp_path, "server", ["127.0.0.1", "etcd-1"], server=True)[0])
    policy = PolicyBuilder().store(Store([ca]))
    policy.build_server_verifier(x509.IPAddress(ipaddress.ip_address("127.0.0.1"))).verify(cert, [])
    policy.build_server_verifier(x509.DNSName("etcd-1")).verify(cert, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("etcd-2")).verify(cert, [])


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    certs.make_ca(tmp_path / "ours")
    other = load(certs.make_ca(tmp_path / "other"))
    cert = load(certs.issue(tmp_path / "ours", "server", ["etcd-1"], server=True)[0])
    with pytest.raises(VerificationError):
        PolicyBuilder().store(Store([other])).build_server_verifier(x509.DNSName("etcd-1")).verify(cert, [])


def test_a_client_certificate_is_not_for_servers(tmp_path: Path) -> None:
    certs.make_ca(tmp_path)
    cert = load(certs.issue(tmp_path, "daemon")[0])
    usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_nobody_else_reads_a_key(tmp_path: Path) -> None:
    place = tmp_path / "tls"
    certs.make_ca(place)
    _, key = certs.issue(place, "daemon")
    for path in (place / "ca.key", key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_keys_are_p256_and_times_are_bounded(tmp_path: Path) -> None:
    ca = load(certs.make_ca(tmp_path))
    leaf = load(certs.issue(tmp_path, "daemon")[0])
    assert (round(days(ca)), round(days(leaf))) == (certs.CA_DAYS, certs.LEAF_DAYS)
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)


def test_a_second_start_keeps_what_is_good(tmp_path: Path) -> None:
    first = certs.make_ca(tmp_path).read_bytes()
    cert = certs.issue(tmp_path, "server", ["a"], server=True)[0].read_bytes()
    assert certs.make_ca(tmp_path).read_bytes() == first
    assert certs.issue(tmp_path, "server", ["a"], server=True)[0].read_bytes() == cert
    assert certs.issue(tmp_path, "server", ["a", "b"], server=True)[0].read_bytes() != cert


def test_an_ending_certificate_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certs.make_ca(tmp_path)
    monkeypatch.setattr(certs, "LEAF_DAYS", 20)
    cert = certs.issue(tmp_path, "daemon")[0].read_bytes()
    assert certs.issue(tmp_path, "daemon")[0].read_bytes() != cert


def test_a_certificate_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="client, a server or both"):
        certs.issue(tmp_path, "x", client=False)
