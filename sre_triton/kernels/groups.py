"""Tiles and their groups: the classes of a tile that one thread holds, and how the groups of a row become one value.

A thread adds up its own group first, without waiting for any other; the threads of a program meet once a row.

A thread reads 2^ADJACENT neighbouring classes at once. The rest of its group lies far apart in the tile, so that
neighbouring threads read neighbouring memory. A tile of 16 classes and two threads, A and B:

    ADJACENT = 3    A A A A A A A A B B B B B B B B     bf16: 8 classes are 16 bytes
    ADJACENT = 2    A A A A B B B B A A A A B B B B     float32: 4 classes are 16 bytes
    ADJACENT = 0    A B A B A B A B A B A B A B A B     odd K and no window: class by class

Where rows share a program, a tile has three dimensions: (ROWS, GROUPS, classes that a thread reads at once). Then no
thread has anything of its group elsewhere, and a row has more tiles instead.
"""

import triton
import triton.language as tl

# Whether Triton's interpreter runs the kernels. It has no instructions of a GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# In a walk a group has 2^3 classes: sixteen bytes of bf16, the most that one instruction reads.
LOG2_GROUP = tl.constexpr(3)

# ---------------------------------------------------------------------------------------------------------------------
# The tiles of a row, computed while a kernel is compiled


# They take numbers and no Variant, of which Triton 3.6 makes a mere tuple on the way.


@triton.constexpr_function
def num_tiles(TILES, TAIL):
    """How many tiles a row has, or a step of a walk: TILES whole ones, and the narrower ones of the tail.

    A whole tile has eight or sixteen classes for each thread, or fewer where rows share a program. TAIL is the number
    of classes for each thread that are left over, a sum of 8, 4, 2 and 1, and each of these stands for a tile. 5400
    classes and 128 threads, BLOCK_K = 2048, TILES = 2, TAIL = 12:

        tile       0            1               2               3
        classes    0 to 2047    2048 to 4095    4096 to 5119    5120 to 5631, of which those from 5400 on do not exist
    """
    return TILES + TAIL.bit_count()


@triton.constexpr_function
def start_of(BLOCK_K, GROUPS, TILES, TAIL, i):
    """The first class of tile i; of the last one and one more, how many classes all tiles have."""
    whole, tail = min(i, TILES), TAIL
    for _ in range(whole, i):
        tail -= 1 << tail.bit_length() >> 1  # its largest power of 2
    return whole * BLOCK_K + (TAIL - tail) * GROUPS


@triton.constexpr_function
def width_of(BLOCK_K, GROUPS, TILES, TAIL, i):
    """How many classes tile i has, whether they exist or not."""
    return start_of(BLOCK_K, GROUPS, TILES, TAIL, i + 1) - start_of(BLOCK_K, GROUPS, TILES, TAIL, i)


@triton.constexpr_function
def num_full(BLOCK_K, GROUPS, TILES, TAIL, shortest):
    """How many tiles have a class at every place in every row, where rows have so many classes at least."""
    return sum(start_of(BLOCK_K, GROUPS, TILES, TAIL, i + 1) <= shortest for i in range(num_tiles(TILES, TAIL)))


@triton.constexpr_function
def again_of(BLOCK_K, GROUPS, ADJACENT, CTAS):
    """How many classes are stored again for the target (walks.py, `store_gradient_of_rest`).

    They are as many as the threads store with one instruction each: a tile begins at a multiple of them, so the same
    thread has a class in it and in the tile. In a cluster they are a whole tile, since the part of a thread block
    depends on the tile's width.
    """
    return GROUPS << ADJACENT if CTAS == 1 else BLOCK_K


@triton.constexpr_function
def num_again(BLOCK_K, GROUPS, TILES, TAIL, again):
    """How many tiles are wide enough for the target to be stored again; it is put into the others."""
    count = 0
    while width_of(BLOCK_K, GROUPS, TILES, TAIL, count) >= again:
        count += 1
    return count


@triton.constexpr_function
def num_alike(TILES):
    """How many of the first tiles are as wide as the first."""
    return max(1, TILES)


@triton.constexpr_function
def num_levels(count):
    """How often pairs are made of so many things until one is left."""
    return (count - 1).bit_length()


@triton.constexpr_function
def levels_of(tile, GROUPS, most=4):
    """How often a tile, or a half of one, can be halved until each thread has one number of it; at most so often."""
    levels = 0
    while len(tile.shape) == 1 and levels < most and (GROUPS << levels) < tile.shape[0]:
        levels += 1
    return levels


# ---------------------------------------------------------------------------------------------------------------------
# Groups


@triton.jit
def column(of_row, tile):
    """A value of each row, of a shape that meets the tile: (ROWS, 1, 1), or a scalar where the tile has one row."""
    if len(tile.shape) == 3:
        return of_row[:, None, None]
    else:
        return of_row


