"""Certificates and keys of a federation: who the SuperLink is, and which nodes may take part.

The SuperLink proves itself by a certificate, signed by a certificate authority made for this federation alone; its
public half (``ca.crt``) goes to every machine. A node proves itself by its own key: the private half (``node.key``)
never leaves its machine, the public half (``node.pub``) is registered with the SuperLink.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fluxlib.io import ConfigError, check_writable, reading, shown

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"


def make_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Write a certificate authority and the SuperLink's certificate for ``hosts`` (names or addresses) into ``folder``.

    ConfigError: no host, or there is an authority already: a new one would lock out every node that trusts it.
    """
    if not hosts:
        raise ConfigError("hosts is empty, allowed is at least one name or address under which nodes reach the server")
    if (folder / CA_KEY).exists():
        raise ConfigError(f"{folder / CA_KEY} exists already; remove the folder to make a new federation")
    names = [_host(name) for name in hosts]
    check_writable(folder)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, now = _name("FLUX federation authority"), datetime.datetime.now(datetime.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = [(x509.BasicConstraints(ca=True, path_length=0), True), (signs, True), (identifier, False)]
    leaf = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName(names), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False),
    ]
    for subject, key, extensions, name in (
        (issuer, authority, root, CA_CERTIFICATE),
        (_name(hosts[0][:64]), server, leaf, SERVER_CERTIFICATE),
    ):
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        builder = builder.not_valid_after(now + datetime.timedelta(days=365))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        (folder / name).write_bytes(builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    _write_key(folder / CA_KEY, authority, PrivateFormat.PKCS8)
    _write_key(folder / SERVER_KEY, server, PrivateFormat.PKCS8)


def make_node_key(folder: Path) -> None:
    """Write a node's key pair into ``folder``; one that is there already is kept."""
    if (folder / NODE_KEY).exists():
        return
    check_writable(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(folder / NODE_KEY, key, PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / NODE_PUBLIC_KEY).write_bytes(public + b"\n")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        with reading(f"host is {shown(name)}, allowed are addresses, and names as the DNS has them"):
            return x509.DNSName(name)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    """Readable by its owner alone, from the first byte on."""
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
