"""A server that is no Redis, or speaks like none: misses, no exception, nothing taken for a block."""

import socketserver
import threading
from random import Random
from time import sleep

import numpy as np
import pytest

from kv_transfer.kv_redis_store import KvRedisStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.dict_store import NAMESPACE, block_hash
from tests.lower_tier_benches import CLUSTER
from tests.store_benches import PAYLOAD, A, get, put

PAUSE_S = 0.02


class FakeServer:
    """Sends `reply` for whatever it is sent, on a TCP port; None: closes at once. With `greets` a new connection is welcomed first."""

    def __init__(self, reply: bytes | None, *, greets: bool = False) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while received := self.request.recv(1 << 16):
                    greetings = received.count(b"SETINFO") if greets else 0
                    if reply is None and not greetings:
                        return
                    self.request.sendall(b"+OK\r\n" * greetings or reply or b"")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: object, client_address: object) -> None:
                return  # the client hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"redis://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def opened(server: FakeServer, *, timeout_s: float) -> KvRedisStore:
    return KvRedisStore(server.url, cluster=CLUSTER, timeout_s=timeout_s, pause_s=PAUSE_S)


GARBAGE = {
    "closed": None,
    "silence": b"",
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no-protocol": b"\x00\xff\xfe" * 100 + b"\r\n",
    "error": b"-ERR no\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "number": b":7\r\n",
    "bad-number": b":seven\r\n",
    "bad-length": b"$seven\r\n",
    "negative-length": b"$-7\r\n",
    "huge-length": b"$99999999999999999999\r\n",
    "half-a-value": b"$1000\r\nabc",
    "text": b"+OK\r\n",
    "value": b"$3\r\nabc\r\n",
    "nothing": b"$-1\r\n",
    "list": b"*2\r\n$3\r\nabc\r\n:5\r\n",
    "bad-list": b"*x\r\n",
    "negative-list": b"*-5\r\n",
    "nested": b"*1\r\n" * 20_000,
    "map": b"%1\r\n+a\r\n+b\r\n",
    "push": b">2\r\n+message\r\n+x\r\n",
    "bulk-error": b"!5\r\nERR x\r\n",
    "not-utf8": b"-ERR \xff\xfe\r\n",
    "many": b":1\r\n" * 50,
}


class TestGarbage:
    @pytest.mark.parametrize("greets", [False, True])
    @pytest.mark.parametrize("kind", GARBAGE)
    def test_whatever_a_server_says_is_a_miss(self, kind: str, greets: bool) -> None:
        server = FakeServer(GARBAGE[kind], greets=greets)
        store = opened(server, timeout_s=0.3)
        rows = np.zeros((3, len(PAYLOAD)), np.uint8)
        hashes = [block_hash(number) for number in range(3)]
        for _ in range(3):
            outcomes = store.get_into(NAMESPACE, hashes, rows)
            assert BlockOutcome.HIT not in outcomes
            assert PutOutcome.STORED not in store.put(NAMESPACE, hashes, rows)
            assert len(store.contains(NAMESPACE, hashes)) == 3
            store.payload_bytes(NAMESPACE, hashes[0])
            store.drop(NAMESPACE, hashes)
            store.stats()
            sleep(PAUSE_S)
        store.close()
        server.close()

    @pytest.mark.parametrize("seed", range(5))
    def test_random_bytes_are_a_miss(self, seed: int) -> None:
        rng = Random(seed)
        for _ in range(10):
            reply = bytes([rng.choice(b"+-:$*_,#!=(%~>")]) + rng.randbytes(rng.randrange(20)) + b"\r\n" + rng.randbytes(20)
            server = FakeServer(reply, greets=True)
            store = opened(server, timeout_s=0.05)
            assert get(store, A)[0] is not BlockOutcome.HIT
            assert put(store, A) is not PutOutcome.STORED
            store.close()
            server.close()

    def test_a_server_that_quotes_what_it_was_sent_puts_no_key_into_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        server = FakeServer(b"-ERR unknown command 'MGET', with args beginning with: 'test:kv:abc'\r\n", greets=True)
        store = opened(server, timeout_s=10.0)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.error == "ResponseError: unknown command "
        assert "test:kv" not in caplog.text
        store.close()
        server.close()
