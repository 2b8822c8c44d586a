"""A hub name that cannot be fetched is told with what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers import ROOT

pytestmark = pytest.mark.integration

PROGRAM = """
from tandem.engine.model_files import resolve_model
from tandem.errors import ConfigError
try:
    resolve_model("owner/never-there")
except ConfigError as error:
    print(error.reason, error.message)
"""


def test_a_hub_name_without_a_hub_is_told_with_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # read when the library is imported
    said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("bad_model --model owner/never-there: the hub has no such model or cannot be reached; give")
