"""Which path a kernel takes: one table, arithmetic on K and the device, the same in every process; nothing is timed.

    classes          path      what decides
    up to 128        resident  several rows share a program, until it has enough for a warp
    up to 4096       resident  four programs and more share a multiprocessor: one loads while others compute
    up to 16384      resident  two programs or one: they go from row to row, and the next row is on its way to shared
                               memory while this one is computed (compute capability 8.0 and newer)
    up to 65536      cluster   thread blocks of 128 threads, four to a multiprocessor: while one cluster waits at a
                               barrier, which it does seven times a row, others compute
    up to 131072     cluster   sixteen blocks, the most there may be, of 256 threads, two to a multiprocessor
    up to 262144     cluster   sixteen of 512 threads, one to a multiprocessor, which go from row to row
    longer rows      loop      three reads, two of them of the L2 cache: the longer a row, the more threads it has, so
                               that the rows which are under way fit there

What a cluster holds. A row of 65536 classes in bf16 has 16 blocks of 128 threads and four tiles of 16384 classes. Every
block has its part of every tile, and a thread eight neighbouring classes of each tile:

             block 0          block 1                  block 15
    tile 0       0 ... 1023    1024 ... 2047    ...    15360 ... 16383
    tile 1   16384 ... 17407  17408 ... 18431   ...    31744 ... 32767
    tile 2   32768 ... 33791  33792 ... 34815   ...    48128 ... 49151
    tile 3   49152 ... 50175  50176 ... 51199   ...    64512 ... 65535
             thread 0: 0 to 7, 16384 to 16391, 32768 to 32775, 49152 to 49159

The blocks meet where a value of the row is needed: its maximum, its sums.

Clusters need compute capability 9.0 and Triton 3.8; without them rows of more than 16384 classes take the loop. Where
there are fewer rows than multiprocessors, a cluster has as many smaller blocks as fill the GPU. Without clusters such a
batch leaves the GPU idle: to split a row over programs that cannot wait for each other takes three launches, and is
read as often as the loop reads it.

Half as many classes fit where a class has more than its logit: a target probability, a weight that is smoothed, a
softcap. In these cases, and where rows do not begin at multiples of 16 bytes, no row is on its way while another is
computed: the registers would not suffice. Neither is one where shared memory would not suffice: with compute capability
8.6, 8.9 and 12.0, in float32, for more than 12288 classes. Kernels that do not hold rows, for the parts of the loss,
take the loop.
"""

from typing import NamedTuple

# The bounds below follow from what a multiprocessor has, as each comment says. No GPU has timed this.

# Of a tile: in bf16 and fp16 a vector of sixteen bytes, in float32 two. It is the group of groups.py.
CLASSES_PER_THREAD = 8
# Tiles of a row that is held. Every thread computes the values of the row too: with more tiles there are fewer threads,
# and less is computed twice. Four tiles are what 128 registers hold: 32 classes, whose e and u are 64 registers.
TILES = 4
# The same where a class has more than its logit.
TILES_WITH_MORE = 2
# Bytes of shared memory, at most, in which the warps of a program add up their sums.
SHARED_FOR_SUMS = 1024
# 512 threads of 128 registers are all that a multiprocessor has.
RESIDENT_THREADS = 512
RESIDENT_REGISTERS = 128
# Four blocks of them share a multiprocessor: while one waits at a barrier, others compute.
CLUSTER_THREADS = 128
# Thread blocks: the most that Hopper and Blackwell allow.
LARGEST_CLUSTER = 16
# Clusters of sixteen must lie in one of the parts of a GPU, of up to eighteen multiprocessors.
MULTIPROCESSORS_PER_CLUSTER = 18
# Rows of few classes share a program until it has so many classes; with more, the values of the rows spill.
SMALLEST_TILE = 256
# A step of a loop: two tiles are what 64 registers hold, with which a thousand threads share a multiprocessor.
LOOP_TILES = 2
LOOP_REGISTERS = 64
# Bytes of a row for each thread of a loop. Times 1024 threads times 132 multiprocessors, these are 35 MB of an H100's
# L2 cache of 50 MB.
LOOP_BYTES_PER_THREAD = 256
# Threads of a program, at most: all that a thread block may have.
LARGEST_LOOP = 1024


