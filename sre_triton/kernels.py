"""The Triton kernels: programs that walk over the classes of their rows.

A program has ROWS rows. Where a row fits into registers it is read once, and everything from its maximum to its
gradient is computed there (RESIDENT). A longer row is walked in tiles of BLOCK_K classes, three times: for the sum of
exponentials, for S and U, for the gradient; the second and third reads are for the cache to serve. The three walks are
kernels of their own as well.

What the gradient sees of a row, with y the smoothed target, ω the sample's weight and U = Σ (1 - y) u:

    gradient of class k = coef_p p_k + coef_u (1 - y_k) u_k - scale w_k y_k

    coef_p = scale (Σ w y + ω (2 α lse - λ' U))
    coef_u = scale ω λ'

For class indices, y is one number for all classes but the target's. The gradient there is computed from the row's
numbers and written, after a barrier, over what the tile left in its place.

Ignored rows are not read: under a mask of nothing their numbers come out as 0, whatever the memory holds.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import (
    INF,
    LN_2,
    add_to_lse,
    coin_h_and_u,
    columns,
    finite_maximum,
    gradient_of,
    load_logits,
    log2_parts,
    sums_of_h_and_u,
)


class Inputs(NamedTuple):
    """What the kernels read; flat, as Triton 3.6 mixes up the constants of nested tuples."""

    logits_ptr: Any
    logits_stride: Any  # from row to row, in units of ALIGN elements
    target_ptr: Any  # (N,) class indices, or probabilities
    target_stride: Any  # as that of the logits
    weight_ptr: Any  # (K,) or None
    num_rows: Any  # N
    num_classes: Any  # K, in units of ALIGN


class Options(NamedTuple):
    """The scalar options. What is None takes no part in the compiled code; no value is compiled in."""

    c: Any
    log2_c_whole: Any  # log2 c: the nearest whole number,
    log2_c_rest: Any  # and the rest
    reg_weight: Any  # λ', or None and
    reg_weight_ptr: Any  # where on the GPU it is
    ignore_index: Any
    label_smoothing: Any
    z_loss: Any
    softcap: Any


class Variant(NamedTuple):
    """What is compiled in."""

    PROBABILITIES: bool  # the target is probabilities, not class indices
    HAS_Y: bool  # y differs from 0 at other classes than the target
    RESIDENT: bool  # a row is one tile
    ROWS: int
    BLOCK_K: int
    ALIGN: int  # elements: pointers and strides are multiples of it
    PTX: bool  # NVIDIA's instructions are there


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
def _shares(inputs, opts, V: tl.constexpr):
    """What label smoothing gives to every class, ε/K, and what it leaves to the target, 1 - ε."""
    if opts.label_smoothing is None:
        return 0.0, 1.0
    else:
        return opts.label_smoothing / (inputs.num_classes * V.ALIGN), 1.0 - opts.label_smoothing


@triton.jit
def _columns(inputs, rows, start, V: tl.constexpr):
    """The classes of the tile that begins at ``start``, and which of its elements there are."""
    cols = (start + tl.arange(0, V.BLOCK_K))[None, :]
    return cols, (cols < inputs.num_classes * V.ALIGN) & (rows < inputs.num_rows)[:, None]


@triton.jit
def _load_y(inputs, opts, rows, cols, mask, V: tl.constexpr):
    """y, w y, and w y before smoothing of a tile. For class indices y is what all classes have, ε/K."""
    share, at_target = _shares(inputs, opts, V)
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
        share, _ = _shares(inputs, opts, V)
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
    share, at_target = _shares(inputs, opts, V)
    y_g = share + at_target
    gradient = gradient_of(z_g, w_g * y_g, numbers, coef_e, coef_u * (1.0 - y_g), scale, opts.softcap, True, V.PTX)
    tl.debug_barrier()
    tl.store(gradient_ptr + rows * gradient_stride * V.ALIGN + g, gradient, mask=counted)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers of a row


@triton.jit
def _zeros(V: tl.constexpr):
    ROWS: tl.constexpr = V.ROWS
    return tl.zeros((ROWS,), tl.float32)


@triton.jit
def _empty_lse(V: tl.constexpr):
    zero = _zeros(V)
    return zero - INF, zero, zero, zero, zero


@triton.jit
def _lse_with_targets(inputs, opts, lse, targets, V: tl.constexpr):
    """The five statistics of row_lse, from the sums over the tiles."""
    m, exp_sum, y_sum, yz_sum, omega = lse
    if V.PROBABILITIES:
        if inputs.weight_ptr is None:
            omega = _zeros(V) + 1.0
        return m, exp_sum, y_sum, yz_sum, omega
    else:
        _, _, z_g, w_g = targets
        _, at_target = _shares(inputs, opts, V)
        wy_g = at_target * w_g
        return m, exp_sum, y_sum + wy_g, yz_sum + wy_g * (z_g - finite_maximum(m)), w_g


@triton.jit
def _numbers(opts, m, exp_sum, counted):
    """What tiles need of a row, the sum of exponentials, and its logarithm.

    The sum of a row of nothing but -inf is NaN, and that of a row which is not read is 1.
    """
    exp_sum = tl.where(counted, tl.where(m == -INF, float("nan"), exp_sum), 1.0)
    whole, rest = log2_parts(exp_sum)
    e_scale = tl.fdiv(1.0, exp_sum * opts.c)
    numbers = (finite_maximum(m), whole + opts.log2_c_whole, rest + opts.log2_c_rest, e_scale)
    return numbers, exp_sum, (whole + rest) * LN_2


@triton.jit
def _sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V: tl.constexpr):
    """Σ (1 - y) h and Σ (1 - y) u, from the sums over the tiles."""
    if V.PROBABILITIES:
        return h_sum * LN_2, u_sum * LN_2
    else:
        _, _, z_g, _ = targets
        h_g, u_g = coin_h_and_u(z_g, numbers, V.PTX)
        share, at_target = _shares(inputs, opts, V)
        return ((1.0 - share) * h_sum - at_target * h_g) * LN_2, ((1.0 - share) * u_sum - at_target * u_g) * LN_2


@triton.jit
def _reg_weight(opts):
    if opts.reg_weight is None:
        return tl.load(opts.reg_weight_ptr)
    else:
        return opts.reg_weight


@triton.jit
def _store_rows(ptr, inputs, rows, numbers):
    """A number per row and row of the matrix (count, N)."""
    for i in tl.static_range(len(numbers)):
        tl.store(ptr + i * inputs.num_rows + rows, numbers[i], mask=rows < inputs.num_rows)


@triton.jit
def _load_rows(ptr, inputs, rows, i):
    return tl.load(ptr + i * inputs.num_rows + rows, mask=rows < inputs.num_rows, other=0.0)


@triton.jit
def _losses(opts, lse, h_sum, log_sum, counted):
    """The loss, H, S and α lse²."""
    m, _, y_sum, yz_sum, omega = lse
    cross_entropy = tl.where(counted, y_sum * log_sum - yz_sum, 0.0)
    regularizer = tl.where(counted, omega * h_sum, 0.0)
    z_penalty = tl.where(counted, opts.z_loss * omega * (m + log_sum) * (m + log_sum), 0.0)
    return cross_entropy - _reg_weight(opts) * regularizer + z_penalty, cross_entropy, regularizer, z_penalty


@triton.jit
def _coefficients(inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum):
    """coef_p / s, the factor of u in bits, and the scale."""
    m, _, y_sum, _, omega = lse
    scale = tl.load(scale_ptr + rows * scale_stride, mask=counted, other=0.0)
    reg_weight = _reg_weight(opts)
    coef_p = scale * (y_sum + omega * (2.0 * opts.z_loss * (m + log_sum) - reg_weight * u_sum))
    coef_u = scale * omega * reg_weight
    return tl.where(counted, coef_p / exp_sum, 0.0), tl.where(counted, coef_u * LN_2, 0.0), scale


# ---------------------------------------------------------------------------------------------------------------------
# The walks over the tiles of a row


@triton.jit
def _walk_lse(inputs, opts, rows, counted, V: tl.constexpr):
    lse = _empty_lse(V)
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        z, _, wy, given = _load_tile(inputs, opts, rows, counted, start, V)
        lse = add_to_lse(lse, z, wy, given, V.HAS_Y)
    return lse


@triton.jit
def _walk_sums(inputs, opts, rows, counted, numbers, V: tl.constexpr):
    h_sum, u_sum = _zeros(V), _zeros(V)
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
        lse = add_to_lse(_empty_lse(V), z, wy, given, V.HAS_Y)
    else:
        lse = _walk_lse(inputs, opts, rows, counted, V)
    lse = _lse_with_targets(inputs, opts, lse, targets, V)
    numbers, exp_sum, log_sum = _numbers(opts, lse[0], lse[1], counted)
    if V.RESIDENT:
        h_sum, u_sum = _sums_of_tile(z, y, numbers, V)
    else:
        h_sum, u_sum = _walk_sums(inputs, opts, rows, counted, numbers, V)
    h_sum, u_sum = _sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    _store_rows(losses_ptr, inputs, rows, _losses(opts, lse, h_sum, log_sum, counted))
    if stats_ptr is not None:
        _store_rows(stats_ptr, inputs, rows, lse)
        _store_rows(stats_ptr + 5 * inputs.num_rows, inputs, rows, (h_sum, u_sum))
    if gradient_ptr is not None:
        coefficients = _coefficients(inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum)
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
    _store_rows(stats_ptr, inputs, rows, _lse_with_targets(inputs, opts, lse, targets, V))


@triton.jit
def row_sums_kernel(inputs, opts, stats_ptr, sums_ptr, V: tl.constexpr):
    """The last two statistics."""
    rows, inside = _program_rows(inputs, V)
    targets = _targets(inputs, opts, rows, inside, V)
    m, exp_sum = _load_rows(stats_ptr, inputs, rows, 0), _load_rows(stats_ptr, inputs, rows, 1)
    numbers, _, _ = _numbers(opts, m, exp_sum, targets[0])
    h_sum, u_sum = _walk_sums(inputs, opts, rows, targets[0], numbers, V)
    sums = _sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    _store_rows(sums_ptr, inputs, rows, sums)


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
    numbers, exp_sum, log_sum = _numbers(opts, lse[0], lse[1], counted)
    coefficients = _coefficients(inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum)
    _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, counted, numbers, coefficients, V)
    if not V.PROBABILITIES:
        _store_gradient_of_targets(inputs, opts, gradient_ptr, gradient_stride, rows, targets, numbers, coefficients, V)


@triton.jit
def scale_gradient_kernel(
    gradient_ptr, gradient_stride, factor_ptr, factor_stride, num_rows, num_classes, num_programs,
    BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a stored gradient; a factor of 1 is seen here, and costs neither traffic nor a wait."""
    for row in range(tl.program_id(0), num_rows, num_programs):
        factor = tl.load(factor_ptr + row * factor_stride)
        if factor != 1.0:
            pointers = gradient_ptr + tl.cast(row, tl.int64) * gradient_stride * ALIGN
            for start in range(0, num_classes * ALIGN, BLOCK_K):
                cols = start + tl.arange(0, BLOCK_K)
                mask = cols < num_classes * ALIGN
                gradient = tl.load(pointers + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(pointers + cols, factor * gradient, mask=mask)
