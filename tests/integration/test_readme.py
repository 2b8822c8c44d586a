"""The README's commands and its Python are run as they stand, on the shared platform."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Cluster

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.M | re.S)


def commands() -> list[str]:
    """The `tandem` commands that need a running cluster, without the folder of the console script."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(".venv/bin/tandem ")]


async def run(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TANDEM_ENDPOINT": cluster.platform.router_address},
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_every_command_works(cluster: Cluster) -> None:
    assert len(commands()) >= 4
    for command in commands():
        script = Path(sys.executable).with_name("tandem")
        status, output, errors = await run(cluster, "bash", "-c", command.replace(".venv/bin/tandem", str(script)))
        assert status == 0, (command, errors)
        assert output.strip(), command


@pytest.mark.parametrize("example", blocks("python"), ids=["tandem", "openai"])
async def test_a_python_example_works(cluster: Cluster, example: str) -> None:
    status, output, errors = await run(cluster, sys.executable, "-c", example.replace("127.0.0.1:8480", cluster.platform.http_address))
    assert status == 0, errors
    assert len(output) > 50


async def test_the_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"make ([a-z]+)", "\n".join(blocks("sh")))
    assert set(targets) == {"demo", "setup"}
    assert all(f"\n{target}:" in makefile for target in targets)
