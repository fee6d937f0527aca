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

from .formulas import (
    exp2_near_0,
    reference_of,
)
from .memory import (
    any_counted,
    at_targets,
    counted_targets,
    load_edge,
    load_rows,
    load_tiles,
    program_rows,
    store_rows,
    window_of,
)
from .rows import (
    coefficients_of,
    losses_of,
    lse_with_targets,
    numbers_of,
    stats_of,
    sums_with_targets,
    zeros,
)
from .walks import (
    lse_of_tiles,
    store_gradient_of_rest,
    store_gradient_of_tiles,
    store_no_gradient,
    sums_of_rows,
    sums_of_tiles,
    walk_gradient,
    walk_lse,
    walk_sums,
)


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
        lse, reference = lse_of_tiles(inputs, opts, tiles, edge, V)
    else:
        lse, reference = walk_lse(inputs, opts, rows, counted, window, edge, V)
    lse = lse_with_targets(inputs, opts, lse, targets, V)
    numbers, exp_sum, log_sum = numbers_of(opts, reference, lse[1], counted, V.PTX)
    if V.RESIDENT:
        h_sum, u_sum = sums_of_tiles(tiles, numbers, V)
        h_sum, u_sum = sums_of_rows(h_sum, u_sum, edge, numbers, V)
    else:
        h_sum, u_sum = walk_sums(inputs, opts, rows, counted, window, edge, numbers, V)
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
            store_gradient_of_tiles(
                inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, 0, tiles, numbers, coefficients,
                V.FULL, V,
            )  # fmt: skip
        else:
            walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V)
        store_gradient_of_rest(
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
            store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)


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
        lse, reference = walk_lse(inputs, opts, rows, masked, window, edge, V)
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
        h_sum, u_sum = walk_sums(inputs, opts, rows, masked, window, edge, numbers, V)
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
        walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, numbers, coefficients, V)
        store_gradient_of_rest(
            inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, edge, targets, numbers, coefficients, V
        )
    else:
        store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)
