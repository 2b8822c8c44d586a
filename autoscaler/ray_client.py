"""Ray's own calls, bounded in time: joining a cluster, asking it, ending all actors of one Tandem cluster.

Must not know pools. A call that does not come back keeps a thread, never the process: Ray tries for minutes to reach what is not there.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import ray
from ray.exceptions import RayError

from tandem.cluster_config import ClusterConfig
from tandem.errors import ConfigError, Reason, UnavailableError
from tandem.network import is_loopback

logger = logging.getLogger(__name__)
T = TypeVar("T")

_CONNECT_S = 30.0
_CALL_S = 20.0
_STOP_S = 15.0
_STOP_ALL_S = 45.0
_POLL_S = 0.1


async def ask_ray(call: Callable[[], T], timeout_s: float = _CALL_S) -> T:
    """Runs a call that blocks in a thread of its own. Raises UnavailableError where Ray takes longer, and what the call raises."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)  # type: ignore[arg-type]
        else:
            answer.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except Exception as failure:  # the caller's
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="ask Ray", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as error:
        raise UnavailableError(f"Ray has not answered for {timeout_s:g} s", reason=Reason.START_FAILED) from error


async def join_ray(address: str, config: ClusterConfig) -> None:
    """Makes this process a driver in the cluster's namespace; nothing where it is one. Raises ConfigError."""
    try:
        await ask_ray(lambda: _connect(address, config), _CONNECT_S)
        nodes = await ask_ray(ray.nodes)
    except (ConnectionError, RuntimeError, TimeoutError, RayError, ValueError, UnavailableError) as error:
        raise ConfigError(f"RAY_ADDRESS {address!r}: no Ray cluster answers there ({first_line(error)})") from error
    addresses = sorted({node["NodeManagerAddress"] for node in nodes if node["Alive"]})
    if is_loopback(config.host) and len(addresses) > 1:
        raise ConfigError(
            f"Ray has nodes at {', '.join(addresses)}, which cannot reach host {config.host}: name this machine's address with --host"
        )


def stop_all(address: str, config: ClusterConfig) -> None:
    """Ends every actor of the cluster, on a Ray that is not ours. Blocks; raises what Ray raises where it does not answer."""
    _connect(address, config)
    deadline_s = time.monotonic() + _STOP_ALL_S
    while names := ray.util.list_named_actors():
        agents = {name for name in names if name.startswith("agent-")}
        for group in (set(names) - agents, agents):  # replicas before their node's daemons
            _stop(group)
        if time.monotonic() > deadline_s:
            logger.warning("actors_left names=%s", names)
            return
        time.sleep(_POLL_S)


def _stop(names: Collection[str]) -> None:
    """Asks all of them at once and kills them when they have answered, or the slowest had its time."""
    actors, answers = [], []
    for name in names:
        with contextlib.suppress(ValueError, AttributeError):  # it has just gone, or is not ours
            actors.append(ray.get_actor(name))
            answers.append(actors[-1].stop.remote())
    if answers:
        _, silent = ray.wait(answers, num_returns=len(answers), timeout=_STOP_S)
        if silent:
            logger.warning("actors_not_stopped count=%d", len(silent))
    for actor in actors:
        ray.kill(actor)


def _connect(address: str, config: ClusterConfig) -> None:
    extra = {"_node_ip_address": config.host} if is_loopback(config.host) and not config.ray_address else {}
    ray.init(
        address=address,
        namespace=f"tandem-{config.cluster}",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        ignore_reinit_error=True,
        **extra,
    )


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a log line; of an actor's own error, what that says."""
    error = getattr(error, "cause", None) or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
