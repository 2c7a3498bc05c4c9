"""Which columns a program of the row kernel takes at a time, from the vocabulary size and the type alone."""

from typing import NamedTuple

THREADS = 512  # of a program on a large vocabulary, which has a multiprocessor to itself
REGISTERS = 65536  # of a multiprocessor, NVIDIA's
SLICES = 8  # of a row, when rows are few
BLOCK_COLUMNS = 16384
RESERVED_SHARED_BYTES = 8192  # for reductions across warps
MAX_STAGES = 5


class LaunchShape(NamedTuple):
    """A block is `reps` rows of `threads` threads with `lane` columns (16 bytes) each."""

    lane: int
    threads: int
    reps: int
    slices: int
    stages: int
    programs: int = 1  # that shall fit a multiprocessor, as far as registers go

    @property
    def max_registers(self) -> int | None:
        """Per thread; None where the instruction set has no more."""
        limit = REGISTERS // (self.threads * self.programs)
        return limit if limit < 256 else None

    @property
    def row(self) -> int:
        """Columns that the threads cover at once."""
        return self.lane * self.threads

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.reps * self.row


def launch_shape(vocab_size: int, element_size: int, shared_memory: int = 232448) -> LaunchShape:
    """Shape for rows of `vocab_size` elements of `element_size` bytes.

    Lanes, threads and reps fix the order of summation, so they depend on the row alone: neither the number of rows nor
    the GPU changes a result. The stages of the pipeline only follow how many blocks of 32 or 64 KiB fit the shared
    memory: 128 KiB keep 64 to 128 KiB in flight, and one program per multiprocessor, so that the rows being worked on
    (132 x 257 KB for bfloat16 and V = 128256 on an H200) fit the L2 cache and the second sweep reads from there.
    """
    lane = 16 // element_size
    threads = min(max(_power_of_two(-(-vocab_size // lane)), 32), THREADS)
    reps = min(_power_of_two(-(-vocab_size // (lane * threads))), BLOCK_COLUMNS // (lane * THREADS))
    block = reps * threads * lane
    if vocab_size < 2 * block:
        return LaunchShape(lane, threads, reps, 1, 1)
    buffers = max((shared_memory - RESERVED_SHARED_BYTES) // (block * element_size), 1)
    return LaunchShape(lane, threads, reps, SLICES, 1 + min(buffers, 131072 // (block * element_size), MAX_STAGES - 1))


def splits_rows(num_rows: int, num_processors: int) -> bool:
    """Whether each row is shared by SLICES programs: when whole rows would leave multiprocessors idle."""
    return num_rows < 2 * num_processors


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
