"""Walks over the classes of rows: sums over tiles and their gradient, with the tiles in registers or in memory.

A row that fits into registers is read once (RESIDENT): `lse_of_tiles`, `sums_of_tiles`. A longer row is read in steps
of a few tiles, once by each walk: `walk_lse`, `walk_sums`, `walk_gradient`. The tuples are explained in rows.py and
memory.py.
"""

import triton
import triton.language as tl

from .arithmetic import INF, value_of
from .formulas import (
    add_to_lse,
    coin_h_and_u,
    columns,
    finite_maximum,
    gradient_of,
    lse_of_edge,
    lse_of_groups,
    maximum_of,
    reference_of,
    sum_of_exps,
    sums_of_h_and_u,
    sums_of_y,
    weighted_sums_of_h_and_u,
)
from .groups import (
    again_of,
    column,
    largest_of_row,
    num_again,
    num_tiles,
    start_of,
    sum_of_row,
    sum_pairs,
)
from .memory import full_tile, last_step, load_tiles, place_of, place_of_edge, place_of_tile, window_of
from .rows import gradient_at_targets, if_counted, shares, zeros

# ---------------------------------------------------------------------------------------------------------------------
# Sums over tiles, and their gradient


@triton.jit
def sums_of_tiles(tiles, constants, VARIANT: tl.constexpr):
    """(Σ h, Σ u) in bits for every group of some tiles, of all classes alike.

    With probabilities they are Σ (1 - y) h and Σ (1 - y) u. With class indices the target is subtracted later (rows.py:
    `sums_with_targets`).
    """
    z, y, _, _ = tiles
    if VARIANT.PROBABILITIES:
        return weighted_sums_of_h_and_u(z, y, columns(constants, z[0]), VARIANT)
    else:
        return sums_of_h_and_u(z, columns(constants, z[0]), VARIANT)


@triton.jit
def sums_of_groups(h_sum, u_sum, edge, constants, VARIANT: tl.constexpr):
    """(Σ h, Σ u) in bits for each row, from those for its groups and from its edge; with 1 - y for probabilities."""
    if VARIANT.WINDOW:
        z, y, _, _ = edge
        h, u = coin_h_and_u(z, columns(constants, z), VARIANT.PTX)
        if VARIANT.PROBABILITIES:
            h, u = (1.0 - y) * h, (1.0 - y) * u
        h_sum, u_sum = h_sum + h, u_sum + u
    return sum_pairs(h_sum, u_sum)


@triton.jit
def _gradient_of_tile(inputs, scalars, z, y, wy, constants, coefficients, VARIANT: tl.constexpr):
    """The gradient at each class of a tile, of the tile's shape, as if there were no target among them."""
    coef_e, coef_u, coef_y = coefficients
    if VARIANT.PROBABILITIES:
        coef_u = column(coef_u, z) * (1.0 - y)
    else:
        share, _ = shares(inputs, scalars, VARIANT)
        coef_u = column(coef_u * (1.0 - share), z)
        if VARIANT.SMOOTHED:
            wy = share
    has_y: tl.constexpr = VARIANT.HAS_Y or VARIANT.SMOOTHED
    return gradient_of(
        z, wy, columns(constants, z), column(coef_e, z), coef_u, column(coef_y, z), scalars.softcap, has_y, VARIANT.PTX
    )


@triton.jit
def _store_gradient(gradient_ptr, gradient_stride, row, place, gradient, mask, VARIANT: tl.constexpr):
    """Write the gradient, of a tile's shape, to a place; all of it where `mask` is None.

    A place counts elements of the logits. In a window the gradient has the logits' stride, and the elements are the
    same.
    """
    offsets, classes, _, _ = place
    if not VARIANT.WINDOW:
        offsets = column(row * gradient_stride * VARIANT.ALIGN, gradient) + classes
    if mask is None:
        tl.store(gradient_ptr + offsets, gradient)
    else:
        tl.store(gradient_ptr + offsets, gradient, mask=mask)


