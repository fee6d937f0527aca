"""Which way a kernel takes for a matrix of logits: one table, decided by arithmetic, the same in every process.

A thread has eight classes of a tile. What a row needs beyond its tiles is computed by every thread, so that the more
tiles a thread has, the less that costs; four are what 128 registers hold (their exponentials and u, 64 numbers).
"""

import math
from typing import NamedTuple

CLASSES_PER_THREAD = 8
TILES = 4
# Where a class has more than its logit (a target probability, a weight, a softcap), half as many tiles fit.
TILES_WITH_MORE = 2
# Threads of a thread block that holds a row or its part: 512 x 128 registers are all that a multiprocessor has.
RESIDENT_THREADS = 512
# Rows of few classes share a program until it has so many; with more, the numbers of the rows spill.
SMALLEST_TILE = 256
# A loop takes steps of two tiles, which 64 registers hold: two programs share a multiprocessor.
LOOP_TILES = 2
LOOP_THREADS = 512
# Clusters of more thread blocks than 16 there are not.
LARGEST_CLUSTER = 16


class Plan(NamedTuple):
    """How a kernel is launched."""

    path: str  # "resident": a program holds its rows; "cluster": some thread blocks hold one; "loop"
    rows: int  # rows of a program at a time
    block_k: int  # classes of a tile
    tiles: int  # tiles of a row, or of one step of a loop
    num_warps: int
    num_ctas: int
    stages: int


def _power_of_2(n: int) -> int:
    """The next power of 2."""
    return 1 << max(0, n - 1).bit_length()


def plan(num_classes: int, *, fused: bool, plain: bool, warp_size: int, clusters: bool) -> Plan:
    import os; clusters = clusters and not os.environ.get("NOCL")
    """The table."""
    tiles = TILES if plain else TILES_WITH_MORE
    width = max(16, _power_of_2(num_classes))
    rows = max(1, SMALLEST_TILE // width)
    if rows > 1:
        return Plan("resident" if fused else "loop", rows, width, 1, 1, 1, 0)
    threads = max(warp_size, width // (tiles * CLASSES_PER_THREAD))
    num_ctas = -(-threads // RESIDENT_THREADS)
    if fused and (num_ctas == 1 or (clusters and num_ctas <= LARGEST_CLUSTER)):
        block_k = threads * CLASSES_PER_THREAD
        path = "resident" if num_ctas == 1 else "cluster"
        return Plan(path, 1, block_k, math.ceil(num_classes / block_k), threads // num_ctas // warp_size, num_ctas, 0)
    threads = min(LOOP_THREADS, max(warp_size, width // (LOOP_TILES * CLASSES_PER_THREAD)))
    return Plan("loop", 1, threads * CLASSES_PER_THREAD, LOOP_TILES, threads // warp_size, 1, 0)
