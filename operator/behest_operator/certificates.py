"""The webhook's certificate: made by the operator, renewed long before it ends, under an authority that stays.

The API server trusts the authority (the webhook's `caBundle`), so that a renewed leaf needs no change there and no pod
is refused meanwhile. When the authority itself gets old, the new one is trusted beside the old one before any leaf is
signed by it.
"""

from datetime import datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE = timedelta(days=3650)
AUTHORITY_RENEWED_BEFORE_END = timedelta(days=365)
LEAF_LIFE = timedelta(days=90)
LEAF_RENEWED_BEFORE_END = timedelta(days=30)
TRUSTED_BEFORE_USE = timedelta(hours=1)
"""A new authority signs only after every API server had so long to learn it."""
_BACKDATED = timedelta(minutes=10)
"""Clocks of nodes differ."""


class Certificates(msgspec.Struct, frozen=True, kw_only=True):
    """What the webhook's Secret holds. All PEM."""

    ca_bundle: bytes
    """The authorities that clients trust, the newest first."""
    ca_key: bytes
    """Of the newest authority."""
    signing_ca: bytes
    """The authority that signed the leaf, and its key: the newest one, or while that is too new the one before."""
    signing_ca_key: bytes
    leaf: bytes
    leaf_key: bytes


def renewed(found: Certificates | None, *, names: list[str], now: datetime) -> Certificates:
    """What the Secret should hold now; the same object where nothing has to be renewed.

    `names` are the host names under which the API server calls the webhook. What cannot be read is made anew.
    """
    if found is None or not _readable(found):
        ca, ca_key = _authority(now)
        leaf, leaf_key = _leaf(ca, ca_key, names, now)
        return Certificates(
            ca_bundle=ca, ca_key=ca_key, signing_ca=ca, signing_ca_key=ca_key, leaf=leaf, leaf_key=leaf_key
        )
    bundle = x509.load_pem_x509_certificates(found.ca_bundle)
    newest = bundle[0]
    if newest.not_valid_after_utc - now < AUTHORITY_RENEWED_BEFORE_END:
        ca, ca_key = _authority(now)
        alive = [_pem(item) for item in bundle if item.not_valid_after_utc > now]
        return msgspec.structs.replace(found, ca_bundle=b"".join([ca, *alive]), ca_key=ca_key)
    result = found
    trusted_since = newest.not_valid_before_utc + _BACKDATED
    if found.signing_ca != _pem(newest) and now - trusted_since >= TRUSTED_BEFORE_USE:
        result = msgspec.structs.replace(result, signing_ca=_pem(newest), signing_ca_key=found.ca_key)
    current = x509.load_pem_x509_certificate(found.leaf)
    if (
        result is not found
        or current.not_valid_after_utc - now < LEAF_RENEWED_BEFORE_END
        or _names_of(current) != sorted(names)
    ):
        pem, key = _leaf(result.signing_ca, result.signing_ca_key, names, now)
        result = msgspec.structs.replace(result, leaf=pem, leaf_key=key)
    return result


def _readable(found: Certificates) -> bool:
    try:
        bundle = x509.load_pem_x509_certificates(found.ca_bundle)
        leaf = x509.load_pem_x509_certificate(found.leaf)
        signer = x509.load_pem_x509_certificate(found.signing_ca)
        for pem in (found.ca_key, found.signing_ca_key, found.leaf_key):
            serialization.load_pem_private_key(pem, None)
        leaf.verify_directly_issued_by(signer)
        key = serialization.load_pem_private_key(found.leaf_key, None)
        return signer in bundle and key.public_key() == leaf.public_key()
    except Exception:  # noqa: BLE001 - whatever somebody wrote into the Secret: it is made anew
        return False


def _names_of(leaf: x509.Certificate) -> list[str]:
    extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return sorted(extension.value.get_values_for_type(x509.DNSName))


def _authority(now: datetime) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"behest webhook {now:%Y-%m-%d}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def _leaf(authority: bytes, authority_key: bytes, names: list[str], now: datetime) -> tuple[bytes, bytes]:
    signer = x509.load_pem_x509_certificate(authority)
    signing_key = serialization.load_pem_private_key(authority_key, None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey), "the authority's key is ours"
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(min(now + LEAF_LIFE, signer.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
