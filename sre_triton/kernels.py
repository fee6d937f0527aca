"""The Triton kernels: programs that walk over the classes of their rows.

A program has ROWS rows. Where a row fits into registers it is read once, and everything from its maximum to its
gradient is computed there (RESIDENT). A longer row is walked in tiles of BLOCK_K classes, three times: for the sum of
exponentials, for S and U, for the gradient; the second and third reads are for the cache to serve. The three walks are
kernels of their own as well.

For class indices, the gradient at the target is computed from the row's numbers and written, after a barrier, over what
the tile left in its place.

Ignored rows are not read: under a mask of nothing their numbers come out as 0, whatever the memory holds.
"""

import triton
import triton.language as tl

from .rows import coefficients_of, empty_lse, losses_of, lse_with_targets, numbers_of, shares, sums_with_targets, zeros
from .tiles import add_to_lse, coin_h_and_u, columns, gradient_of, load_logits, sums_of_h_and_u

# ---------------------------------------------------------------------------------------------------------------------
# Rows and tiles


@triton.jit
def _program_rows(inputs, V: tl.constexpr):
    """The program's rows, and which of them there are."""
    rows = tl.program_id(0).to(tl.int64) * V.ROWS + tl.arange(0, V.ROWS)
    return rows, rows < inputs.num_rows


@triton.jit
def _targets(inputs, opts, rows, inside, V: tl.constexpr):
    """Of each row: whether it is counted, and for class indices the target with its z and w (NaN if out of range)."""
    if V.PROBABILITIES:
        return inside, rows, 0.0, 1.0
    else:
        target = tl.load(inputs.target_ptr + rows, mask=inside, other=0)
        counted = inside & (target != opts.ignore_index)
        in_range = (target >= 0) & (target < inputs.num_classes * V.ALIGN)
        g = tl.where(in_range, target, 0)
        z_g = load_logits(inputs.logits_ptr + rows * inputs.logits_stride * V.ALIGN + g, counted, opts.softcap)
        w_g = tl.where(in_range, 1.0, float("nan"))
        if inputs.weight_ptr is not None:
            w_g *= tl.load(inputs.weight_ptr + g, mask=counted, other=0.0).to(tl.float32)
        # Where the gradient takes the place of the logits, other threads are about to write where z_g was read.
        tl.debug_barrier()
        return counted, g, z_g, w_g


@triton.jit
def _columns(inputs, rows, start, V: tl.constexpr):
    """The classes of the tile that begins at ``start``, and which of its elements there are."""
    cols = (start + tl.arange(0, V.BLOCK_K))[None, :]
    return cols, (cols < inputs.num_classes * V.ALIGN) & (rows < inputs.num_rows)[:, None]


@triton.jit
def _load_y(inputs, opts, rows, cols, mask, V: tl.constexpr):
    """y, w y, and w y before smoothing of a tile. For class indices y is what all classes have, ε/K."""
    share, at_target = shares(inputs, opts, V)
    if V.PROBABILITIES:
        pointers = inputs.target_ptr + rows[:, None] * inputs.target_stride * V.ALIGN
        given = tl.load(pointers + cols, mask=mask, other=0.0).to(tl.float32)
        y = given
        if opts.label_smoothing is not None:
            y = tl.where(mask, share + at_target * given, 0.0)
    else:
        y = tl.where(mask, share, 0.0)
        given = y
    wy = y
    if inputs.weight_ptr is not None:
        w = tl.load(inputs.weight_ptr + cols, mask=cols < inputs.num_classes * V.ALIGN, other=0.0).to(tl.float32)
        wy, given = w * y, w * given
    return y, wy, given


@triton.jit
def _load_tile(inputs, opts, rows, counted, start, V: tl.constexpr):
    """z, and if HAS_Y the tiles of `_load_y`; -inf and 0 where there is nothing or the row is not counted."""
    cols, inside = _columns(inputs, rows, start, V)
    mask = inside & counted[:, None]
    pointers = inputs.logits_ptr + rows[:, None] * inputs.logits_stride * V.ALIGN
    z = load_logits(pointers + cols, mask, opts.softcap)
    if V.HAS_Y:
        y, wy, given = _load_y(inputs, opts, rows, cols, mask, V)
    else:
        y, wy, given = 0.0, 0.0, 0.0
    return z, y, wy, given


