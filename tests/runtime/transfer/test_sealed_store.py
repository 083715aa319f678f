"""What a stranger finds at the rendezvous, and what he can do there."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from wavecast.runtime.transfer import comm_ipc, comm_torch
from wavecast.runtime.transfer.comm import CommunicatorError, Deadline
from wavecast.runtime.transfer.comm_ipc import IpcCommunicator
from wavecast.runtime.transfer.comm_torch import GlooCommunicator, Rendezvous, host_store, join_store
from wavecast.runtime.transfer.sealed_store import RendezvousTampered, SealedStore

SECRET = bytes(range(32))
HANDLE = bytes(range(100, 164))


class Overheard(SealedStore):
    """Notes what a member says in the clear, and tells when it has said something."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__(store, secret=SECRET)
        self.said: list[tuple[str, bytes]] = []
        self.spoken = threading.Event()

    def set(self, key: str, value: str | bytes) -> None:
        super().set(key, value)
        self.said.append((key, value.encode() if isinstance(value, str) else value))
        self.spoken.set()


def rendezvous(store: SealedStore, rank: int, size: int, *, seconds: float = 20.0) -> Rendezvous:
    return Rendezvous(
        store, key="shown", host="127.0.0.1", rank=rank, size=size, groups=(), edges=(), deadline=Deadline(seconds)
    )


def found_by_a_stranger(port: int) -> dict[str, bytes]:
    """Return all that somebody who can reach the port reads there."""
    stranger = join_store("127.0.0.1", port, seconds=5)
    # torch's own mark that the server is up
    return {key: stranger.get(key) for key in stranger.list_keys() if not key.startswith("init/")}


def shows(found: dict[str, bytes], said: bytes) -> bool:
    """Tell whether anything that was found holds what was said, as it is or in another alphabet."""
    forms = (said, said.hex().encode(), base64.b64encode(said).rstrip(b"="))
    read = [key.encode() for key in found] + list(found.values())
    read += [base64.b64decode(value) for value in found.values() if len(value) % 4 == 0]
    return any(form in each for form in forms for each in read)


def test_a_stranger_finds_no_key_and_no_value_of_gloos_members() -> None:
    server, port = host_store("127.0.0.1", seconds=20)
    stores = [Overheard(server), Overheard(join_store("127.0.0.1", port, seconds=20))]
    with ThreadPoolExecutor(2) as threads:
        members = list(threads.map(lambda rank: GlooCommunicator(rendezvous(stores[rank], rank, 2)), range(2)))

    found = found_by_a_stranger(port)
    said = [each for store in stores for each in store.said]
    assert sorted(key for key, _ in said) == ["shown/gloo/world/0/0", "shown/gloo/world/0/1"]
    assert len(found) == 2
    assert all(len(bytes.fromhex(key)) == 32 for key in found)
    assert not any(shows(found, key.encode()) or shows(found, value) for key, value in said)
    # He would have: the same without the seal.
    assert all(shows({key: value}, value) for key, value in said)
    for member in members:
        member.close()


def test_a_stranger_cannot_read_the_handles_of_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm_ipc, "make_current", lambda device: None)
    server, port = host_store("127.0.0.1", seconds=20)
    device = torch.device("cuda", 0)
    sender, receiver = (
        IpcCommunicator(rendezvous(SealedStore(store, secret=SECRET), rank, 2), device)
        for rank, store in enumerate((server, join_store("127.0.0.1", port, seconds=20)))
    )
    sender.tell("0-1/0", HANDLE)
    found = found_by_a_stranger(port)
    assert len(found) == 1
    assert not shows(found, HANDLE)
    # The whole key: three letters of it turn up by chance among random ones.
    assert not shows(found, b"shown/ipc/0-1/0")
    assert shows({"shown/ipc/0-1/0": b""}, b"shown/ipc/0-1/0")
    assert shows({"": HANDLE.hex().encode()}, HANDLE)
    assert receiver.hear("0-1/0", Deadline(5)) == HANDLE
    sender.clear(["0-1/0"])
    assert found_by_a_stranger(port) == {}

    receiver.tell("0-1/0/1", b"taken")
    stranger = join_store("127.0.0.1", port, seconds=5)
    ((key, _),) = found_by_a_stranger(port).items()
    stranger.set(key, HANDLE.hex())
    with pytest.raises(RendezvousTampered, match="128 bytes under the key 'shown/ipc/0-1/0/1'"):
        sender.hear("0-1/0/1", Deadline(5))


def test_an_address_that_a_stranger_put_there_is_refused_by_gloos_members() -> None:
    server, port = host_store("127.0.0.1", seconds=20)
    first = Overheard(server)
    second = SealedStore(join_store("127.0.0.1", port, seconds=20), secret=SECRET)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: GlooCommunicator(rendezvous(first, 0, 2, seconds=2.0)))
        assert first.spoken.wait(10)
        stranger = join_store("127.0.0.1", port, seconds=5)
        for key, value in found_by_a_stranger(port).items():
            stranger.set(key, value[:-8].decode() + "AAAAAAA=")

        with pytest.raises(RendezvousTampered, match="'shown/gloo/world/0/0' that no member of the connection left"):
            GlooCommunicator(rendezvous(second, 1, 2))

        # Its partner has gone: whether it had met it before or not, it does not wait for longer than it may.
        waiting.exception(10)


