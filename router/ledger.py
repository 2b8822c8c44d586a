"""How much work each replica has, by its own reports corrected by what this router knows and the reports do not say yet.

view = the replica's last totals + own dispatches it has not stamped ACCEPTED - own requests that ended here and are not stamped FINISHED.
Stamps come on one ordered stream with the totals, so each request is counted exactly once. Must not choose or forget requests.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.domain import ReplicaId, RequestId, Stamp, StampKind, WorkerLoad

BookingKey = tuple[RequestId, int]  # request and attempt
# From one report to the next: hours of them at 100 Hz, and a stream, which counts from 0, loses none. A leap beyond is a wrong number;
# believed, it would have every true report after it dropped.
_MOST_LOST_REPORTS = 1_000_000


class ReplicaLoad(NamedTuple):
    """One replica's work: all routers', this one's own to the latest."""

    pending_prefill_tokens: int = 0
    running_requests: int = 0
    kv_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class _Booking:
    prefill_tokens: int
    kv_tokens: int
    is_accepted: bool = False
    is_finished: bool = False  # stamped FINISHED before it was released here
    is_unsure: bool = False  # a report was lost since: it may have been accepted
    has_output: bool = False
    released_s: float | None = None

    @property
    def sign(self) -> int:
        """How often the booking counts on top of the totals: +1, 0 or -1."""
        if self.is_finished:
            return 0
        if self.released_s is None:
            return 0 if self.is_accepted else 1
        return -1 if self.is_accepted else 0


@dataclass(slots=True, kw_only=True)
class _Account:
    incarnation: int
    sequence: int | None = None
    load: WorkerLoad = field(default_factory=WorkerLoad)
    bookings: dict[BookingKey, _Booking] = field(default_factory=dict)
    prefill_tokens: int = 0  # the three corrections: sums of sign x booking
    requests: int = 0
    kv_tokens: int = 0
    view: ReplicaLoad | None = None  # as it is now, once it was asked for

    def count(self, booking: _Booking, times: int) -> None:
        sign = booking.sign * times
        if not sign:
            return
        self.view = None
        self.prefill_tokens += sign * booking.prefill_tokens
        self.requests += sign
        self.kv_tokens += sign * booking.kv_tokens


