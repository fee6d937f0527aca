"""The mathematics of the classes of a tile, in registers: each formula once, for all kernels.

For the logit z of one class, in a row whose largest logit is m:

    d = (z - m) log2 e            the exponent of 2; m log2 e is rounded first, then d is one fused multiply-add
    e = 2^d                       the exponential, 1 at the largest logit
    s = Σ e                       the row's sum of exponentials: a class has the probability p = e / s
    whole + rest = log2(s c)      c is the suppression level; whole is a whole number
    t = (d - whole) - rest        log2(p / c): above 0 where the class is more probable than c
    μ = min(e, s c) / (e + s c)   the smaller of the two probabilities of a coin whose odds are p : c
    h = |t| μ - log2(1 - μ)       the coin's entropy in bits
    u = t μ (1 - μ)               minus the slope of h in bits: the row's gradient is made of e and u

Example: c = 1e-7 and p = 1e-7 give t = 0, μ = 1/2, h = 1 bit, u = 0.

Logarithms have the base 2, because a GPU's instructions have it. compiled/formulas.py has the base e: its t, h and u
are those of this file times log 2.

Shapes. A program with one row has a tile as a vector, (BLOCK_K,) or narrower, and a value of the row as a scalar. A
program with several rows has a tile as (ROWS, GROUPS, BLOCK_K / GROUPS), and a value of the rows as a vector, (ROWS,);
`column` (groups.py) gives the vector two dimensions more where it meets the tile. Sums are kept for each group of
classes of a tile, in (GROUPS,) or (ROWS, GROUPS). One thread has a whole group (groups.py), so no thread waits for
another before the row ends.
"""

import triton
import triton.language as tl

from .arithmetic import INF, LOG2_E, exp2, fma, less_product, minus_log2, product_of_two, reciprocal, value_of
from .groups import (
    column,
    halves,
    largest_of_row,
    levels_of,
    maximum_of_groups,
    num_alike,
    sum_in_pairs,
    sum_of_groups,
    sum_of_row,
    to_groups,
)

# The smallest d. 2^FLOOR is 0 in float32, as 2^-inf is. But t = -inf times μ = 0 would be NaN, and t near FLOOR times 0
# is 0.
FLOOR = tl.constexpr(-1e4)

# The largest |m| for which d has the factor log2 e (`reference_of`). There m log2 e is near 2^30.5, where neighbouring
# floats are 128 apart: rounding the product loses up to 64, and s is corrected by 2^64 at most, which is a float. For a
# larger |m| the correction would leave the range of float32, so the factor is smaller than log2 e. This does no harm:
# the logits themselves are 64 or more apart there, and every class but the largest has p < 2^-90 with either factor.
LARGEST = tl.constexpr(2.0**30)

# A factor of a product P belongs to 2^2 classes (`sums_of_h_and_u`).
LOG2_FACTOR = tl.constexpr(2)


# ---------------------------------------------------------------------------------------------------------------------
# The sum of exponentials


@triton.jit
def finite_maximum(m):
    """A finite number, of the shape of m, to subtract from logits whose maximum is m.

    It is 0 for m = -inf, where z - m would be NaN: a row or a group of nothing but -inf.
    """
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def reference_of(m, PTX: tl.constexpr):
    """(factor, product, lost), each of the shape of m: d is computed as z factor - product.

    This form is one instruction per class. factor is log2 e, or less for |m| above LARGEST. product is m factor,
    rounded. lost is m factor - product, the part that the rounding has lost: every d of the row is too large by it, so
    s is too large by the factor 2^lost. `constants_of` and `stats_of` (rows.py) take it out again.
    """
    m = finite_maximum(m)
    factor = tl.minimum(reciprocal(tl.abs(m) * (1 / (LARGEST * LOG2_E)), PTX), LOG2_E)
    product = m * factor
    return factor, product, fma(m, factor, -product)


@triton.jit
def columns(constants, tile):
    """The five constants of the rows, each as a column where the tile has several rows: see `column`."""
    factor, product, whole, rest, sc = constants
    whole, rest = column(whole, tile), column(rest, tile)
    return column(factor, tile), column(product, tile), whole, rest, column(sc, tile)


