"""A process that asked for it ends with its parent, however the parent ends."""

import os
import select
import subprocess
import sys

import pytest

from tests.layers import ROOT

pytestmark = pytest.mark.integration

CHILD = """
import os, sys, time
from tandem.parenthood import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
sys.stdin.read()
time.sleep(600)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}], stdin=subprocess.PIPE)"


@pytest.mark.parametrize("way", ["kill", "terminate"])
def test_the_child_ends_with_its_parent(way: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    getattr(parent, way)()
    parent.communicate(timeout=30)
    ended, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ended
