"""The committed stubs are what the .proto files say, and proto/ stays free of Python."""

import subprocess
import sys
from pathlib import Path

from tests.layers import ROOT


def test_proto_holds_no_python() -> None:
    # An importable proto/ would shadow proto-plus, which Ray installs under that name.
    assert sorted((ROOT / "proto").rglob("*.py*")) == []


def test_committed_stubs_are_what_the_proto_files_generate(tmp_path: Path) -> None:
    sources = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "proto/tandem/v1").glob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *sources]
    subprocess.run(command, cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "tandem/v1").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "tandem/v1").glob("*_pb2*")}
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == [], "run `make proto`"