class Device(NamedTuple):
    """The properties of a GPU and its compiler that decide."""

    warp_size: int
    multiprocessors: int
    clusters: bool
    shared_bytes: int  # of a thread block, where the next row can be copied to shared memory; else 0


class Plan(NamedTuple):
    """How a kernel is launched."""

    path: str  # "resident": a program holds its rows; "cluster": thread blocks hold a row together; "loop"
    rows: int  # rows of a program at a time
    block_k: int  # classes of a tile
    tiles: int  # tiles of a row, or of a step of a loop
    num_warps: int  # of a thread block
    num_ctas: int  # thread blocks of a cluster
    stages: int  # of the loop over rows, where a program goes from row to row: 2, the next is on its way; else 0
    programs: int
    registers: int  # of a thread, at most


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


def plan(
    num_rows: int, num_classes: int, element_size: int, *, holds_rows: bool, aligned: bool, plain: bool, device: Device
) -> Plan:
    """The Plan for N rows of K classes: the table above. `plain`: a class has nothing but its logit, and no softcap."""
    warp, tiles = device.warp_size, TILES if plain else TILES_WITH_MORE
    moves_on = plain and aligned
    width = max(16, _power_of_2(num_classes))
    rows = max(1, SMALLEST_TILE // width)
    if rows > 1:
        path = "resident" if holds_rows else "loop"
        return Plan(path, rows, width, 1, 1, 1, 0, -(-num_rows // rows), 255)

    threads = max(warp, width // (tiles * CLASSES_PER_THREAD))
    if holds_rows and threads <= RESIDENT_THREADS:
        block_k = threads * CLASSES_PER_THREAD
        per_multiprocessor = 65536 // (threads * RESIDENT_REGISTERS)
        num_tiles = -(-num_classes // block_k)
        copies = 2 * num_tiles * block_k * element_size + SHARED_FOR_SUMS
        stages = 2 if moves_on and copies <= device.shared_bytes and per_multiprocessor <= 2 else 0
        programs = min(num_rows, device.multiprocessors * per_multiprocessor) if stages else num_rows
        return Plan("resident", 1, block_k, num_tiles, threads // warp, 1, stages, programs, RESIDENT_REGISTERS)

    if holds_rows and device.clusters and threads <= RESIDENT_THREADS * LARGEST_CLUSTER:
        block_k = threads * CLASSES_PER_THREAD
        num_ctas = min(LARGEST_CLUSTER, threads // CLUSTER_THREADS)
        while num_ctas < LARGEST_CLUSTER and 2 * num_ctas * num_rows <= device.multiprocessors:
            num_ctas *= 2  # few rows: as many blocks as there are multiprocessors
        stages = 2 if moves_on and threads // num_ctas == RESIDENT_THREADS else 0
        places = max(1, device.multiprocessors // MULTIPROCESSORS_PER_CLUSTER)
        programs = min(num_rows, places) if stages else num_rows
        num_tiles, num_warps = -(-num_classes // block_k), threads // num_ctas // warp
        return Plan("cluster", 1, block_k, num_tiles, num_warps, num_ctas, stages, programs, RESIDENT_REGISTERS)

    threads = _power_of_2(-(-num_classes * element_size // LOOP_BYTES_PER_THREAD))
    threads = min(max(threads, warp), LARGEST_LOOP if plain else LARGEST_LOOP // 2)
    tiles = min(LOOP_TILES, max(1, width // (threads * CLASSES_PER_THREAD)))
    registers = LOOP_REGISTERS if plain else 2 * LOOP_REGISTERS
    return Plan("loop", 1, threads * CLASSES_PER_THREAD, tiles, threads // warp, 1, 0, num_rows, registers)
