"""The values of a row: from the sums over its tiles to its losses, and to the coefficients of its gradient.

The gradient of the row's loss, with y the smoothed target, w the class weights, ω the row's weight, λ' the weight of
the regularizer, α that of the z-loss, and U = Σ (1 - y) u:

    gradient at class k = coef_p p_k + coef_u (1 - y_k) u_k + coef_y w_k y_k

    coef_p = scale (Σ w y + ω (2 α lse - λ' U))
    coef_u = scale ω λ'
    coef_y = -scale

For class indices, y is the same at all classes, ε/K, and 1 - ε more at the target. The tiles are treated as if there
were no target; functions named ..._with_targets correct the sums.

Tuples that go through the kernels, all of values of the row:

    targets       (g, z_g, w_g): the target's column, its logit, its weight (memory.py: `at_targets`)
    factors       (λ', scale)
    lse           (m, s, Σ w y, Σ w y (z - m), ω)
    reference     (factor, product, lost) (formulas.py: `reference_of`)
    constants     (factor, product, whole, rest, s c): what formulas.py needs at each class
    coefficients  (coef_p / s, coef_u in bits, coef_y)
    statistics    m, s, Σ w y, Σ w y (z - m), ω, Σ (1 - y) h, Σ (1 - y) u: the rows 0 to 6 of a matrix (7, N)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import LN_2, exp2_near_0, fma, less_product, log2_parts, reciprocal, value_of
from .formulas import coin_h_and_u, finite_maximum, gradient_of


class Inputs(NamedTuple):
    """The tensors and sizes that the kernels read; flat, as Triton 3.6 mixes up the constants of nested tuples."""

    logits_ptr: Any
    logits_stride: Any  # from row to row, in units of ALIGN elements
    target_ptr: Any  # (N,) class indices, or probabilities
    target_stride: Any  # of probabilities: from row to row, in units of ALIGN elements
    weight_ptr: Any  # (K,) or None
    odd: Any  # 2 N + 1, see `num_rows_of`
    num_classes: Any  # K, in units of ALIGN
    first_class: Any = None  # if the logits are a shard: the class of their first column
    all_classes: Any = None  # if the logits are a shard: the number of classes in all shards


class Scalars(NamedTuple):
    """The scalar options: numbers, or pointers to the GPU's memory (arithmetic.py: `value_of`).

    None takes an option out of the compiled code. No value is compiled in.
    """

    c: Any
    log2_c_whole: Any  # the whole number nearest to log2 c; None where c is a pointer
    log2_c_rest: Any  # log2 c less this whole number; None where c is a pointer
    reg_weight: Any  # λ'
    ignore_index: Any
    label_smoothing: Any
    z_loss: Any
    softcap: Any


class Variant(NamedTuple):
    """What is compiled in: each different Variant is a compilation of its own."""

    PROBABILITIES: bool  # the target is probabilities, not class indices
    HAS_Y: bool  # every class has a y or a w y of its own
    SMOOTHED: bool  # all classes but the target have the same y, ε/K
    RESIDENT: bool  # a row is held in registers
    STAGES: int  # of the loop over rows, where a program goes from row to row; 0 where it has one set of rows
    ROWS: int  # rows of a program at a time
    BLOCK_K: int  # classes of a tile
    GROUPS: int  # of a tile: one for each thread of a row
    TILES: int  # tiles of a row that is resident, or in one step of a loop
    TAIL: int  # classes of each group that a resident row has besides: see groups.py, `num_tiles`
    FULL: int  # how many tiles of a resident row are full in every row, and need no mask
    ALIGN: int  # K and the strides are multiples of it
    VECTOR: int  # classes in 16 bytes
    ADJACENT: int  # the logarithm of the number of adjacent classes that a thread reads at once
    WINDOW: bool  # tiles begin at multiples of VECTOR; the classes before and after them are the edge (memory.py)
    CTAS: int  # thread blocks that share the classes of a tile
    PTX: bool  # NVIDIA's instructions are there


@triton.jit
def num_rows_of(inputs):
    """N. An odd number above 1 stands for it: Triton compiles into a kernel whether a number is 1 or a multiple of 16.

    Then the last batch of an epoch, which is smaller, would have a kernel of its own, and wait for its compilation.
    """
    return inputs.odd >> 1


@triton.jit
def shares(inputs, scalars, VARIANT: tl.constexpr):
    """(ε/K, 1 - ε): what label smoothing gives to every class, and what it leaves to the target.

    K counts the classes of all shards. Without label smoothing the two are 0 and 1.
    """
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
    """0 in float32 for each row: a scalar, or (ROWS,) where the program has several rows.

    A variant that does not compute a value of the row has this in its place, and ignored rows get it as their loss. It
    has the shape of a value of the row, so that all variants return and store the same tuples.
    """
    ROWS: tl.constexpr = VARIANT.ROWS
    if ROWS == 1:
        return tl.cast(0.0, tl.float32)
    else:
        return tl.zeros((ROWS,), tl.float32)


@triton.jit
def if_counted(counted, x, other):
    """x where the row counts, else `other`, of the shape of x. `counted` is None if all rows count."""
    if counted is None:
        return x
    else:
        return tl.where(counted, x, other)


@triton.jit
def load_if_counted(pointers, counted):
    """The value at each row's pointer; 0 where the row does not count, which is not read."""
    if counted is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=counted, other=0)


