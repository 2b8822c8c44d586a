"""One platform on real vLLM for all tests that need one: 1 + 1 replicas, a router, and a plain replica without connector.

And one zygote, for it and for every other platform that does not kill its own: to import vLLM takes ten seconds of a core.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

import tandem
from tandem.demo import DirectCaller, Prompts
from tandem.domain import Role
from tandem.engine.environment import has_cuda
from tandem.tether import hold
from tandem.zygote_client import zygote_command, zygote_environment
from tests.bare_platform import BareOptions, BarePlatform
from tests.integration.platform_run import wait_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What tests use of the platform."""

    platform: BarePlatform
    client: tandem.AsyncClient
    plain: DirectCaller
    prompts: Prompts


@pytest.fixture(scope="session")
def zygote_socket() -> Iterator[Path | None]:
    """Where the session's zygote listens; None where replicas are not forked."""
    if has_cuda():
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="td", dir="/tmp"))  # a short name: a socket is in it
    tether = hold(folder / "agent.lock")
    assert tether is not None
    with (folder / "zygote.log").open("wb") as log:
        zygote = subprocess.Popen(
            zygote_command(folder / "zygote.sock", folder / "agent.lock", grace_s=1.0),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=zygote_environment(),
            start_new_session=True,
        )
    try:
        wait_for(lambda: (folder / "zygote.sock").exists() or zygote.poll() is not None, 120.0)
        assert zygote.poll() is None, (folder / "zygote.log").read_text()
        yield folder / "zygote.sock"
    finally:
        zygote.terminate()
        zygote.wait(timeout=20)
        os.close(tether)
        shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(zygote_socket: Path | None) -> AsyncIterator[Cluster]:
    platform = BarePlatform(BareOptions(zygote_socket=zygote_socket))
    try:
        await platform.start()
        plain = DirectCaller(await platform.add_replica(Role.DECODE, "plain", is_kv_transfer_on=False))
        async with tandem.AsyncClient(platform.router_address, timeout_s=60.0) as client:
            yield Cluster(platform=platform, client=client, plain=plain, prompts=Prompts())
        await plain.close()
    finally:
        await platform.stop()
