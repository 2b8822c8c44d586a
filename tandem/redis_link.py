"""One Redis server as its users here see it: scripts, a subscription, an answer in time or an UnavailableError.

Must not know what is kept there; redis-py and its errors end in this file.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import parse_qs, urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisError

from tandem.errors import ConfigError, Reason, UnavailableError

EXPECTED_URL = "redis://[[user]:password@]host[:port][/db], rediss://... (TLS) or unix:///path/of.sock[?db=0]"
COALESCE_S = 0.02  # a burst of hints within it is one

# What a URL may set besides: the rest of redis-py's options would change what this file relies on.
_URL_OPTIONS = frozenset({"db", "username", "password"})
_TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})


class Hints:
    """One subscribed channel. The text of a hint does not matter, only that there was one."""

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub

    async def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s`, or COALESCE_S after a hint. Raises UnavailableError where the connection is lost."""
        if await self.next(timeout_s):
            loop = asyncio.get_running_loop()
            ends_s = loop.time() + COALESCE_S
            while (left_s := ends_s - loop.time()) > 0:
                await self.next(left_s)

    async def next(self, timeout_s: float) -> bool:
        """Whether a message came within `timeout_s`; raises UnavailableError."""
        with _translated():
            return await self._pubsub.get_message(timeout=timeout_s) is not None


class RedisLink:
    """Connections to one server, made when they are needed; nothing is tried twice.

    Every call ends within `timeout_s`, with UnavailableError (NO_REGISTER) where the server did not answer or refused. Raises
    ConfigError where `url` is none.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.name = _checked_name(url)
        self._timeout_s = timeout_s
        try:
            self._redis = Redis.from_url(
                url,
                # With one, redis-py sends through asyncio.wait_for, which may swallow a cancellation on CPython 3.11.
                # asyncio.timeout bounds each call instead.
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
                # By default redis-py tries again for seconds. No error is one to try again after: else a subscription would connect
                # once more, without a limit of time, before it says that it is lost.
                retry=Retry(NoBackoff(), 0, supported_errors=()),
                protocol=2,  # one exchange less at the start; we need nothing of 3
                decode_responses=True,
                encoding_errors="replace",
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"REDIS_URL: {self.name} cannot be used ({error}); expected {EXPECTED_URL}") from error

    async def run(self, script: str, keys: Sequence[str] = (), arguments: Sequence[str | int] = ()) -> object:
        """The reply of a Lua script: int, str, None or a list of these."""
        digest = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        with _translated():
            async with asyncio.timeout(self._timeout_s):
                try:
                    reply: object = await self._redis.evalsha(digest, len(keys), *keys, *arguments)
                except NoScriptError:  # first use, or the server was restarted
                    reply = await self._redis.eval(script, len(keys), *keys, *arguments)
        return reply

    async def ping(self) -> None:
        """Returns when the server has answered."""
        with _translated():
            async with asyncio.timeout(self._timeout_s):
                await self._redis.ping()

    @asynccontextmanager
    async def subscription(self, channel: str) -> AsyncIterator[Hints]:
        """Hints of a channel; none is missed once this is entered. Its connection is closed at the end, whatever the end is."""
        pubsub = self._redis.pubsub()
        try:
            hints = Hints(pubsub)
            with _translated():
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.subscribe(channel)
                    if not await hints.next(self._timeout_s):  # the server's confirmation
                        raise TimeoutError
            yield hints
        finally:
            with _translated():
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Closes all connections, within `timeout_s` too; a call in flight fails."""
        with _translated():
            async with asyncio.timeout(self._timeout_s):
                await self._redis.aclose()


def is_password_problem(error: UnavailableError) -> bool:
    """Whether the server answered, and wants another password or any at all."""
    cause = error.__cause__  # while it connects, redis-py wraps the server's word once more
    while cause is not None and not isinstance(cause, AuthenticationError):
        cause = cause.__cause__
    return cause is not None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        cause = str(error) or "no answer in time"
        raise UnavailableError(f"the register (Redis) does not answer: {cause}", reason=Reason.NO_REGISTER) from error


def _checked_name(url: str) -> str:
    """The URL without user and password, for messages; raises ConfigError where it is not one of ours."""
    try:
        parts = urlsplit(url)
        port, options = parts.port, parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:  # its text may hold the password
        raise ConfigError(f"REDIS_URL is no URL; expected {EXPECTED_URL}") from error
    if parts.scheme == "unix":
        name, is_right = f"unix://{parts.path}", parts.path.startswith("/") and not parts.hostname
    else:
        host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
        name = f"{parts.scheme}://{host or ''}{f':{port}' if port is not None else ''}{parts.path}"
        is_right = parts.scheme in ("redis", "rediss") and bool(host) and port != 0 and bool(re.fullmatch(r"/?|/\d+", parts.path))
    if not is_right:
        raise ConfigError(f"REDIS_URL is {name!r}; expected {EXPECTED_URL}")
    if unknown := sorted(options.keys() - _URL_OPTIONS - (_TLS_OPTIONS if parts.scheme == "rediss" else set())):
        raise ConfigError(f"REDIS_URL: {name} has options that are not taken here ({', '.join(unknown)}); expected {EXPECTED_URL}")
    return name
