"""A kernel's own secrets: the key that signs its messages, and its CurveZMQ pair."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


@dataclass(frozen=True)
class KernelSecrets:
    key: str
    curve_publickey: str
    curve_secretkey: str


def new_secrets() -> KernelSecrets:
    """Fresh ones. CurveZMQ keys are Curve25519 keys, so no libzmq is needed to make them."""
    pair = X25519PrivateKey.generate()
    return KernelSecrets(
        key=secrets.token_hex(32),
        curve_publickey=z85(pair.public_key().public_bytes_raw()),
        curve_secretkey=z85(pair.private_bytes_raw()),
    )


def z85(raw: bytes) -> str:
    """ZeroMQ's text form of bytes (RFC 32): 5 characters for each 4 bytes; `raw` must be a multiple of 4
    long."""
    if len(raw) % 4:
        raise ValueError(f"Z85 needs a multiple of 4 bytes, not {len(raw)}")
    text = []
    for at in range(0, len(raw), 4):
        value = int.from_bytes(raw[at : at + 4], "big")
        text.append("".join(_Z85[value // 85**power % 85] for power in (4, 3, 2, 1, 0)))
    return "".join(text)
