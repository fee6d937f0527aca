"""Groups: the eight classes of a tile that one thread holds, and how a row's groups become one number.

A vector of classes that a thread reads at once is 2^ADJACENT wide; its other classes lie far apart.
"""

import triton
import triton.language as tl

# Whether Triton's interpreter runs the kernels. It has no instructions of a GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Groups of 2^3 classes: sixteen bytes of bf16, which one instruction reads.
LOG2_GROUP = tl.constexpr(3)


@triton.jit
def column(of_row, tile):
    """What belongs to the rows, to meet a tile of them."""
    if len(tile.shape) == 2:
        return of_row[:, None]
    else:
        return of_row


@triton.jit
def halves(x, LEVEL: tl.constexpr, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """Two tensors of half the width, whose elements at the same place a thread has both."""
    if len(x.shape) == 2:
        if LEVEL < ADJACENT:
            return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        else:
            return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    elif LEVEL < ADJACENT:
        return tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    elif CTAS == 1:
        return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2)), (1, 0)))
    else:
        # Each thread block has its part of the tile.
        a, b = tl.split(tl.permute(tl.reshape(x, (CTAS, 2, x.shape[0] // (2 * CTAS))), (0, 2, 1)))
        return tl.reshape(a, (x.shape[0] // 2,)), tl.reshape(b, (x.shape[0] // 2,))


@triton.jit
def sum_of_groups(x, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """Of each group of a tile: an eighth of its width."""
    for level in tl.static_range(LOG2_GROUP):
        a, b = halves(x, level, ADJACENT, CTAS)
        x = a + b
    return x


@triton.jit
def maximum_of_groups(x, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """Of each group of a tile: an eighth of its width."""
    for level in tl.static_range(LOG2_GROUP):
        a, b = halves(x, level, ADJACENT, CTAS)
        x = tl.maximum(a, b)
    return x


@triton.jit
def to_groups(x, ADJACENT: tl.constexpr):
    """A number per group, at each of its classes."""
    for level in tl.static_range(LOG2_GROUP):
        x = tl.join(x, x)
        if len(x.shape) == 3:
            if LOG2_GROUP - 1 - level >= ADJACENT:
                x = tl.permute(x, (0, 2, 1))
            x = tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))
        else:
            if LOG2_GROUP - 1 - level >= ADJACENT:
                x = tl.permute(x, (1, 0))
            x = tl.reshape(x, (x.shape[0] * x.shape[1],))
    return x


@triton.jit
def largest_of_row(x):
    """Over the classes of a tile."""
    return tl.max(x, len(x.shape) - 1)


@triton.jit
def sum_of_row(x):
    """Over the classes of a tile."""
    return tl.sum(x, len(x.shape) - 1)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pairs(a, b):
    """The sums of two tensors over a row; the threads of a program meet once for both."""
    if INTERPRETED:  # which would add one number after the other, and lose digits that a GPU does not
        return sum_of_row(a), sum_of_row(b)
    else:
        return tl.reduce((a, b), len(a.shape) - 1, _add_pairs)
