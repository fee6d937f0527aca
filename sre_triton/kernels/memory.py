"""Where the classes of a row lie in memory, and how tiles of them come into registers.

One instruction reads 16 bytes, VECTOR elements, only where they begin at a multiple of 16 bytes. With an odd K most
rows begin elsewhere. Such a row is read as a *window*, which begins and ends at multiples, and an *edge*, the few
classes before and after the window (WINDOW). The second row of bf16 logits with K = 21, a letter for each element (rows
as short as these share a program, and have no window; from K = 1025 on, or 513 with some options, it is the same):

    element    16      24      32      40      48
               |       |       |       |       |
    row 0      00000
    row 1           bbbwwwwwwwwwwwwwwwwaa
    row 2                                222222...

    begin = 21: the row's first element
    first = 24: the first element of the window
    head = 3: the class at the beginning of the window; the classes 0, 1, 2 before it are b
    length = 16: the classes in the window, 3 to 18; the classes 19 and 20 after it are a

The tiles of the row lie in the window. The edge is a small tile of its own, with b and a in it.

The tuples that the functions here pass on:

    window    (first, head, length)
    place     of a tile: (its elements, counted from the pointer to the logits; its classes; which of the classes exist;
              which of the classes are to be read)
    tiles     (z, y, w y, w y before smoothing), each a tuple of TILES tiles
    edge      (z, y, w y, w y before smoothing), each one tile
"""

import triton
import triton.language as tl

from .arithmetic import INF, fma, tanh, value_of
from .groups import column, num_tiles, start_of, width_of
from .rows import load_if_counted, num_rows_of, shares


@triton.jit
def program_row(VARIANT: tl.constexpr):
    """The program's row, an int64 scalar, or its rows, (ROWS,) in int64: a row times a stride may pass 2^31."""
    program = tl.program_id(0).to(tl.int64)
    if VARIANT.ROWS == 1:
        return program
    else:
        return program * VARIANT.ROWS + tl.arange(0, VARIANT.ROWS)


@triton.jit
def counted_targets(inputs, scalars, row, inside, VARIANT: tl.constexpr):
    """(target, counted) of each row. A row counts if it exists and is not ignored.

    `inside` says which rows exist, None if all of them. With probabilities there is no target: the row takes its place.
    """
    if VARIANT.PROBABILITIES:
        return row, row < num_rows_of(inputs)
    else:
        target = load_if_counted(inputs.target_ptr + row, inside)
        if inside is None:
            return target, target != scalars.ignore_index
        else:
            return target, inside & (target != scalars.ignore_index)


@triton.jit
def any_counted(counted, VARIANT: tl.constexpr):
    """Whether the program has anything to read. It is False only for a program whose single row does not count.

    A program of several rows goes on, under a mask. With probabilities every row counts.
    """
    if VARIANT.ROWS == 1 and not VARIANT.PROBABILITIES:
        return counted
    else:
        return True


@triton.jit
def load_logits(pointers, mask, softcap):
    """z, float32 of the shape of the pointers, after the softcap; -inf outside the mask.

    -inf is the logit of a class that does not exist: its exponential is 0.
    """
    z = (tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=-INF)).to(tl.float32)
    if softcap is not None:
        softcap = value_of(softcap)
        z = fma(tanh(z * (1.0 / softcap)), softcap, 0.0)  # not a plain product: see less_product
        if mask is not None:
            z = tl.where(mask, z, -INF)
    return z


