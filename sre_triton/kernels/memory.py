"""Where the classes of a row lie in memory, and how tiles of them come into registers.

Rows that do not begin at multiples of 16 bytes are read in a window that does, and the few classes before and after
it, the edges, as a tile of their own (WINDOW). A *place* is of a tile: its elements, counted from the pointer to the
logits, its classes, which of them there are, and which of those are to be read.
"""

import triton
import triton.language as tl

from .formulas import INF, load_logits
from .groups import column
from .rows import load_if_counted, shares


@triton.jit
def program_row(VARIANT: tl.constexpr):
    """The program's row, or its rows."""
    program = tl.program_id(0).to(tl.int64)
    if VARIANT.ROWS == 1:
        return program
    else:
        return program * VARIANT.ROWS + tl.arange(0, VARIANT.ROWS)


@triton.jit
def counted_targets(inputs, scalars, row, inside, VARIANT: tl.constexpr):
    """The targets, if they are class indices, and which of the rows are there and not ignored."""
    if VARIANT.PROBABILITIES:
        return row, row < inputs.num_rows
    else:
        target = load_if_counted(inputs.target_ptr + row, inside)
        if inside is None:
            return target, target != scalars.ignore_index
        else:
            return target, inside & (target != scalars.ignore_index)


@triton.jit
def any_counted(counted, VARIANT: tl.constexpr):
    """Whether a program has anything to read: a program of one row, one that is counted; else it is masked."""
    if VARIANT.ROWS == 1 and not VARIANT.PROBABILITIES:
        return counted
    else:
        return True


@triton.jit
def at_targets(inputs, scalars, row, target, counted, VARIANT: tl.constexpr):
    """Of class indices: the target, or 0 if it is out of range, and there z and w (NaN if out of range).

    Of targets in another shard: -1, -inf and 0.
    """
    if VARIANT.PROBABILITIES:
        return row, 0.0, 1.0
    else:
        g = target if inputs.first_class is None else target - inputs.first_class
        here = g.to(tl.uint64) < inputs.num_classes * VARIANT.ALIGN
        g = tl.where(here, g, 0)
        z_g = load_logits(inputs.logits_ptr + row * inputs.logits_stride * VARIANT.ALIGN + g, counted, scalars.softcap)
        w_g = tl.where(here, 1.0, float("nan"))
        if inputs.weight_ptr is not None:
            w_g *= load_if_counted(inputs.weight_ptr + g, counted).to(tl.float32)
        if inputs.all_classes is not None:
            elsewhere = (target.to(tl.uint64) < inputs.all_classes) & (here == 0)
            g, z_g, w_g = tl.where(elsewhere, -1, g), tl.where(elsewhere, -INF, z_g), tl.where(elsewhere, 0.0, w_g)
        if VARIANT.STAGES == 0:
            # Where the gradient takes the place of the logits, other threads are about to write where z_g was read.
            tl.debug_barrier()
        return g, z_g, w_g


@triton.jit
def last_step(inputs, VARIANT: tl.constexpr):
    """Where the last step of a walk begins; before it there are only full tiles."""
    shortest = inputs.num_classes * VARIANT.ALIGN
    if VARIANT.WINDOW:
        shortest -= 2 * (VARIANT.VECTOR - 1)
    if VARIANT.ROWS > 1:
        return 0
    else:
        return (shortest - 1) // (VARIANT.TILES * VARIANT.BLOCK_K) * (VARIANT.TILES * VARIANT.BLOCK_K)


