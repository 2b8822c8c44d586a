"""A model is found or the error says what to do, and its digest covers every byte that decides its KV."""

from pathlib import Path

import pytest

from tandem.engine.model_files import BUNDLED_MODEL, bundled_model_path, digest_model, resolve_model, served_name
from tandem.errors import ConfigError, Reason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model-1.safetensors").write_bytes(b"one")
    (path / "model-2.safetensors").write_bytes(b"two")
    return path


def test_a_folder_is_a_model(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder.resolve()


def test_the_bundled_model_needs_no_path() -> None:
    assert resolve_model(BUNDLED_MODEL) == bundled_model_path().resolve()


@pytest.mark.parametrize("model", ["no-such-model", "./no/such", "~/no-such-model-folder", "a/b/c"])
def test_a_missing_folder_is_told_with_what_may_be_given(model: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder; give a local folder, a hub name \(owner/name\) or 'bundled'") as caught:
        resolve_model(model)
    assert caught.value.reason is Reason.BAD_MODEL
    assert model in caught.value.message


def test_a_folder_without_a_configuration_is_told_so(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json in this folder; give the folder of a model"):
        resolve_model(str(folder))


def test_a_folder_without_weights_is_told_so(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no weights .* in this folder; copy them there"):
        resolve_model(str(folder))


def test_clients_call_a_model_by_its_folders_name(folder: Path) -> None:
    assert served_name(str(folder)) == "my-model"
    assert served_name(f"{folder}/.") == "my-model"


@pytest.mark.parametrize("model", [BUNDLED_MODEL, "owner/name"])
def test_clients_call_a_model_that_is_no_folder_by_its_own_name(model: str) -> None:
    assert served_name(model) == model


@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors", "model-2.safetensors"])
def test_the_digest_changes_with_every_file(folder: Path, name: str) -> None:
    before = digest_model(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert digest_model(folder) != before


def test_the_digest_knows_where_one_file_ends_and_the_next_begins(folder: Path) -> None:
    before = digest_model(folder)
    (folder / "model-1.safetensors").write_bytes(b"onet")
    (folder / "model-2.safetensors").write_bytes(b"wo")
    assert digest_model(folder) != before


def test_the_digest_does_not_depend_on_where_the_model_lies(folder: Path) -> None:
    before = digest_model(folder)
    assert digest_model(folder.rename(folder.with_name("moved"))) == before


def test_the_digest_leaves_out_what_does_not_decide_the_kv(folder: Path) -> None:
    before = digest_model(folder)
    (folder / "README.md").write_text("changed")
    assert digest_model(folder) == before
