"""The Triton kernels: programs that walk over the classes of their rows.

Where a row fits into registers it is read once, as a few tiles, and everything from its maximum to its gradient is
computed there (RESIDENT). A longer row is walked in steps of a few tiles, three times: for the sum of exponentials, for
S and U, for the gradient; the second and third reads are for the cache to serve. The three walks are kernels of their
own as well. A program may be a cluster of thread blocks, which hold the tiles of a row together: the code is the same.

The gradient at the target is computed from the row's numbers, and written over what its tile left there. The thread
that wrote the tile does it, so that no barrier is needed: a cluster has none but those of its reductions, and programs
that go from row to row while the next row is on its way cannot afford one.

Ignored rows are not read. Where rows of few classes share a program, they are under a mask of nothing, and their
numbers come out as 0 whatever the memory holds.
"""

import triton
import triton.language as tl

from .loads import (
    any_counted,
    at_targets,
    counted_targets,
    full_tile,
    last_step,
    load_edge,
    load_rows,
    load_tiles,
    place_of_edge,
    place_of_tile,
    program_rows,
    store_rows,
    window_of,
)
from .rows import (
    coefficients_of,
    losses_of,
    lse_with_targets,
    numbers_of,
    shares,
    stats_of,
    sums_with_targets,
    zeros,
)
from .tiles import (
    INF,
    add_to_lse,
    coin_h_and_u,
    column,
    columns,
    exp2_near_0,
    finite_maximum,
    gradient_of,
    largest_of_row,
    lse_of_edge,
    lse_of_rows,
    maximum_of,
    reference_of,
    sum_of_exps,
    sum_of_row,
    sum_pairs,
    sums_of_h_and_u,
    sums_of_y,
    value_of,
    weighted_sums_of_h_and_u,
)

# ---------------------------------------------------------------------------------------------------------------------
# Sums over tiles, and their gradient


@triton.jit
def _sums_of_tiles(tiles, numbers, V: tl.constexpr):
    """In bits, of the groups: for probabilities of (1 - y) h and (1 - y) u, else of h and u of all classes alike."""
    z, y, _, _ = tiles
    if V.PROBABILITIES:
        return weighted_sums_of_h_and_u(z, y, columns(numbers, z[0]), V.ADJACENT, V.CTAS, V.PTX)
    else:
        return sums_of_h_and_u(z, columns(numbers, z[0]), V.ADJACENT, V.CTAS, V.PTX)


@triton.jit
def _sums_of_rows(h_sum, u_sum, edge, numbers, V: tl.constexpr):
    """The same of rows, from their groups."""
    if V.WINDOW:
        z, y, _, _ = edge
        h, u = coin_h_and_u(z, columns(numbers, z), V.PTX)
        if V.PROBABILITIES:
            h, u = (1.0 - y) * h, (1.0 - y) * u
        h_sum, u_sum = h_sum + h, u_sum + u
    return sum_pairs(h_sum, u_sum)


@triton.jit
def _gradient_of_tile(inputs, opts, z, y, wy, numbers, coefficients, V: tl.constexpr):
    coef_e, coef_u, coef_y = coefficients
    if V.PROBABILITIES:
        coef_u = column(coef_u, z) * (1.0 - y)
    else:
        share, _ = shares(inputs, opts, V)
        coef_u = column(coef_u * (1.0 - share), z)
        if V.SMOOTHED:
            wy = share
    has_y: tl.constexpr = V.HAS_Y or V.SMOOTHED
    return gradient_of(
        z, wy, columns(numbers, z), column(coef_e, z), coef_u, column(coef_y, z), opts.softcap, has_y, V.PTX
    )


@triton.jit
def _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V: tl.constexpr):
    """``mask`` is None for all of the tile."""
    offsets, classes, _, _ = place
    if not V.WINDOW:
        offsets = column(rows * gradient_stride * V.ALIGN, gradient) + classes
    if mask is None:
        tl.store(gradient_ptr + offsets, gradient)
    else:
        tl.store(gradient_ptr + offsets, gradient, mask=mask)


@triton.jit
def _store_gradient_of_tiles(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
    FULL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    z, y, wy, _ = tiles
    TILES: tl.constexpr = V.TILES  # or Triton 3.6 takes it for a number of the running program
    for i in tl.static_range(TILES):
        place = place_of_tile(inputs, rows, counted, window, start + i * V.BLOCK_K, V)
        gradient = _gradient_of_tile(inputs, opts, z[i], y[i], wy[i], numbers, coefficients, V)
        mask = place[2] if V.ROWS > 1 or i >= FULL else None
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V)


