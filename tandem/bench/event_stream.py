"""Server-sent events from bytes: the data of each event, whole. Must not know what the data means."""

from tandem.errors import ProtocolError

_MAX_EVENT_BYTES = 4 * 2**20


class EventStream:
    """Splits a stream of bytes, however it is cut, into the data of its events; comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, payload: bytes) -> list[bytes]:
        """The events that these bytes complete; raises ProtocolError where one grows beyond 4 MiB."""
        *lines, self._rest = (self._rest + payload).split(b"\n")
        events = []
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].strip())
            elif not text and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        if len(self._rest) + sum(map(len, self._data)) > _MAX_EVENT_BYTES:
            raise ProtocolError(f"an event is larger than {_MAX_EVENT_BYTES} bytes")
        return events