@triton.jit
def _sums_of_tile(z, y, numbers, V: tl.constexpr):
    """In bits: for probabilities of (1 - y) h and (1 - y) u, else of h and u of all classes alike."""
    if V.PROBABILITIES:
        h, u = coin_h_and_u(z, columns(numbers), V.PTX)
        return tl.sum((1.0 - y) * h, 1), tl.sum((1.0 - y) * u, 1)
    else:
        return sums_of_h_and_u(z, columns(numbers), ADJACENT=V.ALIGN >= 4, PTX=V.PTX)


@triton.jit
def _store_gradient_of_tile(
    inputs, opts, gradient_ptr, gradient_stride, rows, start, z, y, wy, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    coef_e, coef_u, scale = coefficients
    if V.PROBABILITIES:
        coef_u = coef_u[:, None] * (1.0 - y)
    else:
        share, _ = shares(inputs, opts, V)
        coef_u = (coef_u * (1.0 - share))[:, None]
    gradient = gradient_of(
        z, wy, columns(numbers), coef_e[:, None], coef_u, scale[:, None], opts.softcap, V.HAS_Y, V.PTX
    )
    cols, inside = _columns(inputs, rows, start, V)
    pointers = gradient_ptr + rows[:, None] * gradient_stride * V.ALIGN
    tl.store(pointers + cols, gradient, mask=inside)


@triton.jit
def _store_gradient_of_targets(
    inputs, opts, gradient_ptr, gradient_stride, rows, targets, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    counted, g, z_g, w_g = targets
    coef_e, coef_u, scale = coefficients
    share, at_target = shares(inputs, opts, V)
    y_g = share + at_target
    gradient = gradient_of(z_g, w_g * y_g, numbers, coef_e, coef_u * (1.0 - y_g), scale, opts.softcap, True, V.PTX)
    tl.debug_barrier()
    tl.store(gradient_ptr + rows * gradient_stride * V.ALIGN + g, gradient, mask=counted)


@triton.jit
def _store_rows(ptr, inputs, rows, numbers, FIRST: tl.constexpr):
    """Numbers of the rows into a matrix (count, N), from its row FIRST on."""
    N = tl.cast(inputs.num_rows, tl.int64)
    for i in tl.static_range(len(numbers)):
        tl.store(ptr + (FIRST + i) * N + rows, numbers[i], mask=rows < N)


@triton.jit
def _load_rows(ptr, inputs, rows, i):
    N = tl.cast(inputs.num_rows, tl.int64)
    return tl.load(ptr + i * N + rows, mask=rows < N, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The walks over the tiles of a row


@triton.jit
def _walk_lse(inputs, opts, rows, counted, V: tl.constexpr):
    lse = empty_lse(V)
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        z, _, wy, given = _load_tile(inputs, opts, rows, counted, start, V)
        lse = add_to_lse(lse, z, wy, given, V.HAS_Y, inputs.weight_ptr is not None)
    return lse


@triton.jit
def _walk_sums(inputs, opts, rows, counted, numbers, V: tl.constexpr):
    h_sum, u_sum = zeros(V), zeros(V)
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        z, y, _, _ = _load_tile(inputs, opts, rows, counted, start, V)
        h, u = _sums_of_tile(z, y, numbers, V)
        h_sum += h
        u_sum += u
    return h_sum, u_sum


@triton.jit
def _walk_gradient(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        z, y, wy, _ = _load_tile(inputs, opts, rows, counted, start, V)
        _store_gradient_of_tile(
            inputs, opts, gradient_ptr, gradient_stride, rows, start, z, y, wy, numbers, coefficients, V
        )


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@triton.jit
def row_loss_kernel(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, V: tl.constexpr
):  # fmt: skip
    """row_loss with stats_ptr, row_loss_and_gradient with gradient_ptr."""
    rows, inside = _program_rows(inputs, V)
    targets = _targets(inputs, opts, rows, inside, V)
    counted = targets[0]
    if V.RESIDENT:
        z, y, wy, given = _load_tile(inputs, opts, rows, counted, 0, V)
        lse = add_to_lse(empty_lse(V), z, wy, given, V.HAS_Y, inputs.weight_ptr is not None)
    else:
        lse = _walk_lse(inputs, opts, rows, counted, V)
    lse = lse_with_targets(inputs, opts, lse, targets, V)
    numbers, exp_sum, log_sum = numbers_of(opts, lse[0], lse[1], counted)
    if V.RESIDENT:
        h_sum, u_sum = _sums_of_tile(z, y, numbers, V)
    else:
        h_sum, u_sum = _walk_sums(inputs, opts, rows, counted, numbers, V)
    h_sum, u_sum = sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    _store_rows(losses_ptr, inputs, rows, losses_of(opts, lse, h_sum, log_sum, counted), FIRST=0)
    if stats_ptr is not None:
        _store_rows(stats_ptr, inputs, rows, lse, FIRST=0)
        _store_rows(stats_ptr, inputs, rows, (h_sum, u_sum), FIRST=5)
    if gradient_ptr is not None:
        coefficients = coefficients_of(
            inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum
        )
        if V.RESIDENT:
            _store_gradient_of_tile(
                inputs, opts, gradient_ptr, gradient_stride, rows, 0, z, y, wy, numbers, coefficients, V
            )
        else:
            _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, counted, numbers, coefficients, V)
        if not V.PROBABILITIES:
            _store_gradient_of_targets(
                inputs, opts, gradient_ptr, gradient_stride, rows, targets, numbers, coefficients, V
            )


@triton.jit
def row_lse_kernel(inputs, opts, stats_ptr, V: tl.constexpr):
    """The first five statistics."""
    rows, inside = _program_rows(inputs, V)
    targets = _targets(inputs, opts, rows, inside, V)
    lse = _walk_lse(inputs, opts, rows, targets[0], V)
    _store_rows(stats_ptr, inputs, rows, lse_with_targets(inputs, opts, lse, targets, V), FIRST=0)


@triton.jit
def row_sums_kernel(inputs, opts, stats_ptr, sums_ptr, V: tl.constexpr):
    """The last two statistics."""
    rows, inside = _program_rows(inputs, V)
    targets = _targets(inputs, opts, rows, inside, V)
    m, exp_sum = _load_rows(stats_ptr, inputs, rows, 0), _load_rows(stats_ptr, inputs, rows, 1)
    numbers, _, _ = numbers_of(opts, m, exp_sum, targets[0])
    h_sum, u_sum = _walk_sums(inputs, opts, rows, targets[0], numbers, V)
    sums = sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    _store_rows(sums_ptr, inputs, rows, sums, FIRST=0)


@triton.jit
def row_gradient_kernel(
    inputs, opts, stats_ptr, scale_ptr, scale_stride, gradient_ptr, gradient_stride, V: tl.constexpr
):  # fmt: skip
    """The gradient of scale * loss."""
    rows, inside = _program_rows(inputs, V)
    targets = _targets(inputs, opts, rows, inside, V)
    counted = targets[0]
    lse = (
        _load_rows(stats_ptr, inputs, rows, 0),
        _load_rows(stats_ptr, inputs, rows, 1),
        _load_rows(stats_ptr, inputs, rows, 2),
        0.0,
        _load_rows(stats_ptr, inputs, rows, 4),
    )
    u_sum = _load_rows(stats_ptr, inputs, rows, 6)
    numbers, exp_sum, log_sum = numbers_of(opts, lse[0], lse[1], counted)
    coefficients = coefficients_of(inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum)
    _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, counted, numbers, coefficients, V)
    if not V.PROBABILITIES:
        _store_gradient_of_targets(inputs, opts, gradient_ptr, gradient_stride, rows, targets, numbers, coefficients, V)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def scale_gradient_kernel(
    gradient_ptr, gradient_stride, factor_ptr, factor_stride, num_rows, num_classes, num_programs,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a stored gradient; factors of 1 are seen here, and cost neither traffic nor a wait."""
    K = num_classes * ALIGN
    for first in range(tl.program_id(0) * ROWS, num_rows, num_programs * ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        factor = tl.load(factor_ptr + rows * factor_stride, mask=rows < num_rows, other=1.0)
        if tl.max((factor != 1.0).to(tl.int32), 0) == 1:
            for start in range(0, K, BLOCK_K):
                cols = (start + tl.arange(0, BLOCK_K))[None, :]
                mask = (rows < num_rows)[:, None] & (cols < K)
                pointers = gradient_ptr + rows[:, None] * gradient_stride * ALIGN + cols
                gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                tl.store(pointers, factor[:, None] * gradient, mask=mask)
