"""Keeps one member registered: renews its lease, tells the register of changes, gives the lease back at the end.

Must not stop the process: what to do where a newer incarnation has taken over is the caller's word (`on_fenced`).
"""

import asyncio
import logging
from collections.abc import Callable

from tandem.errors import PreconditionError, UnavailableError
from tandem.membership import RENEW_S, Member, Register

RETRY_S = 0.2  # after a failure: a register that was restarted empty knows its members again soon
LEAVE_S = 1.0  # a process that ends waits no longer for the register; its lease runs out by itself

logger = logging.getLogger(__name__)


class Registrar:
    """The lease of `member`. `on_fenced` is called once, at most, where a newer incarnation holds it."""

    def __init__(self, register: Register, member: Member, on_fenced: Callable[[], None]) -> None:
        self._register = register
        self._member = member
        self._on_fenced = on_fenced
        self._is_changed = asyncio.Event()
        self._is_lost = False

    def update(self, member: Member) -> None:
        """Registers a change of the same member at once (or as soon as the register is there); only the last one counts."""
        self._member = member
        self._is_changed.set()

    async def run(self) -> None:
        """Renews until it is cancelled, then gives the lease back within LEAVE_S; returns where the member is fenced."""
        try:
            while await self._try_renew():
                pause_s = RETRY_S if self._is_lost else RENEW_S
                try:
                    async with asyncio.timeout(pause_s):
                        await self._is_changed.wait()
                except TimeoutError:
                    pass
        except asyncio.CancelledError:
            leaving = asyncio.create_task(self._leave(), name="leave the register")
            await asyncio.shield(leaving)
            raise

    async def _try_renew(self) -> bool:
        """Whether the member is still the one to be registered."""
        self._is_changed.clear()
        member = self._member
        try:
            await self._register.renew(member)
        except UnavailableError as error:
            if not self._is_lost:
                self._is_lost = True
                logger.warning("registration_lost member_id=%s error=%s", member.member_id, error)
        except PreconditionError as error:
            logger.warning("registration_fenced member_id=%s incarnation=%d error=%s", member.member_id, member.incarnation, error)
            self._on_fenced()
            return False
        else:
            if self._is_lost:
                self._is_lost = False
                logger.info("registration_back member_id=%s", member.member_id)
        return True

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._register.leave(self._member)
        except (UnavailableError, TimeoutError) as error:
            logger.info("registration_left_to_expire member_id=%s error=%s", self._member.member_id, error)