@triton.jit
def lse_with_targets(inputs, scalars, lse, targets, VARIANT: tl.constexpr):
    """(m, s, Σ w y, Σ w y (z - m), ω) of each row, from the same five without the targets.

    With class indices the target adds (1 - ε) w_g to Σ w y, and ω is its weight. With probabilities and without class
    weights ω is 1.
    """
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
    """(c, whole, rest), with log2 c = whole + rest. The host computes the last two, unless c lies on the GPU."""
    if scalars.log2_c_whole is None:
        c = value_of(scalars.c)
        whole, rest = log2_parts(c, PTX)
        return c, whole, rest
    else:
        return scalars.c, scalars.log2_c_whole, scalars.log2_c_rest


@triton.jit
def constants_of(scalars, reference, exp_sum, counted, PTX: tl.constexpr):
    """((factor, product, whole, rest, s c), s, log s) of each row; the first are the constants of its tiles.

    log s is the natural logarithm of Σ exp(z - m), without the part that the reference has lost. A row of nothing but
    -inf has s = 0: here s becomes NaN, as such a row has no probabilities. A row that does not count gets s = 1.
    """
    factor, product, lost = reference
    exp_sum = if_counted(counted, tl.where(exp_sum == 0.0, float("nan"), exp_sum), 1.0)
    whole, rest = log2_parts(exp_sum, PTX)
    c, c_whole, c_rest = _c(scalars, PTX)
    # Never so small that the reciprocal of e + s c is infinite: s c is with huge logits and a tiny c.
    sc = tl.maximum(exp_sum * c, 2e-38, propagate_nan=tl.PropagateNan.ALL)
    return (factor, product, whole + c_whole, rest + c_rest, sc), exp_sum, (whole + (rest - lost)) * LN_2


@triton.jit
def all_if_counted(counted, values):
    """A tuple of values of the rows, 0 where a row does not count."""
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (if_counted(counted, values[i], 0.0),)
    return found


@triton.jit
def stats_of(lse, reference, counted):
    """(m, s, Σ w y, Σ w y (z - m), ω) of each row as `row_lse` returns them: here s is Σ exp(z - m).

    In the kernels s is 2^lost times as large (formulas.py: `reference_of`).
    """
    m, exp_sum, y_sum, yz_sum, omega = lse
    _, _, lost = reference
    return all_if_counted(counted, (m, exp_sum * exp2_near_0(-lost), y_sum, yz_sum, omega))


@triton.jit
def sums_with_targets(inputs, scalars, h_sum, u_sum, targets, constants, VARIANT: tl.constexpr):
    """(Σ (1 - y) h, Σ (1 - y) u) of each row, with natural logarithms, from the sums over the tiles in bits.

    With class indices the tiles have summed up h and u of all classes alike. The target's part, 1 - ε of its h and u,
    is subtracted here.
    """
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
def factors_of(scalars, scale_ptr, scale_stride, row, counted):
    """(λ', scale) of each row; without a pointer to scale nobody reads the second.

    `scale_ptr` points to scale, the factor of each row's loss in the result that is differentiated: 1/N for a mean over
    N rows, times the upstream gradient. `scale_stride` is 0 where all rows have the same scale.

    They are loaded with the target, though they are needed last: after the row's last reduction nobody would have
    anything to do while they are on their way.
    """
    reg_weight = value_of(scalars.reg_weight)
    if scale_ptr is None:
        return reg_weight, reg_weight
    else:
        return reg_weight, load_if_counted(scale_ptr + row * scale_stride, counted)


@triton.jit
def losses_of(scalars, factors, lse, h_sum, log_sum, counted, VARIANT: tl.constexpr):
    """(loss, H, S, α lse²) of each row, each times the row's weight."""
    reg_weight, _ = factors
    m, _, y_sum, yz_sum, omega = lse
    cross_entropy = if_counted(counted, fma(y_sum, log_sum, -yz_sum), 0.0)
    regularizer = if_counted(counted, omega * h_sum, 0.0)
    z_penalty = zeros(VARIANT)
    if scalars.z_loss is not None:
        z_penalty = if_counted(counted, value_of(scalars.z_loss) * omega * (m + log_sum) * (m + log_sum), 0.0)
    loss = less_product(cross_entropy, reg_weight, regularizer) + z_penalty
    return loss, cross_entropy, regularizer, z_penalty


@triton.jit
def coefficients_of(scalars, factors, counted, lse, exp_sum, log_sum, u_sum, PTX: tl.constexpr):
    """(coef_p / s, coef_u in bits, coef_y) of each row: see the formulas above.

    The gradient is computed from e and from u in bits, so s divides the first, and log 2 multiplies the second.
    """
    reg_weight, scale = factors
    m, _, y_sum, _, omega = lse
    of_u = omega * reg_weight
    of_p = less_product(y_sum, of_u, u_sum)
    if scalars.z_loss is not None:
        of_p += omega * (2.0 * value_of(scalars.z_loss) * (m + log_sum))
    coef_e = if_counted(counted, scale * of_p * reciprocal(exp_sum, PTX), 0.0)
    return coef_e, if_counted(counted, scale * of_u * LN_2, 0.0), -scale


@triton.jit
def gradient_at_targets(inputs, scalars, targets, constants, coefficients, VARIANT: tl.constexpr):
    """The gradient at each row's target class."""
    _, z_g, w_g = targets
    coef_e, coef_u, coef_y = coefficients
    share, at_target = shares(inputs, scalars, VARIANT)
    y_g = share + at_target
    return gradient_of(
        z_g, w_g * y_g, constants, coef_e, coef_u * (1.0 - y_g), coef_y, scalars.softcap, True, VARIANT.PTX
    )
