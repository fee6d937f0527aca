"""Which path a kernel takes: one table, arithmetic on K and the device, the same in every process; nothing is timed.

The number of rows is not asked for, so that a last batch, which is smaller, runs what is compiled.

    classes          path      what decides
    up to 1024       resident  rows share a program of four warps: 128 of up to 32 classes, 4 of more than 512
                               (these numbers are for warps of 32 lanes; on AMD it is twice as many rows)
    up to 6400       resident  three programs and more share a multiprocessor: one loads while others compute
    up to 16384      resident  two programs or one: they go from row to row, and the next row is on its way to shared
                               memory while this one is computed (compute capability 8.0 and newer)
    up to 102400     cluster   thread blocks of 128 threads, three or four to a multiprocessor: while one cluster waits
                               at a barrier, which it does seven times a row, others compute
    up to 131072     cluster   sixteen blocks, the most there may be, of 256 threads, two to a multiprocessor
    up to 262144     cluster   sixteen of 256 or 512 threads, one to a multiprocessor, which go from row to row
    longer rows      loop      three reads, two of them of the L2 cache: the longer a row, the more threads it has, so
                               that the rows which are under way fit there

Rows that share a program. Each has as few threads as have registers for it, a power of 2: one for 32 classes, 32 for
1024. So the values of a row are computed by few, and its threads, all in one warp, meet without a barrier. A tile is
what these threads read with one instruction each: 16 bytes, or as many as all rows begin at multiples of. With one row
in a program, at the speed of a copy an H100 would have to start one every 2.3 cycles for 1000 classes in bf16, and
every 0.3 for 129.

What a thread holds of longer rows. As few threads as have registers for the row, a power of 2: each has 26 to 50
classes, an even number. Up to 32 they are in tiles of eight, beyond that in tiles of sixteen, and what is left over in
narrower ones (groups.py, `num_tiles`). So nearly every class of a tile exists, whatever K is, and what each thread
computes of the row is computed by few.

What a cluster holds. A row of 50304 classes in bf16 has 8 blocks of 128 threads, three tiles of 16384 classes and a
narrow one of 2048. Every block has its part of every tile, and a thread sixteen classes of each, but two of the last:

             block 0          block 1                 block 7
    tile 0       0 ... 2047     2048 ... 4095    ...    14336 ... 16383
    tile 1   16384 ... 18431   18432 ... 20479   ...    30720 ... 32767
    tile 2   32768 ... 34815   34816 ... 36863   ...    47104 ... 49151
    tile 3   49152 ... 49407   49408 ... 49663   ...    50944 ... 51199, of which those from 50304 on do not exist

The blocks meet where a value of the row is needed: its maximum, its sums.

Clusters need compute capability 9.0 and Triton 3.8; without them rows of more than 16384 classes take the loop. A GPU
may have no room for a cluster as large, as a part of one has (MIG): launch.py asks its driver. Fewer rows than fill the
GPU leave it idle: to split a row over programs that cannot wait for each other takes three launches, and is read as
often as the loop reads it.

Half as many classes fit where a class has more than its logit: a target probability, a weight that is smoothed, a
softcap (rows share a program up to 512). In these cases, and where rows do not begin at multiples of 16 bytes, no row
is on its way while another is computed: the registers would not suffice. Neither is one where shared memory would not
suffice: with compute capability 8.6, 8.9 and 12.0, in float32, for more than 12288 classes. The kernels of the parts of
the loss take the loop where rows do not share a program.
"""

from typing import NamedTuple

# The bounds below follow from what a multiprocessor has, as each comment says. No GPU has timed this.

# A step of a loop has tiles of eight classes for each thread: in bf16 a vector of sixteen bytes, in float32 two.
CLASSES_PER_THREAD = 8
# Classes of a row for each thread, and registers for them: e and u of a class are two. Every thread computes the values
# of the row too, so the fewer threads there are, the less is computed twice.
FEW, REGISTERS = 32, 128
MANY, MORE_REGISTERS = 50, 168
# The same where a class has more than its logit.
FEW_WITH_MORE, MANY_WITH_MORE = 16, 24
# Bytes of shared memory, at most, in which the warps of a program add up their sums.
SHARED_FOR_SUMS = 1024
MULTIPROCESSOR_REGISTERS = 65536
# Three or four blocks of them share a multiprocessor: while one waits at a barrier, others compute.
CLUSTER_THREADS = 128
# Thread blocks of a cluster: the most that Hopper and Blackwell allow.
LARGEST_CLUSTER = 16
# Rows of so few classes share a program of so many warps, each row with as few threads as have registers for it.
SHORT, SHORT_WARPS, SHORT_REGISTERS = 1024, 4, 168
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
    largest_cluster: int  # thread blocks; 1 where there are no clusters
    shared_bytes: int  # of a thread block, where the next row can be copied to shared memory; else 0


