"""A local certificate authority and the certificates that it signs, as PEM files of mode 0600.

ECDSA on P-256. The authority's key stays in the folder: keep a copy elsewhere, or begin anew by removing the
folder, after which every client needs the new `ca.crt`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reward_service.errors import StartError
from reward_service.home import write_atomically

CA_DAYS = 3650
LEAF_DAYS = 825
RENEW_BEFORE_DAYS = 30
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_NOTHING = dict.fromkeys(
    (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ),
    False,
)  # fmt: skip


class LocalCA:
    """The authority in `folder` (`ca.key`, `ca.crt`), made where it is missing.

    Raises:
        StartError: one of its two files is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key_file, certificate_file = folder / "ca.key", folder / "ca.crt"
        if not key_file.exists() and not certificate_file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = _name("Looper local CA")
            builder = _builder(name, name, key.public_key(), CA_DAYS)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            usage = x509.KeyUsage(**{**_NOTHING, "key_cert_sign": True, "crl_sign": True})
            certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
            write_atomically(key_file, _key_pem(key))
            write_atomically(certificate_file, _pem(certificate))
        try:
            loaded = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            self._certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError):
            raise StartError(
                f"{folder}: ca.key and ca.crt belong together; restore both, or remove the folder"
            ) from None
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise StartError(f"{key_file}: is not the key that this command makes; restore it from a backup")
        self._key = loaded

    def issue(self, name: str, hosts: Sequence[str], usage: x509.ObjectIdentifier) -> bool:
        """Write `NAME.key`, `NAME.crt` and `NAME.pem` (both) unless they are good for another 30 days.

        `hosts` are host names or IP addresses. Returns whether they were written.
        """
        pem, certificate_file = self._folder / f"{name}.pem", self._folder / f"{name}.crt"
        if pem.exists() and certificate_file.exists() and self._still_good(certificate_file):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self._certificate.subject, key.public_key(), LEAF_DAYS)
        alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        key_usage = x509.KeyUsage(**{**_NOTHING, "digital_signature": True})
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(alternatives, critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_atomically(self._folder / f"{name}.key", _key_pem(key))
        write_atomically(certificate_file, _pem(certificate))
        write_atomically(pem, _pem(certificate) + _key_pem(key))
        return True

    def _still_good(self, file: Path) -> bool:
        try:
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
            certificate.verify_directly_issued_by(self._certificate)
        except Exception:  # unreadable, or of another authority: in each case a new one is due
            return False
        ends: datetime = certificate.not_valid_after_utc
        return ends > datetime.now(UTC) + timedelta(days=RENEW_BEFORE_DAYS)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> str:
    text: str = certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
    return text


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    text: str = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")
    return text
