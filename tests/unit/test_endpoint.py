"""Where the SDK looks for a router, in order, and which files it does not believe."""

import json
import os
import stat
from pathlib import Path

import pytest

from tandem.endpoint import (
    endpoint_folder,
    known_clusters,
    read_endpoint_file,
    remove_endpoint_file,
    resolve_endpoint,
    write_endpoint_file,
)
from tandem.errors import ConfigError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(tmp_path)}


def written_at(path: Path, time_s: int) -> None:
    os.utime(path, (time_s, time_s))


def test_the_argument_wins_over_all(environ: dict[str, str]) -> None:
    write_endpoint_file("a", {"grpc": "file:1"}, environ)
    assert resolve_endpoint("argument:1", {**environ, "TANDEM_ENDPOINT": "variable:1"}) == "argument:1"


def test_the_variable_wins_over_the_file(environ: dict[str, str]) -> None:
    write_endpoint_file("a", {"grpc": "file:1"}, environ)
    assert resolve_endpoint(None, {**environ, "TANDEM_ENDPOINT": "variable:1"}) == "variable:1"


def test_the_file_is_the_last_resort_and_an_empty_variable_is_none(environ: dict[str, str]) -> None:
    write_endpoint_file("a", {"grpc": "file:1"}, environ)
    assert resolve_endpoint(None, {**environ, "TANDEM_ENDPOINT": ""}) == "file:1"


def test_the_newest_file_is_taken(environ: dict[str, str]) -> None:
    for age, cluster in enumerate(("c", "a", "b")):
        written_at(write_endpoint_file(cluster, {"grpc": f"{cluster}:1"}, environ), 1_000 - age)
    assert resolve_endpoint(None, environ) == "c:1"


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"grpc": 7}', '{"grpc": "no port"}', '{"http": "a:1"}', "\x00"])
def test_a_file_that_cannot_be_used_is_passed_over(environ: dict[str, str], content: str) -> None:
    written_at(write_endpoint_file("good", {"grpc": "good:1"}, environ), 1_000)
    (endpoint_folder(environ) / "newer.json").write_text(content)
    assert resolve_endpoint(None, environ) == "good:1"


def test_nothing_to_be_found_says_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="tandem up"):
        resolve_endpoint(None, environ)


def test_a_folder_that_others_can_write_is_not_believed(environ: dict[str, str]) -> None:
    write_endpoint_file("a", {"grpc": "file:1"}, environ)
    endpoint_folder(environ).chmod(0o777)
    with pytest.raises(ConfigError, match="tandem up"):
        resolve_endpoint(None, environ)


def test_a_folder_that_is_a_link_is_not_believed(environ: dict[str, str], tmp_path: Path) -> None:
    elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path / "elsewhere")}
    write_endpoint_file("a", {"grpc": "file:1"}, elsewhere)
    endpoint_folder(environ).symlink_to(endpoint_folder(elsewhere))
    with pytest.raises(ConfigError, match="tandem up"):
        resolve_endpoint(None, environ)
    with pytest.raises(ConfigError, match="is not a folder of user"):
        write_endpoint_file("b", {"grpc": "file:2"}, environ)


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:0", "host:65536", "http://host:1", "host:1/x", "a b:1", "host:1\n"])
def test_what_is_no_host_and_port_is_refused_by_its_source(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint must be host:port"):
        resolve_endpoint(endpoint, {})
    if endpoint:
        with pytest.raises(ConfigError, match="TANDEM_ENDPOINT must be host:port"):
            resolve_endpoint(None, {"TANDEM_ENDPOINT": endpoint})


@pytest.mark.parametrize("endpoint", ["a:1,", ",a:1", "a:1,,b:2", "a:1, b:2", "a:1,b", "a:1,b:0", "a:1;b:2"])
def test_a_list_is_refused_where_one_part_is_no_host_and_port(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint must be host:port"):
        resolve_endpoint(endpoint, {})


def test_the_list_of_routers_in_a_file_is_taken_whole(environ: dict[str, str]) -> None:
    write_endpoint_file("a", {"grpc": "127.0.0.1:8470,127.0.0.1:8471"}, environ)
    assert resolve_endpoint(None, environ) == "127.0.0.1:8470,127.0.0.1:8471"


def test_the_file_of_a_cluster_that_still_starts_is_passed_over(environ: dict[str, str]) -> None:
    written_at(write_endpoint_file("good", {"grpc": "good:1"}, environ), 1_000)
    write_endpoint_file("starting", {"cluster": "starting", "pid": 1}, environ)
    assert resolve_endpoint(None, environ) == "good:1"


def test_one_clusters_file_is_read_back_and_a_damaged_one_is_none(environ: dict[str, str]) -> None:
    path = write_endpoint_file("a", {"pid": 7}, environ)
    assert read_endpoint_file("a", environ) == {"pid": 7}
    for content in ("", "{", "[]", "7"):
        path.write_text(content)
        assert read_endpoint_file("a", environ) is None
    assert read_endpoint_file("b", environ) is None


def test_clusters_are_known_by_their_file_or_their_folder(environ: dict[str, str]) -> None:
    assert known_clusters(environ) == []
    write_endpoint_file("both", {}, environ)
    write_endpoint_file("file", {}, environ)
    for name in ("both", "folder", ".hidden"):
        (endpoint_folder(environ) / name).mkdir()
    assert known_clusters(environ) == ["both", "file", "folder"]


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8470", "localhost:1", "router-0.tandem.svc:65535", "[::1]:8470", "a:1,[::1]:2,c:3"])
def test_hosts_and_addresses_are_taken(endpoint: str) -> None:
    assert resolve_endpoint(endpoint, {}) == endpoint


def test_without_a_runtime_folder_it_is_one_of_this_user() -> None:
    assert endpoint_folder({}) == Path(f"/tmp/tandem-{os.getuid()}")


def test_the_file_is_for_this_user_alone_and_replaced_in_one_step(environ: dict[str, str]) -> None:
    path = write_endpoint_file("a", {"grpc": "old:1"}, environ)
    assert write_endpoint_file("a", {"grpc": "new:1", "http": "new:2"}, environ) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text()) == {"grpc": "new:1", "http": "new:2"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(environ: dict[str, str]) -> None:
    with pytest.raises(TypeError):
        write_endpoint_file("a", {"grpc": object()}, environ)
    assert list(endpoint_folder(environ).iterdir()) == []


def test_an_unusable_place_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the endpoint file"):
        write_endpoint_file("a", {"grpc": "a:1"}, {"XDG_RUNTIME_DIR": str(tmp_path / "file")})


@pytest.mark.parametrize("cluster", ["", "../a", "a/b", ".hidden", "a" * 129])
def test_a_cluster_id_cannot_leave_the_folder(environ: dict[str, str], cluster: str) -> None:
    with pytest.raises(ConfigError, match="cluster id"):
        write_endpoint_file(cluster, {"grpc": "a:1"}, environ)


def test_removing_is_repeatable(environ: dict[str, str]) -> None:
    path = write_endpoint_file("a", {"grpc": "a:1"}, environ)
    remove_endpoint_file("a", environ)
    remove_endpoint_file("a", environ)
    assert not path.exists()