@triton.jit
def _store_gradient_of_rest(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, edge, targets, numbers, coefficients,
    V: tl.constexpr,
):  # fmt: skip
    """After the tiles: that of the edges and of the targets."""
    if not V.PROBABILITIES:
        g, z_g, w_g = targets
        coef_e, coef_u, coef_y = coefficients
        share, at_target = shares(inputs, opts, V)
        y_g = share + at_target
        gradient_g = gradient_of(
            z_g, w_g * y_g, numbers, coef_e, coef_u * (1.0 - y_g), coef_y, opts.softcap, True, V.PTX
        )
        # The whole tile that holds the target is stored once more, under a mask: its elements lie with the same threads
        # as before, so that the second of two writes is the one that stays.
        if V.ROWS == 1:
            col = g.to(tl.int32) - window[1]
            place = place_of_tile(inputs, rows, counted, window, col // V.BLOCK_K * V.BLOCK_K, V)
            mask = place[1] == (tl.where(col < window[2], g, -1) if V.WINDOW else g).to(tl.int32)
        else:
            place = place_of_tile(inputs, rows, counted, window, 0, V)
            mask = place[3] & (place[1] == g.to(tl.int32)[:, None])
        gradient_g = gradient_g.to(gradient_ptr.dtype.element_ty)
        gradient, _ = tl.broadcast(column(gradient_g, place[1]), place[1])
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V)
    if V.WINDOW:
        z, y, wy, _ = edge
        place = place_of_edge(inputs, rows, window, V)
        gradient = _gradient_of_tile(inputs, opts, z, y, wy, numbers, coefficients, V)
        if not V.PROBABILITIES:
            gradient = tl.where(place[1] == g, gradient_g, gradient)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, place[2], V)


