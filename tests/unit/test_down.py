"""Which cluster `tandem down` means."""

from pathlib import Path

import pytest

from tandem.down import choose_clusters
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
