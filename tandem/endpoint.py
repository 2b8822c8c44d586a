"""Where a router is: what the caller says, else the environment, else the file that `tandem up` leaves.

Must not connect. The files are in a folder of this user alone, which is checked before it is believed.
"""

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tandem.domain import HOST_PORT
from tandem.errors import ConfigError

ENDPOINT_VARIABLE = "TANDEM_ENDPOINT"
_MAX_FILE_BYTES = 65_536
_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def resolve_endpoint(endpoint: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The router's host:port: the argument, else TANDEM_ENDPOINT, else "grpc" in the newest readable endpoint file.

    Raises ConfigError where what is named is not host:port, or where nothing is.
    """
    environ = os.environ if environ is None else environ
    if endpoint is not None:
        return _host_port("endpoint", endpoint)
    if environ.get(ENDPOINT_VARIABLE):
        return _host_port(ENDPOINT_VARIABLE, environ[ENDPOINT_VARIABLE])
    found = _newest_in(endpoint_folder(environ))
    if found is None:
        raise ConfigError(
            f"no cluster found: start one with `tandem up`, or name a router with --endpoint host:port, endpoint= or {ENDPOINT_VARIABLE}"
        )
    return found


def read_endpoint_file(cluster: str, environ: Mapping[str, str] | None = None) -> dict[str, object] | None:
    """What `<cluster>.json` holds; None where it is not there or damaged."""
    try:
        endpoints = json.loads(_file_of(cluster, environ).read_bytes()[:_MAX_FILE_BYTES])
    except (OSError, ValueError):
        return None
    return endpoints if isinstance(endpoints, dict) else None


def known_clusters(environ: Mapping[str, str] | None = None) -> list[str]:
    """Clusters of this user that have an endpoint file or a folder on this machine, running or not, by name."""
    folder = endpoint_folder(environ)
    if not _is_own(folder):
        return []
    return sorted({path.stem if path.suffix == ".json" else path.name for path in folder.iterdir() if not path.name.startswith(".")})


def endpoint_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of this user's endpoint files; it may not exist."""
    environ = os.environ if environ is None else environ
    runtime_folder = environ.get("XDG_RUNTIME_DIR")
    return Path(runtime_folder) / "tandem" if runtime_folder else Path(f"/tmp/tandem-{os.getuid()}")


def write_endpoint_file(cluster: str, endpoints: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Path:
    """Writes `<cluster>.json`, for this user alone (0600 in a folder of 0700), in one step, and returns its path.

    `endpoints` should hold "grpc": "host:port". Raises ConfigError where the folder is not this user's or cannot be written.
    """
    path = _file_of(cluster, environ)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(path.parent):
            raise ConfigError(f"{path.parent} is not a folder of user {os.getuid()}: remove it, or set XDG_RUNTIME_DIR to another place")
        path.parent.chmod(0o700)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # made with mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(dict(endpoints), file)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write the endpoint file {path}: {error.strerror}") from error
    return path


def remove_endpoint_file(cluster: str, environ: Mapping[str, str] | None = None) -> None:
    """Removes `<cluster>.json`; nothing where it is not there."""
    with suppress(FileNotFoundError):
        _file_of(cluster, environ).unlink()


def _file_of(cluster: str, environ: Mapping[str, str] | None) -> Path:
    if not _CLUSTER.fullmatch(cluster):
        raise ConfigError(f"cluster id {cluster!r} must have 1 to 128 letters, digits, dots, dashes or underscores")
    return endpoint_folder(environ) / f"{cluster}.json"


def _host_port(source: str, text: str) -> str:
    """One router, or several with commas between them: calls go to the first that answers."""
    for part in text.split(","):
        match = HOST_PORT.fullmatch(part)
        if match is None or not 1 <= int(match["port"]) <= 65_535:
            raise ConfigError(f"{source} must be host:port with a port from 1 to 65535, got {text[:200]!r}")
    return text


def _newest_in(folder: Path) -> str | None:
    """The newest usable file's router: ties by name, the damaged passed over."""
    if not _is_own(folder) or folder.stat().st_mode & 0o022:  # what others can write could send prompts anywhere
        return None
    found = [entry for path in folder.glob("*.json") if (entry := _read(path)) is not None]
    return max(found)[-1] if found else None


def _read(path: Path) -> tuple[int, str, str] | None:
    """Time of writing (ns), name and router of one file; None where it cannot be used."""
    try:
        with path.open("rb") as file:
            written_ns = os.fstat(file.fileno()).st_mtime_ns
            endpoints = json.loads(file.read(_MAX_FILE_BYTES))
        return written_ns, path.name, _host_port(str(path), endpoints["grpc"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError):
        return None


def _is_own(folder: Path) -> bool:
    """Whether it is a real folder, no link, of this user."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
