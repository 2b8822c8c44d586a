"""Which cluster `tandem down` means, and which process."""

import os
from pathlib import Path

import psutil
import pytest

from tandem.down import choose_clusters, try_up_process
from tandem.endpoint import endpoint_folder, write_endpoint_file
from tandem.errors import ConfigError, NotFoundError


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_the_only_cluster_needs_no_name() -> None:
    write_endpoint_file("a", {})
    assert choose_clusters(None, is_all=False) == ["a"]
    assert choose_clusters("a", is_all=False) == ["a"]


def test_a_cluster_of_which_only_a_folder_is_left_can_be_meant() -> None:
    endpoint_folder().mkdir(mode=0o700)
    (endpoint_folder() / "left").mkdir()
    assert choose_clusters("left", is_all=False) == ["left"]


def test_of_several_one_must_be_named_or_all_be_meant() -> None:
    for cluster in ("b", "a"):
        write_endpoint_file(cluster, {})
    with pytest.raises(ConfigError, match="name one with --cluster, or say --all: a, b"):
        choose_clusters(None, is_all=False)
    assert choose_clusters("b", is_all=False) == ["b"]
    assert choose_clusters(None, is_all=True) == ["a", "b"]


def test_a_name_wins_over_all() -> None:
    for cluster in ("b", "a"):
        write_endpoint_file(cluster, {})
    assert choose_clusters("b", is_all=True) == ["b"]


@pytest.mark.parametrize("is_all", [False, True])
def test_where_there_is_none_it_says_so(is_all: bool) -> None:
    with pytest.raises(NotFoundError, match="no cluster of this user on this machine"):
        choose_clusters(None, is_all=is_all)
    with pytest.raises(NotFoundError, match="no cluster 'x' here; there are: none"):
        choose_clusters("x", is_all=is_all)


def test_an_unknown_name_is_refused_with_the_known() -> None:
    write_endpoint_file("a", {})
    with pytest.raises(NotFoundError, match="no cluster 'x' here; there are: a"):
        choose_clusters("x", is_all=False)


def _up_is_this_process(**more: object) -> None:
    write_endpoint_file("a", {"pid": os.getpid(), **more})


def test_the_process_that_wrote_the_endpoint_file_is_the_one_to_end() -> None:
    _up_is_this_process(started=psutil.Process().create_time())
    process = try_up_process("a")
    assert process is not None
    assert process.pid == os.getpid()


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_another_process_with_the_same_pid_is_left_alone(off_s: float) -> None:
    _up_is_this_process(started=psutil.Process().create_time() + off_s)
    assert try_up_process("a") is None


def test_without_a_start_time_the_command_line_must_name_the_program() -> None:
    _up_is_this_process()
    found = try_up_process("a")
    assert (found is not None) == any("tandem" in part for part in psutil.Process().cmdline())


@pytest.mark.parametrize("pid", [None, "7", 0, 1, -5, True, 2**22 + 1])
def test_what_is_no_pid_of_a_process_is_passed_over(pid: object) -> None:
    write_endpoint_file("a", {"pid": pid, "started": 1.0})
    assert try_up_process("a") is None


def test_without_an_endpoint_file_there_is_nothing_to_end() -> None:
    assert try_up_process("a") is None
