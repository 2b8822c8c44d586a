"""gRPC channels by address, kept open for the process that calls the same few peers again and again."""

import grpc.aio

from tandem.rpc import open_channel

_MAX_CHANNELS = 1024  # addresses of replicas long gone are dropped, oldest use first


class ChannelPool:
    """Channels of one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def __call__(self, address: str) -> grpc.aio.Channel:
        """The channel to `address`, opened at the first call."""
        channel = self._channels.pop(address, None) or open_channel(address)
        self._channels[address] = channel
        if len(self._channels) > _MAX_CHANNELS:
            del self._channels[next(iter(self._channels))]
        return channel

    async def close(self) -> None:
        """Closes them all."""
        for channel in self._channels.values():
            await channel.close(None)