class Ledger:
    """Bookings and totals of every replica. Replicas it does not know are ignored: their loss comes before late news of them."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._accounts: dict[ReplicaId, _Account] = {}
        self._released: deque[tuple[float, _Account, BookingKey]] = deque()  # when, in this order; some are settled since

    def add_replica(self, replica_id: ReplicaId, incarnation: int) -> None:
        """Opens an empty account; one of another incarnation is closed with all its bookings."""
        self._accounts[replica_id] = _Account(incarnation=incarnation)

    def remove_replica(self, replica_id: ReplicaId) -> None:
        """Closes the account with all its bookings."""
        self._accounts.pop(replica_id, None)

    def book(self, replica_id: ReplicaId, key: BookingKey, *, prefill_tokens: int, kv_tokens: int) -> None:
        """Counts a dispatch at once. Raises KeyError for an unknown replica, AssertionError for a second booking."""
        account = self._accounts[replica_id]
        old = account.bookings.pop(key, None)
        if old is not None:
            assert old.released_s is not None, f"{key} is booked twice on {replica_id}"
            account.count(old, -1)
        account.bookings[key] = booking = _Booking(prefill_tokens=prefill_tokens, kv_tokens=kv_tokens)
        account.count(booking, 1)

    def add_output(self, replica_id: ReplicaId, key: BookingKey, tokens: int) -> None:
        """The request has `tokens` more output tokens: its prompt is computed and its KV has grown."""
        found = self._find(replica_id, key)
        if found is None:
            return
        account, booking = found
        account.count(booking, -1)
        booking.prefill_tokens = 0
        booking.kv_tokens += tokens
        booking.has_output = True
        booking.is_accepted = booking.is_accepted or booking.is_unsure
        account.count(booking, 1)

    def release(self, replica_id: ReplicaId, key: BookingKey, now_s: float) -> None:
        """The request ended here. Its part of the totals is subtracted until FINISHED comes; again is no harm."""
        found = self._find(replica_id, key)
        if found is None or found[1].released_s is not None:
            return
        account, booking = found
        account.count(booking, -1)
        booking.released_s = now_s
        account.count(booking, 1)
        if booking.is_finished:
            del account.bookings[key]
        else:
            self._released.append((now_s, account, key))

    def report(self, replica_id: ReplicaId, incarnation: int, sequence: int, load: WorkerLoad | None, stamps: Iterable[Stamp] = ()) -> bool:
        """Takes a replica's totals (None: as before) and stamps.

        False, and nothing is believed: of another incarnation, no later than the last report, or too far beyond it to be true.
        """
        account = self._accounts.get(replica_id)
        if account is None or account.incarnation != incarnation or sequence > (account.sequence or 0) + _MOST_LOST_REPORTS:
            return False
        if account.sequence is not None and sequence <= account.sequence:
            return False
        if account.sequence is not None and sequence > account.sequence + 1:
            self._doubt(account)
        account.sequence = sequence
        if load is not None:
            account.load, account.view = load, None
        for stamp in stamps:
            self._stamp(account, stamp)
        return True

    def _stamp(self, account: _Account, stamp: Stamp) -> None:
        key = (stamp.request_id, stamp.attempt)
        booking = account.bookings.get(key)
        if booking is None:
            return
        account.count(booking, -1)
        if stamp.kind is StampKind.ACCEPTED:
            booking.is_accepted = True
            account.count(booking, 1)
        elif booking.released_s is None:
            booking.is_finished = True
        else:
            del account.bookings[key]

    def _doubt(self, account: _Account) -> None:
        """After a lost report, with stamps perhaps: what has output was accepted, what was released has likely been finished."""
        for key, booking in list(account.bookings.items()):
            account.count(booking, -1)
            booking.is_unsure = True
            if booking.released_s is not None:
                del account.bookings[key]
                continue
            booking.is_accepted = booking.is_accepted or booking.has_output
            account.count(booking, 1)

    def expire(self, now_s: float) -> None:
        """Gives up waiting for the stamps of requests released longer than the settle time ago; O(those)."""
        released = self._released
        while released and now_s - released[0][0] >= self._settle_s:
            released_s, account, key = released.popleft()
            booking = account.bookings.get(key)
            if booking is not None and booking.released_s == released_s:
                account.count(booking, -1)
                del account.bookings[key]

    def view(self, replica_id: ReplicaId) -> ReplicaLoad:
        """The replica's work now; nothing is negative. Raises KeyError for an unknown replica."""
        account = self._accounts[replica_id]
        view = account.view
        if view is None:
            load = account.load
            view = account.view = ReplicaLoad(
                pending_prefill_tokens=max(0, load.pending_prefill_tokens + account.prefill_tokens),
                running_requests=max(0, load.running_requests + account.requests),
                kv_tokens=max(0, load.kv_tokens + account.kv_tokens),
            )
        return view

    def reported(self, replica_id: ReplicaId) -> WorkerLoad:
        """The replica's last totals as they came. Raises KeyError for an unknown replica."""
        return self._accounts[replica_id].load

    def open_bookings(self, replica_id: ReplicaId) -> set[BookingKey]:
        """Bookings that are not released. Raises KeyError for an unknown replica."""
        return {key for key, booking in self._accounts[replica_id].bookings.items() if booking.released_s is None}

    def settling(self) -> int:
        """Bookings released and still remembered, on all replicas."""
        return sum(booking.released_s is not None for account in self._accounts.values() for booking in account.bookings.values())

    def check_invariants(self) -> None:
        """The running sums are the sums; O(bookings). Raises AssertionError."""
        for replica_id, account in self._accounts.items():
            fresh = _Account(incarnation=account.incarnation)
            for booking in account.bookings.values():
                fresh.count(booking, 1)
            sums = (account.prefill_tokens, account.requests, account.kv_tokens)
            assert sums == (fresh.prefill_tokens, fresh.requests, fresh.kv_tokens), f"{replica_id}: {sums} is not the sum of its bookings"

    def _find(self, replica_id: ReplicaId, key: BookingKey) -> tuple[_Account, _Booking] | None:
        account = self._accounts.get(replica_id)
        if account is None or key not in account.bookings:
            return None
        return account, account.bookings[key]