@triton.jit
def at_targets(inputs, scalars, row, target, counted, VARIANT: tl.constexpr):
    """(g, z_g, w_g) of each row: the target's column among these logits, its logit, and its class weight.

    The loss needs them, and the gradient at the target. An out-of-range target has g = 0 and w_g = NaN, so the row's
    loss and gradient are NaN. A target in another shard has g = -1, z_g = -inf and w_g = 0. With probabilities nobody
    reads the three.
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
            # The gradient may take the place of the logits: then another thread is about to write where z_g was read.
            tl.debug_barrier()
        return g, z_g, w_g


@triton.jit
def last_step(inputs, VARIANT: tl.constexpr):
    """The element of the window at which the last step of a walk begins, a multiple of TILES x BLOCK_K.

    All steps before it have full tiles in every row, and need no mask. With K = 5000, no window, and steps of 2048 it
    is 4096.
    """
    shortest = inputs.num_classes * VARIANT.ALIGN
    if VARIANT.WINDOW:
        shortest -= 2 * (VARIANT.VECTOR - 1)
    return (shortest - 1) // (VARIANT.TILES * VARIANT.BLOCK_K) * (VARIANT.TILES * VARIANT.BLOCK_K)


@triton.jit
def window_of(inputs, row, VARIANT: tl.constexpr):
    """(first, head, length) of each row: see the picture above. Without WINDOW they are (begin, 0, K).

    first is an element counted from the pointer to the logits, head the class there, length the number of classes.
    """
    begin = row * inputs.logits_stride * VARIANT.ALIGN
    K = inputs.num_classes * VARIANT.ALIGN
    if VARIANT.WINDOW:
        first = (begin + (VARIANT.VECTOR - 1)) // VARIANT.VECTOR * VARIANT.VECTOR
        length = ((begin + K) // VARIANT.VECTOR * VARIANT.VECTOR - first).to(tl.int32)
        # What is longer than the tiles of a row, or the steps of a walk, goes with the edge.
        if VARIANT.RESIDENT:
            COUNT: tl.constexpr = num_tiles(VARIANT.TILES, VARIANT.TAIL)
            END: tl.constexpr = start_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, COUNT)
            length = tl.minimum(length, END)
        else:
            length = tl.minimum(length, last_step(inputs, VARIANT) + VARIANT.TILES * VARIANT.BLOCK_K)
        return first, (first - begin).to(tl.int32), length
    else:
        return begin, 0, K


@triton.jit
def full_tile(WIDTH: tl.constexpr, value: tl.constexpr):
    """A tile of one row, (WIDTH,), full of one value."""
    return tl.full((WIDTH,), value, tl.float32)


@triton.jit
def place_of_tile(inputs, row, counted, window, start, i: tl.constexpr, ALL: tl.constexpr, VARIANT: tl.constexpr):
    """The place of tile i of those that begin `start` classes into the window: see `place_of`."""
    START: tl.constexpr = start_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, i)
    WIDTH: tl.constexpr = width_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, i)
    return place_of(inputs, row, counted, window, start + START, WIDTH, ALL, VARIANT)


@triton.jit
def place_of(
    inputs, row, counted, window, start, WIDTH: tl.constexpr, ALL: tl.constexpr, VARIANT: tl.constexpr
):  # fmt: skip
    """The place of WIDTH classes, from `start` in the window on: four tensors that meet in the shape of such a tile.

    ALL says that every row has all of them. Of rows that share a program each may have a `start` of its own, (ROWS, 1,
    1). Loads and stores need its elements, its classes and two masks: which classes exist, and which are to be read.
    The masks differ only for a program of several rows: the classes of an ignored row exist, and get a gradient of 0,
    but are not read. Example, row 1 of the picture with WIDTH = 256 and start = 0: element 24 + i, class 3 + i, and
    both masks i < 16.
    """
    first, head, length = window
    if VARIANT.ROWS > 1:
        ADJACENT: tl.constexpr = WIDTH // VARIANT.GROUPS
        cols = tl.arange(0, VARIANT.GROUPS)[:, None] * ADJACENT + tl.arange(0, ADJACENT)[None, :]
        cols = start + cols[None, :, :]
        inside, _ = tl.broadcast((row < num_rows_of(inputs))[:, None, None], cols)
        read, _ = tl.broadcast(counted[:, None, None], cols)
        if not ALL:
            inside, read = inside & (cols < length), read & (cols < length)
        return first[:, None, None] + cols, cols, inside, read
    else:
        cols = start + tl.arange(0, WIDTH)
        return first + cols, head + cols, cols < length, cols < length


@triton.jit
def place_of_edge(inputs, row, window, VARIANT: tl.constexpr):
    """The place of the edge: four tensors, (GROUPS,).

    The edge has one class where the tiles have a group, so the edge is added to the sums of the groups as it
    is. The first VECTOR elements go backwards from the window, the others backwards from the row's end. Row 1 of the
    picture:

        element of the edge    0  1  2  3  4  5  6  7  8  9 10 ...
        class                  2  1  0  .  .  .  .  . 20 19  . ...
    """
    _, head, length = window
    i = tl.arange(0, VARIANT.GROUPS)
    # Backwards, as Triton would see that forwards they are neighbours, and give all of them to a few threads.
    before, behind = head - 1 - i, inputs.num_classes * VARIANT.ALIGN - 1 - (i - VARIANT.VECTOR)
    classes = tl.where(i < VARIANT.VECTOR, before, behind)
    mask = tl.where(i < VARIANT.VECTOR, before >= 0, behind >= head + length)
    return row * inputs.logits_stride * VARIANT.ALIGN + classes, classes, mask, mask


@triton.jit
def _load(inputs, scalars, row, place, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """(z, y, w y, w y before smoothing) at a place, each of the tile's shape.

    Outside the mask z is -inf, and the others are 0. With SMOOTHED, y is the same for all classes: the last three are 1
    where the class exists. Without HAS_Y and SMOOTHED nobody reads the last three.
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
        return z, z, z, z  # nobody reads the last three