class Plan(NamedTuple):
    """How a kernel is launched."""

    path: str  # "resident": a program holds its rows; "cluster": thread blocks hold a row together; "loop"
    rows: int  # rows of a program at a time
    block_k: int  # classes of a tile
    groups: int  # of a tile, one for each thread of a row
    tiles: int  # tiles of a row, or of a step of a loop
    tail: int  # classes that each thread has of a row besides, in narrower tiles
    num_warps: int  # of a thread block
    num_ctas: int  # thread blocks of a cluster
    stages: int  # of the loop over rows, where a program goes from row to row: 2, the next is on its way; else 0
    programs: int  # at most, where they go from row to row; else 0, one for each set of rows
    registers: int  # of a thread, at most


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


def _per_thread(num_classes: int, threads: int) -> int:
    """Classes for each thread, an even number: a copy to shared memory has four bytes or more."""
    return 2 * -(-num_classes // (2 * threads))


def plan(
    num_classes: int,
    element_size: int,
    *,
    holds_rows: bool,
    at_once: int,
    plain: bool,
    device: Device,
    window: int = 0,
) -> Plan:
    """The Plan for rows of K classes: the table above. `plain`: a class has nothing but its logit, and no softcap."""
    warp, aligned = device.warp_size, at_once == 16 // element_size
    few, many = (FEW, MANY) if plain else (FEW_WITH_MORE, MANY_WITH_MORE)
    groups = power_of_2(-(-num_classes // few))  # threads of a row
    if num_classes <= SHORT and groups <= warp:
        tiles, tail = divmod(-(-num_classes // groups), at_once)
        rows = SHORT_WARPS * warp // groups
        return Plan("resident", rows, groups * at_once, groups, tiles, tail, SHORT_WARPS, 1, 0, 0, SHORT_REGISTERS)

    threads = max(warp, power_of_2(-(-num_classes // many)))
    registers, per_tile = (REGISTERS, 8) if num_classes <= threads * few else (MORE_REGISTERS, 16)
    num_ctas = 1
    if threads * registers > MULTIPROCESSOR_REGISTERS:
        num_ctas = min(device.largest_cluster, threads // CLUSTER_THREADS)
    per_multiprocessor = MULTIPROCESSOR_REGISTERS // (threads // num_ctas * registers)
    if per_multiprocessor == 1:  # then it may have them all
        registers = min(255, MULTIPROCESSOR_REGISTERS // (threads // num_ctas))
    if holds_rows and per_multiprocessor:
        in_edge = threads - window if window else 0  # classes, at most
        tiles, tail = divmod(_per_thread(num_classes - in_edge, threads), per_tile)
        copies = 2 * threads // num_ctas * (tiles * per_tile + tail) * element_size + SHARED_FOR_SUMS
        one_or_two = per_multiprocessor <= (2 if num_ctas == 1 else 1)
        stages = 2 if plain and aligned and one_or_two and copies <= device.shared_bytes else 0
        programs = max(1, device.multiprocessors * per_multiprocessor // num_ctas) if stages else 0
        path, num_warps = "resident" if num_ctas == 1 else "cluster", threads // num_ctas // warp
        block_k = threads * per_tile
        return Plan(path, 1, block_k, threads, tiles, tail, num_warps, num_ctas, stages, programs, registers)

    threads = power_of_2(-(-num_classes * element_size // LOOP_BYTES_PER_THREAD))
    threads = min(max(threads, warp), LARGEST_LOOP if plain else LARGEST_LOOP // 2)
    tiles = min(LOOP_TILES, max(1, power_of_2(num_classes) // (threads * CLASSES_PER_THREAD)))
    registers = LOOP_REGISTERS if plain else 2 * LOOP_REGISTERS
    block_k, num_warps = threads * CLASSES_PER_THREAD, threads // warp
    return Plan("loop", 1, block_k, threads, tiles, 0, num_warps, 1, 0, 0, registers)
