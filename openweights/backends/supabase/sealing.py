"""Boxes that anybody can close and one key opens: how secrets lie in a project's database.

A box is sealed with the organization's public key, on the machine of whoever sets the secret; the
private key is with the workers, and never in the database. Each box has a key pair of its own
(X25519), whose private half is forgotten. HKDF-SHA256 of the shared secret is the key of
ChaCha20-Poly1305, used once, so its nonce is constant. This is the base mode of HPKE (RFC 9180) but
for its framing.

A box is bound to its organization and to the name of its secret: whoever can write to the database
cannot make it pass for another one.

    box = "ow1." base64url(first 8 bytes of the recipient's public key's SHA-256
                           | the box's public key, 32 bytes | ciphertext and tag)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from openweights.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

_BOX, _PUBLIC, _PRIVATE = "ow1.", "owpk_", "owsk_"
_KEY_BYTES = 32
_MARK_BYTES = 8
_TAG_BYTES = 16
_NONCE = bytes(12)
_DAMAGED = "the organization's public key for secrets is damaged: `ow env init` makes another one"
_NO_PRIVATE_KEY = f"OPENWEIGHTS_SECRETS_KEY holds no private key: it begins with {_PRIVATE}"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Keys as text, `owpk_…` and `owsk_…`."""

    public: str
    private: str = field(repr=False)


def new_key_pair() -> KeyPair:
    """A pair of a new random private key."""
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = _PRIVATE + _text(X25519PrivateKey.generate().private_bytes_raw())
    return KeyPair(public_key_of(private), private)


def public_key_of(private_key: str) -> str:
    """The public half.

    Raises:
        ConfigurationError: This is no private key.
    """
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = X25519PrivateKey.from_private_bytes(_key(private_key, _PRIVATE))
    return _PUBLIC + _text(key.public_key().public_bytes_raw())


def seal(value: bytes, public_key: str, *, organization_id: str, name: str) -> str:
    """A box with `value` in it.

    Raises:
        ConfigurationError: This is no public key.
    """
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    recipient = _key(public_key, _PUBLIC)
    own = X25519PrivateKey.generate()
    sender = own.public_key().public_bytes_raw()
    try:
        cipher = _cipher(own.private_bytes_raw(), recipient, sender + recipient)
    except ValueError:  # no point of the curve
        raise ConfigurationError(_DAMAGED) from None
    sealed = cipher.encrypt(_NONCE, value, _context(organization_id, name))
    return _BOX + _text(_mark(recipient) + sender + sealed)


def unseal(box: str, private_key: str, *, organization_id: str, name: str) -> bytes:
    """What is in the box.

    Raises:
        ConfigurationError: `private_key` is none, or not the one that opens this box.
        InvalidInputError: The box was damaged, or made for another organization or name.
    """
    _check_installed()
    from cryptography.exceptions import InvalidTag

    own = _key(private_key, _PRIVATE)
    recipient = _key(public_key_of(private_key), _PUBLIC)
    content = _bytes(box.removeprefix(_BOX)) if box.startswith(_BOX) else None
    if content is None or len(content) < _MARK_BYTES + _KEY_BYTES + _TAG_BYTES:
        raise InvalidInputError(f"what is stored as secret {name} is no sealed box: set it again")
    if content[:_MARK_BYTES] != _mark(recipient):
        raise ConfigurationError(
            f"secret {name} was sealed with another key than the one here: give this worker the "
            "organization's OPENWEIGHTS_SECRETS_KEY, or set the secret again"
        )
    sender = content[_MARK_BYTES : _MARK_BYTES + _KEY_BYTES]
    sealed = content[_MARK_BYTES + _KEY_BYTES :]
    try:
        cipher = _cipher(own, sender, sender + recipient)
        return cipher.decrypt(_NONCE, sealed, _context(organization_id, name))
    except (InvalidTag, ValueError):  # ValueError: no point of the curve
        raise InvalidInputError(
            f"the box of secret {name} was changed, or is that of another secret: set it again"
        ) from None


def _cipher(private: bytes, public: bytes, salt: bytes) -> ChaCha20Poly1305:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    other = X25519PublicKey.from_public_bytes(public)
    shared = X25519PrivateKey.from_private_bytes(private).exchange(other)
    key = HKDF(SHA256(), _KEY_BYTES, salt, b"openweights secret, version 1").derive(shared)
    return ChaCha20Poly1305(key)


def _context(organization_id: str, name: str) -> bytes:
    return f"{organization_id}/{name}".encode()


def _mark(public: bytes) -> bytes:
    return hashlib.sha256(public).digest()[:_MARK_BYTES]


def _key(text: str, prefix: str) -> bytes:
    """The bytes of a key; what is wrong with it is said without showing it."""
    key = _bytes(text.removeprefix(prefix)) if text.startswith(prefix) else None
    if key is None or len(key) != _KEY_BYTES:
        raise ConfigurationError(_DAMAGED if prefix == _PUBLIC else _NO_PRIVATE_KEY)
    return key


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _bytes(text: str) -> bytes | None:
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    # One spelling of each: what was changed anywhere is noticed.
    return content if _text(content) == text else None


def _check_installed() -> None:
    if find_spec("cryptography") is None:
        raise ConfigurationError(
            "secrets need the package cryptography: pip install 'openweights[supabase]'"
        )
