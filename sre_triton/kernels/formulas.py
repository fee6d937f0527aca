"""The mathematics of tiles, classes in registers: each formula once, for all kernels.

Logarithms have the base 2, as the hardware's have: d, t, h and u are those of compiled/formulas.py, divided by log 2.

    d = (z - m) log2 e          m the row's maximum; in one multiplication and addition, with m log2 e rounded before
    e = 2^d                     p = e / s, s the sum of e over the row
    t = d - log2(s c)           = log2(p / c)
    μ = min(e, s c) / (e + s c) the smaller of the coin's two probabilities
    h = |t| μ - log2(1 - μ)     the coin's entropy, in bits
    u = t μ (1 - μ)

A tile of one row is a vector, (BLOCK_K,), and what belongs to the row a scalar. A tile of more rows is a matrix,
(ROWS, BLOCK_K), and what belongs to the rows a vector, (ROWS,), which meets the tile as a column. What a row's tiles
add up to is kept per group of eight classes of a tile, and a thread has whole groups: until a row is at its end, no
thread waits for another.
"""

import triton
import triton.language as tl

from .groups import (
    INTERPRETED,
    LOG2_GROUP,
    column,
    halves,
    largest_of_row,
    maximum_of_groups,
    sum_of_groups,
    sum_of_row,
    to_groups,
)

# A constexpr stands on the right: on the left of a tensor, the interpreter would make a constexpr of the result.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# 2^FLOOR is 0. It stands in for -inf, so that t is finite where it is multiplied by 0.
FLOOR = tl.constexpr(-1e4)

# Where m is larger, m log2 e may be rounded by more than 2 has exponents. Neighbouring floats are more than 64 apart
# there: with a smaller factor than log2 e, all but the largest logits still have probabilities below 2^-90.
LARGEST = tl.constexpr(2.0**30)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of a number. PTX says whether NVIDIA's instructions are there; the interpreter and AMD take Triton's own.