@triton.jit
def window_of(inputs, row, VARIANT: tl.constexpr):
    """Where the tiles of a row begin, in elements from the pointer, the class there, and the number of classes."""
    begin = row * inputs.logits_stride * VARIANT.ALIGN
    K = inputs.num_classes * VARIANT.ALIGN
    if VARIANT.WINDOW:
        first = (begin + (VARIANT.VECTOR - 1)) // VARIANT.VECTOR * VARIANT.VECTOR
        length = ((begin + K) // VARIANT.VECTOR * VARIANT.VECTOR - first).to(tl.int32)
        if not VARIANT.RESIDENT:
            # Some rows have a vector more than the last step of a walk; it goes with the edge.
            length = tl.minimum(length, last_step(inputs, VARIANT) + VARIANT.TILES * VARIANT.BLOCK_K)
        return first, (first - begin).to(tl.int32), length
    else:
        return begin, 0, K


@triton.jit
def full_tile(WIDTH: tl.constexpr, value: tl.constexpr, VARIANT: tl.constexpr):
    """A tile of the rows full of one value."""
    if VARIANT.ROWS == 1:
        return tl.full((WIDTH,), value, tl.float32)
    else:
        return tl.full((VARIANT.ROWS, WIDTH), value, tl.float32)


@triton.jit
def place_of_tile(inputs, row, counted, window, start, VARIANT: tl.constexpr):
    """Of the tile that begins ``start`` into the window."""
    first, head, length = window
    cols = start + tl.arange(0, VARIANT.BLOCK_K)
    if VARIANT.ROWS > 1:
        cols = cols[None, :]
        mask = (cols < length) & (row < inputs.num_rows)[:, None]
        return first[:, None] + cols, cols, mask, mask & counted[:, None]
    else:
        return first + cols, head + cols, cols < length, cols < length


@triton.jit
def place_of_edge(inputs, row, window, VARIANT: tl.constexpr):
    """The same of the edges: a tile of one class per group, those before the window and those behind it."""
    _, head, length = window
    i = tl.arange(0, VARIANT.BLOCK_K // 8)
    # Backwards, or Triton would see neighbours, and give all of them to a few threads.
    before, behind = head - 1 - i, inputs.num_classes * VARIANT.ALIGN - 1 - (i - VARIANT.VECTOR)
    classes = tl.where(i < VARIANT.VECTOR, before, behind)
    mask = tl.where(i < VARIANT.VECTOR, before >= 0, behind >= head + length)
    return row * inputs.logits_stride * VARIANT.ALIGN + classes, classes, mask, mask


@triton.jit
def _load(inputs, scalars, row, place, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """z, and if HAS_Y y, w y, and w y before smoothing; -inf and 0 where there is nothing or the row is not counted.

    If SMOOTHED, 1 takes the place of y.
    """
    offsets, classes, _, mask = place
    if not MASKED:
        mask = None
    z = load_logits(inputs.logits_ptr + offsets, mask, scalars.softcap)
    if VARIANT.HAS_Y:
        share, at_target = shares(inputs, scalars, VARIANT)
        if VARIANT.PROBABILITIES:
            pointers = inputs.target_ptr + column(row * inputs.target_stride * VARIANT.ALIGN, z) + classes
            if mask is None:
                given = tl.load(pointers).to(tl.float32)
            else:
                given = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            y = given
            if scalars.label_smoothing is not None:
                y = share + at_target * given
        else:
            y = tl.zeros_like(z) + share
            given = y
        if mask is not None:
            y = tl.where(mask, y, 0.0)
        wy = y
        if inputs.weight_ptr is not None:
            exists = (classes >= 0) & (classes < inputs.num_classes * VARIANT.ALIGN)
            w = tl.load(inputs.weight_ptr + classes, mask=exists, other=0.0)
            wy, given = w.to(tl.float32) * y, w.to(tl.float32) * given
        return z, y, wy, given
    elif VARIANT.SMOOTHED:
        there = tl.zeros_like(z) + 1.0
        if mask is not None:
            there = tl.where(mask, there, 0.0)
        return z, there, there, there
    else:
        return z, z, z, z  # the last three for nobody


@triton.jit
def load_tiles(inputs, scalars, row, counted, window, start, FULL: tl.constexpr, VARIANT: tl.constexpr):
    """The four of `_load`, each of TILES tiles, the first FULL of which end before the row does."""
    z, y, wy, given = (), (), (), ()
    TILES: tl.constexpr = VARIANT.TILES  # or Triton 3.6 takes it for a number of the running program
    for i in tl.static_range(TILES):
        place = place_of_tile(inputs, row, counted, window, start + i * VARIANT.BLOCK_K, VARIANT)
        z_i, y_i, wy_i, given_i = _load(inputs, scalars, row, place, VARIANT.ROWS > 1 or i >= FULL, VARIANT)
        z, y, wy, given = z + (z_i,), y + (y_i,), wy + (wy_i,), given + (given_i,)
    return z, y, wy, given


@triton.jit
def load_edge(inputs, scalars, row, window, VARIANT: tl.constexpr):
    """The four of `_load`, of one tile."""
    if VARIANT.WINDOW:
        return _load(inputs, scalars, row, place_of_edge(inputs, row, window, VARIANT), True, VARIANT)
    else:
        return row, row, row, row  # for nobody


@triton.jit
def store_per_row(ptr, inputs, row, constants, FIRST: tl.constexpr, VARIANT: tl.constexpr):
    """Numbers of the rows into a matrix (count, N), from its row FIRST on."""
    N = tl.cast(inputs.num_rows, tl.int64)
    for i in tl.static_range(len(constants)):
        if VARIANT.ROWS == 1:
            tl.store(ptr + (FIRST + i) * N + row, constants[i])
        else:
            tl.store(ptr + (FIRST + i) * N + row, constants[i], mask=row < N)


@triton.jit
def load_per_row(ptr, inputs, row, i, inside):
    """The numbers in row i of such a matrix."""
    N = tl.cast(inputs.num_rows, tl.int64)
    return load_if_counted(ptr + i * N + row, inside)
