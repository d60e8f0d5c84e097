"""Certificates and keys of a federation: who the SuperLink is, and which nodes may take part.

The SuperLink proves itself by a certificate, signed by a certificate authority made for this federation alone; its
public half (``ca.crt``) goes to every machine. A node proves itself by its own key: the private half (``node.key``)
never leaves its machine, the public half (``node.pub``) is registered with the SuperLink.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxlib.config import ConfigError, check_writable

DAYS = 365
"""How long certificates are valid."""

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"


def make_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Write a certificate authority and the SuperLink's certificate for ``hosts`` (names or addresses) into ``folder``.

    Raises:
        ConfigError: no host, or there is an authority already: a new one would lock out every node that trusts it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not hosts:
        raise ConfigError("hosts is empty, allowed is at least one name or address under which nodes reach the server")
    if (folder / CA_KEY).exists():
        raise ConfigError(f"{folder / CA_KEY} exists already; remove the folder to make a new federation")
    check_writable(folder)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _name("FLUX federation authority")
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = _sign(
        issuer, issuer, authority.public_key(), authority,
        [(x509.BasicConstraints(ca=True, path_length=0), True), (signs, True), (identifier, False)],
    )  # fmt: skip
    names = x509.SubjectAlternativeName([_host(name) for name in hosts])
    use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    known_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    leaf = _sign(
        _name(hosts[0][:64]), issuer, server.public_key(), authority,
        [(x509.BasicConstraints(ca=False, path_length=None), True), (names, False), (use, False), (known_by, False)],
    )  # fmt: skip
    _write_key(folder / CA_KEY, authority)
    _write_key(folder / SERVER_KEY, server)
    (folder / CA_CERTIFICATE).write_bytes(_pem(root))
    (folder / SERVER_CERTIFICATE).write_bytes(_pem(leaf))


def make_node_key(folder: Path) -> None:
    """Write a node's key pair into ``folder``; one that is there already is kept."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if (folder / NODE_KEY).exists():
        return
    check_writable(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(folder / NODE_KEY, key, openssh=True)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / NODE_PUBLIC_KEY).write_bytes(public + b"\n")


def _sign(subject: Any, issuer: Any, public: Any, signer: Any, extensions: Sequence[tuple[Any, bool]]) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
    builder = builder.not_valid_after(now + datetime.timedelta(days=DAYS))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256())


def _name(text: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def _host(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _write_key(path: Path, key: Any, openssh: bool = False) -> None:
    """Readable by its owner alone, from the first byte on."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
