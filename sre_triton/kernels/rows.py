"""The numbers of a row: from the sums over its tiles to its losses, and to the coefficients of its gradient.

What the gradient sees of a row, with y the smoothed target, ω the sample's weight and U = Σ (1 - y) u:

    gradient of class k = coef_p p_k + coef_u (1 - y_k) u_k + coef_y w_k y_k

    coef_p = scale (Σ w y + ω (2 α lse - λ' U))
    coef_u = scale ω λ'
    coef_y = -scale

For class indices, y is one number, ε/K, for all classes but the target's, which has 1 - ε more.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .formulas import (
    LN_2,
    coin_h_and_u,
    exp2_near_0,
    finite_maximum,
    fma,
    less_product,
    log2_parts,
    reciprocal,
    value_of,
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
    first_class: Any = None  # the classes are a shard's: the first of them,
    all_classes: Any = None  # and how many there are in all shards


class Scalars(NamedTuple):
    """The scalar options: numbers, or pointers to where on the GPU they lie (formulas.py: `value_of`).

    What is None takes no part in the compiled code; no value is compiled in.
    """

    c: Any
    log2_c_whole: Any  # log2 c: the nearest whole number,
    log2_c_rest: Any  # and the rest; both None where c is a pointer
    reg_weight: Any  # λ'
    ignore_index: Any
    label_smoothing: Any
    z_loss: Any
    softcap: Any


class Variant(NamedTuple):
    """What is compiled in."""

    PROBABILITIES: bool  # the target is probabilities, not class indices
    HAS_Y: bool  # every class has a y or a w y of its own
    SMOOTHED: bool  # all classes have the same y, but the target
    RESIDENT: bool  # a row is held in registers
    STAGES: int  # of the loop over rows, where a program goes from row to row; 0 where it has one set of rows
    ROWS: int  # rows of a program at a time
    BLOCK_K: int  # classes of a tile
    TILES: int  # tiles of a row that is resident, or in one step of a loop
    FULL: int  # the first so many of a resident row's tiles end before the row does
    ALIGN: int  # K and the strides are multiples of it
    VECTOR: int  # classes in 16 bytes
    ADJACENT: int  # the logarithm of the number of adjacent classes that a thread reads at once
    WINDOW: bool  # tiles begin at multiples of VECTOR, and what of a row lies before and after is a tile of its own
    CTAS: int  # thread blocks that share the classes of a tile
    PTX: bool  # NVIDIA's instructions are there


@triton.jit
def shares(inputs, scalars, VARIANT: tl.constexpr):
    """What label smoothing gives to every class, ε/K, and what it leaves to the target, 1 - ε."""
    if scalars.label_smoothing is None:
        return 0.0, 1.0
    elif inputs.all_classes is None:
        label_smoothing = value_of(scalars.label_smoothing)
        return label_smoothing / (inputs.num_classes * VARIANT.ALIGN), 1.0 - label_smoothing
    else:
        label_smoothing = value_of(scalars.label_smoothing)
        return label_smoothing / inputs.all_classes, 1.0 - label_smoothing


@triton.jit
def zeros(VARIANT: tl.constexpr):
    """What belongs to the rows."""
    ROWS: tl.constexpr = VARIANT.ROWS
    if ROWS == 1:
        return tl.cast(0.0, tl.float32)
    else:
        return tl.zeros((ROWS,), tl.float32)


@triton.jit
def if_counted(counted, x, other):
    """``counted`` is None where all rows are."""
    if counted is None:
        return x
    else:
        return tl.where(counted, x, other)


@triton.jit
def load_if_counted(pointers, counted):
    """A number of each row, 0 where it is not counted."""
    if counted is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=counted, other=0)


@triton.jit
def lse_with_targets(inputs, scalars, lse, targets, VARIANT: tl.constexpr):
    """m, s and the sums with y of whole rows, from those over the tiles."""
    m, exp_sum, y_sum, yz_sum, omega = lse
    if VARIANT.PROBABILITIES:
        if inputs.weight_ptr is None:
            omega = zeros(VARIANT) + 1.0
        return m, exp_sum, y_sum, yz_sum, omega
    else:
        g, z_g, w_g = targets
        _, at_target = shares(inputs, scalars, VARIANT)
        wy_g = at_target * w_g
        d_g = z_g - finite_maximum(m)
        if inputs.all_classes is not None:
            d_g = tl.where(g < 0, 0.0, d_g)
        return m, exp_sum, y_sum + wy_g, yz_sum + wy_g * d_g, w_g


@triton.jit
def _c(scalars, PTX: tl.constexpr):
    """c, and log2 c as a whole number and the rest."""
    if scalars.log2_c_whole is None:
        c = value_of(scalars.c)
        whole, rest = log2_parts(c, PTX)
        return c, whole, rest
    else:
        return scalars.c, scalars.log2_c_whole, scalars.log2_c_rest


@triton.jit
def constants_of(scalars, reference, exp_sum, counted, PTX: tl.constexpr):
    """What tiles need of a row (formulas.py: its `numbers`), the sum of exponentials, and its logarithm.

    The sum of a row of nothing but -inf is 0: it becomes NaN, and that of a row which is not read 1.
    """
    factor, product, lost = reference
    exp_sum = if_counted(counted, tl.where(exp_sum == 0.0, float("nan"), exp_sum), 1.0)
    whole, rest = log2_parts(exp_sum, PTX)
    c, c_whole, c_rest = _c(scalars, PTX)
    # log2(s c) is rounded to `off`, and s c to what `off` is the logarithm of: p / c is the same number wherever it
    # stands. All it costs is that c is not quite the c that was asked for, by up to 6e-7 of it.
    off = (whole + c_whole) + (rest + c_rest)
    more = (rest + c_rest) - (off - (whole + c_whole))
    sc = exp_sum * c
    # Not 0, nor so small that its reciprocal is infinite, which with a tiny c it would be for huge logits.
    sc = tl.maximum(less_product(sc, sc, more * LN_2), 2e-38, propagate_nan=tl.PropagateNan.ALL)
    return (factor, product, off, sc), exp_sum, (whole + (rest - lost)) * LN_2


@triton.jit
def stats_of(lse, reference):
    """The five statistics of row_lse: there the sum of exponentials is that of exp(z - m)."""
    m, exp_sum, y_sum, yz_sum, omega = lse
    _, _, lost = reference
    return m, exp_sum * exp2_near_0(-lost), y_sum, yz_sum, omega


@triton.jit
def sums_with_targets(inputs, scalars, h_sum, u_sum, targets, constants, VARIANT: tl.constexpr):
    """Σ (1 - y) h and Σ (1 - y) u, from the sums over the tiles."""
    if VARIANT.PROBABILITIES:
        return h_sum * LN_2, u_sum * LN_2
    else:
        _, z_g, _ = targets
        h_g, u_g = coin_h_and_u(z_g, constants, VARIANT.PTX)
        share, at_target = shares(inputs, scalars, VARIANT)
        h_sum = less_product((1.0 - share) * h_sum, at_target, h_g)
        u_sum = less_product((1.0 - share) * u_sum, at_target, u_g)
        return h_sum * LN_2, u_sum * LN_2


@triton.jit
def losses_of(scalars, lse, h_sum, log_sum, counted, VARIANT: tl.constexpr):
    """The loss, H, S and α lse²."""
    m, _, y_sum, yz_sum, omega = lse
    cross_entropy = if_counted(counted, fma(y_sum, log_sum, -yz_sum), 0.0)
    regularizer = if_counted(counted, omega * h_sum, 0.0)
    z_penalty = zeros(VARIANT)
    if scalars.z_loss is not None:
        z_penalty = if_counted(counted, value_of(scalars.z_loss) * omega * (m + log_sum) * (m + log_sum), 0.0)
    loss = less_product(cross_entropy, value_of(scalars.reg_weight), regularizer) + z_penalty
    return loss, cross_entropy, regularizer, z_penalty


@triton.jit
def coefficients_of(
    inputs, scalars, scale_ptr, scale_stride, row, counted, lse, exp_sum, log_sum, u_sum, PTX: tl.constexpr
):  # fmt: skip
    """coef_p / s, the factor of u in bits, and that of w y."""
    m, _, y_sum, _, omega = lse
    scale = load_if_counted(scale_ptr + row * scale_stride, counted)
    of_u = omega * value_of(scalars.reg_weight)
    of_p = less_product(y_sum, of_u, u_sum)
    if scalars.z_loss is not None:
        of_p += omega * (2.0 * value_of(scalars.z_loss) * (m + log_sum))
    coef_e = if_counted(counted, scale * of_p * reciprocal(exp_sum, PTX), 0.0)
    return coef_e, if_counted(counted, scale * of_u * LN_2, 0.0), -scale
