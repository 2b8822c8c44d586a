"""The wheel holds the whole product, and its client side works where no engine, Ray or Redis is installed."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.layers import HEAVY_OWNERS, ROOT

TOP_FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

# Runs in the light environment: uses every public name, and says which heavy packages are there.
PROBE = """
import importlib.util, json, sys
import router.main, tandem
for name in tandem.__all__:
    getattr(tandem, name)
print(json.dumps({
    "file": tandem.__file__,
    "heavy": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
}))
"""


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} {command[1:5]}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it or found by the next build."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TOP_FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist", ".", cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


def test_the_wheel_holds_every_python_file_and_the_bundled_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    source = {path.relative_to(ROOT).as_posix() for package in TOP_FOLDERS for path in (ROOT / package).rglob("*.py*")}
    source = {name for name in source if "__pycache__" not in name}
    model = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tandem/bundled_model").iterdir() if path.is_file()}
    assert "tandem/py.typed" in inside
    assert "tandem/bundled_model/model.safetensors" in inside
    assert sorted((source | model) - inside) == []


def test_the_wheel_holds_nothing_but_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(TOP_FOLDERS)


@pytest.mark.timeout(600)  # pip fetches the light dependencies
def test_the_client_side_works_without_engine_ray_or_redis(wheel: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    # The pins are the tested versions; a constraint installs nothing by itself.
    install = ("install", "--quiet", "--no-compile", "--disable-pip-version-check", "--constraint", ROOT / "requirements/cpu.txt", wheel)
    _run(python, "-m", "pip", *install, cwd=tmp_path)
    found = json.loads(_run(python, "-c", PROBE, *HEAVY_OWNERS, cwd=tmp_path))
    assert found["heavy"] == []
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert "Usage" in _run(tmp_path / "venv/bin/tandem", "--help", cwd=tmp_path)
