"""A replica's configuration travels as JSON."""

from dataclasses import replace

import pytest

from tandem.config import EngineConfig, ReplicaConfig, replica_config_from_json

CONFIG = ReplicaConfig(
    replica_id="decode-0",
    role="decode",
    incarnation=2**62,
    served_model="m",
    engine=EngineConfig(model="m", context_tokens=128, is_kv_transfer_on=False, faults="kv_put.drop_every=2"),
    port=1,
    watch_interval_s=0.25,
)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, engine=EngineConfig())])
def test_a_configuration_comes_back_as_it_was(config: ReplicaConfig) -> None:
    assert replica_config_from_json(config.to_json()) == config


def test_a_configuration_is_one_line() -> None:
    assert "\n" not in replace(CONFIG, replica_id="a\nb").to_json()


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="'speed'"):
        replica_config_from_json(CONFIG.to_json().replace('"port"', '"speed"'))
    with pytest.raises(TypeError, match="'size'"):
        replica_config_from_json(CONFIG.to_json().replace('"dtype"', '"size"'))
