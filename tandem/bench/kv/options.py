"""What `tandem kv bench` is told, and the sizes that follow from it. Must not read files or call anybody."""

from dataclasses import dataclass, replace
from pathlib import Path

from tandem.errors import ConfigError

_KIB, _MIB = 1 << 10, 1 << 20
DEFAULT_CAPACITY_BYTES = 1 << 30
DEFAULT_REPETITIONS = 9
MIN_CAPACITY_BYTES = 32 * _MIB
BATCH_BLOCKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBenchOptions:
    """Settings of one run, which takes some 3.5 GiB of memory beside three times `capacity_bytes`.

    `is_quick`: a look at whether it works; its buffers fit into caches, so its figures mean nothing.
    """

    capacity_bytes: int = DEFAULT_CAPACITY_BYTES  # of each arena
    repetitions: int = DEFAULT_REPETITIONS  # of which the median is taken; one more comes before and does not count
    mooncake_python: Path | None = None  # None: this interpreter
    is_quick: bool = False
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError naming the first option that is wrong."""
        if self.capacity_bytes < MIN_CAPACITY_BYTES:
            raise ConfigError(f"--capacity-bytes must be at least {MIN_CAPACITY_BYTES} (32 MiB), got {self.capacity_bytes}")
        if self.repetitions < 1:
            raise ConfigError(f"--repetitions must be at least 1, got {self.repetitions}")
        if self.mooncake_python is not None and not self.mooncake_python.is_file():
            raise ConfigError(f"--mooncake-python: {self.mooncake_python} is no file; name the Python of the environment that has Mooncake")

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Bytes of a block, by row."""
        return (256 * _KIB,) if self.is_quick else (64 * _KIB, 256 * _KIB, _MIB, 4 * _MIB)

    @property
    def pressed_block_sizes(self) -> tuple[int, ...]:
        """Bytes of a block where the store is full or has many users."""
        return self.block_sizes if self.is_quick else (64 * _KIB, _MIB)

    @property
    def buffer_bytes(self) -> int:
        """What each side moves in a repetition: far more than caches hold, and a quarter of the arena at most."""
        return min((8 if self.is_quick else 256) * _MIB, self.capacity_bytes // 4 // (4 * _MIB) * (4 * _MIB))

    @property
    def peer_bytes(self) -> int:
        """What the slow peers move in a repetition."""
        return min(64 * _MIB, self.buffer_bytes)

    @property
    def memcpy_bytes(self) -> int:
        """Of each buffer of the memcpy bound."""
        return (16 if self.is_quick else 256) * _MIB

    @property
    def single_blocks(self) -> int:
        """Blocks that are put and got one at a time, a repetition."""
        return min(100 if self.is_quick else 500, self.buffer_bytes // (64 * _KIB))


_QUICK_CAPACITY_BYTES = 64 * _MIB
_QUICK_REPETITIONS = 2


def quick_or_given(options: KvBenchOptions, *, is_quick: bool, capacity_bytes: int | None, repetitions: int | None) -> KvBenchOptions:
    """`options` with what was given, and a quick run's or the usual defaults for what was not."""
    usual = (_QUICK_CAPACITY_BYTES, _QUICK_REPETITIONS) if is_quick else (DEFAULT_CAPACITY_BYTES, DEFAULT_REPETITIONS)
    return replace(
        options,
        is_quick=is_quick,
        capacity_bytes=usual[0] if capacity_bytes is None else capacity_bytes,
        repetitions=usual[1] if repetitions is None else repetitions,
    )