@triton.jit
def _exp(z, factor, product):
    """(d, e), each of the shape of z. d is finite also where z is -inf; NaN stays NaN."""
    d = tl.maximum(fma(z, factor, -product), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return d, exp2(d)


@triton.jit
def maximum_of(tiles, edge, VARIANT: tl.constexpr):
    """m, the largest logit of each row, from its tiles in registers and its edge.

    The maxima of groups are taken first, then the threads meet once.
    """
    m = tiles[0]
    for i in tl.static_range(1, num_alike(VARIANT.TILES)):
        m = tl.maximum(m, tiles[i])
    m = maximum_of_groups(m, VARIANT)
    for i in tl.static_range(num_alike(VARIANT.TILES), len(tiles)):
        m = tl.maximum(m, maximum_of_groups(tiles[i], VARIANT))
    if edge is not None:
        m = tl.maximum(m, edge)
    return largest_of_row(m)


@triton.jit
def sum_of_exps(tiles, edge, reference, VARIANT: tl.constexpr):
    """s, the sum of e over each row, from its tiles in registers and its edge."""
    factor, product = column(reference[0], tiles[0]), column(reference[1], tiles[0])
    alike = ()
    for i in tl.static_range(num_alike(VARIANT.TILES)):
        _, e = _exp(tiles[i], factor, product)
        alike = alike + (e,)
    exp_sum = sum_of_groups(sum_in_pairs(alike), VARIANT)
    for i in tl.static_range(num_alike(VARIANT.TILES), len(tiles)):
        _, e = _exp(tiles[i], factor, product)
        exp_sum += sum_of_groups(e, VARIANT)
    if edge is not None:
        _, e = _exp(edge, factor, product)
        exp_sum += e
    return sum_of_row(exp_sum)


@triton.jit
def _yz(z, wy, m):
    """w y (z - m), of the shape of z; 0 where w y is 0, also for z = -inf."""
    return tl.where(wy == 0, 0.0, wy * (z - m))


@triton.jit
def sums_of_y(z, wy, given, m, VARIANT: tl.constexpr):
    """(Σ w y, Σ w y (z - m), Σ w y before smoothing), each for every group of some tiles.

    The cross entropy needs the first two, the row's weight ω is the third. m is a scalar, or of a shape that meets a
    tile.
    """
    y_sum, yz_sum, omega = wy[0], _yz(z[0], wy[0], m), given[0]
    for i in tl.static_range(1, num_alike(VARIANT.TILES)):
        y_sum += wy[i]
        yz_sum += _yz(z[i], wy[i], m)
        omega += given[i]
    y_sum, yz_sum = sum_of_groups(y_sum, VARIANT), sum_of_groups(yz_sum, VARIANT)
    omega = sum_of_groups(omega, VARIANT)
    for i in tl.static_range(num_alike(VARIANT.TILES), len(z)):
        y_sum += sum_of_groups(wy[i], VARIANT)
        yz_sum += sum_of_groups(_yz(z[i], wy[i], m), VARIANT)
        omega += sum_of_groups(given[i], VARIANT)
    return y_sum, yz_sum, omega


@triton.jit
def lse_of_edge(z, wy, given, HAS_Y: tl.constexpr):
    """(m, s, Σ w y, Σ w y (z - m), Σ w y before smoothing) of an edge, each of the edge's shape.

    A walk begins with these five. Every element of an edge stands for a group of one class: m is the class's own logit,
    and s is 1. Where HAS_Y is not set nobody reads the last three: s stands in for them.
    """
    exp_sum = tl.where(z == -INF, 0.0, 1.0)
    if HAS_Y:
        return z, exp_sum, wy, _yz(z, wy, finite_maximum(z)), given
    else:
        return z, exp_sum, exp_sum, exp_sum, exp_sum


@triton.jit
def add_to_lse(lse, z, wy, given, HAS_Y: tl.constexpr, VARIANT: tl.constexpr):
    """The five values of `lse_of_edge` for every group, after some tiles more.

    A walk sees a tile at a time, so the maximum of a group may rise. Then the old s is multiplied by exp(old maximum -
    new maximum). Example: s = 3 at m = 5 becomes 3 exp(5 - 7) at m = 7.
    """
    m_old, exp_sum, y_sum, yz_sum, omega = lse
    largest = z[0]
    for i in tl.static_range(1, len(z)):
        largest = tl.maximum(largest, z[i])
    m = tl.maximum(m_old, maximum_of_groups(largest, VARIANT))
    finite = finite_maximum(m)
    m_tile = to_groups(finite, VARIANT)
    e = exp2((z[0] - m_tile) * LOG2_E)
    for i in tl.static_range(1, len(z)):
        e += exp2((z[i] - m_tile) * LOG2_E)
    exp_sum = exp_sum * exp2((m_old - finite) * LOG2_E) + sum_of_groups(e, VARIANT)
    if HAS_Y:
        more_y, more_yz, more_omega = sums_of_y(z, wy, given, m_tile, VARIANT)
        yz_sum += y_sum * (finite_maximum(m_old) - finite) + more_yz
        y_sum += more_y
        omega += more_omega
    return m, exp_sum, y_sum, yz_sum, omega


@triton.jit
def lse_of_groups(lse, reference, m, zero, HAS_Y: tl.constexpr):
    """The five values of `lse_of_edge` for each row, from those for its groups.

    Each group's s has its own maximum. It is brought to the row's reference, then the threads meet. `zero` is what
    stands in for the last three where HAS_Y is not set.
    """
    m_group, exp_sum, y_sum, yz_sum, omega = lse
    factor, product = column(reference[0], m_group), column(reference[1], m_group)
    # Not a plain product: fused with the first addition it would be rounded in one of two lanes, and their sums differ.
    exp_sum = sum_of_row(fma(exp_sum, exp2(fma(m_group, factor, -product)), 0.0))
    if HAS_Y:
        yz_sum += y_sum * (finite_maximum(m_group) - column(finite_maximum(m), m_group))
        return m, exp_sum, sum_of_row(y_sum), sum_of_row(yz_sum), sum_of_row(omega)
    else:
        return m, exp_sum, zero, zero, zero


# ---------------------------------------------------------------------------------------------------------------------
# The coin and its sums. The `constants` of a row are factor, product (`reference_of`), log2(s c) as whole + rest, and
# s c. In one number log2(s c) is rounded by up to 1e-6, and moves every t alike: where many u cancel, this does not.


@triton.jit
def coin(z, constants, PTX: tl.constexpr):
    """(e, t, μ, 1 - μ) of each class, each of the shape of z.

    1 - μ comes from a fused multiply-add: the product that makes μ is not rounded on the way.
    """
    factor, product, whole, rest, sc = constants
    d, e = _exp(z, factor, product)
    smaller, inverse_sum = tl.minimum(e, sc), reciprocal(e + sc, PTX)
    return e, (d - whole) - rest, smaller * inverse_sum, less_product(1.0, smaller, inverse_sum)


@triton.jit
def coin_h_and_u(z, constants, PTX: tl.constexpr):
    """(h, u) of each class, each of the shape of z, with one logarithm for every class."""
    _, t, mu, rest = coin(z, constants, PTX)
    v = t * mu
    return tl.abs(v) + minus_log2(rest, mu, PTX), less_product(v, v, mu)


@triton.jit
def _sums_in_factors(z, constants, VARIANT: tl.constexpr):
    """(|v|, u) of each class of a tile, and (M, 1 - M) for every four, or fewer, classes of a group."""
    _, t, mu, rest = coin(z, constants, VARIANT.PTX)
    v = t * mu
    u = less_product(v, v, mu)
    for level in tl.static_range(levels_of(z, VARIANT.GROUPS, LOG2_FACTOR)):
        a, b = halves(mu, level, VARIANT)
        mu = a + less_product(b, a, b)
        rest = 1.0 - mu
    return tl.abs(v), u, mu, rest


@triton.jit
def _product_of_groups(M, P, tile, VARIANT: tl.constexpr):
    """(M, P) of each group, from those of the tile's factors."""
    if len(tile.shape) == 3:
        return tl.reduce((M, P), 2, product_of_two)
    else:
        for level in tl.static_range(LOG2_FACTOR, levels_of(tile, VARIANT.GROUPS)):
            a, b = halves(M, level, VARIANT)
            P_a, P_b = halves(P, level, VARIANT)
            M, P = product_of_two(a, P_a, b, P_b)
        return M, P


@triton.jit
def sums_of_h_and_u(tiles, constants, VARIANT: tl.constexpr):
    """(Σ h, Σ u) in bits for every group of some tiles, with one logarithm for all classes of a group.

    A logarithm costs more than a product, and Σ log2(1 - μ) = log2 P for P = Π (1 - μ). M = 1 - P goes along, because P
    knows nothing of a small M: two classes with μ = 1e-9 have P = 1 and M = 2e-9. Two parts a and b of a product have M
    = a + b (1 - a). P is multiplied from factors 1 - M of four classes each, or of fewer in a narrow tile and
    where rows share a program. With eight classes in a factor, all at μ = 1/2, 1 - M = 2^-8 would have lost eight bits.
    """
    v_sum, u_sum, M, P = _sums_in_factors(tiles[0], constants, VARIANT)
    for i in tl.static_range(1, num_alike(VARIANT.TILES)):
        v, u, mu, _ = _sums_in_factors(tiles[i], constants, VARIANT)
        # The sums begin with the first tile and not with 0: an addition to 0 is an instruction too.
        v_sum, u_sum = v_sum + v, u_sum + u
        M, P = M + less_product(mu, M, mu), less_product(P, P, mu)
    M, P = _product_of_groups(M, P, tiles[0], VARIANT)
    v_sum, u_sum = sum_of_groups(v_sum, VARIANT), sum_of_groups(u_sum, VARIANT)
    for i in tl.static_range(num_alike(VARIANT.TILES), len(tiles)):
        v, u, mu, rest = _sums_in_factors(tiles[i], constants, VARIANT)
        v_sum, u_sum = v_sum + sum_of_groups(v, VARIANT), u_sum + sum_of_groups(u, VARIANT)
        if len(mu.shape) == 3 or levels_of(tiles[i], VARIANT.GROUPS) > LOG2_FACTOR:
            mu, rest = _product_of_groups(mu, rest, tiles[i], VARIANT)
            M, P = M + less_product(mu, M, mu), P * rest
        else:
            M, P = M + less_product(mu, M, mu), less_product(P, P, mu)
    return v_sum + minus_log2(P, M, VARIANT.PTX), u_sum


@triton.jit
def weighted_sums_of_h_and_u(z, y, constants, VARIANT: tl.constexpr):
    """(Σ (1 - y) h, Σ (1 - y) u) in bits for every group of some tiles.

    Every class has its own factor, so every class has its own logarithm.
    """
    h, u = coin_h_and_u(z[0], constants, VARIANT.PTX)
    h_sum, u_sum = (1.0 - y[0]) * h, (1.0 - y[0]) * u
    for i in tl.static_range(1, num_alike(VARIANT.TILES)):
        h, u = coin_h_and_u(z[i], constants, VARIANT.PTX)
        h_sum, u_sum = h_sum + (1.0 - y[i]) * h, u_sum + (1.0 - y[i]) * u
    h_sum, u_sum = sum_of_groups(h_sum, VARIANT), sum_of_groups(u_sum, VARIANT)
    for i in tl.static_range(num_alike(VARIANT.TILES), len(z)):
        h, u = coin_h_and_u(z[i], constants, VARIANT.PTX)
        h_sum += sum_of_groups((1.0 - y[i]) * h, VARIANT)
        u_sum += sum_of_groups((1.0 - y[i]) * u, VARIANT)
    return h_sum, u_sum


@triton.jit
def gradient_of(z, wy, constants, coef_e, coef_u, coef_y, softcap, HAS_Y: tl.constexpr, PTX: tl.constexpr):
    """coef_e e + coef_u u + coef_y w y, of the shape of z: the gradient of the row's loss at each class.

    With a softcap the chain rule adds a factor, 1 - (z / softcap)².
    """
    e, t, mu, _ = coin(z, constants, PTX)
    v = t * mu
    u = less_product(v, v, mu)
    gradient = coef_e * e + (fma(coef_u, u, coef_y * wy) if HAS_Y else coef_u * u)
    if softcap is not None:
        ratio = z * (1.0 / value_of(softcap))
        gradient *= tl.where(z == -INF, 0.0, less_product(1.0, ratio, ratio))  # z is -inf only where nothing is read
    return gradient
