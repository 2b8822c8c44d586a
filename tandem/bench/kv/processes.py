"""The two sides of a store under test as processes: commands out, answers in, an end to each wait. Must not measure."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_START_S = 60.0  # Ray takes ten on two busy cores
_COMMAND_S = 120.0
_END_S = 10.0
_READ_BYTES = 1 << 20
_LAST_WORDS_CHARS = 300

# Makes packages out of folders without running their __init__, which may want what a peer's environment does not have.
_BOOT = """
import sys, types
for name, folder in {folders!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [folder]
"""


class SideError(Exception):
    """A side that did not start, failed or went silent; `is_missing`: the package it needs is not installed."""

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class Sides(Protocol):
    """A writer and a reader of one kind of store; some have more of each, by number."""

    def call(self, role: str, **command: Any) -> dict[str, Any]:
        """Sends a command to "writer" or "reader" and returns its answer; raises SideError."""


class SideProcess:
    """One process that answers JSON lines. Its stderr goes to a file without a name, for its last words."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._pending = b""
        self.pid = 0
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the bench
            )
        except OSError as error:
            self._errors.close()
            raise SideError(f"cannot run {arguments[0]}: {error.strerror}") from error
        self.pid = self._process.pid

    def start(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sends the first line and returns what the process says of itself."""
        self.send(config)
        return self.answer(_START_S)

    def call(self, **command: Any) -> dict[str, Any]:
        """One command and its answer."""
        self.send(command)
        return self.answer()

    def send(self, command: Mapping[str, Any]) -> None:
        """Does not wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SideError(f"a side has ended: {self._last_words()}") from error

    def answer(self, timeout_s: float = _COMMAND_S) -> dict[str, Any]:
        """The next answer; raises SideError where there is none in time, or the answer is an error."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            if not select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise SideError(f"a side did not answer in {timeout_s:g} s")
            part = os.read(descriptor, _READ_BYTES)
            if not part:
                raise SideError(f"a side has ended: {self._last_words()}")
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SideError(found["error"], is_missing=found.get("is_missing", False))
        return found

    def close(self) -> None:
        """The end of its stdin ends it; SIGKILL where that takes long."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not sent yet cannot be sent any more
                stream.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = " ".join(self._errors.read().decode(errors="replace").split())
        return text[-_LAST_WORDS_CHARS:] or "it said nothing"


class ProcessSides:
    """One process each, by role."""

    def __init__(self, processes: Mapping[str, SideProcess]) -> None:
        self.processes = processes

    def call(self, role: str, **command: Any) -> dict[str, Any]:
        """One command and its answer."""
        return self.processes[role].call(**command)


def module_command(module: str) -> list[str]:
    """Runs a module of ours in this interpreter."""
    return [sys.executable, "-m", module]


def foreign_command(interpreter: str, code: str) -> list[str]:
    """Runs `code` in another environment's interpreter, where of ours only `tandem.bench.kv` can be imported."""
    here = Path(__file__).resolve().parent
    folders = {"tandem": str(here.parent.parent), "tandem.bench": str(here.parent), "tandem.bench.kv": str(here)}
    return [interpreter, "-c", _BOOT.format(folders=folders) + code]


@contextmanager
def running_sides(
    command: Sequence[str],
    config: Mapping[str, Any],
    roles: Sequence[str] = ("writer", "reader"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[ProcessSides, dict[str, Any]]]:
    """Starts one process a role, and what the last one says of itself; ends them all."""
    processes: dict[str, SideProcess] = {}
    said: dict[str, Any] = {}
    try:
        for role in roles:
            processes[role] = SideProcess(command, environment)
            said = processes[role].start(config)
        yield ProcessSides(processes), said
    finally:
        for process in processes.values():
            process.close()