@triton.jit
def store_gradient_of_tiles(
    inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, start, tiles, targets, constants,
    coefficients, FULL: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of tiles that are in registers; that of a target is left to `store_gradient_of_rest`.

    The first FULL tiles are full in every row, and need no mask. In a narrow tile, whose threads have fewer classes
    than one instruction stores, the target's gradient is put into the tile.
    """
    z, y, wy, _ = tiles
    if VARIANT.TAIL > 0 and not VARIANT.PROBABILITIES:  # the compiler makes one of this and the one of the rest
        gradient_g = gradient_at_targets(inputs, scalars, targets, constants, coefficients, VARIANT)
    AGAIN: tl.constexpr = again_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.ADJACENT, VARIANT.CTAS)
    NUM_AGAIN: tl.constexpr = num_again(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, AGAIN)
    for i in tl.static_range(num_tiles(VARIANT.TILES, VARIANT.TAIL)):
        place = place_of_tile(inputs, row, counted, window, start, i, i < FULL, VARIANT)
        gradient = _gradient_of_tile(inputs, scalars, z[i], y[i], wy[i], constants, coefficients, VARIANT)
        if i >= NUM_AGAIN and not VARIANT.PROBABILITIES:
            g = column(if_counted(counted, targets[0].to(tl.int32), -1), gradient)
            gradient = tl.where(place[1] == g, column(gradient_g, gradient), gradient)
        mask = place[2] if VARIANT.ROWS > 1 or i >= FULL else None
        _store_gradient(gradient_ptr, gradient_stride, row, place, gradient, mask, VARIANT)


@triton.jit
def store_gradient_of_rest(
    inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, edge, targets, constants, coefficients,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each row's target and edge, after that of its tiles.

    The tiles have written a gradient at the target as at any other class. The target's own gradient differs, and is
    written over it. Only the thread that wrote the class before may do this: its two stores keep their order, where
    another thread's store could come first. A store of one element would be done by the program's first thread. So a
    part of the tile is stored again, as much as the threads store with one instruction each, under a mask that is true
    at the target alone: the thread that has the target is the one that had it before, and no barrier is needed.
    Example: with bf16, 256 threads, no window and g = 5000, these are the classes 4096 to 6143, and the mask is true at
    class 5000.

    The edge is stored once, as a narrow tile is. If the target lies in one of them, its gradient is put into it before
    the store, and the mask is true nowhere.
    """
    if not VARIANT.PROBABILITIES:
        g, _, _ = targets
        gradient_g = gradient_at_targets(inputs, scalars, targets, constants, coefficients, VARIANT)
        AGAIN: tl.constexpr = again_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.ADJACENT, VARIANT.CTAS)
        NUM_AGAIN: tl.constexpr = num_again(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, AGAIN)
        if NUM_AGAIN > 0:
            # What the target lies in once more, under a mask: the thread that wrote the class before writes it again.
            g = if_counted(counted, g.to(tl.int32), -1)
            col = g - window[1]
            # g is -1 where nothing is stored again: a tile of one class would begin, and be written, at -1.
            start = (tl.maximum(col, 0) if VARIANT.ROWS > 1 else col) // AGAIN * AGAIN
            if VARIANT.ROWS > 1:
                start = start[:, None, None]
            place = place_of(inputs, row, counted, window, start, AGAIN, False, VARIANT)
            if VARIANT.WINDOW:
                g = tl.where(col < window[2], g, -1)
            if VARIANT.TAIL > 0:
                g = tl.where(
                    col < start_of(VARIANT.BLOCK_K, VARIANT.GROUPS, VARIANT.TILES, VARIANT.TAIL, NUM_AGAIN), g, -1
                )
            mask = place[1] == column(g, place[1])
            gradient, _ = tl.broadcast(column(gradient_g.to(gradient_ptr.dtype.element_ty), place[1]), place[1])
            _store_gradient(gradient_ptr, gradient_stride, row, place, gradient, mask, VARIANT)
    if VARIANT.WINDOW:
        z, y, wy, _ = edge
        place = place_of_edge(inputs, row, window, VARIANT)
        gradient = _gradient_of_tile(inputs, scalars, z, y, wy, constants, coefficients, VARIANT)
        if not VARIANT.PROBABILITIES:
            gradient = tl.where(place[1] == targets[0], gradient_g, gradient)
        _store_gradient(gradient_ptr, gradient_stride, row, place, gradient, place[2], VARIANT)


