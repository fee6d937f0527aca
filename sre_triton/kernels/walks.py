"""Walks over the classes of rows, in registers and in memory: sums over tiles, and their gradient."""

import triton
import triton.language as tl

from .formulas import (
    INF,
    add_to_lse,
    coin_h_and_u,
    columns,
    finite_maximum,
    gradient_of,
    lse_of_edge,
    lse_of_rows,
    maximum_of,
    reference_of,
    sum_of_exps,
    sums_of_h_and_u,
    sums_of_y,
    value_of,
    weighted_sums_of_h_and_u,
)
from .groups import (
    column,
    largest_of_row,
    sum_of_row,
    sum_pairs,
)
from .memory import (
    full_tile,
    last_step,
    load_tiles,
    place_of_edge,
    place_of_tile,
    window_of,
)
from .rows import (
    shares,
    zeros,
)

# ---------------------------------------------------------------------------------------------------------------------
# Sums over tiles, and their gradient


@triton.jit
def sums_of_tiles(tiles, numbers, V: tl.constexpr):
    """In bits, of the groups: for probabilities of (1 - y) h and (1 - y) u, else of h and u of all classes alike."""
    z, y, _, _ = tiles
    if V.PROBABILITIES:
        return weighted_sums_of_h_and_u(z, y, columns(numbers, z[0]), V.ADJACENT, V.CTAS, V.PTX)
    else:
        return sums_of_h_and_u(z, columns(numbers, z[0]), V.ADJACENT, V.CTAS, V.PTX)


@triton.jit
def sums_of_rows(h_sum, u_sum, edge, numbers, V: tl.constexpr):
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
def store_gradient_of_tiles(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
    FULL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write the gradient of tiles that lie in registers; all classes of the first FULL tiles are there."""
    z, y, wy, _ = tiles
    TILES: tl.constexpr = V.TILES  # or Triton 3.6 takes it for a number of the running program
    for i in tl.static_range(TILES):
        place = place_of_tile(inputs, rows, counted, window, start + i * V.BLOCK_K, V)
        gradient = _gradient_of_tile(inputs, opts, z[i], y[i], wy[i], numbers, coefficients, V)
        mask = place[2] if V.ROWS > 1 or i >= FULL else None
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V)


@triton.jit
def store_gradient_of_rest(
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
def store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V: tl.constexpr):
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
def lse_of_tiles(inputs, opts, tiles, edge, V: tl.constexpr):
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
def walk_lse(inputs, opts, rows, counted, window, edge, V: tl.constexpr):
    """What `lse_of_tiles` returns, of rows in memory."""
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
def walk_sums(inputs, opts, rows, counted, window, edge, numbers, V: tl.constexpr):
    """Σ h and Σ u as `sums_of_rows` has them, of rows in memory."""
    last = last_step(inputs, V)
    h_sum, u_sum = sums_of_tiles(load_tiles(inputs, opts, rows, counted, window, last, 0, V), numbers, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        h, u = sums_of_tiles(tiles, numbers, V)
        h_sum += h
        u_sum += u
    return sums_of_rows(h_sum, u_sum, edge, numbers, V)


@triton.jit
def walk_gradient(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    """Write the gradient of rows in memory, a step of tiles at a time."""
    last = last_step(inputs, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        store_gradient_of_tiles(
            inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
            V.TILES, V,
        )  # fmt: skip
    tiles = load_tiles(inputs, opts, rows, counted, window, last, 0, V)
    store_gradient_of_tiles(
        inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, last, tiles, numbers, coefficients, 0, V
    )
