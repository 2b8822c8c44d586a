"""Tenants in a cluster's file and in a router's environment. No message and no JSON may hold a key."""

from pathlib import Path

import pytest

from tandem.cluster_config import ClusterConfig, cluster_config_from_json, load_cluster_config
from tandem.errors import ConfigError
from tandem.tenancy import Tenant, hash_key
from tandem.tenant_config import tenants_from_json, tenants_to_json

SECRET = "sk-secret"


def load(folder: Path, text: str, **environ: str) -> ClusterConfig:
    path = folder / "cluster.toml"
    path.write_text(text)
    return load_cluster_config(path, {}, environ)


def refused(folder: Path, text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, **environ)
    assert SECRET not in caught.value.message
    return caught.value.message


def test_a_file_names_tenants_with_their_keys_shares_and_limits(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f'[tenants.bob]\nkeys = ["{SECRET}"]\n[tenants.alice]\nkey_env = "KEY_A"\nkey_sha256 = ["{hash_key("b")}"]\nweight = 3\n'
        "prompt_tokens_per_minute = 100\noutput_tokens_per_minute = 50\nmax_running_requests = 4\nis_operator = true\n",
        KEY_A="sk-a",
    )
    assert config.tenants == (
        Tenant(
            name="alice",
            key_sha256=(hash_key("b"), hash_key("sk-a")),
            weight=3.0,
            prompt_tokens_per_minute=100,
            output_tokens_per_minute=50,
            max_running_requests=4,
            is_operator=True,
        ),
        Tenant(name="bob", key_sha256=(hash_key(SECRET),)),
    )


def test_what_is_sent_to_other_processes_holds_hashes_only(tmp_path: Path) -> None:
    config = load(tmp_path, f'[tenants.bob]\nkeys = ["{SECRET}"]\nweight = 2.5\n')
    assert SECRET not in config.to_json() + repr(config) + tenants_to_json(config.tenants)
    assert cluster_config_from_json(config.to_json()) == config
    assert tenants_from_json(tenants_to_json(config.tenants)) == config.tenants


def test_no_tenants_are_no_words_at_all() -> None:
    assert tenants_to_json(()) == ""
    assert tenants_from_json("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'tenants = "{SECRET}"\n', "tenants must be tables: [tenants.NAME]"),
        (f'[tenants]\nbob = "{SECRET}"\n', "tenants must be tables: [tenants.NAME]"),
        (f'[[tenants]]\nkeys = ["{SECRET}"]\n', "tenants must be tables: [tenants.NAME]"),
        (f'[tenants.bob]\nkeys = "{SECRET}"\n', "tenants.bob.keys must be a list of texts"),
        (f'[tenants.bob]\nkeys = [["{SECRET}"]]\n', "tenants.bob.keys must be a list of texts"),
        (f'[tenants.bob]\nkey_sha256 = "{SECRET}"\n', "tenants.bob.key_sha256 must be a list of texts"),
        (f'[tenants.bob]\nkey_env = ["{SECRET}"]\n', "tenants.bob.key_env must be the name of a variable"),
        (f'[tenants.bob]\nkey_env = "{SECRET}"\n', "tenants.bob.key_env names a variable that the environment does not have"),
        (f'[tenants.bob]\nkey = ["{SECRET}"]\n', "tenants.bob.unknown key 'key'; the nearest valid one is 'keys'"),
        (f'[tenants.bob]\nkeys = ["{SECRET}"]\nweigth = 2\n', "unknown key 'weigth'; the nearest valid one is 'weight'"),
        (f'[tenants.bob]\nkeys = ["{SECRET}"]\nmax_running_requests = 1.5\n', "max_running_requests must be a whole number, got 1.5"),
        (f'[tenants.bob]\nkeys = ["{SECRET} "]\n', "tenants.bob.keys: a key has 1 to 512 printable ASCII characters and no space"),
        ('[tenants.bob]\nkeys = [""]\n', "tenants.bob.keys: a key has 1 to 512"),
        (f'[tenants.bob]\nkey_sha256 = ["{SECRET}"]\n', "tenants.bob.key_sha256 must have 64"),
        ("[tenants.bob]\nweight = 2\n", "tenants.bob has no key"),
        (f'[tenants.a]\nkeys = ["{SECRET}"]\n[tenants.b]\nkeys = ["{SECRET}"]\n', "tenants.b has a key that tenants.a has"),
    ],
)
def test_a_wrong_table_is_refused_by_its_key_and_without_its_value(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text)


def test_a_variable_with_a_key_that_cannot_travel_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, '[tenants.bob]\nkey_env = "KEY"\n', KEY=f"{SECRET}\n")
    assert "tenants.bob.key_env: a key has" in message


@pytest.mark.parametrize("text", [f"{SECRET}", "[]", f'["{SECRET}"]', f'{{"bob": {{"keys": "{SECRET}"}}}}', '{"bob": {}}'])
def test_an_environment_that_is_none_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tenants_from_json(text)
    assert SECRET not in caught.value.message
