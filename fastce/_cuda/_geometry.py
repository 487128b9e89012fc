"""Which kernel does a problem, with how many threads: rules with the limits of the device as arguments.

Design
------
1. Three blocks of 64 KiB and more on a multiprocessor keep enough bytes under way for its share of the bandwidth; a
   cluster splits longer rows until a slice is that small. Where clusters cannot, two or one block will do.
2. Blocks have 256 threads: with three of them each thread may have 80 registers, which none of the kernels exceeds.
"""

from typing import NamedTuple

WARP_SIZE = 32
GRANULE = 16  # bytes
TILE_BYTES = 256  # the longest row of a tile
BANK_BYTES = 32  # rows a multiple of it long would meet in the same banks of shared memory
REGISTER_GRANULES = 8  # what a thread can hold of a row beside its sums
MOST_CLUSTER = 8  # blocks: the portable limit
REGISTER_CLASSES = 32
TOTAL_THREADS = 256
TOTAL_BLOCKS = 256
ALL_SUMS = 7  # as in row.cuh


class Limits(NamedTuple):
    """What a device has."""

    shared_per_block: int  # bytes, the most that a block may ask for
    shared_per_sm: int
    has_clusters: bool


class Geometry(NamedTuple):
    """A kernel's family and shape, as the macros of ``kernels.cu`` say it, and its launch."""

    family: str
    grid: int
    threads: int = 256
    per_sm: int = 3
    lanes: int = WARP_SIZE
    granules: int = 1
    cluster: int = 1
    classes: int = 0
    shared_bytes: int = 0


def divide_up(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def exchange_bytes(warps: int, cluster: int) -> int:
    """Return what the teams of ``team.cuh`` need of the shared memory, in whole granules."""
    return divide_up((warps + cluster) * (ALL_SUMS + 2) * 8, GRANULE) * GRANULE


def choose_geometry(
    n_rows: int,
    n_classes: int,
    itemsize: int,
    limits: Limits,
    *,
    is_row_major: bool,
    is_dense: bool,
    is_aligned: bool,
) -> Geometry:
    """Return how to do a problem.

    `is_row_major`: the classes lie side by side. `is_dense`: so do the rows, in what is written too. `is_aligned`:
    every row begins and ends at a multiple of 16 bytes.
    """
    row_bytes = n_classes * itemsize
    if not is_row_major:
        classes = n_classes if n_classes * max(itemsize, 4) <= REGISTER_CLASSES * 4 else 0
        return Geometry("COLUMN", divide_up(n_rows, 256), per_sm=1, classes=classes)
    if row_bytes <= TILE_BYTES and row_bytes % BANK_BYTES:
        threads = 256 if row_bytes <= TILE_BYTES // 2 else 128
        places = 0 if is_dense else 8 * threads
        return Geometry(
            "TILE",
            divide_up(n_rows, threads),
            threads,
            shared_bytes=(divide_up(threads * row_bytes, GRANULE) + 1) * GRANULE + places,
        )
    granules = divide_up(row_bytes, GRANULE) + (0 if is_aligned else 1)
    if granules <= WARP_SIZE * REGISTER_GRANULES:
        lanes = next((lanes for lanes in (4, 8, 16) if granules <= 2 * lanes), WARP_SIZE)
        per_lane = next(n for n in (1, 2, 4, 8) if granules <= n * lanes)
        threads = 128
        return Geometry("WARP", divide_up(n_rows, threads // lanes), threads, 4, lanes=lanes, granules=per_lane)
    clusters = [1, 2, 4, MOST_CLUSTER] if limits.has_clusters else [1]
    for per_sm in (3, 2, 1):
        room = min(limits.shared_per_block, limits.shared_per_sm // per_sm - 1024)  # 1024: what the system keeps
        threads = 256 if per_sm > 1 else 512
        for cluster in clusters:
            shared = exchange_bytes(threads // WARP_SIZE, cluster) + divide_up(granules, cluster) * GRANULE
            if shared <= room:
                return Geometry("BLOCK", n_rows * cluster, threads, per_sm, cluster=cluster, shared_bytes=shared)
    return Geometry("STREAM", n_rows, 512, 1, shared_bytes=exchange_bytes(512 // WARP_SIZE, 1))


def total_geometry(n_rows: int) -> Geometry:
    """Return how to sum over rows: the same blocks on every device, so that the sum has the same bits."""
    blocks = min(TOTAL_BLOCKS, divide_up(n_rows, TOTAL_THREADS))
    return Geometry("TOTAL", blocks, TOTAL_THREADS, 1, shared_bytes=8 * (TOTAL_THREADS // WARP_SIZE) + 8)