@triton.jit
def store_no_gradient(inputs, gradient_ptr, gradient_stride, row, counted, VARIANT: tl.constexpr):
    """Write zeros as the gradient of the program's row, which does not count."""
    window = window_of(inputs, row, VARIANT)
    if VARIANT.ROWS == 1:  # Triton 3.6 compiles this also where rows share a program, and it is never called
        for start in range(0, inputs.num_classes * VARIANT.ALIGN, VARIANT.BLOCK_K):
            place = place_of(inputs, row, counted, window, start, VARIANT.BLOCK_K, False, VARIANT)
            zero = full_tile(VARIANT.BLOCK_K, 0.0)
            _store_gradient(gradient_ptr, gradient_stride, row, place, zero, place[2], VARIANT)
    if VARIANT.WINDOW:
        place = place_of_edge(inputs, row, window, VARIANT)
        zero = full_tile(VARIANT.GROUPS, 0.0)
        _store_gradient(gradient_ptr, gradient_stride, row, place, zero, place[2], VARIANT)


# ---------------------------------------------------------------------------------------------------------------------
# The walks over the tiles of a row


@triton.jit
def _smoothed(lse, inputs, scalars, VARIANT: tl.constexpr):
    """(m, s, Σ y, Σ y (z - m), 0) of each row for y = ε/K, the target's 1 - ε aside, given Σ (z - m) as the fourth.

    Σ y over all classes is ε, or the part of ε that this shard's classes have. Σ y (z - m) is ε/K times Σ (z - m). ω
    comes from the target (rows.py: `lse_with_targets`).
    """
    m, exp_sum, _, z_sum, _ = lse
    zero = zeros(VARIANT)
    share, _ = shares(inputs, scalars, VARIANT)
    if inputs.all_classes is None:
        return m, exp_sum, zero + value_of(scalars.label_smoothing), share * z_sum, zero
    else:
        return m, exp_sum, zero + share * (inputs.num_classes * VARIANT.ALIGN), share * z_sum, zero


@triton.jit
def lse_of_tiles(inputs, scalars, tiles, edge, VARIANT: tl.constexpr):
    """((m, s, Σ w y, Σ w y (z - m), ω), reference) of each row, from its tiles and its edge in registers.

    s is relative to the reference (formulas.py: `reference_of`). Without HAS_Y and SMOOTHED the last three are 0: with
    class indices only the target adds to them.
    """
    z, _, wy, given = tiles
    edge_z = None
    if VARIANT.WINDOW:
        edge_z = edge[0]
    m = maximum_of(z, edge_z, VARIANT)
    reference = reference_of(m, VARIANT.PTX)
    exp_sum = sum_of_exps(z, edge_z, reference, VARIANT)
    if VARIANT.HAS_Y:
        finite = column(finite_maximum(m), z[0])
        y_sum, yz_sum, omega = sums_of_y(z, wy, given, finite, VARIANT)
        if VARIANT.WINDOW:
            _, _, edge_y, edge_yz, edge_omega = lse_of_edge(edge[0], edge[2], edge[3], True)
            edge_yz += edge_y * (finite_maximum(edge[0]) - finite)
            y_sum, yz_sum, omega = y_sum + edge_y, yz_sum + edge_yz, omega + edge_omega
        return (m, exp_sum, sum_of_row(y_sum), sum_of_row(yz_sum), sum_of_row(omega)), reference
    elif VARIANT.SMOOTHED:
        finite = column(finite_maximum(m), z[0])
        _, z_sum, _ = sums_of_y(z, wy, wy, finite, VARIANT)
        if VARIANT.WINDOW:
            z_sum += tl.where(edge[1] == 0, 0.0, edge[0] - finite)
        lse = m, exp_sum, zeros(VARIANT), sum_of_row(z_sum), zeros(VARIANT)
        return _smoothed(lse, inputs, scalars, VARIANT), reference
    else:
        return (m, exp_sum, zeros(VARIANT), zeros(VARIANT), zeros(VARIANT)), reference


