"""The Triton kernels: programs that walk over the classes of their rows.

Where a row fits into registers it is read once, as a few tiles, and everything from its maximum to its gradient is
computed there (RESIDENT). A longer row is read three times, in steps of a few tiles: for the sum of exponentials, for S
and U, and for the gradient. The second and the third read should come from the cache. The three walks are kernels of
their own as well. A cluster of thread blocks may be one program, and hold the tiles of a row together: the code is the
same (plan.py has a picture).

The gradient at the target is computed from the row's values, and written over the gradient that its tile left there.
The thread that wrote the tile writes it, so no barrier is needed between the two. A program has the barriers of its
reductions, and one after the target's logit is read (memory.py, `at_targets`); a program that goes from row to row
while the next row is on its way has no barrier for the target, since it would end the overlap. In place, nothing is
overwritten before it is read: each thread has its part of the row, and the target's logit, before it meets the others
for the row's maximum, and stores after they have met for the last sum. In a cluster these are the meetings of all of
its blocks, which the barrier after the target is not. Rows that share a program have their threads in one
warp, and meet without a barrier.

The logits of an ignored row are not read, except where a program goes from row to row: these loads begin before the
target is known, and what they bring is not used. Where several rows share a program, a mask excludes the ignored ones,
and their results are 0 whatever the memory holds.

`row` is a row index, int64: a scalar, or (ROWS,) where several rows share a program. `inside` says which of these rows
exist, `counted` which exist and are not ignored; None where all do. rows.py and memory.py explain the tuples.
"""

import triton
import triton.language as tl

from .arithmetic import exp2_near_0
from .formulas import reference_of
from .memory import (
    any_counted,
    at_targets,
    counted_targets,
    load_edge,
    load_per_row,
    load_row,
    load_tiles,
    program_row,
    store_per_row,
    window_of,
)
from .rows import (
    all_if_counted,
    coefficients_of,
    constants_of,
    factors_of,
    losses_of,
    lse_with_targets,
    num_rows_of,
    stats_of,
    sums_with_targets,
    zeros,
)
from .walks import (
    lse_of_tiles,
    store_gradient,
    store_no_gradient,
    sums_of_groups,
    sums_of_tiles,
    walk_lse,
    walk_sums,
)


@triton.jit
def _lse_of_row(inputs, scalars, row, counted, window, edge, tiles, VARIANT: tl.constexpr):
    """((m, s, Σ w y, Σ w y (z - m), ω), reference) of each row, in registers or in memory."""
    if VARIANT.RESIDENT:
        return lse_of_tiles(inputs, scalars, tiles, edge, VARIANT)
    else:
        return walk_lse(inputs, scalars, row, counted, window, edge, VARIANT)


@triton.jit
def _sums_of_row(inputs, scalars, row, counted, window, edge, tiles, constants, VARIANT: tl.constexpr):
    """(Σ h, Σ u) in bits for each row, in registers or in memory; with 1 - y for probabilities."""
    if VARIANT.RESIDENT:
        h_sum, u_sum = sums_of_tiles(tiles, constants, VARIANT)
        return sums_of_groups(h_sum, u_sum, edge, constants, VARIANT)
    else:
        return walk_sums(inputs, scalars, row, counted, window, edge, constants, VARIANT)


