"""A replica's process around an engine of a few lines: what ends it."""

import subprocess
import sys

import pytest

from tests.layers import ROOT

pytestmark = pytest.mark.integration

PROGRAM = """
import asyncio, logging, sys
from tandem import replica
from tandem.config import EngineConfig, ReplicaConfig
from tandem.domain import Namespace
from tandem.faults import Faults
from tests.fake_engine import FakeEngine

async def fail(*_):
    raise LookupError("a bug of the registration")

logging.basicConfig(stream=sys.stderr)
if sys.argv[1] == "bug":
    replica._stay_registered = fail
url = {"bug": "", "none": ""}.get(sys.argv[1], sys.argv[1])
config = ReplicaConfig(
    replica_id="r-0", role="decode", incarnation=1, served_model="m", engine=EngineConfig(model="bundled"), cluster="c", redis_url=url
)
try:
    asyncio.run(asyncio.wait_for(replica._serve(config, FakeEngine(), Namespace("n"), Faults.parse(""), None), 3.0))
except TimeoutError:
    print("still serves")
"""


def serve(case: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PROGRAM, case], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize(("case", "error"), [("bug", "a bug of the registration"), ("http://no-register", "REDIS_URL")])
def test_a_replica_whose_registration_dies_ends_and_says_so(case: str, error: str) -> None:
    ended = serve(case)
    assert ended.stdout.startswith("replica ready id=r-0")
    assert "still serves" not in ended.stdout
    assert "registration_died replica_id=r-0" in ended.stderr
    assert error in ended.stderr


def test_a_replica_without_a_register_serves_on() -> None:
    ended = serve("none")
    assert "still serves" in ended.stdout
    assert "registration_died" not in ended.stderr
