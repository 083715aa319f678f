"""A rendezvous that strangers can reach and neither read nor write: names and values leave this process sealed."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from wavecast.runtime.transfer.comm import CommunicatorError

__all__ = ("SealedStore", "RendezvousTampered", "SECRET_BYTES")

#: Bytes of a connection's secret, and of each key that is derived from it.
SECRET_BYTES = 32
_NONCE_BYTES = 16
_TAG_BYTES = 32


class RendezvousTampered(CommunicatorError):
    """Raised when the store holds a value that no member of the connection left there under that key."""


class SealedStore(dist.Store):
    """
    A store of torch's whose server learns neither keys nor values; torch's process groups take it as any other.

    A key is named by its HMAC. A value is hidden by a keystream, which is HMAC in counter mode over a fresh nonce, and
    bears a tag over its name, nonce and ciphertext (encrypt then MAC), all by HMAC-SHA256 under keys derived from the
    secret: the standard library has no cipher. So who reaches the server sees how many keys there are and how long
    their values; what he changes or moves to another key is found out. He can still delete keys, put back an old value
    of a counter, and keep the server busy.

    Keep it for as long as a group made on it: torch calls back into this object.

    :param store: reached by all members
    :param secret: 32 random bytes of the connection, handed to its members by Ray and to nobody else
    :ivar tampered: the first value found that no member had left, or ``None``: torch may wrap an error raised to it
    :raises ValueError: when the secret has another size
    """

    def __init__(self, store: dist.Store, *, secret: bytes) -> None:
        super().__init__()
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret of a connection has {SECRET_BYTES} bytes, not {len(secret)}")

        self._store = store
        self._naming, self._hiding, self._tagging = (_derive(secret, use) for use in (b"name", b"hide", b"tag"))
        self.tampered: RendezvousTampered | None = None

    def set(self, key: str, value: str | bytes) -> None:
        name = self._name(key)
        self._store.set(name, self._seal(name, _octets(value)))

    def get(self, key: str) -> bytes:
        name = self._name(key)
        return self._open(key, name, self._store.get(name))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        names = [self._name(key) for key in keys]
        if timeout is None:
            self._store.wait(names)
        else:
            self._store.wait(names, timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check([self._name(key) for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._name(key))

    def add(self, key: str, value: int) -> int:
        # The server cannot count what it cannot read: exchanged for what was read, again if another was faster.
        name = self._name(key)
        while True:
            before = self._found(name)
            total = (0 if before is None else int(self._open(key, name, before))) + value
            sealed = self._seal(name, str(total).encode())
            if self._store.compare_set(name, (before or b"").decode(), sealed) == sealed.encode():
                return total

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        name, expected = self._name(key), _octets(expected_value)
        before = self._found(name)
        if before is None and expected:
            return expected

        current = b"" if before is None else self._open(key, name, before)
        if current != expected:
            return current

        sealed = self._seal(name, _octets(desired_value))
        after = self._store.compare_set(name, (before or b"").decode(), sealed)
        return self._open(key, name, after)

    def _found(self, name: str) -> bytes | None:
        return self._store.get(name) if self._store.check([name]) else None

    def _name(self, key: str) -> str:
        return hmac.digest(self._naming, key.encode(), "sha256").hex()

    def _seal(self, name: str, value: bytes) -> str:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        hidden = _mask(self._hiding, nonce, value)
        # As text: not all of torch's calls take other bytes.
        return base64.b64encode(nonce + hidden + self._tag(name, nonce, hidden)).decode()

    def _open(self, key: str, name: str, sealed: bytes) -> bytes:
        try:
            data = base64.b64decode(sealed, validate=True)
        except binascii.Error:
            data = b""

        nonce, hidden, tag = data[:_NONCE_BYTES], data[_NONCE_BYTES:-_TAG_BYTES], data[-_TAG_BYTES:]
        if len(data) < _NONCE_BYTES + _TAG_BYTES or not hmac.compare_digest(tag, self._tag(name, nonce, hidden)):
            error = RendezvousTampered(
                f"the rendezvous holds {len(sealed)} bytes under the key {key!r} that no member of the connection left"
            )
            self.tampered = self.tampered or error
            raise error

        return _mask(self._hiding, nonce, hidden)

    def _tag(self, name: str, nonce: bytes, hidden: bytes) -> bytes:
        # Name and nonce are of fixed size: no two values run into the same bytes.
        return hmac.digest(self._tagging, name.encode() + nonce + hidden, "sha256")


def _derive(secret: bytes, use: bytes) -> bytes:
    return hmac.digest(secret, b"wavecast rendezvous " + use, "sha256")


def _mask(key: bytes, nonce: bytes, data: bytes) -> bytes:
    """Hide ``data``, or uncover what was hidden with the same nonce."""
    blocks = range(-(-len(data) // SECRET_BYTES))
    stream = b"".join(hmac.digest(key, nonce + block.to_bytes(8, "little"), "sha256") for block in blocks)
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(stream[: len(data)], "little")
    return mixed.to_bytes(len(data), "little")


def _octets(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