@triton.jit
def halves(x, LEVEL: tl.constexpr, VARIANT: tl.constexpr):
    """Two tensors of half the width of x. A thread that had all of a group before has all of its halves: nothing moves.

    Sums and maxima over groups of eight need it three times, at the levels 0, 1 and 2. At a level below ADJACENT every
    other class goes into b. At the levels above, b is the second half of the tile. A tile of 16 classes with ADJACENT =
    2, two threads A and B, a digit for each class of a thread:

        level 0     A0 A1 A2 A3 B0 B1 B2 B3 A4 A5 A6 A7 B4 B5 B6 B7
            a       A0    A2    B0    B2    A4    A6    B4    B6
            b          A1    A3    B1    B3    A5    A7    B5    B7
        level 1     A0 A2 B0 B2 A4 A6 B4 B6         (a + b of level 0, if it is a sum)
            a       A0    B0    A4    B4
            b          A2    B2    A6    B6
        level 2     A0 B0 A4 B4
            a       A0 B0
            b             A4 B4

    In a cluster of CTAS thread blocks, each block has its own part of the tile: at the levels above, b is the second
    half of every block's part.
    """
    if LEVEL < VARIANT.ADJACENT:
        return tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    elif VARIANT.CTAS == 1:
        return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2)), (1, 0)))
    else:
        # Each thread block halves its own part of the tile.
        a, b = tl.split(tl.permute(tl.reshape(x, (VARIANT.CTAS, 2, x.shape[0] // (2 * VARIANT.CTAS))), (0, 2, 1)))
        return tl.reshape(a, (x.shape[0] // 2,)), tl.reshape(b, (x.shape[0] // 2,))


@triton.jit
def sum_in_pairs(tiles):
    """The sum of a tuple of tensors of one shape, in pairs.

    One after another, 32 of them would lose 31 roundings of the largest: e is 1 at one class, and 1e-7 at others.
    """
    for _level in tl.static_range(num_levels(len(tiles))):
        halved = ()
        for i in tl.static_range(len(tiles) // 2):
            halved = halved + (tiles[2 * i] + tiles[2 * i + 1],)
        if len(tiles) % 2 == 1:
            halved = halved + (tiles[len(tiles) - 1],)
        tiles = halved
    return tiles[0]


@triton.jit
def sum_of_groups(x, VARIANT: tl.constexpr):
    """The sum of each group of a tile, (GROUPS,) or (ROWS, GROUPS)."""
    if len(x.shape) == 3:
        return tl.sum(x, 2)
    else:
        for level in tl.static_range(levels_of(x, VARIANT.GROUPS)):
            a, b = halves(x, level, VARIANT)
            x = a + b
        return x


@triton.jit
def maximum_of_groups(x, VARIANT: tl.constexpr):
    """The maximum of each group of a tile, (GROUPS,) or (ROWS, GROUPS)."""
    if len(x.shape) == 3:
        return tl.max(x, 2)
    else:
        for level in tl.static_range(levels_of(x, VARIANT.GROUPS)):
            a, b = halves(x, level, VARIANT)
            x = tl.maximum(a, b)
        return x


@triton.jit
def to_groups(x, VARIANT: tl.constexpr):
    """The value of each group, at all eight of its classes: eight times the width of x.

    A walk needs it to subtract a group's maximum from the group's logits. It undoes three `halves`, the last one first.
    """
    for level in tl.static_range(LOG2_GROUP):
        x = tl.join(x, x)
        if LOG2_GROUP - 1 - level >= VARIANT.ADJACENT:
            x = tl.permute(x, (1, 0))
        x = tl.reshape(x, (x.shape[0] * x.shape[1],))
    return x


@triton.jit
def largest_of_row(x):
    """The maximum over the classes: a scalar, or (ROWS,). Threads and thread blocks wait for each other here."""
    return tl.max(x, len(x.shape) - 1)


@triton.jit
def sum_of_row(x):
    """The sum over the classes: a scalar, or (ROWS,). Threads and thread blocks wait for each other here."""
    return tl.sum(x, len(x.shape) - 1)


@triton.jit
def _add_pairs(a, b, c, d):
    """(a + c, b + d): how `sum_pairs` combines two pairs."""
    return a + c, b + d


@triton.jit
def sum_pairs(a, b):
    """(Σ a, Σ b) over the classes, each a scalar or (ROWS,). The threads of a program meet once for both sums."""
    if INTERPRETED:  # its reduce adds one element after another, and loses digits that a GPU does not lose
        return sum_of_row(a), sum_of_row(b)
    else:
        return tl.reduce((a, b), len(a.shape) - 1, _add_pairs)