@triton.jit
def walk_lse(inputs, scalars, row, counted, window, edge, VARIANT: tl.constexpr):
    """((m, s, Σ w y, Σ w y (z - m), ω), reference) of each row in memory, as `lse_of_tiles` has them; one read.

    Every group has a maximum and sums of its own until the row ends, so no step waits for other threads.
    """
    if VARIANT.WINDOW:
        lse = lse_of_edge(edge[0], edge[2], edge[3], VARIANT.HAS_Y or VARIANT.SMOOTHED)
    else:
        none, zero = full_tile(VARIANT.GROUPS, -INF), full_tile(VARIANT.GROUPS, 0.0)
        # Triton 3.6 and 3.8 rewrite a sum in a loop that begins at a constant, and fail if it is used twice afterwards.
        zero += tl.program_id(0).to(tl.float32) * 0.0
        lse = none, zero, zero, zero, zero
    last = last_step(inputs, VARIANT)
    for start in range(0, last, VARIANT.TILES * VARIANT.BLOCK_K):
        z, _, wy, given = load_tiles(inputs, scalars, row, counted, window, start, VARIANT.TILES, VARIANT)
        lse = add_to_lse(lse, z, wy, given, VARIANT.HAS_Y or VARIANT.SMOOTHED, VARIANT)
    z, _, wy, given = load_tiles(inputs, scalars, row, counted, window, last, 0, VARIANT)
    lse = add_to_lse(lse, z, wy, given, VARIANT.HAS_Y or VARIANT.SMOOTHED, VARIANT)
    m = largest_of_row(lse[0])
    reference = reference_of(m, VARIANT.PTX)
    lse = lse_of_groups(lse, reference, m, zeros(VARIANT), VARIANT.HAS_Y or VARIANT.SMOOTHED)
    if VARIANT.SMOOTHED:
        return _smoothed(lse, inputs, scalars, VARIANT), reference
    else:
        return lse, reference


@triton.jit
def walk_sums(inputs, scalars, row, counted, window, edge, constants, VARIANT: tl.constexpr):
    """(Σ h, Σ u) in bits for each row in memory, as `sums_of_groups` has them; one read.

    The last step comes first, while the other steps have nothing to wait for: it begins the sums.
    """
    last = last_step(inputs, VARIANT)
    tiles = load_tiles(inputs, scalars, row, counted, window, last, 0, VARIANT)
    h_sum, u_sum = sums_of_tiles(tiles, constants, VARIANT)
    for start in range(0, last, VARIANT.TILES * VARIANT.BLOCK_K):
        tiles = load_tiles(inputs, scalars, row, counted, window, start, VARIANT.TILES, VARIANT)
        h, u = sums_of_tiles(tiles, constants, VARIANT)
        h_sum += h
        u_sum += u
    return sums_of_groups(h_sum, u_sum, edge, constants, VARIANT)


@triton.jit
def walk_gradient(
    inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, targets, constants, coefficients,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each row in memory, a step of tiles at a time; one read, one write."""
    last = last_step(inputs, VARIANT)
    for start in range(0, last, VARIANT.TILES * VARIANT.BLOCK_K):
        tiles = load_tiles(inputs, scalars, row, counted, window, start, VARIANT.TILES, VARIANT)
        store_gradient_of_tiles(
            inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, start, tiles, targets, constants,
            coefficients, VARIANT.TILES, VARIANT,
        )  # fmt: skip
    tiles = load_tiles(inputs, scalars, row, counted, window, last, 0, VARIANT)
    store_gradient_of_tiles(
        inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, last, tiles, targets, constants,
        coefficients, 0, VARIANT,
    )  # fmt: skip


@triton.jit
def store_gradient(
    inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, edge, tiles, targets, constants,
    coefficients, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each row: that of its tiles, in registers or in memory, then of its target and its edge."""
    if VARIANT.RESIDENT:
        store_gradient_of_tiles(
            inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, 0, tiles, targets, constants,
            coefficients, VARIANT.FULL, VARIANT,
        )  # fmt: skip
    else:
        walk_gradient(
            inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, targets, constants, coefficients,
            VARIANT,
        )  # fmt: skip
    store_gradient_of_rest(
        inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, edge, targets, constants, coefficients,
        VARIANT,
    )  # fmt: skip