@triton.jit
def fma(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def less_product(x, y, z):
    """x - y z, rounded once on a GPU.

    Said in one word, as the LLVM of Triton 3.8 cannot compile the words for Blackwell, which has instructions for two
    numbers at once: where it sees only late, after a shuffle of such pairs, that a product is subtracted, it makes a
    negation of a pair, and ends the process.
    """
    if INTERPRETED:
        return x - y * z
    else:
        return tl.fma(y * -1.0, z, x)  # Triton 3.6 and 3.7 take -y for 0 - y, which is an instruction


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """To 2^-23 of itself."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _exp2(x):
    """To 2^-22 of itself."""
    return tl.exp2(x)


@triton.jit
def _log2(x, PTX: tl.constexpr):
    """To 2^-22, of itself or absolutely."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _minus_log2(P, M, PTX: tl.constexpr):
    """-log2 P for P = 1 - M; where P would lose digits of M, by a polynomial in M.

    That is M q(M), q fitted to -log2(1 - M) / M at Chebyshev nodes, and right to 1.4e-8.
    """
    near = M * (1.44269502 + M * (0.721357346 + M * (0.479925036 + M * 0.391268671)))
    return tl.where(M < 0.05, near, -_log2(P, PTX))


@triton.jit
def _tanh(v):
    """To 2e-7 of itself. Near 0 it is v + v³ q(v²), q fitted to (tanh(v)/v - 1)/v² at Chebyshev nodes in v²."""
    w = v * v
    near = v + v * w * (-0.333333116 + w * (0.133305137 + w * (-0.0533910541 + w * 0.0179992182)))
    e = tl.exp2(tl.abs(v) * (-2 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.5, near, tl.where(v < 0, -far, far))


@triton.jit
def exp2_near_0(x):
    """2^x, where it is near 1 to the last digit: the instruction is right to 2^-22 only."""
    y = x * LN_2
    return tl.where(tl.abs(x) < 0.001, 1.0 + (y + 0.5 * y * y), _exp2(x))


@triton.jit
def log2_parts(x, PTX: tl.constexpr):
    """(whole, rest) with log2 x = whole + rest and 0 <= rest < 1, for x >= 1e-37 or NaN."""
    bits = x.to(tl.int32, bitcast=True)
    whole = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return whole, _log2(mantissa, PTX) + x * 0.0  # NaN stays NaN


@triton.jit
def value_of(option):
    """A scalar option that is in use: a number, or what lies on the GPU where it points to."""
    if isinstance(option, float):  # in the interpreter
        return option
    elif option.dtype.is_ptr():
        return tl.load(option).to(tl.float32)
    else:
        return option


@triton.jit
def load_logits(pointers, mask, softcap):
    """z in float32, -inf outside the mask."""
    z = (tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=-INF)).to(tl.float32)
    if softcap is not None:
        softcap = value_of(softcap)
        z = fma(_tanh(z * (1.0 / softcap)), softcap, 0.0)  # no product: something is subtracted from it
        if mask is not None:
            z = tl.where(mask, z, -INF)
    return z


# ---------------------------------------------------------------------------------------------------------------------
# The sum of exponentials


@triton.jit
def finite_maximum(m):
    """What to subtract from logits whose maximum is m, which may be -inf."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def reference_of(m, PTX: tl.constexpr):
    """The factor log2 e, m log2 e rounded, and what the rounding lost: d is too large by that."""
    m = finite_maximum(m)
    factor = tl.minimum(reciprocal(tl.abs(m) * (1 / (LARGEST * LOG2_E)), PTX), LOG2_E)
    product = m * factor
    return factor, product, fma(m, factor, -product)


@triton.jit
def columns(constants, tile):
    """The numbers of the rows, to meet a tile of them."""
    factor, product, off, sc = constants
    return column(factor, tile), column(product, tile), column(off, tile), column(sc, tile)


@triton.jit
def _exp(z, factor, product):
    """d and e, d finite also where z is -inf; NaN stays NaN."""
    d = tl.maximum(fma(z, factor, -product), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return d, _exp2(d)


@triton.jit
def maximum_of(tiles, edge, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """The maximum of rows that are held as tiles."""
    m = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        m = tl.maximum(m, tiles[i])
    m = maximum_of_groups(m, ADJACENT, CTAS)
    if edge is not None:
        m = tl.maximum(m, edge)
    return largest_of_row(m)


@triton.jit
def sum_of_exps(tiles, edge, reference, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """Of rows that are held as tiles."""
    factor, product = column(reference[0], tiles[0]), column(reference[1], tiles[0])
    _, exp_sum = _exp(tiles[0], factor, product)
    for i in tl.static_range(1, len(tiles)):
        _, e = _exp(tiles[i], factor, product)
        exp_sum += e
    exp_sum = sum_of_groups(exp_sum, ADJACENT, CTAS)
    if edge is not None:
        _, e = _exp(edge, factor, product)
        exp_sum += e
    return sum_of_row(exp_sum)


@triton.jit
def _yz(z, wy, m):
    return tl.where(wy == 0, 0.0, wy * (z - m))


@triton.jit
def sums_of_y(z, wy, given, m, ADJACENT: tl.constexpr, CTAS: tl.constexpr):
    """Σ w y, Σ w y (z - m), and Σ w y before smoothing, of the groups; m is a number or a tile."""
    y_sum, yz_sum, omega = wy[0], _yz(z[0], wy[0], m), given[0]
    for i in tl.static_range(1, len(z)):
        y_sum += wy[i]
        yz_sum += _yz(z[i], wy[i], m)
        omega += given[i]
    y_sum, yz_sum = sum_of_groups(y_sum, ADJACENT, CTAS), sum_of_groups(yz_sum, ADJACENT, CTAS)
    return y_sum, yz_sum, sum_of_groups(omega, ADJACENT, CTAS)


@triton.jit
def lse_of_edge(z, wy, given, HAS_Y: tl.constexpr):
    """m, s, Σ w y, Σ w y (z - m), and Σ w y before smoothing, of groups of one class."""
    exp_sum = tl.where(z == -INF, 0.0, 1.0)
    if HAS_Y:
        return z, exp_sum, wy, _yz(z, wy, finite_maximum(z)), given
    else:
        return z, exp_sum, exp_sum, exp_sum, exp_sum


@triton.jit
def add_to_lse(lse, z, wy, given, HAS_Y: tl.constexpr, ADJACENT: tl.constexpr):
    """The same of the groups, with some tiles more."""
    m_old, exp_sum, y_sum, yz_sum, omega = lse
    largest = z[0]
    for i in tl.static_range(1, len(z)):
        largest = tl.maximum(largest, z[i])
    m = tl.maximum(m_old, maximum_of_groups(largest, ADJACENT, 1))
    finite = finite_maximum(m)
    m_tile = to_groups(finite, ADJACENT)
    e = _exp2((z[0] - m_tile) * LOG2_E)
    for i in tl.static_range(1, len(z)):
        e += _exp2((z[i] - m_tile) * LOG2_E)
    exp_sum = exp_sum * _exp2((m_old - finite) * LOG2_E) + sum_of_groups(e, ADJACENT, 1)
    if HAS_Y:
        more_y, more_yz, more_omega = sums_of_y(z, wy, given, m_tile, ADJACENT, 1)
        yz_sum += y_sum * (finite_maximum(m_old) - finite) + more_yz
        y_sum += more_y
        omega += more_omega
    return m, exp_sum, y_sum, yz_sum, omega


@triton.jit
def lse_of_row(lse, reference, m, zero, HAS_Y: tl.constexpr):
    """The same of rows, from their groups; s relative to the reference."""
    m_group, exp_sum, y_sum, yz_sum, omega = lse
    factor, product = column(reference[0], m_group), column(reference[1], m_group)
    exp_sum = sum_of_row(exp_sum * _exp2(fma(m_group, factor, -product)))
    if HAS_Y:
        yz_sum += y_sum * (finite_maximum(m_group) - column(finite_maximum(m), m_group))
        return m, exp_sum, sum_of_row(y_sum), sum_of_row(yz_sum), sum_of_row(omega)
    else:
        return m, exp_sum, zero, zero, zero


# ---------------------------------------------------------------------------------------------------------------------
# What follows from it. A row's `numbers` are the factor and product of its reference, log2(s c), and s c.


@triton.jit
def _coin(z, constants, PTX: tl.constexpr):
    """e, t, μ and 1 - μ."""
    factor, product, off, sc = constants
    d, e = _exp(z, factor, product)
    smaller, of_sum = tl.minimum(e, sc), reciprocal(e + sc, PTX)
    return e, d - off, smaller * of_sum, less_product(1.0, smaller, of_sum)


@triton.jit
def coin_h_and_u(z, constants, PTX: tl.constexpr):
    """h and u, with a logarithm for every class."""
    _, t, mu, rest = _coin(z, constants, PTX)
    v = t * mu
    return tl.abs(v) + _minus_log2(rest, mu, PTX), less_product(v, v, mu)


@triton.jit
def sums_of_h_and_u(tiles, constants, ADJACENT: tl.constexpr, CTAS: tl.constexpr, PTX: tl.constexpr):
    """Of the groups of some tiles, with one logarithm for all classes of a group.

    P = Π (1 - μ) and M = 1 - P are kept apart, as P knows nothing of small M. Four classes go into M at a time: with
    eight, where all μ are 1/2, 1 - M would lose eight bits.
    """
    for i in tl.static_range(len(tiles)):
        _, t, mu, _ = _coin(tiles[i], constants, PTX)
        v = t * mu
        u = less_product(v, v, mu)
        # Not from 0 on: adding to that takes an instruction as well.
        if i == 0:
            v_sum, u_sum = tl.abs(v), u
        else:
            v_sum, u_sum = v_sum + tl.abs(v), u_sum + u
        for level in tl.static_range(LOG2_GROUP - 1):
            a, b = halves(mu, level, ADJACENT, CTAS)
            mu = a + less_product(b, a, b)
        if i == 0:
            M, P = mu, 1.0 - mu
        else:
            M, P = M + less_product(mu, M, mu), less_product(P, P, mu)
    a, b = halves(M, LOG2_GROUP - 1, ADJACENT, CTAS)
    P_a, P_b = halves(P, LOG2_GROUP - 1, ADJACENT, CTAS)
    logarithms = _minus_log2(P_a * P_b, a + less_product(b, a, b), PTX)
    return sum_of_groups(v_sum, ADJACENT, CTAS) + logarithms, sum_of_groups(u_sum, ADJACENT, CTAS)


@triton.jit
def weighted_sums_of_h_and_u(z, y, constants, ADJACENT: tl.constexpr, CTAS: tl.constexpr, PTX: tl.constexpr):
    """Of (1 - y) h and (1 - y) u, with a logarithm for every class."""
    h, u = coin_h_and_u(z[0], constants, PTX)
    h_sum, u_sum = (1.0 - y[0]) * h, (1.0 - y[0]) * u
    for i in tl.static_range(1, len(z)):
        h, u = coin_h_and_u(z[i], constants, PTX)
        h_sum, u_sum = h_sum + (1.0 - y[i]) * h, u_sum + (1.0 - y[i]) * u
    return sum_of_groups(h_sum, ADJACENT, CTAS), sum_of_groups(u_sum, ADJACENT, CTAS)


@triton.jit
def gradient_of(z, wy, constants, coef_e, coef_u, coef_y, softcap, HAS_Y: tl.constexpr, PTX: tl.constexpr):
    """coef_e e + coef_u u + coef_y w y."""
    e, t, mu, _ = _coin(z, constants, PTX)
    v = t * mu
    u = less_product(v, v, mu)
    gradient = coef_e * e + (fma(coef_u, u, coef_y * wy) if HAS_Y else coef_u * u)
    if softcap is not None:
        ratio = z * (1.0 / value_of(softcap))
        gradient *= tl.where(z == -INF, 0.0, less_product(1.0, ratio, ratio))  # -inf only where nothing is read
    return gradient
