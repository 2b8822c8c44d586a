"""Who connects to a node's blocks and is no store, or no longer: cut off and counted, and no thread held beyond its bound."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_transfer import peer_server
from kv_transfer.peer_server import PeerServer
from kv_transfer.peer_wire import RequestKind, pack_request
from kv_transfer.store_totals import StoreTotals
from tandem.errors import ConfigError
from tests.dict_store import NAMESPACE, block_hash
from tests.peer_sides import CAPACITY_BYTES, SLAB_BYTES, WAIT_S, Address, Side, server_threads, soon

pytestmark = pytest.mark.integration


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    far, near = Side(tmp_path / "far"), Side(tmp_path / "near")
    yield far, near
    near.close()
    far.close()


@pytest.fixture
def far(sides: tuple[Side, Side]) -> Side:
    return sides[0]


@pytest.fixture
def near(sides: tuple[Side, Side]) -> Side:
    return sides[1]


@pytest.fixture
def address(far: Side, near: Side) -> Iterator[Address]:
    with far.serving() as address:
        yield address


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: scanner\r\n\r\n",
        bytes(100),
        struct.pack("<4sHHII16s", b"TKV1", 1, 0, 2**31, 0, bytes(16)),
        struct.pack("<4sHHII16s", b"TKV1", 1, 0, 0, 0, bytes(16)),
        struct.pack("<4sHHII16s", b"TKV1", 9, 0, 1, 0, bytes(16)),
    ],
    ids=["another protocol", "zeros", "too many blocks", "no block", "an unknown kind"],
)
def test_who_says_what_no_store_says_is_cut_off_and_counted(far: Side, near: Side, address: Address, said: bytes) -> None:
    far.put(0)
    with socket.create_connection(address, timeout=WAIT_S) as client:
        client.sendall(said)
        with contextlib.suppress(ConnectionResetError):  # what it said after its request was not read
            assert client.recv(1) == b""
    soon(lambda: far.totals.bad_requests == 1)
    assert near.fetch(address, [0]) == 1


@pytest.mark.parametrize("said_bytes", [0, 1, 31, 32, 63])
def test_who_stops_in_the_middle_of_a_request_is_dropped(
    far: Side, address: Address, monkeypatch: pytest.MonkeyPatch, said_bytes: int
) -> None:
    monkeypatch.setattr(peer_server, "_STALL_S", 0.1)
    monkeypatch.setattr(peer_server, "_IDLE_S", 0.1)
    with socket.create_connection(address, timeout=WAIT_S) as client:
        client.sendall(pack_request(RequestKind.FETCH, NAMESPACE, [block_hash(0)])[:said_bytes])
        assert client.recv(1) == b""
    assert far.totals == StoreTotals()


def test_who_stops_reading_is_dropped(far: Side, near: Side, address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "_STALL_S", 0.1)
    numbers = range(CAPACITY_BYTES // SLAB_BYTES)
    far.put(*numbers, size_bytes=SLAB_BYTES)
    request = pack_request(RequestKind.FETCH, NAMESPACE, [block_hash(number) for number in numbers])
    with socket.create_connection(address, timeout=WAIT_S) as client:
        client.sendall(request * 50)  # 200 MB are more than any buffer on the way holds
        soon(lambda: bool(far.totals.served_blocks))
        soon(lambda: not server_threads())
    assert near.fetch(address, numbers) == len(numbers)


def test_who_goes_in_the_middle_of_an_answer_is_forgotten(far: Side, near: Side, address: Address) -> None:
    far.put(*range(30), size_bytes=SLAB_BYTES)
    for _ in range(10):
        with socket.create_connection(address, timeout=WAIT_S) as client:
            client.sendall(pack_request(RequestKind.FETCH, NAMESPACE, [block_hash(number) for number in range(30)]))
            client.recv(1)
    soon(lambda: not server_threads())
    assert near.fetch(address, range(30)) == 30


def test_more_connections_than_the_limit_are_turned_away(far: Side, near: Side, address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "_MAX_CONNECTIONS", 2)
    far.put(0)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(address, timeout=WAIT_S))
        soon(lambda: len(server_threads()) == 2)
        with socket.create_connection(address, timeout=WAIT_S) as third:
            assert third.recv(1) == b""
    soon(lambda: not server_threads())
    assert near.fetch(address, [0]) == 1


def test_a_taken_port_is_an_error_that_names_it(tmp_path: Path, near: Side, address: Address) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{address[1]}"):
        PeerServer(near.store, near.totals, near.folder, *address)