@triton.jit
def _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V: tl.constexpr):
    """Zeros, of rows that are not counted."""
    window = window_of(inputs, rows, V)
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        place = place_of_tile(inputs, rows, counted, window, start, V)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, full_tile(V.BLOCK_K, 0.0, V), place[2], V)
    if V.WINDOW:
        place = place_of_edge(inputs, rows, window, V)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, full_tile(V.BLOCK_K // 8, 0.0, V), place[2], V)


# ---------------------------------------------------------------------------------------------------------------------
# The walks over the tiles of a row. `edge` is what `load_edge` returns.


@triton.jit
def _smoothed(lse, inputs, opts, V: tl.constexpr):
    """The statistics of a row with y, from those with 1 in its place."""
    m, exp_sum, _, z_sum, _ = lse
    zero = zeros(V)
    share, _ = shares(inputs, opts, V)
    if inputs.all_classes is None:
        return m, exp_sum, zero + value_of(opts.label_smoothing), share * z_sum, zero
    else:
        return m, exp_sum, zero + share * (inputs.num_classes * V.ALIGN), share * z_sum, zero


@triton.jit
def _lse_of_tiles(inputs, opts, tiles, edge, V: tl.constexpr):
    """m, s and the sums with y of rows that are held as tiles, and the reference of s."""
    z, _, wy, given = tiles
    edge_z = None
    if V.WINDOW:
        edge_z = edge[0]
    m = maximum_of(z, edge_z, V.ADJACENT, V.CTAS)
    reference = reference_of(m, V.PTX)
    exp_sum = sum_of_exps(z, edge_z, reference, V.ADJACENT, V.CTAS)
    if V.HAS_Y:
        finite = column(finite_maximum(m), z[0])
        y_sum, yz_sum, omega = sums_of_y(z, wy, given, finite, V.ADJACENT, V.CTAS)
        if V.WINDOW:
            _, _, edge_y, edge_yz, edge_omega = lse_of_edge(edge[0], edge[2], edge[3], True)
            edge_yz += edge_y * (finite_maximum(edge[0]) - finite)
            y_sum, yz_sum, omega = y_sum + edge_y, yz_sum + edge_yz, omega + edge_omega
        return (m, exp_sum, sum_of_row(y_sum), sum_of_row(yz_sum), sum_of_row(omega)), reference
    elif V.SMOOTHED:
        finite = column(finite_maximum(m), z[0])
        _, z_sum, _ = sums_of_y(z, wy, wy, finite, V.ADJACENT, V.CTAS)
        if V.WINDOW:
            z_sum += tl.where(edge[1] == 0, 0.0, edge[0] - finite)
        return _smoothed((m, exp_sum, zeros(V), sum_of_row(z_sum), zeros(V)), inputs, opts, V), reference
    else:
        return (m, exp_sum, zeros(V), zeros(V), zeros(V)), reference


@triton.jit
def _walk_lse(inputs, opts, rows, counted, window, edge, V: tl.constexpr):
    """What `_lse_of_tiles` returns, of rows in memory."""
    if V.WINDOW:
        lse = lse_of_edge(edge[0], edge[2], edge[3], V.HAS_Y or V.SMOOTHED)
    else:
        none, zero = full_tile(V.BLOCK_K // 8, -INF, V), full_tile(V.BLOCK_K // 8, 0.0, V)
        # Triton 3.6 and 3.8 rewrite a sum in a loop that begins at a constant, and fail if it is used twice afterwards.
        zero += tl.program_id(0).to(tl.float32) * 0.0
        lse = none, zero, zero, zero, zero
    last = last_step(inputs, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        z, _, wy, given = load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        lse = add_to_lse(lse, z, wy, given, V.HAS_Y or V.SMOOTHED, V.ADJACENT)
    z, _, wy, given = load_tiles(inputs, opts, rows, counted, window, last, 0, V)
    lse = add_to_lse(lse, z, wy, given, V.HAS_Y or V.SMOOTHED, V.ADJACENT)
    m = largest_of_row(lse[0])
    reference = reference_of(m, V.PTX)
    lse = lse_of_rows(lse, reference, m, zeros(V), V.HAS_Y or V.SMOOTHED)
    if V.SMOOTHED:
        return _smoothed(lse, inputs, opts, V), reference
    else:
        return lse, reference


@triton.jit
def _walk_sums(inputs, opts, rows, counted, window, edge, numbers, V: tl.constexpr):
    """Σ h and Σ u as `_sums_of_rows` has them, of rows in memory."""
    last = last_step(inputs, V)
    h_sum, u_sum = _sums_of_tiles(load_tiles(inputs, opts, rows, counted, window, last, 0, V), numbers, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        h, u = _sums_of_tiles(tiles, numbers, V)
        h_sum += h
        u_sum += u
    return _sums_of_rows(h_sum, u_sum, edge, numbers, V)


@triton.jit
def _walk_gradient(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    last = last_step(inputs, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        _store_gradient_of_tiles(
            inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
            V.TILES, V,
        )  # fmt: skip
    tiles = load_tiles(inputs, opts, rows, counted, window, last, 0, V)
    _store_gradient_of_tiles(
        inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, last, tiles, numbers, coefficients, 0, V
    )


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@triton.jit
def _rows_of_row_loss(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, counted, target,
    tiles, V: tl.constexpr,
):  # fmt: skip
    targets = at_targets(inputs, opts, rows, target, counted, V)
    window = window_of(inputs, rows, V)
    edge = load_edge(inputs, opts, rows, window, V)
    if V.RESIDENT:
        if tiles is None:
            tiles = load_tiles(inputs, opts, rows, counted, window, 0, V.FULL, V)
        lse, reference = _lse_of_tiles(inputs, opts, tiles, edge, V)
    else:
        lse, reference = _walk_lse(inputs, opts, rows, counted, window, edge, V)
    lse = lse_with_targets(inputs, opts, lse, targets, V)
    numbers, exp_sum, log_sum = numbers_of(opts, reference, lse[1], counted, V.PTX)
    if V.RESIDENT:
        h_sum, u_sum = _sums_of_tiles(tiles, numbers, V)
        h_sum, u_sum = _sums_of_rows(h_sum, u_sum, edge, numbers, V)
    else:
        h_sum, u_sum = _walk_sums(inputs, opts, rows, counted, window, edge, numbers, V)
    h_sum, u_sum = sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    store_rows(losses_ptr, inputs, rows, losses_of(opts, lse, h_sum, log_sum, counted, V), 0, V)
    if stats_ptr is not None:
        store_rows(stats_ptr, inputs, rows, stats_of(lse, reference), 0, V)
        store_rows(stats_ptr, inputs, rows, (h_sum, u_sum), 5, V)
    if gradient_ptr is not None:
        coefficients = coefficients_of(
            inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum, V.PTX
        )
        if V.RESIDENT:
            _store_gradient_of_tiles(
                inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, 0, tiles, numbers, coefficients,
                V.FULL, V,
            )  # fmt: skip
        else:
            _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V)
        _store_gradient_of_rest(
            inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, edge, targets, numbers, coefficients, V
        )


@triton.jit
def _row_loss(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, inside, tiles,
    V: tl.constexpr,
):  # fmt: skip
    target, counted = counted_targets(inputs, opts, rows, inside, V)
    if any_counted(counted, V):
        _rows_of_row_loss(
            inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows,
            None if V.ROWS == 1 else counted, target, tiles, V,
        )  # fmt: skip
    else:
        zero = zeros(V)
        store_rows(losses_ptr, inputs, rows, (zero, zero, zero, zero), 0, V)
        if stats_ptr is not None:
            store_rows(stats_ptr, inputs, rows, (zero, zero, zero, zero, zero, zero, zero), 0, V)
        if gradient_ptr is not None:
            _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)


@triton.jit
def row_loss_kernel(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, num_programs,
    V: tl.constexpr,
):  # fmt: skip
    """row_loss with stats_ptr, row_loss_and_gradient with gradient_ptr."""
    if V.STAGES == 0:
        rows = program_rows(V)
        inside = None if V.ROWS == 1 else rows < inputs.num_rows
        _row_loss(
            inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, inside,
            None, V,
        )  # fmt: skip
    else:
        for row in tl.range(tl.program_id(0), inputs.num_rows, num_programs, num_stages=V.STAGES):
            rows = tl.cast(row, tl.int64)
            # Of ignored rows as well: which they are is not known when this is read, while the row before is computed.
            tiles = load_tiles(inputs, opts, rows, None, window_of(inputs, rows, V), 0, V.FULL, V)
            _row_loss(
                inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows,
                None, tiles, V,
            )  # fmt: skip


@triton.jit
def row_lse_kernel(inputs, opts, stats_ptr, V: tl.constexpr):
    """The first five statistics."""
    rows = program_rows(V)
    inside = None if V.ROWS == 1 else rows < inputs.num_rows
    target, counted = counted_targets(inputs, opts, rows, inside, V)
    if any_counted(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = at_targets(inputs, opts, rows, target, masked, V)
        window = window_of(inputs, rows, V)
        edge = load_edge(inputs, opts, rows, window, V)
        lse, reference = _walk_lse(inputs, opts, rows, masked, window, edge, V)
        stats = stats_of(lse_with_targets(inputs, opts, lse, targets, V), reference)
        store_rows(stats_ptr, inputs, rows, stats, 0, V)
    else:
        zero = zeros(V)
        store_rows(stats_ptr, inputs, rows, (zero, zero, zero, zero, zero), 0, V)


@triton.jit
def _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, counted, V: tl.constexpr):
    m, exp_sum = load_rows(stats_ptr, inputs, rows, 0, inside), load_rows(stats_ptr, inputs, rows, 1, inside)
    reference = reference_of(m, V.PTX)
    numbers, exp_sum, log_sum = numbers_of(opts, reference, exp_sum * exp2_near_0(reference[2]), counted, V.PTX)
    return m, numbers, exp_sum, log_sum


@triton.jit
def row_sums_kernel(inputs, opts, stats_ptr, sums_ptr, V: tl.constexpr):
    """The last two statistics."""
    rows = program_rows(V)
    inside = None if V.ROWS == 1 else rows < inputs.num_rows
    target, counted = counted_targets(inputs, opts, rows, inside, V)
    if any_counted(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = at_targets(inputs, opts, rows, target, masked, V)
        _, numbers, _, _ = _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, masked, V)
        window = window_of(inputs, rows, V)
        edge = load_edge(inputs, opts, rows, window, V)
        h_sum, u_sum = _walk_sums(inputs, opts, rows, masked, window, edge, numbers, V)
        store_rows(sums_ptr, inputs, rows, sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V), 0, V)
    else:
        store_rows(sums_ptr, inputs, rows, (zeros(V), zeros(V)), 0, V)


@triton.jit
def row_gradient_kernel(
    inputs, opts, stats_ptr, scale_ptr, scale_stride, gradient_ptr, gradient_stride, V: tl.constexpr
):  # fmt: skip
    """The gradient of scale * loss."""
    rows = program_rows(V)
    inside = None if V.ROWS == 1 else rows < inputs.num_rows
    target, counted = counted_targets(inputs, opts, rows, inside, V)
    if any_counted(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = at_targets(inputs, opts, rows, target, masked, V)
        m, numbers, exp_sum, log_sum = _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, masked, V)
        y_sum = load_rows(stats_ptr, inputs, rows, 2, inside)
        lse = m, exp_sum, y_sum, y_sum, load_rows(stats_ptr, inputs, rows, 4, inside)
        u_sum = load_rows(stats_ptr, inputs, rows, 6, inside)
        coefficients = coefficients_of(
            inputs, opts, scale_ptr, scale_stride, rows, masked, lse, exp_sum, log_sum, u_sum, V.PTX
        )
        window = window_of(inputs, rows, V)
        edge = load_edge(inputs, opts, rows, window, V)
        _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, numbers, coefficients, V)
        _store_gradient_of_rest(
            inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, edge, targets, numbers, coefficients, V
        )
    else:
        _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)
