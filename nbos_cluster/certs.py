"""A private certificate authority: every process proves with a certificate who it is to etcd.

Guarantees: keys are ECDSA P-256 and readable by their owner only (mode 0600, created so, never widened); a
certificate says in its extended key usage whether it is for a server, a client or both, and in its common name
which user of etcd it is; `make_ca` and `issue` keep what is good, so that a second start of the same cluster goes on
with the same authority.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
LEAF_DAYS = 825
_RENEW_DAYS = 30
_BACKDATE = dt.timedelta(days=1)
"""Machines whose clocks are behind, or in another time zone by mistake, must not refuse a certificate made just now."""


class CertError(ValueError):
    """A certificate or key cannot be read or used; says which file, why, and the way out."""


@dataclass(frozen=True, slots=True)
class Authority:
    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Facts:
    """What stands in a certificate. sans: host names and IP addresses, as text."""

    common: str
    sans: tuple[str, ...]
    begins: dt.datetime
    ends: dt.datetime
    server: bool
    client: bool

    @property
    def days_left(self) -> int:
        """Whole days; negative when it has ended."""
        return (self.ends - dt.datetime.now(dt.UTC)).days


# -- one folder with its own authority, for the embedded form ---------------------------------------------------------


def make_ca(directory: Path, name: str = "NBOS private CA") -> Path:
    """Make ca.pem and ca.key in `directory` (mode 0700) unless they exist; returns the path of ca.pem."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    cert_path, key_path = directory / "ca.pem", directory / "ca.key"
    if not (cert_path.exists() and key_path.exists()):
        write_authority(cert_path, key_path, name)
    return cert_path


def issue(
    directory: Path, name: str, sans: Sequence[str] = (), *, common: str = "", client: bool = True, server: bool = False
) -> tuple[Path, Path]:
    """Make `name`.pem and `name`.key, signed by the CA in `directory`; returns both paths.

    sans: host names and IP addresses of a server. common: the user of etcd, `name` where it is not given. An existing
    certificate is kept while it has a month left, is `common`'s and names all of `sans`.
    """
    if not client and not server:
        raise ValueError(f"certificate {name}: for a client, a server or both?")
    common = common or name
    cert_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
    if not _good(cert_path, key_path, common, sans):
        authority = load_authority(directory / "ca.pem", directory / "ca.key")
        write_leaf(
            cert_path, key_path, authority, common=common, sans=sans, client=client, server=server, days=LEAF_DAYS
        )
    return cert_path, key_path


def _good(cert_path: Path, key_path: Path, common: str, sans: Sequence[str]) -> bool:
    if not cert_path.exists() or not key_path.exists():
        return False
    found = read(cert_path)
    return found.days_left >= _RENEW_DAYS and found.common == common and set(normal(sans)) <= set(found.sans)


# -- making -----------------------------------------------------------------------------------------------------------


def write_authority(
    cert_path: Path, key_path: Path, name: str, *, days: int = CA_DAYS, passphrase: bytes | None = None
) -> Authority:
    """A new authority. Its key is encrypted when there is a passphrase. Writes over what is there."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), _name(name), key.public_key(), _days(days))
    cert = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key, passphrase)
    _write_cert(cert_path, cert)
    return Authority(cert, key)


def write_leaf(
    cert_path: Path,
    key_path: Path,
    authority: Authority,
    *,
    common: str,
    sans: Sequence[str] = (),
    client: bool = True,
    server: bool = False,
    days: int = LEAF_DAYS,
) -> None:
    """A new key and its certificate, which ends no later than its authority. Writes over what is there."""
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
    ends = min(_days(days), authority.cert.not_valid_after_utc)
    signer = authority.key.public_key()
    builder = (
        _builder(_name(common), authority.cert.subject, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName([_san(s) for s in sans]), critical=False)
    cert = builder.sign(authority.key, hashes.SHA256())
    _write_key(key_path, key)
    _write_cert(cert_path, cert)


def _days(days: int) -> dt.datetime:
    """So many in all, with those before now: some programs refuse what is valid for longer than LEAF_DAYS."""
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days) - _BACKDATE


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, ends: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime.now(dt.UTC) - _BACKDATE)
        .not_valid_after(ends)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def normal(sans: Sequence[str]) -> tuple[str, ...]:
    """The names as a certificate holds them (IP addresses in their shortest form)."""
    return tuple(str(_san(name).value) for name in sans)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> x509.Certificate:
    """Raises CertError that names the file."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as err:
        raise CertError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise CertError(f"{path} holds no certificate in PEM form ({err})") from err


def read(path: Path) -> Facts:
    """What stands in the certificate in `path`. Raises CertError."""
    cert = load(path)
    usages = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value if _has_usage(cert) else ()
    return Facts(
        common=_common(cert),
        sans=_sans(cert),
        begins=cert.not_valid_before_utc,
        ends=cert.not_valid_after_utc,
        server=ExtendedKeyUsageOID.SERVER_AUTH in usages,
        client=ExtendedKeyUsageOID.CLIENT_AUTH in usages,
    )


def _common(cert: x509.Certificate) -> str:
    found = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _has_usage(cert: x509.Certificate) -> bool:
    return any(isinstance(extension.value, x509.ExtendedKeyUsage) for extension in cert.extensions)


def _sans(cert: x509.Certificate) -> tuple[str, ...]:
    for extension in cert.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            return tuple(str(name.value) for name in extension.value)
    return ()


def load_authority(cert_path: Path, key_path: Path, passphrase: bytes | None = None) -> Authority:
    """Raises CertError: a file is missing, the passphrase is wrong, or the two do not belong together."""
    cert, key = load(cert_path), load_key(key_path, passphrase)
    if cert.public_key() != key.public_key():
        raise CertError(f"{key_path} is not the key of {cert_path}")
    return Authority(cert, key)


def load_key(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Raises CertError, also when the passphrase is missing, wrong or not needed."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=passphrase)
    except OSError as err:
        raise CertError(f"{path} cannot be read: {err.strerror}") from err
    except TypeError as err:
        wrong = "is not encrypted, a passphrase was given" if passphrase else "is encrypted; its passphrase is needed"
        raise CertError(f"{path} {wrong}") from err
    except ValueError as err:
        said = "its passphrase is another one, or the file is damaged" if passphrase else str(err)
        raise CertError(f"{path} cannot be used as a key: {said}") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertError(f"{path} holds no elliptic-curve key")
    return key


def trouble(cert_path: Path, key_path: Path, ca_path: Path) -> str:
    """What is wrong with a certificate, its key and its authority as they lie there, besides its age; '' if nothing."""
    try:
        cert, ca, key = load(cert_path), load(ca_path), load_key(key_path)
        cert.verify_directly_issued_by(ca)
    except CertError as err:
        return str(err)
    except (InvalidSignature, ValueError, TypeError):
        return f"{cert_path} was not issued by the authority in {ca_path}"
    if cert.public_key() != key.public_key():
        return f"{key_path} is not the key of {cert_path}"
    return ""


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> None:
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    write(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how), 0o600)


def _write_cert(path: Path, cert: x509.Certificate) -> None:
    write(path, cert.public_bytes(serialization.Encoding.PEM), 0o644)


def write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others in between."""
    part = path.with_name(path.name + ".new")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    part.replace(path)
