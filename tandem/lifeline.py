"""A lifeline: a descriptor that its supervisor holds the other end of, so that its end says that the supervisor has gone."""

import asyncio
import os


def stop_at_end(lifeline_fd: int, stop: asyncio.Event) -> None:
    """Has the running loop set `stop` once the lifeline has ended; what comes over it before is passed over."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        try:
            has_ended = not os.read(lifeline_fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            has_ended = True
        if has_ended:
            loop.remove_reader(lifeline_fd)
            stop.set()

    loop.add_reader(lifeline_fd, look)
