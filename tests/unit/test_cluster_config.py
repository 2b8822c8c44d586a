"""What a cluster is to be: which source wins, which words are refused, and that it travels as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from tandem.cluster_config import ClusterConfig, ModelConfig, cluster_config_from_json, load_cluster_config, parse_slowdowns, read_section
from tandem.config import MIB
from tandem.domain import Role
from tandem.errors import ConfigError

TWO_MODELS = '[[models]]\nname = "a"\n[[models]]\nname = "b"\n'


def load(folder: Path, text: str | None = None, environ: Mapping[str, str] | None = None, **flags: object) -> ClusterConfig:
    """The configuration of a file (none where `text` is None), an environment that is empty otherwise, and flags."""
    path = None
    if text is not None:
        path = folder / "cluster.toml"
        path.write_text(text)
    return load_cluster_config(path, flags, environ or {})


def refused(folder: Path, text: str | None = None, environ: Mapping[str, str] | None = None, **flags: object) -> str:
    """The words of the refusal."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ, **flags)
    return caught.value.message


def changed(**changes: Any) -> ClusterConfig:
    return ClusterConfig(**changes)


def with_model(**changes: Any) -> ClusterConfig:
    return ClusterConfig(models=(ModelConfig(**changes),))


def test_nothing_given_is_the_bundled_model_on_one_and_one_replica(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config == ClusterConfig()
    assert [(model.model, model.prefill, model.decode) for model in config.models] == [("bundled", 1, 1)]
    assert (config.host, config.routers, config.redis_url, config.ray_address) == ("127.0.0.1", 1, "", "")


def test_the_file_is_read_with_its_models_and_sections(tmp_path: Path) -> None:
    text = 'port = 1000\n[router]\nretry_budget = 3\n[scaler]\nidle_s = 5.0\n[[models]]\nname = "a"\nprefill = 2\nmax_decode = 4\n'
    config = load(tmp_path, text)
    assert config.port == 1000
    assert (config.router, config.scaler) == ({"retry_budget": 3}, {"idle_s": 5.0})
    assert config.models == (ModelConfig(name="a", prefill=2, max_decode=4),)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, 'port = 1000\nhttp_port = 1100\ncluster = "file"\n', {"TANDEM_PORT": "2000", "TANDEM_CLUSTER": "variable"})
    assert (config.port, config.http_port, config.cluster) == (2000, 1100, "variable")


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    assert load(tmp_path, "port = 1000\n", {"TANDEM_PORT": "2000"}, port=3000).port == 3000


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "port = 1000\n", None, port=None, prefill=None).port == 1000


def test_the_names_that_redis_and_ray_users_know_are_read(tmp_path: Path) -> None:
    config = load(tmp_path, None, {"REDIS_URL": "redis://r:1", "RAY_ADDRESS": "ray:2"})
    assert (config.redis_url, config.ray_address) == ("redis://r:1", "ray:2")


def test_a_variable_of_ours_wins_over_the_one_that_others_share(tmp_path: Path) -> None:
    assert load(tmp_path, None, {"REDIS_URL": "redis://r:1", "TANDEM_REDIS_URL": "redis://ours:1"}).redis_url == "redis://ours:1"


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    environ = {"TANDEM_PORT": "", "TANDEM_HOST": "", "REDIS_URL": ""}
    assert load(tmp_path, "port = 1000\n", environ) == ClusterConfig(port=1000)


def test_a_variable_that_is_no_number_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, None, {"TANDEM_ROUTERS": "two"}) == "TANDEM_ROUTERS must be a number, got 'two'"


def test_flags_of_a_model_change_the_only_model_and_keep_the_rest_of_it(tmp_path: Path) -> None:
    config = load(tmp_path, '[[models]]\nname = "a"\ndtype = "float32"\n', None, prefill=2, max_prefill=3)
    assert config.models == (ModelConfig(name="a", dtype="float32", prefill=2, max_prefill=3),)


def test_a_flag_of_a_model_is_refused_where_the_file_has_several(tmp_path: Path) -> None:
    message = refused(tmp_path, TWO_MODELS, None, kv_cache_bytes=64 * MIB)
    assert message.startswith("--kv-cache-bytes is for one model")
    assert "cluster.toml has several" in message
    assert [model.name for model in load(tmp_path, TWO_MODELS, None, port=1).models] == ["a", "b"]


