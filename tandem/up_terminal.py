"""`tandem up` in a terminal: what is waited for, the endpoints, the signals that end it.

Starts nothing itself: `tandem.up.Platform` does.
"""

import asyncio
import contextlib
import signal
import time

from rich.console import Console

from autoscaler.pool import model_name
from tandem.cluster_config import SIMULATED, ClusterConfig
from tandem.up import Platform

_STATUS_S = 0.25


def run_up(config: ClusterConfig) -> None:
    """Starts the cluster, prints its endpoints, serves until Ctrl-C or SIGTERM. Raises ConfigError."""
    asyncio.run(_run_up(config, Console()))


async def _run_up(config: ClusterConfig, console: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started_s = time.monotonic()
    stage = ""
    is_serving = False

    def progress(line: str) -> None:
        nonlocal stage
        if line != stage and (not console.is_terminal or is_serving):
            console.print(f"{time.monotonic() - started_s:6.1f} s  {line}", highlight=False)
        stage = line

    platform = Platform(config, progress)
    try:
        starting = asyncio.create_task(platform.start(), name="start")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
            while not starting.done() and not stopping.done():
                if status is not None:
                    status.update(f"{time.monotonic() - started_s:.0f} s  {stage}")
                await asyncio.wait({starting, stopping}, timeout=_STATUS_S, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            is_serving = True
            _print_ready(console, platform, time.monotonic() - started_s)
            await stopping
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        console.print("stopping", highlight=False)
    finally:
        await platform.stop()


def _print_ready(console: Console, platform: Platform, took_s: float) -> None:
    console.print(f"ready in {took_s:.1f} s: {platform.ready_replicas} replicas, cluster {platform.cluster}", highlight=False)
    for name, addresses in (("gRPC  ", platform.router_addresses), ("HTTP  ", [f"http://{item}" for item in platform.http_addresses])):
        console.print(f"  {name}    {', '.join(addresses)}", highlight=False)
    for model in platform.config.models:
        if model.engine == SIMULATED:
            console.print(f"  engine    simulated for {model_name(model)}: times and texts are made up", highlight=False)
    console.print(f"  logs      {platform.folder}", highlight=False)
    console.print('  try       tandem generate "The for statement"', highlight=False)
    console.print("Ctrl-C stops all of it", highlight=False)