@triton.jit
def load_tiles(inputs, scalars, row, counted, window, start, FULL: tl.constexpr, VARIANT: tl.constexpr):
    """(z, y, w y, w y before smoothing), each a tuple of tiles, from `start` in the window on.

    A whole row, or a step of a walk, comes into registers this way. The first FULL tiles end before the row does in
    every row, so they need no mask. With K = 5000, BLOCK_K = 2048 and TILES = 3, FULL is 2.
    """
    z, y, wy, given = (), (), (), ()
    for i in tl.static_range(num_tiles(VARIANT.TILES, VARIANT.TAIL)):
        place = place_of_tile(inputs, row, counted, window, start, i, i < FULL, VARIANT)
        z_i, y_i, wy_i, given_i = _load(inputs, scalars, row, place, VARIANT.ROWS > 1 or i >= FULL, VARIANT)
        z, y, wy, given = z + (z_i,), y + (y_i,), wy + (wy_i,), given + (given_i,)
    return z, y, wy, given


@triton.jit
def load_row(inputs, scalars, row, counted, window, VARIANT: tl.constexpr):
    """The tiles of a resident row; a walk loads its own, and nobody reads what is returned."""
    if VARIANT.RESIDENT:
        return load_tiles(inputs, scalars, row, counted, window, 0, VARIANT.FULL, VARIANT)
    else:
        return row, row, row, row


@triton.jit
def load_edge(inputs, scalars, row, window, VARIANT: tl.constexpr):
    """(z, y, w y, w y before smoothing) of the edge, each (GROUPS,). Without WINDOW nobody reads the four."""
    if VARIANT.WINDOW:
        return _load(inputs, scalars, row, place_of_edge(inputs, row, window, VARIANT), True, VARIANT)
    else:
        return row, row, row, row  # nobody reads them


@triton.jit
def store_per_row(ptr, inputs, row, values, FIRST: tl.constexpr, VARIANT: tl.constexpr):
    """Write a tuple of values of the row to the rows FIRST, FIRST + 1, ... of a matrix (count, N).

    The losses are such a matrix, (4, N), and the statistics, (7, N): a column is a row of logits.
    """
    N = tl.cast(num_rows_of(inputs), tl.int64)
    for i in tl.static_range(len(values)):
        if VARIANT.ROWS == 1:
            tl.store(ptr + (FIRST + i) * N + row, values[i])
        else:
            tl.store(ptr + (FIRST + i) * N + row, values[i], mask=row < N)


@triton.jit
def load_per_row(ptr, inputs, row, i, inside):
    """The value of each row in row i of a matrix (count, N), as `store_per_row` wrote it; 0 outside `inside`."""
    N = tl.cast(num_rows_of(inputs), tl.int64)
    return load_if_counted(ptr + i * N + row, inside)
