"""No file that git tracks names a package registry's host or a path of one machine, and none uses an em dash."""

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.layers import ROOT

# Put together from parts, so that this file passes too.
HOSTS = tuple(
    ".".join(parts) for parts in [("pypi", "org"), ("pythonhosted", "org"), ("pytorch", "org", "whl"), ("npmjs", "org"), ("debian", "org")]
)
DOWNLOADS = ".".join(("download", "pytorch", "org"))
HOST = re.compile("|".join(re.escape(host) for host in (*HOSTS, DOWNLOADS)))
FOLDERS = ("work", "root", "opt/pypi", "opt/wheels")
MACHINE_PATH = re.compile(rf"(?<![\w.~}}/-])/(?:{'|'.join(FOLDERS)})(?![\w-])")
EM_DASH = "\u2014"


def _lines() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            yield f"{name}:{number}", line


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    assert [where for where, line in _lines() if HOST.search(line) or MACHINE_PATH.search(line)] == []


def test_no_file_uses_an_em_dash() -> None:
    # A tokenizer's vocabulary may hold any character.
    assert [where for where, line in _lines() if EM_DASH in line and "tokenizer" not in where] == []


@pytest.mark.parametrize("text", [f"see https://{DOWNLOADS}/x", f"/{FOLDERS[0]}/main/x.py", f'"/{FOLDERS[1]}"', f"cd /{FOLDERS[0]}"])
def test_a_host_or_path_is_seen(text: str) -> None:
    assert HOST.search(text) or MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["/workers/1", "a/work/b", "/rootfs", "$HOME/work", "prefill/work", "/work-queue"])
def test_other_paths_are_fine(text: str) -> None:
    assert not HOST.search(text)
    assert not MACHINE_PATH.search(text)
