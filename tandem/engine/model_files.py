"""Finding a model's folder, and the digest of the files that decide its KV bytes."""

from pathlib import Path

import xxhash

from tandem.errors import ConfigError, Reason

BUNDLED_MODEL = "bundled"
_READ_BYTES = 1 << 22


def bundled_model_path() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent.parent / "bundled_model"


def resolve_model(model: str) -> Path:
    """The local folder of "bundled", of a path, or of a hub name (owner/name), which is downloaded where it is not cached.

    Raises ConfigError where there is no such model, or a folder without config.json or weights.
    """
    folder = bundled_model_path() if model == BUNDLED_MODEL else Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise ConfigError(
                f"--model {model}: no such folder; give a local folder, a hub name (owner/name) or 'bundled'", reason=Reason.BAD_MODEL
            )
        folder = _download(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: no config.json in this folder; give the folder of a model", reason=Reason.BAD_MODEL)
    if not _weight_files(folder):
        raise ConfigError(f"--model {folder}: no weights (*.safetensors or *.bin) in this folder; copy them there", reason=Reason.BAD_MODEL)
    return folder.resolve()


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"--model {model}: hub names need the huggingface_hub package", reason=Reason.MISSING_PACKAGE) from error
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]))
    except (OSError, ValueError) as error:
        message = f"--model {model}: the hub has no such model or cannot be reached; give a local folder or 'bundled'"
        raise ConfigError(message, reason=Reason.BAD_MODEL) from error


def served_name(model: str) -> str:
    """What clients call the model: "bundled", the folder's name, or the hub name."""
    return model if model == BUNDLED_MODEL or not Path(model).expanduser().exists() else Path(model).expanduser().resolve().name


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")])


def digest_model(folder: Path) -> str:
    """XXH3-128 over configuration and all weights: two models that differ in one byte never share a block.

    Reads every byte once, at the disk's speed.
    """
    digest = xxhash.xxh3_128()
    for path in [folder / "config.json", *_weight_files(folder)]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