def test_a_tampered_value_is_told_also_where_torch_wraps_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = dist.HashStore()
    store = SealedStore(inner, secret=SECRET)
    store.set("id", b"1")
    (name,) = inner.list_keys()
    inner.set(name, "forged")

    def wrapping(*args: object) -> None:
        try:
            store.get("id")
        except CommunicatorError as error:
            raise RuntimeError("store->get('id') got error: unknown") from error

    monkeypatch.setattr(comm_torch, "_gloo_group", wrapping)
    with pytest.raises(RendezvousTampered, match="6 bytes under the key 'id'"):
        GlooCommunicator(rendezvous(store, 0, 2))


@pytest.mark.parametrize("forged", ["", "AAAA", "not base64!", base64.b64encode(bytes(49)).decode()])
def test_what_no_member_left_is_no_value(forged: str) -> None:
    inner = dist.HashStore()
    store = SealedStore(inner, secret=SECRET)
    store.set("address", b"10.0.0.1")
    (name,) = inner.list_keys()
    inner.set(name, forged)
    with pytest.raises(RendezvousTampered, match=f"holds {len(forged)} bytes under the key 'address'"):
        store.get("address")

    with pytest.raises(RendezvousTampered):
        store.compare_set("address", "10.0.0.1", "10.0.0.2")

    with pytest.raises(RendezvousTampered):
        store.add("address", 1)


def test_every_bit_of_a_sealed_value_counts() -> None:
    inner = dist.HashStore()
    store = SealedStore(inner, secret=SECRET)
    store.set("address", b"10.0.0.1")
    (name,) = inner.list_keys()
    sealed = base64.b64decode(inner.get(name))
    assert len(sealed) == 16 + 8 + 32
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        inner.set(name, base64.b64encode(changed).decode())
        with pytest.raises(RendezvousTampered):
            store.get("address")


def test_a_value_of_one_key_is_none_of_another() -> None:
    inner = dist.HashStore()
    store = SealedStore(inner, secret=SECRET)
    store.set("one", b"1")
    (one,) = inner.list_keys()
    store.set("two", b"2")
    (two,) = set(inner.list_keys()) - {one}
    inner.set(two, inner.get(one).decode())
    assert store.get("one") == b"1"
    with pytest.raises(RendezvousTampered):
        store.get("two")


def test_equal_values_look_different_and_another_secret_finds_nothing() -> None:
    inner = dist.HashStore()
    store = SealedStore(inner, secret=SECRET)
    store.set("one", b"same")
    store.set("two", b"same")
    values = [inner.get(key) for key in inner.list_keys()]
    assert len({base64.b64decode(value)[:16] for value in values}) == 2
    assert len({base64.b64decode(value)[16:20] for value in values}) == 2
    assert not SealedStore(inner, secret=bytes(32)).check(["one"])
    assert SealedStore(inner, secret=SECRET).check(["one", "two"])


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 178, 4096])
def test_values_of_any_size_come_back(size: int) -> None:
    store = SealedStore(dist.HashStore(), secret=SECRET)
    value = bytes(index * 7 % 256 for index in range(size))
    store.set("value", value)
    assert store.get("value") == value
    assert store.delete_key("value")
    assert not store.check(["value"])


def test_torch_calls_it_like_any_other_store() -> None:
    server, port = host_store("127.0.0.1", seconds=20)
    stores = [SealedStore(server, secret=SECRET), SealedStore(join_store("127.0.0.1", port, seconds=20), secret=SECRET)]
    first, second = (dist.PrefixStore("group", store) for store in stores)
    with ThreadPoolExecutor(2) as threads:
        totals = list(threads.map(lambda store: [store.add("count", 1) for _ in range(50)], (first, second)))

    assert sorted(total for each in totals for total in each) == list(range(1, 101))
    assert second.get("count") == b"100"
    assert first.compare_set("owner", "", "first") == b"first"
    assert second.compare_set("owner", "", "second") == b"first"
    assert second.compare_set("owner", "first", "second") == b"second"
    assert first.compare_set("nobody", "somebody", "else") == b"somebody"
    first.wait(["owner"])
    assert first.multi_get(["owner", "count"]) == [b"second", b"100"]
    assert not any("group" in key or "owner" in key for key in found_by_a_stranger(port))


def test_what_never_comes_is_given_up_in_time() -> None:
    store = SealedStore(host_store("127.0.0.1", seconds=0.2)[0], secret=SECRET)
    with pytest.raises(dist.DistStoreError):
        store.wait(["never"])

    with pytest.raises(dist.DistStoreError):
        store.get("never")


def test_a_secret_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="has 32 bytes, not 16"):
        SealedStore(dist.HashStore(), secret=bytes(16))