@triton.jit
def _loss_of_counted_rows(
    inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, row, counted,
    target, tiles, VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the losses, and if asked for the statistics and the gradient, of rows that are read."""
    factors = factors_of(scalars, scale_ptr, scale_stride, row, counted)
    targets = at_targets(inputs, scalars, row, target, counted, VARIANT)
    window = window_of(inputs, row, VARIANT)
    edge = load_edge(inputs, scalars, row, window, VARIANT)
    if tiles is None:
        tiles = load_row(inputs, scalars, row, counted, window, VARIANT)
    lse, reference = _lse_of_row(inputs, scalars, row, counted, window, edge, tiles, VARIANT)
    lse = lse_with_targets(inputs, scalars, lse, targets, VARIANT)
    constants, exp_sum, log_sum = constants_of(scalars, reference, lse[1], counted, VARIANT.PTX)
    h_sum, u_sum = _sums_of_row(inputs, scalars, row, counted, window, edge, tiles, constants, VARIANT)
    h_sum, u_sum = sums_with_targets(inputs, scalars, h_sum, u_sum, targets, constants, VARIANT)
    losses = losses_of(scalars, factors, lse, h_sum, log_sum, counted, VARIANT)
    store_per_row(losses_ptr, inputs, row, losses, 0, VARIANT)
    if stats_ptr is not None:
        store_per_row(stats_ptr, inputs, row, stats_of(lse, reference, counted), 0, VARIANT)
        store_per_row(stats_ptr, inputs, row, all_if_counted(counted, (h_sum, u_sum)), 5, VARIANT)
    if gradient_ptr is not None:
        coefficients = coefficients_of(scalars, factors, counted, lse, exp_sum, log_sum, u_sum, VARIANT.PTX)
        store_gradient(
            inputs, scalars, gradient_ptr, gradient_stride, row, counted, window, edge, tiles, targets, constants,
            coefficients, VARIANT,
        )  # fmt: skip


@triton.jit
def _loss_of_rows(
    inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, row, inside, tiles,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the losses, and if asked for the statistics and the gradient, of a program's rows; 0 for ignored rows.

    `tiles` are the row's tiles if they are loaded already, else None.
    """
    target, counted = counted_targets(inputs, scalars, row, inside, VARIANT)
    if any_counted(counted, VARIANT):
        _loss_of_counted_rows(
            inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, row,
            None if VARIANT.ROWS == 1 else counted, target, tiles, VARIANT,
        )  # fmt: skip
    else:
        zero = zeros(VARIANT)
        store_per_row(losses_ptr, inputs, row, (zero, zero, zero, zero), 0, VARIANT)
        if stats_ptr is not None:
            store_per_row(stats_ptr, inputs, row, (zero, zero, zero, zero, zero, zero, zero), 0, VARIANT)
        if gradient_ptr is not None:
            store_no_gradient(inputs, gradient_ptr, gradient_stride, row, counted, VARIANT)


@triton.jit(do_not_specialize=["num_programs"])
def row_loss_kernel(
    inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, num_programs,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Write the losses of all rows, (4, N), and their statistics, (7, N), or their gradient, (N, K).

    With stats_ptr this is `row_loss`, with gradient_ptr `row_loss_and_gradient`.

    `scale_ptr` points to scale, (N,): the factor of each row's loss in the result that is differentiated, 1/N for a
    mean over N rows. The gradient is multiplied by it before it is rounded. `scale_stride` is 0 where all rows have the
    same scale.

    With STAGES a program goes from row to row, every num_programs-th one, and the next row is on its way meanwhile.
    """
    if VARIANT.STAGES == 0:
        row = program_row(VARIANT)
        inside = None if VARIANT.ROWS == 1 else row < num_rows_of(inputs)
        _loss_of_rows(
            inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, row, inside,
            None, VARIANT,
        )  # fmt: skip
    else:
        for row_int32 in tl.range(tl.program_id(0), num_rows_of(inputs), num_programs, num_stages=VARIANT.STAGES):
            row = tl.cast(row_int32, tl.int64)
            # Ignored rows are loaded too: the load is under way while the row before is computed, and at this time the
            # target is not known.
            tiles = load_tiles(inputs, scalars, row, None, window_of(inputs, row, VARIANT), 0, VARIANT.FULL, VARIANT)
            _loss_of_rows(
                inputs, scalars, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, row,
                None, tiles, VARIANT,
            )  # fmt: skip


@triton.jit
def row_lse_kernel(inputs, scalars, stats_ptr, VARIANT: tl.constexpr):
    """Write the first five statistics of all rows, (5, N)."""
    row = program_row(VARIANT)
    inside = None if VARIANT.ROWS == 1 else row < num_rows_of(inputs)
    target, counted = counted_targets(inputs, scalars, row, inside, VARIANT)
    if any_counted(counted, VARIANT):
        masked = None if VARIANT.ROWS == 1 else counted
        targets = at_targets(inputs, scalars, row, target, masked, VARIANT)
        window = window_of(inputs, row, VARIANT)
        edge = load_edge(inputs, scalars, row, window, VARIANT)
        tiles = load_row(inputs, scalars, row, masked, window, VARIANT)
        lse, reference = _lse_of_row(inputs, scalars, row, masked, window, edge, tiles, VARIANT)
        stats = stats_of(lse_with_targets(inputs, scalars, lse, targets, VARIANT), reference, masked)
        store_per_row(stats_ptr, inputs, row, stats, 0, VARIANT)
    else:
        zero = zeros(VARIANT)
        store_per_row(stats_ptr, inputs, row, (zero, zero, zero, zero, zero), 0, VARIANT)


@triton.jit
def _constants_from_stats(inputs, scalars, stats_ptr, row, inside, counted, VARIANT: tl.constexpr):
    """(m, constants, s, log s) of each row, from its statistics in memory.

    There s is Σ exp(z - m): it is multiplied by 2^lost, because the tiles' d have the rounding of the reference in
    them.
    """
    m, exp_sum = load_per_row(stats_ptr, inputs, row, 0, inside), load_per_row(stats_ptr, inputs, row, 1, inside)
    reference = reference_of(m, VARIANT.PTX)
    exp_sum *= exp2_near_0(reference[2])
    constants, exp_sum, log_sum = constants_of(scalars, reference, exp_sum, counted, VARIANT.PTX)
    return m, constants, exp_sum, log_sum


@triton.jit
def row_sums_kernel(inputs, scalars, stats_ptr, sums_ptr, VARIANT: tl.constexpr):
    """Write the last two statistics of all rows, (2, N), from the first five."""
    row = program_row(VARIANT)
    inside = None if VARIANT.ROWS == 1 else row < num_rows_of(inputs)
    target, counted = counted_targets(inputs, scalars, row, inside, VARIANT)
    if any_counted(counted, VARIANT):
        masked = None if VARIANT.ROWS == 1 else counted
        targets = at_targets(inputs, scalars, row, target, masked, VARIANT)
        _, constants, _, _ = _constants_from_stats(inputs, scalars, stats_ptr, row, inside, masked, VARIANT)
        window = window_of(inputs, row, VARIANT)
        edge = load_edge(inputs, scalars, row, window, VARIANT)
        tiles = load_row(inputs, scalars, row, masked, window, VARIANT)
        h_sum, u_sum = _sums_of_row(inputs, scalars, row, masked, window, edge, tiles, constants, VARIANT)
        sums = sums_with_targets(inputs, scalars, h_sum, u_sum, targets, constants, VARIANT)
        store_per_row(sums_ptr, inputs, row, all_if_counted(masked, sums), 0, VARIANT)
    else:
        store_per_row(sums_ptr, inputs, row, (zeros(VARIANT), zeros(VARIANT)), 0, VARIANT)


@triton.jit
def row_gradient_kernel(
    inputs, scalars, stats_ptr, scale_ptr, scale_stride, gradient_ptr, gradient_stride, VARIANT: tl.constexpr
):  # fmt: skip
    """Write the gradient of all rows, (N, K), from the logits and the statistics, (7, N).

    `scale_ptr` points to scale, (N,): the factor of each row's loss in the result that is differentiated, 1/N for a
    mean over N rows. The gradient is multiplied by it before it is rounded. `scale_stride` is 0 where all rows have the
    same scale.
    """
    row = program_row(VARIANT)
    inside = None if VARIANT.ROWS == 1 else row < num_rows_of(inputs)
    target, counted = counted_targets(inputs, scalars, row, inside, VARIANT)
    if any_counted(counted, VARIANT):
        masked = None if VARIANT.ROWS == 1 else counted
        factors = factors_of(scalars, scale_ptr, scale_stride, row, masked)
        targets = at_targets(inputs, scalars, row, target, masked, VARIANT)
        m, constants, exp_sum, log_sum = _constants_from_stats(inputs, scalars, stats_ptr, row, inside, masked, VARIANT)
        y_sum = load_per_row(stats_ptr, inputs, row, 2, inside)
        lse = m, exp_sum, y_sum, y_sum, load_per_row(stats_ptr, inputs, row, 4, inside)
        u_sum = load_per_row(stats_ptr, inputs, row, 6, inside)
        coefficients = coefficients_of(scalars, factors, masked, lse, exp_sum, log_sum, u_sum, VARIANT.PTX)
        window = window_of(inputs, row, VARIANT)
        edge = load_edge(inputs, scalars, row, window, VARIANT)
        tiles = load_row(inputs, scalars, row, masked, window, VARIANT)
        store_gradient(
            inputs, scalars, gradient_ptr, gradient_stride, row, masked, window, edge, tiles, targets, constants,
            coefficients, VARIANT,
        )  # fmt: skip
    else:
        store_no_gradient(inputs, gradient_ptr, gradient_stride, row, counted, VARIANT)