def test_a_file_without_any_model_is_refused_whatever_the_flags_say(tmp_path: Path) -> None:
    for flags in ({}, {"prefill": 2}):
        assert refused(tmp_path, "models = []\n", None, **flags) == "models: from 1 to 64 models, got 0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rooters = 2\n", "unknown key 'rooters'; the nearest valid one is 'routers'"),
        ("rooters = 2\n", ", and all are cluster, host, port, "),
        ("_path = 'x'\n", "unknown key '_path'"),
        ("[[models]]\nprefil = 2\n", "models[0].unknown key 'prefil'; the nearest valid one is 'prefill'"),
        ('"" = 2\n', "unknown key ''; the nearest valid one is "),
        ("routers = '2'\n", "routers must be a whole number, got '2'"),
        ("routers = true\n", "routers must be a whole number, got True"),
        ("routers = 1.0\n", "routers must be a whole number, got 1.0"),
        ("host = 1\n", "host must be text, got 1"),
        ("router = 1\n", "router must be a table, got 1"),
        ("models = 1\n", "models must be a list of tables: [[models]]"),
        ("models = [1]\n", "models must be a list of tables: [[models]]"),
        ("[models]\nprefill = 1\n", "models must be a list of tables: [[models]]"),
        ("[[models]]\nmax_prefill = 'x'\n", "models[0].max_prefill must be a whole number, got 'x'"),
        ("[[models]]\ngpus_per_replica = false\n", "models[0].gpus_per_replica must be a number, got False"),
        ("routers = \n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(str(tmp_path / "cluster.toml"))
    assert words in message


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    for name, words in (("bytes.toml", "is not TOML"), ("none.toml", "cannot read .*: No such file")):
        with pytest.raises(ConfigError, match=words):
            load_cluster_config(tmp_path / name, {}, {})


def test_a_whole_number_is_a_number_too(tmp_path: Path) -> None:
    model = load(tmp_path, "[[models]]\ngpus_per_replica = 1\n").models[0]
    assert (model.gpus_per_replica, type(model.gpus_per_replica)) == (1.0, float)


def test_the_bounds_of_a_pool_are_its_size_at_the_start_unless_said_otherwise() -> None:
    model = ModelConfig(prefill=2, decode=3, min_prefill=1, max_decode=5)
    assert model.bounds(Role.PREFILL) == (1, 2)
    assert model.bounds(Role.DECODE) == (3, 5)
    assert ModelConfig(prefill=0, decode=1, min_prefill=0).bounds(Role.PREFILL) == (0, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(cluster="-a"), "cluster '-a' must have"),
        (changed(cluster="Ab"), "cluster 'Ab' must have"),
        (changed(cluster="a" * 41), "must have 1 to"),
        (changed(host=""), "host must not be empty"),
        (changed(port=-1), r"port must be from 0 to 65535 \(routers = 1\), got -1"),
        (changed(port=65_535, routers=2), r"port must be from 0 to 65534 \(routers = 2\), got 65535"),
        (changed(http_port=65_536), "http_port must be from 0 to 65535"),
        (changed(port=8470, http_port=8480, routers=11), r"8470 and http_port 8480 must be at least 11 apart"),
        (changed(port=8480, http_port=8480), "must be at least 1 apart"),
        (changed(routers=0), "routers must be from 1 to 16, got 0"),
        (changed(autoscalers=9), "autoscalers must be from 1 to 8, got 9"),
        (changed(models=(ModelConfig(),) * 65), "from 1 to 64 models, got 65"),
        (changed(store_capacity_bytes=1), "store_capacity_bytes must be at least"),
        (with_model(prefill=1001), r"models\[0\]\.prefill must be from 0 to 1000, got 1001"),
        (with_model(min_decode=-1), r"models\[0\]\.min_decode must be from 0 to 1000"),
        (with_model(prefill=1, min_prefill=2), "prefill = 1 is outside min_prefill = 2 and max_prefill = 2"),
        (with_model(decode=3, max_decode=2), "decode = 3 is outside min_decode = 3 and max_decode = 2"),
        (with_model(prefill=0, decode=0), "are both 0: at least one replica is needed"),
        (with_model(kv_cache_bytes=1), "kv_cache_bytes must be at least"),
        (with_model(name="a b"), "name 'a b' must have"),
        (with_model(cpus_per_replica=-0.5), "cpus_per_replica must be a number and not negative"),
        (with_model(gpus_per_replica=float("nan")), "gpus_per_replica must be a number and not negative"),
        (with_model(cpus_per_replica=float("inf")), "cpus_per_replica must be a number and not negative"),
        (with_model(max_num_seqs=0), "max_num_seqs must be at least 1"),
        (with_model(context_tokens=0), "context_tokens must be at least 1, got 0"),
        (with_model(dtype="float8"), r"models\[0\]\.dtype 'float8' is not known; valid are auto, float32, bfloat16, float16, float, half"),
        (with_model(engine="vlm"), r"models\[0\]\.engine 'vlm' is not known; valid are vllm, simulated"),
        (with_model(step_profile={"base_s": 1.0}), "are for engine = 'simulated', and it is 'vllm'"),
        (with_model(engine="simulated", step_profile={"bases": 1.0}), r"models\[0\]\.step_profile\.unknown key 'bases'; .* 'base_s'"),
        (with_model(engine="simulated", step_profile={"slowdown": 0.0}), r"step_profile\.slowdown must be above 0"),
        (with_model(engine="simulated", slowdowns={"a": "x"}), r"models\[0\]\.slowdowns\.a must be a number above 0, got 'x'"),
        (with_model(engine="simulated", slowdowns={"a": True}), "must be a number above 0, got True"),
        (with_model(engine="simulated", slowdowns={"a": 0}), "must be a number above 0, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(config: ClusterConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.validate()


@pytest.mark.parametrize(
    "config",
    [
        changed(),
        changed(port=0, http_port=0, routers=16),
        changed(port=65_534, http_port=65_532, routers=2),
        with_model(prefill=0, decode=0, max_decode=1),
        with_model(prefill=0, decode=1),
        with_model(name="meta-llama/Llama-3.1:8b", context_tokens=1),
        with_model(engine="simulated", step_profile={"base_s": 1, "kv_blocks": 100}, slowdowns={"m-decode-0": 2}),
    ],
)
def test_what_makes_sense_is_taken(config: ClusterConfig) -> None:
    config.validate()


def test_a_configuration_comes_back_from_json_as_it_was() -> None:
    models = (ModelConfig(name="a", gpus_per_replica=0.5, min_prefill=0), ModelConfig(name="b", context_tokens=128))
    config = ClusterConfig(cluster="c", models=models, router={"retry_budget": 1}, scaler={"idle_s": 2.5})
    assert cluster_config_from_json(config.to_json()) == config
    assert cluster_config_from_json(replace(config, models=()).to_json()).models == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"models": 1}', '{"speed": 1}'])
def test_json_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        cluster_config_from_json(text)


def test_a_section_names_where_it_was_wrong() -> None:
    with pytest.raises(
        ConfigError, match=r"^here: unknown key 'dtypes'; the nearest valid one is 'dtype', and all are model, name, .*, faults$"
    ):
        read_section(ModelConfig, {"dtypes": "x"}, "here: ")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: Colour = Colour.RED


def test_a_choice_is_read_from_its_word_and_another_word_is_answered_with_those_there_are() -> None:
    assert read_section(Paint, {"colour": "blue"}, "").colour is Colour.BLUE
    for value in ("green", 1, ["red"]):
        with pytest.raises(ConfigError, match=r"^here: colour must be red or blue, got "):
            read_section(Paint, {"colour": value}, "here: ")


def test_the_file_it_was_read_from_is_known_and_does_not_travel(tmp_path: Path) -> None:
    config = load(tmp_path, "port = 1000\n")
    assert config.path == tmp_path / "cluster.toml"
    assert cluster_config_from_json(config.to_json()).path is None
    assert load(tmp_path).path is None


def test_a_slow_replica_has_a_profile_of_its_own() -> None:
    model = ModelConfig(engine="simulated", step_profile={"base_s": 0.5, "slowdown": 1.5}, slowdowns={"m-decode-1": 3.0})
    assert model.profile_of("m-decode-0") == {"base_s": 0.5, "slowdown": 1.5}
    assert model.profile_of("m-decode-1") == {"base_s": 0.5, "slowdown": 3.0}


def test_many_simulated_replicas_fit_where_few_real_ones_do() -> None:
    assert ModelConfig().declared_cpus == 0.25
    assert 100 * ModelConfig(engine="simulated").declared_cpus <= 2
    assert ModelConfig(engine="simulated", cpus_per_replica=1.0).declared_cpus == 1.0


def test_slowdowns_are_read_by_replica() -> None:
    assert parse_slowdowns(["m-decode-0=2", "m-prefill-1=0.5"]) == {"m-decode-0": 2.0, "m-prefill-1": 0.5}


@pytest.mark.parametrize("text", ["", "2", "m-decode-0", "m-decode-0=fast", "=2"])
def test_a_slowdown_without_replica_or_factor_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not REPLICA=FACTOR"):
        parse_slowdowns([text])
