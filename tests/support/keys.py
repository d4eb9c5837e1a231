"""Keys for the servers of the tests; they are made anew each time and open nothing else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any


def write_service_account(path: Path, token_port: int) -> None:
    """Write a Google service account whose tokens come from a server on `token_port` of this machine."""
    from cryptography.hazmat.primitives import serialization

    pem = _rsa().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "project_id": "none",
        "private_key": pem.decode(),
        "client_email": "tests@none.invalid",
        "token_uri": f"http://127.0.0.1:{token_port}/token",
    }
    path.write_text(json.dumps(account))


def write_certificate(key_path: Path, path: Path, host: str) -> None:
    """Write a self-signed certificate for `host`, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = _rsa()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )


def _rsa() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)
