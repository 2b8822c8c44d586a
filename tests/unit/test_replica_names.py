"""Names of replicas tell their pool, whatever their model is called."""

from pathlib import Path

import pytest

from autoscaler.observation import PoolKey
from autoscaler.pool import ReplicaNames, check_models, model_name
from tandem.cluster_config import ClusterConfig, ModelConfig
from tandem.domain import ModelId, Role
from tandem.errors import ConfigError

LLAMA = ModelConfig(name="meta-llama/Llama-3.1:8b")


def pool(model: str, role: Role = Role.DECODE) -> PoolKey:
    return PoolKey(model=ModelId(model), role=role)


def test_a_model_is_called_as_it_is_named_or_as_its_folder_or_as_the_hub_does(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert model_name(LLAMA) == "meta-llama/Llama-3.1:8b"
    assert model_name(ModelConfig(model=str(tmp_path / "tiny"))) == "tiny"
    assert model_name(ModelConfig(model="owner/name")) == "owner/name"


def test_a_name_is_the_lowest_number_that_is_free() -> None:
    names = ReplicaNames([LLAMA])
    assert names.free(pool(LLAMA.name), []) == "meta-llama-llama-3-1-8b-decode-0"
    taken = [f"meta-llama-llama-3-1-8b-decode-{number}" for number in (0, 2)]
    assert names.free(pool(LLAMA.name), taken) == "meta-llama-llama-3-1-8b-decode-1"
    assert names.free(pool(LLAMA.name, Role.PREFILL), taken) == "meta-llama-llama-3-1-8b-prefill-0"


def test_a_name_comes_back_as_its_pool() -> None:
    names = ReplicaNames([LLAMA, ModelConfig(name="b")])
    for key in (pool(LLAMA.name), pool("b", Role.PREFILL)):
        assert names.try_parse(names.free(key, [])) == key
        assert model_name(names.config(key)) == key.model


@pytest.mark.parametrize("name", ["agent-0123", "", "b-decode", "b-decode-x", "b-other-0", "decode-0", "c-decode-0", "b-decode-0-1"])
def test_what_is_no_replica_of_a_configured_model_has_no_pool(name: str) -> None:
    assert ReplicaNames([ModelConfig(name="b")]).try_parse(name) is None


def test_models_whose_names_look_alike_have_pools_of_their_own() -> None:
    models = [ModelConfig(name=name) for name in ("a.b", "a-b", "A B".replace(" ", "_"), "...")]
    names = ReplicaNames(models)
    free = [names.free(pool(model.name), []) for model in models]
    assert free == ["a-b-decode-0", "a-b-2-decode-0", "a-b-3-decode-0", "model-decode-0"]
    assert [names.try_parse(name) for name in free] == [pool(model.name) for model in models]


def test_a_model_that_ends_like_a_replica_is_told_from_it() -> None:
    names = ReplicaNames([ModelConfig(name="a"), ModelConfig(name="a-decode-1")])
    for model in ("a", "a-decode-1"):
        assert names.try_parse(names.free(pool(model), [])) == pool(model)


def test_two_models_of_one_name_are_refused() -> None:
    check_models(ClusterConfig(models=(ModelConfig(name="a"), ModelConfig(name="b"))))
    with pytest.raises(ConfigError, match="two models are called 'owner/tiny'"):
        check_models(ClusterConfig(models=(ModelConfig(model="owner/tiny"), ModelConfig(name="owner/tiny"))))
