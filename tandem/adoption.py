"""Finding the process of a replica that its last supervisor has left behind, and taking it over.

A process that does not answer, or runs with another configuration, is ended: afterwards the replica may be started anew.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from dataclasses import replace

from tandem.config import ReplicaConfig
from tandem.custody import OWNED, adopt_socket, claim_file
from tandem.errors import ConfigError, Reason
from tandem.hang import LOOK_S, HangJudge, is_stopped
from tandem.launch import ReplicaProcess
from tandem.tether import is_held

logger = logging.getLogger(__name__)

_RETRY_S = 0.1
_OWNED_S = 12.0  # a predecessor may be dying, or be stopped: then the replica gives it up after 5 s
_SILENT_LOOKS = 15  # as many seconds as a supervised replica may be silent
_ABSENT_S = 300.0  # one that was starting when its supervisor died, as long as any start may take


async def try_adopt(config: ReplicaConfig) -> ReplicaProcess | None:
    """The replica's living process, where it runs with this configuration; None where none lives any more, and one may be started.

    Raises ConfigError where it belongs to a supervisor that lives.
    """
    if not config.runtime_dir:
        return None
    began_s = looked_s = time.monotonic()
    judge = HangJudge(silent_looks=_SILENT_LOOKS)
    while is_held(claim_file(config)):
        is_silent, waited_s = False, time.monotonic() - began_s
        try:
            async with asyncio.timeout(LOOK_S):
                met = await _try_meet(config)
            if met is not None:
                process, is_same = met
                if is_same:
                    logger.info("replica_adopted replica_id=%s pid=%d", config.replica_id, process.pid)
                    return process
                logger.info("replica_not_as_wanted replica_id=%s pid=%d", config.replica_id, process.pid)
                await process.stop()
            elif waited_s > _OWNED_S:
                raise ConfigError(f"replica {config.replica_id} has another supervisor", reason=Reason.START_FAILED)
        except TimeoutError:
            is_silent = True
        except OSError:  # it has not come as far as its socket, or is just going
            pass
        if time.monotonic() - looked_s >= LOOK_S:
            looked_s = time.monotonic()
            _end_if_hung(config, judge, is_silent=is_silent, is_late=waited_s > _ABSENT_S)
        await asyncio.sleep(_RETRY_S)
    return None


def _end_if_hung(config: ReplicaConfig, judge: HangJudge, *, is_silent: bool, is_late: bool) -> None:
    try:
        pid = int(claim_file(config).read_text())
    except (OSError, ValueError):
        return
    why = judge.judge(is_stopped=is_stopped(pid), is_silent=is_silent)
    if why or is_late:
        logger.warning("replica_given_up replica_id=%s pid=%d why=%s", config.replica_id, pid, why or "it never served")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _try_meet(config: ReplicaConfig) -> tuple[ReplicaProcess, bool] | None:
    """Its process, this supervisor's from here on, and whether it is what `config` asks for; None where another supervisor owns it.

    Raises OSError where it cannot be met.
    """
    reader, writer = await asyncio.open_unix_connection(adopt_socket(config))
    try:
        words = (await reader.readline()).decode().split()
        if words == [OWNED]:
            writer.close()
            return None
        if words[:2] != ["replica", "adopted"]:
            raise ConnectionResetError("the replica went before it answered")
        facts = dict(word.split("=", 1) for word in words[2:])
        process = ReplicaProcess(replace(config, incarnation=int(facts["incarnation"])), reader, writer)
    except BaseException:
        writer.close()
        raise
    process.adopt(int(facts["pid"]), facts["address"])
    return process, facts["fingerprint"] == config.fingerprint() and facts["is_ending"] == "0"
